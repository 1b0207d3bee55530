"""What a chat template must not leave out in silence.

Many do: Gemma 1 to 3 ignore tools and tool calls, Gemma 4 the reasoning of earlier turns, and each drops what it does
not know. Dropping earlier reasoning is as the model is served; losing what is to be learned, or what it is asked, is
not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gemma_tune.encoding.eye import texts_around
from gemma_tune.encoding.labels import FormatError

Messages = Sequence[dict[str, Any]]
Tools = Sequence[dict[str, Any]] | None

_NAMES = {"system": "the system message", "user": "a user's turn", "tool": "a tool's result"}
QUESTION = {"role": "user", "content": "q"}
# Mistral's templates want ids of nine letters and digits.
CALL = {"role": "assistant", "content": "", "tool_calls": [{"id": "gemma0001", "type": "function", "function": {
    "name": "gemma_probe", "arguments": {"gemma_key": "gemma value"}}}]}
RESULT = {"role": "tool", "tool_call_id": "gemma0001", "name": "gemma_probe", "content": "gemma result"}
TOOLS = [{"type": "function", "function": {
    "name": "gemma_probe", "description": "gemma description", "parameters": {
        "type": "object", "properties": {"gemma_key": {"type": "string", "description": "d"}},
        "required": ["gemma_key"]}}}]


def left_out_kinds(render: Callable[[Messages, Tools, bool], str]) -> set[str]:
    """Which of "tools", "tool calls" and "tool results" a template ignores; what it refuses is not among them.

    Args:
        render: messages, tools and whether to end where the assistant begins → text.
    """
    def shows(words: str, turns: Messages, tools: Tools, prompt: bool) -> bool:
        try:
            return words in render(turns, tools, prompt)
        except FormatError:
            return True

    kinds = set()
    if not shows("gemma description", [QUESTION], TOOLS, True):
        kinds.add("tools")
    if not shows("gemma value", [QUESTION, CALL], None, False):
        kinds.add("tool calls")
    if not shows("gemma result", [QUESTION, CALL, RESULT], None, True):
        kinds.add("tool results")
    return kinds


def kinds_in(turns: Messages, tools: Tools) -> set[str]:
    """Which of "tools", "tool calls" and "tool results" a conversation has."""
    kinds = {"tools"} if tools else set()
    for turn in turns:
        if turn["role"] == "tool":
            kinds.add("tool results")
        elif "tool_calls" in turn:
            kinds.add("tool calls")
    return kinds


def refuse_ignored(ignored: set[str]) -> None:
    """Raises:
        FormatError: if anything is ignored.
    """
    if ignored:
        names = [kind for kind in ("tools", "tool calls", "tool results") if kind in ignored]
        raise FormatError(f"the model's chat template has no place for {' and '.join(names)} and leaves them out",
                          about_tools=True)


def refuse_lost_question(turns: Messages, tools: Tools, prompt: str) -> None:
    """Check that a prompt shows what the assistant is told: white space may change, words may not vanish.

    Earlier answers are not looked for: where a template shortens them, the model is asked with the short ones.

    Raises:
        FormatError: naming what is left out.
    """
    for turn in turns:
        if turn["role"] != "assistant" and turn["content"] not in prompt and not all(
                _shows(prompt, text) for text in texts_around(turn)):
            raise FormatError(f"the chat template leaves out a part of {_NAMES.get(turn['role'], turn['role'])}",
                              about_tools=turn["role"] == "tool")
    for tool in tools or ():
        if tool["function"]["name"] not in prompt:
            raise FormatError(f"the chat template leaves out the tool {tool['function']['name']}", about_tools=True)


def refuse_lost_answer(turn: dict[str, Any], answer: str) -> None:
    """Check that all of an answer is learned: its reasoning, its text and its tool calls.

    Raises:
        FormatError: naming what is left out.
    """
    if "reasoning_content" in turn and not _shows(answer, turn["reasoning_content"]):
        raise FormatError("the chat template leaves out the reasoning of the answer", about_reasoning=True)
    if turn["content"] not in answer and not _shows(answer, turn["content"]):
        raise FormatError("the chat template leaves out the text beside a tool call" if "tool_calls" in turn else
                          "the chat template leaves out a part of the answer, such as its reasoning",
                          about_tools="tool_calls" in turn)
    if "tool_calls" in turn:
        functions = [call["function"] for call in turn["tool_calls"]]
        for name in {f["name"] for f in functions}:
            if answer.count(name) < sum(f["name"] == name for f in functions):
                raise FormatError(f"the chat template leaves out a call of {name}", about_tools=True)
        for text in _texts([f["arguments"] for f in functions]):
            if text not in answer and not _shows(answer, text):
                raise FormatError(f"the chat template leaves out an argument of a tool call: {text[:60]!r}",
                                  about_tools=True)


def _texts(value: Any) -> Iterator[str]:
    """All texts, keys and numbers in JSON data."""
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value
    elif value is not None and not isinstance(value, bool):  # templates have their own words for these
        yield str(value)


def _shows(rendered: str, text: str) -> bool:
    """Whether a render has this text but for white space, as it is or as a JSON string."""
    rendered = "".join(rendered.split())
    forms = (text, *(json.dumps(text, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True)))
    return any("".join(form.split()) in rendered for form in forms)
