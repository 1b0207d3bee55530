"""What Ollama is to be told about an exported model: name, template, parameters, system prompt and licence."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tune.answers.prompts import prepared_rows
from gemma_tune.answers.sampling import arguments_of
from gemma_tune.base.checkpoint import context_length, generation_settings, read_config
from gemma_tune.base.errors import UserError
from gemma_tune.base.words import near
from gemma_tune.ollama import client as ollama
from gemma_tune.ollama.modelfile import PARAMETERS, TYPE_NAMES
from gemma_tune.ollama.template import OllamaChat, about_tools, layout_of

if TYPE_CHECKING:
    from gemma_tune.encoding.chat_format import ChatFormat
    from gemma_tune.models.source import BaseModel
    from gemma_tune.run.session import Session

# Ollama's own default of 4096 tokens or fewer would cut conversations that were trained whole.
LEAST_CONTEXT = 4096


@dataclass(frozen=True)
class Target:
    """What Ollama is to be told about the model.

    Args:
        system: for SYSTEM; None leaves the template's own default there, an empty text puts none.
        notes: where a setting comes from that nobody gave, one sentence each.
    """

    name: str
    chat: OllamaChat
    parameters: dict[str, Any]
    system: str | None
    license: str | None
    notes: tuple[str, ...] = ()


def target_for(session: Session, merged: Path, chat: ChatFormat, context: int | None) -> Target:
    """Everything that Ollama is told, from the settings, the data, the merged model and its base.

    Args:
        context: tokens up to which llama.cpp computes the same as transformers, where it does not always.

    Raises:
        UserError: a parameter that Ollama does not take, or a template that cannot be reproduced there.
    """

    config, settings = read_config(merged), session.config
    laid_out = layout_of(chat, config.get("model_type"))
    prepared = session.manifest.stages.get("prepare", {"summary": {}})["summary"]
    if told := about_tools(laid_out, prepared.get("tool_rows", 0)):
        laid_out = replace(laid_out, notes=(*laid_out.notes, told))
    system, notes = settings.system, ()
    if system is None and (system := constant_system(session.run.train_rows, session.run.valid_rows)) is not None:
        notes = (f"every conversation of the data has the system prompt {shortened(system)}: it becomes SYSTEM",)
    parameters = {"num_ctx": _context(session, config, context),
                  **with_sampling(merged, _own_parameters(settings))}
    return Target(settings.name or ollama.default_model_name(session.model.name), laid_out, parameters, system,
                  licence_text(merged, session.model), notes)


def shortened(text: str, length: int = 60) -> str:
    """A system prompt in a message: quoted, on one line, with … where it goes on."""
    line = " ".join(text.split())
    return repr(line if len(line) <= length else line[:length - 1] + "…")


# --- parameters -----------------------------------------------------------------------------------------------------


def _context(session: Session, config: Mapping[str, Any], known: int | None) -> int:
    room = known or context_length(config) or LEAST_CONTEXT
    # A shorter one than the model's own: it may slide a window, or divide frequencies otherwise behind it.
    limit = f"{room:,} tokens that " + ("llama.cpp computes as in training" if known else "the model was made for")
    if (longest := _longest_in_training(session)) > room:
        session.listener.warn(f"rows of up to {longest:,} tokens were learned, and the context here is the {limit}")
    if (asked := session.config.num_ctx) is not None and asked > room:
        session.listener.warn(f"--num-ctx {asked:,} is more than the {limit}: what it says behind them can be worth "
                              "nothing")
    return asked or min(max(LEAST_CONTEXT, longest), room)


def _longest_in_training(session: Session) -> int:
    """The tokens of training's longest sequence; 0 where the manifest does not tell."""
    return session.manifest.stages.get("prepare", {"summary": {}})["summary"].get("longest", 0)


