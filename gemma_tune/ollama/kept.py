"""What is left of tools and calls by the time that a TEMPLATE gets them.

Ollama reads them into structures of its own (`api/types.go`) and hands these on (`template/template.go`): what has no
place there is lost, keys are sorted, and whole numbers are written as such.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

Turns = Sequence[dict[str, Any]]

NOTE = (
    "Ollama hands tools and the arguments of calls on with their keys sorted, and leaves out what it does not know of "
    "a parameter (default, minimum, …), and writes 1.0 as 1 and no whole number beyond 2^53 exactly: where rows have "
    "such keys or numbers, or another order, their prompts differ from training."
)


def kept(messages: Turns, tools: Turns | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """A conversation as Ollama hands it to a TEMPLATE, tools as our TEMPLATE writes them."""
    return [_turn(turn) for turn in messages], [_tool(tool) for tool in tools] if tools else None


def is_kept(messages: Turns, tools: Turns | None) -> bool:
    """Whether Ollama changes nothing of a conversation's tools and calls."""
    text = json.dumps([list(messages), list(tools) if tools else None])
    return json.dumps(kept(messages, tools)) == text and not _EXPONENT.search(text)


def is_known(text: str, messages: Turns, tools: Turns | None, trained: Callable[[Turns, Turns | None], str]) -> bool:
    """Whether a prompt of Ollama's differs from training by nothing but what Ollama changes in tools and calls.

    Args:
        text: Ollama's, without BOS.
        trained: what training makes of messages and tools, without BOS.
    """
    return not is_kept(messages, tools) and _numbered(text) == _numbered(trained(*kept(messages, tools)))


_LARGEST = 1e300  # Ollama refuses a number that is no float64
_EXPONENT = re.compile(r"\d[eE][+-]?\d")
_NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?")


def _numbered(text: str) -> str:
    """A text with its numbers in one form: Go has another for very large and very small ones."""
    return _NUMBER.sub(lambda number: repr(float(number[0])), text)


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    if not turn.get("tool_calls"):
        return turn
    calls = [call | {"function": call["function"] | {"arguments": _sorted(call["function"]["arguments"])}}
             for call in turn["tool_calls"]]
    return turn | {"tool_calls": calls}


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    function, written = tool["function"], {"name": tool["function"]["name"]}
    if function.get("description"):
        written["description"] = function["description"]
    if (function.get("parameters") or {}).get("type"):
        written["parameters"] = _parameters(function["parameters"])
    return {"type": "function", "function": written}


def _parameters(schema: dict[str, Any]) -> dict[str, Any]:
    """The usual keys in the usual order; Ollama's where there are others that it knows."""
    parts = {"type": schema["type"], "properties": _properties(schema), "required": schema.get("required")}
    others = {key: _sorted(schema[key]) for key in ("$defs", "items") if schema.get(key) is not None}
    if others and parts["properties"] is not None:
        parts = {"type": parts["type"], **others, "required": parts["required"], "properties": parts["properties"]}
    if parts["properties"] is None:
        return {"type": parts["type"]}
    return {key: value for key, value in parts.items() if key != "required" or value}


def _properties(schema: dict[str, Any]) -> dict[str, Any] | None:
    found = schema.get("properties")
    return {name: _property(found[name]) for name in sorted(found)} if isinstance(found, dict) else None


def _property(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    values = {
        "anyOf": [_property(each) for each in schema.get("anyOf") or ()], "type": schema.get("type"),
        "items": _sorted(schema.get("items")), "description": schema.get("description"),
        "enum": _sorted(schema.get("enum")), "properties": _properties(schema)}
    if isinstance(values["type"], list) and len(values["type"]) == 1:
        [values["type"]] = values["type"]
    return {key: value for key, value in values.items() if value is not None and value != [] and value not in ("", {})}


def _sorted(value: Any) -> Any:
    """A value that went through Go's ``map[string]any``."""
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [_sorted(each) for each in value]
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST
    return int(float(value)) if number and float(value).is_integer() else value
