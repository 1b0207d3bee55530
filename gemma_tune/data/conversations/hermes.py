"""Tool calls and results inside what turns say, as Hermes' data sets and dumps of Qwen's template have them.

The assistant says ``<tool_call>{"name": "…", "arguments": {…}}</tool_call>``, once for each call and perhaps below a
text; a turn of results says ``<tool_response>…</tool_response>`` for each.
"""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Sequence
from typing import Any

from gemma_tune.base import strict_json
from gemma_tune.data.conversations.turns import CALLS, role_of


def calls_apart(turns: Sequence[Any]) -> list[Any]:
    """The turns with such calls as ``tool_calls``, and each result behind them as a turn of the role ``tool``."""
    found: list[Any] = []
    calling = False
    for turn in turns:
        pieces, role = [turn], role_of(turn) if isinstance(turn, dict) else None
        if role == "assistant":
            pieces = [_called(turn)]
            calling = "tool_calls" in pieces[0]
        elif role == "tool" or role == "user" and calling:
            pieces = _results(turn)
        found += pieces
    return found


def _called(turn: dict[str, Any]) -> dict[str, Any]:
    said, calls = _marked(turn, "tool_call")
    if not calls or any(turn.get(name) for name in CALLS):
        return turn
    return {**turn, _key(turn): said.rstrip(), "tool_calls": [*map(_read, calls)]}


def _results(turn: dict[str, Any]) -> list[dict[str, Any]]:
    said, results = _marked(turn, "tool_response")
    role = "role" if turn.get("role") is not None else "from"
    return [turn] if not results or said.strip() else [{**turn, role: "tool", _key(turn): text} for text in results]


def _key(turn: dict[str, Any]) -> str:
    return "content" if turn.get("content") is not None else "value"


def _marked(turn: dict[str, Any], name: str) -> tuple[str, list[str]]:
    """What a turn says before the first mark of that name, and what is in each, where nothing stands between or behind
    them; no mark else."""
    text = turn.get(_key(turn))
    before, *pieces = text.split(f"<{name}>") if isinstance(text, str) else [""]
    inside = [piece.partition(f"</{name}>") for piece in pieces]
    if any(not end or behind.strip() for _, end, behind in inside):
        return "", []
    return before, [said.strip() for said, _, _ in inside]


def _read(call: str) -> Any:
    """A call that Hermes writes as Python shows a dictionary; else the text itself, which is read as JSON later.

    What Python takes is more than JSON has: text that is not clearly its own is not given to it, so that a key that
    stands twice is found, and what it makes of one has to be JSON as well.
    """
    if not call.startswith("{'"):
        return call
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a backslash that escapes nothing
            return strict_json.loads(json.dumps(ast.literal_eval(call)))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return call
