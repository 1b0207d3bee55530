"""The text of a Modelfile, and the parameters of a model in Ollama.

Sources: Ollama's `parser/parser.go` (the grammar) and `api/types.go` (parameters).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from gemma_tune.base.errors import UserError
from gemma_tune.ollama.go_text import lossy_runes
from gemma_tune.ollama.template import OllamaChat

# In the order in which they are written. Ollama: "unknown parameter 'x'" for any other.
PARAMETERS: dict[str, type] = {
    "num_ctx": int, "temperature": float, "top_k": int, "top_p": float, "min_p": float, "repeat_penalty": float,
    "seed": int, "num_predict": int, "repeat_last_n": int, "presence_penalty": float, "frequency_penalty": float,
    "num_keep": int, "num_batch": int, "num_gpu": int, "main_gpu": int, "num_thread": int, "use_mmap": bool,
    "stop": list,
}  # fmt: skip


def merged_parameters(chat: OllamaChat, parameters: Mapping[str, object]) -> dict[str, object]:
    """The parameters to store: the caller's and the template's stops, in the fixed order.

    Raises:
        UserError: unknown names and wrong types, all of them together.
    """
    problems = []
    for name, value in parameters.items():
        if name not in PARAMETERS:
            problems.append(f"{name}: Ollama has no such model parameter")
        elif not _fits(PARAMETERS[name], value):
            problems.append(f"{name}: {value!r} is not {TYPE_NAMES[PARAMETERS[name]]}")
    if problems:
        raise UserError("these parameters cannot be given to Ollama", f"Known: {', '.join(PARAMETERS)}.", problems)
    stops = parameters.get("stop", [])
    stops = dict.fromkeys([*chat.stops, *([stops] if isinstance(stops, str) else stops)])  # once each, in order
    values = {name: parameters[name] for name in PARAMETERS if name in parameters and name != "stop"}
    return values | ({"stop": list(stops)} if stops else {})


TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", list: "a text or a list of texts"}


def _fits(kind: type, value: object) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is list:
        texts = [value] if isinstance(value, str) else value
        return isinstance(texts, list) and all(isinstance(t, str) and t for t in texts)
    if kind is int:
        return isinstance(value, int) and abs(value) < 2**63
    return isinstance(value, (int, float)) and math.isfinite(value)


def system_text(chat: OllamaChat, system: str | None) -> str | None:
    """What belongs in SYSTEM: the caller's text, else the template's own; line breaks as `\\n` on every route."""
    return unix_lines(system if system is not None else chat.default_system or "") or None


def unix_lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def render_modelfile(
    gguf_name: str,
    chat: OllamaChat,
    *,
    parameters: Mapping[str, object],
    system: str | None,
    license_text: str | None,
    comment_lines: Sequence[str] = (),
    projector_name: str | None = None,
) -> str:
    """The text of a Modelfile that stands beside its GGUF file, and the one with which the model sees.

    Ask `lossy_runes` about `system` and `license_text` first: what it lists is lost on this route.

    Raises:
        UserError: a parameter, the file name or a text that a Modelfile cannot hold.
    """
    names = [gguf_name, *([projector_name] if projector_name else [])]
    for name in names:
        if not re.fullmatch(r"[^/\\:\s]([^/\\:\r\n]*[^/\\:\s])?", name) or lossy_runes(name):
            raise UserError(f"{name!r} cannot stand in FROM", "Use a plain file name without / \\ : or line breaks.")
    lines = [f"# {line}".rstrip() for text in comment_lines for line in re.split(r"[\r\n]+", text)]
    lines += [f"FROM ./{name}" for name in names]
    texts = {"TEMPLATE": chat.template, "SYSTEM": system_text(chat, system), "LICENSE": unix_lines(license_text or "")}
    if chat.template is not None:
        lines.append(f"TEMPLATE {_quoted('TEMPLATE', chat.template)}")
    lines += [f"{name} {value}" for name, value in (("RENDERER", chat.renderer), ("PARSER", chat.parser)) if value]
    for name, value in merged_parameters(chat, parameters).items():
        for single in value if isinstance(value, list) else [value]:
            text = _quoted("a stop", single) if isinstance(single, str) else str(single).lower()
            lines.append(f"PARAMETER {name} {text}")
    lines += [f"{name} {_quoted(name, text)}" for name in ("SYSTEM", "LICENSE") if (text := texts[name])]
    return "\n".join(lines) + "\n"


def _quoted(what: str, text: str) -> str:
    """In three quotes. There are no escapes, so the first line that ends in three quotes ends the value."""
    if re.search(r'"""[^\S\n]*\n', text.translate(dict.fromkeys(map(ord, lossy_runes(text))))):
        raise UserError(
            f'{what} has a line that ends in """, where a Modelfile would cut it off',
            "Write the three quotes differently, or put a character after them.",
        )
    return f'"""{text}"""'
