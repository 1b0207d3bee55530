"""What ``/export`` of ``chat`` writes: a conversation for people as Markdown, or for programs as JSON."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_tune.base.errors import UserError
from gemma_tune.base.files import json_bytes
from gemma_tune.chat.pictures import as_row
from gemma_tune.encoding.eye import PICTURES

_CALLED = {"system": "System", "user": "You", "assistant": "Model"}
_JSON = (".json", ".jsonl")


def export(messages: Sequence[Mapping[str, Any]], which: str, folder: Path, name: str = "") -> Path:
    """Write a conversation into a new file.

    Args:
        which: who answered.
        folder: where it lies without a name: the run.
        name: ending in .json or .jsonl it is ``{"messages": …}`` on one line, as ``prepare`` reads it; else Markdown.

    Raises:
        UserError: nothing to write, a file that is there already, or cannot be written.
    """
    if not any(turn["role"] == "assistant" for turn in messages):
        raise UserError("there is no conversation to export yet", "ask something first")
    path = Path(os.path.expanduser(name)) if name else folder / f"chat-{dt.datetime.now():%Y%m%d-%H%M%S}.md"
    content = (json_bytes({"messages": [as_row(turn) for turn in messages]}) if path.suffix.lower() in _JSON
               else markdown(messages, which).encode("utf-8", "replace"))
    try:
        with open(path, "xb") as file:
            file.write(content)
    except FileExistsError as e:
        raise UserError(f"{path} is there already", "name another file: /export FILE") from e
    except OSError as e:
        raise UserError(f"{path} cannot be written: {e.strerror}", "name another file: /export FILE") from e
    return path


def markdown(messages: Sequence[Mapping[str, Any]], which: str) -> str:
    """A conversation as Markdown; what an answer has of it stays."""
    parts = [f"# Conversation with {which}\n"]
    for turn in messages:
        pictures = "".join(f"![{Path(one['path']).name}](<{one['path']}>)\n\n" for one in turn.get(PICTURES, ()))
        parts.append(f"## {_CALLED[turn['role']]}\n\n{pictures}{turn['content'].strip(chr(10))}\n")
    return "\n".join(parts)