def with_sampling(checkpoint: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that were given to Ollama, and the model's own sampling settings, by Ollama's names for them.

    All of them are said, as Ollama has other defaults than transformers: a model without any answers greedily there,
    here with temperature 0.8 and, before its version of August 2026, a penalty of 1.1 on what the last 64 tokens hold.
    A model that is greedy by itself samples with what is given, completed as `chat` does.
    """
    own = arguments_of(generation_settings(checkpoint), given)
    penalty = own.get("repetition_penalty", 1.0)
    drawn = {name: own[name] for name in ("temperature", "top_k", "top_p", "min_p") if name in own}
    if not own["do_sample"]:
        drawn = {"temperature": 0.0}
    # Transformers looks at everything that was said.
    return {**drawn, "repeat_penalty": penalty, **({"repeat_last_n": -1} if penalty != 1 else {}), **given}


def _own_parameters(settings: Any) -> dict[str, Any]:
    own = parse_parameters(settings.parameter)
    if settings.num_ctx is not None and own.get("num_ctx", settings.num_ctx) != settings.num_ctx:
        raise UserError(f"--num-ctx {settings.num_ctx} and --parameter num_ctx={own['num_ctx']} contradict each other",
                        "leave one of them out")
    return own


def parse_parameters(texts: Sequence[str]) -> dict[str, Any]:
    """Texts such as ``temperature=0.3`` as Ollama's parameters, with their types; several ``stop`` add up to a list.

    Raises:
        UserError: no such parameter, a value of another type, one given twice; all of them together.
    """
    values: dict[str, Any] = {}
    problems = []
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip()
        try:
            if not equals:
                raise ValueError("expected NAME=VALUE")
            if name == "typical_p":
                raise ValueError("Ollama 0.34.1 and later refuse it for a model; send it with requests instead")
            if name not in PARAMETERS:
                raise ValueError(f"Ollama has no such model parameter{near(name, PARAMETERS)}")
            read = _converted(PARAMETERS[name], value)
            if name != "stop" and values.get(name, read) != read:
                raise ValueError("given twice, with different values")
            values[name] = [*values.get("stop", []), read] if name == "stop" else read
        except ValueError as problem:
            problems.append(f"{text}: {problem}")
    if problems:
        raise UserError("these parameters cannot be given to Ollama", f"Known: {', '.join(PARAMETERS)}.", problems)
    return values


_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def _converted(kind: type, text: str) -> Any:
    """A parameter's value; of ``stop`` a single text, white space and all.

    Raises:
        ValueError: the text is of another type.
    """
    bare = text.strip()
    if kind is list and text:
        return text
    if kind is bool and bare.lower() in ("true", "false"):
        return bare.lower() == "true"
    if kind is int and re.fullmatch(r"[+-]?[0-9]{1,18}", bare):
        return int(bare)
    if kind is float and _NUMBER.fullmatch(bare) and math.isfinite(float(bare)):
        return float(bare)
    raise ValueError(f"expected {TYPE_NAMES[kind]}")


# --- system prompt and licence --------------------------------------------------------------------------------------


def constant_system(*files: Path) -> str | None:
    """The system prompt that every conversation in these files of prepared rows opens with.

    White space around it does not count; that of the first is kept. None if one has another or has none, or there is no
    conversation; plain texts are none. Reads line by line: the files can be larger than memory. One that is missing has
    no rows.

    Raises:
        UserError: a line that ``prepare`` did not write so.
    """
    found: str | None = None
    for system in _systems(path for path in files if path.exists()):
        if not system or (found is not None and system.strip() != found.strip()):
            return None
        found = found or system
    return found


def _systems(files: Iterable[Path]) -> Iterator[str | None]:
    for path in files:
        for found in prepared_rows(path, _systems_of):
            yield from found


def _systems_of(row: Mapping[str, Any]) -> list[str | None]:
    """The system prompt of a row, None where a conversation has none; of a plain text, nothing."""
    if "text" in row:
        return []
    first = next(iter(row.get("messages") or ()), {})
    content = first.get("content") if first.get("role") == "system" else None
    return [content if isinstance(content, str) else None]


def licence_text(merged: Path, base: BaseModel) -> str | None:
    """The licence of the model: the file in the merged model's directory, else name and address of the base's."""
    from gemma_tune.models.licence import base_licence

    names = re.compile(r"(licen[sc]e|copying)([.-].*)?", re.IGNORECASE)
    for path in sorted(p for p in merged.iterdir() if names.fullmatch(p.name) and p.is_file()):
        return path.read_text(encoding="utf-8", errors="replace")
    stated = base_licence(base)
    if not stated:
        return None
    name, link = _LICENCES.get(stated["license"], (stated.get("license_name") or stated["license"], ""))
    return ": ".join(filter(None, (name, stated.get("license_link") or link))) + "\n"


# What the licences of common base models are called, and where their texts are.
_LICENCES = {
    "gemma": ("Gemma Terms of Use", "https://ai.google.dev/gemma/terms"),
    "apache-2.0": ("Apache License 2.0", "https://www.apache.org/licenses/LICENSE-2.0"),
    "mit": ("MIT License", "https://opensource.org/license/mit"),
}
