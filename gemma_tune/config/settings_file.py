"""Settings written as a ``--config`` file, each with where its value came from. No heavy import."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gemma_tune.base.words import visible
from gemma_tune.config.settings import plain

# What an origin is called in a file and in a note; see ``settings.Resolved``.
ORIGINS = {"flag": "given", "file": "of a settings file", "family": "default of the model's family",
           "default": "default", "auto": "chosen here"}


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
