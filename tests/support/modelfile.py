"""Modelfiles read as Ollama does, to check that what was written comes back."""

from __future__ import annotations

import re

from gemma_tune.base.errors import UserError
from gemma_tune.ollama.go_text import lossy_runes
from gemma_tune.ollama.modelfile import PARAMETERS, unix_lines


def parse_modelfile(text: str) -> dict:
    """Reads a Modelfile as Ollama does, to check that what was written comes back.

    Returns:
        `from`, and `beside` with the files of further FROM lines; `template`, `system`, `renderer`, `parser`, ... (the last
        one wins); `license` and `message` (lists);
        `parameters` (numbers converted; `stop` is a list).

    Raises:
        UserError: Ollama would refuse it, with the line.
    """
    found: dict = {"parameters": {}}
    lines = list(enumerate(unix_lines(text).split("\n"), start=1))[::-1]
    while lines:
        number, line = lines.pop()
        if not line.strip(" \t") or line.lstrip(" \t").startswith("#"):
            continue
        key, word, value = _instruction(line.lstrip(" \t"), number)
        while (whole := _unquoted(value)) is None:
            if not lines:
                raise UserError(f"line {number} of the Modelfile opens a quotation that never ends")
            value += "\n" + lines.pop()[1]
        _store(found, key, word, whole)
    if "from" not in found:
        raise UserError("the Modelfile has no FROM line")
    return found


def _instruction(line: str, number: int) -> tuple[str, str, str]:
    """(instruction, name of a parameter or role of a message, start of the value)."""
    match = re.fullmatch(r"([A-Za-z]+)[ \t](.*)", line)
    if not match or match[1].lower() not in _INSTRUCTIONS:
        raise UserError(f"line {number} of the Modelfile has no instruction that Ollama knows: {line[:40]!r}")
    key, value = match[1].lower(), match[2]
    if key not in ("parameter", "message"):
        return key, "", value
    match = re.fullmatch(r"([A-Za-z0-9_]+)[ \t](.*)", value)
    if not match or (key == "parameter" and match[1] not in PARAMETERS):
        raise UserError(f"line {number} of the Modelfile is incomplete, or Ollama has no such parameter: {line[:40]!r}")
    return key, match[1], match[2]


_INSTRUCTIONS = (
    "from", "license", "template", "system", "adapter", "draft", "renderer", "parser", "parameter", "message",
    "requires",
)  # fmt: skip


def _unquoted(value: str) -> str | None:
    """The value without its quotes, or None while it is not complete."""
    lost = lossy_runes(value)
    value = "".join(c for c in value if c not in lost).strip()
    for quotes in ('"""', '"'):
        if value.startswith(quotes):
            closed = len(value) >= 2 * len(quotes) and value.endswith(quotes)
            return value[len(quotes) : -len(quotes)] if closed else None
    return value


def _store(found: dict, key: str, word: str, value: str) -> None:
    if key == "parameter":
        kind = PARAMETERS[word]
        if kind is list:
            found["parameters"].setdefault(word, []).append(value)
        else:
            found["parameters"][word] = value == "true" if kind is bool else kind(value)
    elif key in ("license", "message"):
        found.setdefault(key, []).append(value if key == "license" else {"role": word, "content": value})
    elif key == "from" and key in found:
        found.setdefault("beside", []).append(value)
    else:
        found[key] = value
