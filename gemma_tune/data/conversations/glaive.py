"""Conversations with tool calls that are written as one text, as Glaive publishes them.

``system``: ``SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -`` and
JSON objects. ``chat``: ``USER: …``, ``ASSISTANT: <functioncall> {"name": "…", "arguments": '{…}'} <|endoftext|>``,
``FUNCTION RESPONSE: {…}``, ``ASSISTANT: … <|endoftext|>``, with empty lines between them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gemma_tune.base import strict_json
from gemma_tune.data.conversations.layouts import Draft, text_of, user
from gemma_tune.data.conversations.problems import Problem

_MARK = re.compile(r"(?:\A|(?<=\s))(USER|ASSISTANT|FUNCTION RESPONSE):(?=\s|\Z)")
_END = "<|endoftext|>"
# The arguments are JSON in single quotes, in the middle of what is JSON otherwise.
_QUOTED = re.compile(r"""\A\{\s*"name"\s*:\s*"(?P<name>[^"]*)"\s*,\s*"arguments"\s*:\s*'(?P<arguments>.*)'\s*\}\Z""",
                     re.DOTALL)


def is_chat(text: Any) -> bool:
    """Whether a text begins as such a conversation."""
    return isinstance(text, str) and text.lstrip().startswith(("USER:", "ASSISTANT:"))


def glaive(row: Mapping[str, Any], problems: list[Problem]) -> Draft:
    """``system`` and ``chat``: turns, and the tools that are declared in the system text."""
    system, declared = _system(text_of(row, "system", problems))
    pieces = _MARK.split(row["chat"])
    turns: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for mark, text in zip(pieces[1::2], pieces[2::2]):
        if mark == "USER":
            turns.append(user(_said(text)))
        elif mark == "ASSISTANT":
            turns.append(_answer(_said(text.rstrip().removesuffix(_END))))
        else:
            turns.append({"role": "tool", "content": _said(text)})
    return Draft(turns, "chat", declared)


def _said(text: str) -> str:
    """A turn without the layout around it: a space after the speaker, and what separates turns."""
    return text[1:].rstrip() if text[:1].isspace() else text.rstrip()


def _system(text: str) -> tuple[str, list[Any]]:
    """The system text without the declarations, and these: JSON objects one behind the other."""
    text = text.removeprefix("SYSTEM:").strip()
    start, found = text.find("{"), []
    position = start
    while position >= 0 and text[position:position + 1] == "{":
        try:
            value, end = strict_json.decode(text, position)
        except ValueError:
            return text, []
        found.append(value)
        position = strict_json.skip_space(text, end)
    if not found or position < len(text) or any("name" not in value for value in found):
        return text, []
    return text[:start].rstrip().removesuffix("-").rstrip(), found


def _answer(text: str) -> dict[str, Any]:
    said, mark, call = text.partition("<functioncall>")
    said = said.rstrip() if mark else said
    if not mark:
        return {"role": "assistant", "content": said}
    call = call.strip()
    if quoted := _QUOTED.match(call):
        arguments = quoted["arguments"]
        if _fails(arguments):  # apostrophes of the text are escaped as in Python
            arguments = arguments.replace("\\'", "'")
        return {"role": "assistant", "content": said,
                "tool_calls": [{"name": quoted["name"], "arguments": arguments}]}
    return {"role": "assistant", "content": said, "tool_calls": call or "{}"}


def _fails(text: str) -> bool:
    try:
        strict_json.loads(text)
    except ValueError:
        return True
    return False
