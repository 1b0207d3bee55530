"""``--config`` files: read with all that is wrong told together, and written, each value with where it came from. No
heavy import."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_tune.base.errors import UserError
from gemma_tune.base.words import counted, full_width, near, shortened, shown, visible
from gemma_tune.config.habits import meant_in_file
from gemma_tune.config.settings import no_name, plain, problem_of, taken, types_of
from gemma_tune.config.stages import CONFIGS
from gemma_tune.config.yaml_file import ESCAPES, read_yaml

# What an origin is called in a file and in a note; see ``settings.Resolved``.
ORIGINS = {"flag": "given", "file": "of a settings file", "family": "default of the model's family",
           "default": "default", "auto": "chosen here", "adapter": "of the adapter that it starts from",
           "method": "suits the method", "data": "suits the data"}
TEXTS = ("model", "revision", "run")  # what a YAML file holds beside the stages
_AN_ADAPTER = "an adapter is what is trained here, and with `qlora: true` below `train:` in 4 bits"
# As Axolotl names them, where the setting here is a directory; all weights are trained where it is left empty.
_KINDS_OF_ADAPTERS = {"lora": _AN_ADAPTER, "qlora": _AN_ADAPTER, "": "all weights are trained with `full: true` below "
                                                                     "`train:`, and an adapter without"}
_LONGEST_NAME = 60  # characters of a name that nobody knows, in a message
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")  # what "C:\temp\new" holds in YAML's double quotes


def settings_file(section: str, values: Mapping[str, Any], sources: Mapping[str, str], about: Sequence[str]) -> str:
    """The text of a file that ``--config`` reads back to the same values.

    Args:
        section: which stage's they are.
        values: by name; texts, numbers, lists of them, true and false, and None for a setting that is left open.
        sources: what the comment on each says of it; a setting that is not in it has none.
        about: lines of the comment at the top.
    """
    lines = [f"# {_one_line(line)}".rstrip() for line in about]
    entries = {name: _entry(name, plain(value)) for name, value in values.items()}
    widest = max(map(len, entries.values()), default=0)
    for name, entry in entries.items():
        source = _one_line(sources.get(name, ""))
        lines.append(f"  {entry:<{widest}}  # {source}" if source else f"  {entry}")
    lines.insert(len(about), f"{section}:")
    return "\n".join(lines) + "\n"


def _entry(name: str, value: Any) -> str:
    import yaml

    style = {"allow_unicode": True, "width": float("inf")}
    if isinstance(value, list):
        text = f"{name}: {yaml.safe_dump(value, default_flow_style=True, **style)}".rstrip("\n")
    else:
        text = yaml.safe_dump({name: value}, **style).rstrip("\n")
    return f"{name}: {json.dumps(value)}" if "\n" in text else text


def _one_line(text: str) -> str:
    """What others wrote, such as a model's name, in a comment that does not end before its line does."""
    return visible(" ".join(text.splitlines()))


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a ``--config`` file: ``model``, ``revision``, ``run`` and one mapping per stage.

    Raises:
        UserError: unreadable file, broken YAML or a key that is there twice (with its line), unknown keys or wrong
            types, all together.
    """
    content = read_yaml(path)
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected sections such as `train:`, found {shown(content)}"
                        f"{full_width(content) if isinstance(content, str) else ''}",
                        "write `train:` and its settings indented below it")
    _words_for_true_and_false(content)
    problems = list(_yaml_problems(content))
    if problems:
        raise UserError(f"{path}: {counted(len(problems), 'setting')} cannot be used",
                        f"sections: {', '.join([*TEXTS, *CONFIGS])}", problems)
    return content


def _words_for_true_and_false(content: Mapping[Any, Any]) -> None:
    """Give settings that are `on` or `off` these words back: without quotes YAML takes them for true and false."""
    for key, cls in CONFIGS.items():
        section = content.get(key)
        for f in dataclasses.fields(cls) if isinstance(section, dict) else ():
            if {"on", "off"} <= {*(f.metadata.get("choices") or ())} and isinstance(section.get(f.name), bool):
                section[f.name] = "on" if section[f.name] else "off"


def _yaml_problems(content: Mapping[str, Any]) -> Iterator[str]:
    for key, section in content.items():
        if key in TEXTS:
            if not isinstance(section, str):
                yield f"{key}: expected text, found {shown(section)}"
            elif problem := no_name(section):
                yield f"{key}: {problem}"
            elif _CONTROL.search(section):
                yield f"{key}: {shown(section)} holds a control character; {ESCAPES}"
        elif key not in CONFIGS:
            above = [f"`{name}:`" for name, cls in CONFIGS.items() if str(key) in types_of(cls)]
            habit = meant_in_file(str(key))
            if key == "adapter" and (kind := str(section or "").lower()) in _KINDS_OF_ADAPTERS:
                above, habit = [], _KINDS_OF_ADAPTERS[kind]
            called = shortened(str(key), _LONGEST_NAME)
            yield (f"{called}: it belongs below {' or '.join(above)}, indented" if above else
                   f"{called}: unknown section; {habit}" if habit else
                   f"{called}: unknown section{full_width(str(key)) or near(str(key), [*TEXTS, *CONFIGS])}")
        elif section is None:  # all its settings are commented out
            continue
        elif not isinstance(section, dict):
            yield (f"{key}: expected settings below it, found {shown(section)}"
                   f"{full_width(section) if isinstance(section, str) else ''}")
        else:
            known, kinds = {f.name: f for f in dataclasses.fields(CONFIGS[key])}, types_of(CONFIGS[key])
            for name, value in section.items():
                if name not in known:
                    habit = None if str(name).replace("-", "_") in known else meant_in_file(str(name))
                    yield f"{key}.{shortened(str(name), _LONGEST_NAME)}: unknown setting" + (
                        f"; {habit}" if habit else full_width(str(name)) or near(str(name), known))
                elif (problem := problem_of(known[name], kinds[name], taken(known[name], kinds[name], value))):
                    yield f"{key}.{problem}"
                elif not known[name].metadata.get("prose") and any(map(_CONTROL.search, _texts(value))):
                    yield f"{key}.{name}: {shown(value)} holds a control character; {ESCAPES}"


def _texts(value: Any) -> list[str]:
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
