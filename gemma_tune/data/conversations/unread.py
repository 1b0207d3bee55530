"""Which columns of a row and which keys of its turns nobody reads, so that it can be said instead of passed over."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from gemma_tune.data.conversations.layouts import HISTORIES, SYSTEMS, is_history
from gemma_tune.data.conversations.learned import MARKS
from gemma_tune.data.conversations.pictures import COLUMNS, OWN
from gemma_tune.data.conversations.preference import columns_read
from gemma_tune.data.conversations.thoughts import REASONING
from gemma_tune.data.conversations.turns import CALLS, PLAIN, ROLES


class Unread(NamedTuple):
    """A filled value that does not become part of the example: ``where`` is ``column`` or ``key`` (of a turn)."""

    where: str
    name: str
    value: Any


_TOOLS = ("tools", "functions")
_READ: dict[str, frozenset[str]] = {
    "messages": frozenset(("messages", *SYSTEMS, *COLUMNS, *_TOOLS)),
    "sharegpt": frozenset(("conversations", "conversation", "chat", *SYSTEMS, *COLUMNS, *_TOOLS)),
    "alpaca": frozenset(("instruction", "input", "context", "passage", "output", "response", *HISTORIES, *SYSTEMS,
                         *COLUMNS)),
    "prompt-completion": frozenset(("prompt", "completion", *HISTORIES, *SYSTEMS, *COLUMNS, *_TOOLS)),
    "gemini": frozenset(("contents", "systemInstruction", "system_instruction", "tools", *SYSTEMS, *COLUMNS)),
    "rendered": frozenset(("text", *SYSTEMS, *COLUMNS)),
    "text": frozenset(("text",)),
}
# A column that is read only where the other one is missing.
_SECOND = {"response": "output", "functions": "tools", "chat_history": "history", "conversation": "conversations",
           "chat": "conversations", "system_instruction": "systemInstruction"}
_OF_EVERY_TURN = frozenset(("role", "from", "content", "value", "tool_responses", *CALLS, *MARKS))
_OF_TURNS = {"assistant": _OF_EVERY_TURN | set(REASONING),
             "user": _OF_EVERY_TURN | {OWN, *COLUMNS},
             "tool": _OF_EVERY_TURN | {"tool_call_id", "name", "tool_name"}}
_SECOND_OF_TURNS = {"value": "content", "from": "role", "tool_name": "name"}


def of_row(row: Mapping[str, Any], format: str, columns: Mapping[str, str], turns: Any = ()) -> tuple[Unread, ...]:
    """What is not read of a row and of its turns, but for what is empty.

    Args:
        columns: those that ``--columns`` names, by role.
        turns: the row's turns as the row has them.
    """
    read = _named(row, columns) if format == "columns" else columns_read(row) if format == "preference" else (
        _READ[format])
    names = row.keys() - read
    if not _SECOND.keys().isdisjoint(row):
        names |= _seconds(row, read, _SECOND)
    found = [Unread("column", name, row[name]) for name in row if name in names and _holds(row[name])] if names else []
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, dict) and turn.keys() not in PLAIN:
            found += _of_turn(turn)
    return tuple(found)


def _named(row: Mapping[str, Any], columns: Mapping[str, str]) -> Collection[str]:
    named = {*columns.values(), *(name for name in HISTORIES if "user" in columns and is_history(row.get(name)))}
    named |= set(_TOOLS) if "turns" in columns and "tools" not in columns else set()
    named |= set() if "images" in columns else set(COLUMNS)
    return named if "system" in columns else named | set(SYSTEMS)


def _of_turn(turn: Mapping[str, Any]) -> list[Unread]:
    name = turn.get("role") if turn.get("role") is not None else turn.get("from")
    read = _OF_TURNS.get(ROLES.get(name), _OF_EVERY_TURN)
    names = turn.keys() - read | _seconds(turn, read, _SECOND_OF_TURNS)
    kwargs = turn.get("additional_kwargs")  # LangChain's, of which only the calls are read
    if not isinstance(kwargs, dict) or any(_holds(value) for key, value in kwargs.items() if key not in CALLS):
        names |= {"additional_kwargs"}
    return [Unread("key", key, turn[key]) for key in turn if key in names and _holds(turn[key])]


def _seconds(found: Mapping[str, Any], read: Collection[str], seconds: Mapping[str, str]) -> set[str]:
    """The keys that are not read because another one is there, and does not say the same."""
    return {key for key, first in seconds.items() if key in found and first in read
            and found.get(first) is not None and found[first] != found[key]}


def _holds(value: Any) -> bool:
    return value is not None and value != "" and value != [] and value != {}
