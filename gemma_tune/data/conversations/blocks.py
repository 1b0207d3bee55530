"""Tool calls and results as parts of what turns say, as Anthropic's interface has them.

The assistant's turn ends with ``tool_use``, once for each call; the user's next turn begins with a ``tool_result`` for
each. Parts in any other order stay where they are, and are refused with their turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gemma_tune.data.conversations.pictures import COLUMNS, OWN, holds

_CALL, _RESULT = "tool_use", "tool_result"


def blocks_apart(turns: Sequence[Any]) -> list[Any]:
    """The turns with such calls as ``tool_calls``, and each result as a turn of the role ``tool``."""
    return [piece for turn in turns for piece in _pieces(turn)]


def _pieces(turn: Any) -> list[Any]:
    parts = turn.get("content") if isinstance(turn, dict) else None
    if not isinstance(parts, list):
        return [turn]
    types = [part.get("type") if isinstance(part, dict) else None for part in parts]
    if turn.get("role") == "assistant" and _CALL in types and not turn.get("tool_calls"):
        first = types.index(_CALL)
        if all(sort == _CALL for sort in types[first:]):
            return [{**turn, "content": parts[:first] or "", "tool_calls": [*map(_call, parts[first:])]}]
    if turn.get("role") == "user" and _RESULT in types:
        count = types.count(_RESULT)
        if all(sort == _RESULT for sort in types[:count]):
            more = parts[count:] or any(holds(turn.get(key)) for key in (*COLUMNS, OWN))
            said = [{**turn, "content": parts[count:]}] if more else []
            return [*map(_result, parts[:count]), *said]
    return [turn]


def _call(part: dict[str, Any]) -> dict[str, Any]:
    return {"id": part.get("id"), "name": part.get("name"), "arguments": part.get("input")}


def _result(part: dict[str, Any]) -> dict[str, Any]:
    """The turn of a result; that it is an error has no place in a turn, and stays to be reported."""
    failed = {"is_error": True} if part.get("is_error") else {}
    content = [] if part.get("content") is None else part["content"]
    return {"role": "tool", "tool_call_id": part.get("tool_use_id"), "content": content} | failed
