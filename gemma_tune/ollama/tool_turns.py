"""Tools in a chat template: the list of them, calls and results, read off as the other turns are.

What Ollama reads in turn (`tools/template.go` and `tools/tools.go`): the text that stands first inside
`{{ if .ToolCalls }}`, up to a brace, is how it knows a call in an answer; the call's name and its arguments, a JSON
object, have to follow. So a template that writes calls otherwise than as JSON has no place in a TEMPLATE.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from gemma_tune.ollama.probe import FIRST, REPLY, SECOND, SYSTEM, Jinja, Messages, Unlike, message, split, talk, without

Tools = Sequence[dict[str, Any]]

LIST = "\0"  # in a text: the list of tools stands here


@dataclass(frozen=True)
class ToolTurns:
    """What a template writes where there are tools, in place of or beside what ``turns.Turns`` has.

    Args:
        bare: whether a tool is written as its ``function`` alone.
        indent: of its JSON; None for one line.
        between: what stands between two tools.
        opening: what stands first if there is no system message.
        system: around a system message that stands first.
        user: before the first user's message.
        call: before the name of a called function, between name and arguments, and after these.
        alone: before the first call of a turn without a text.
        beside: between a turn's text and its calls; None where a turn that calls shows no text.
        next_call: between two calls.
        group: around results that follow each other.
        result: around each result.
        quoted: whether a result is written as a JSON string.
    """

    bare: bool
    indent: int | None
    between: str
    opening: str
    system: tuple[str, str]
    user: str
    call: tuple[str, str, str]
    alone: str
    beside: str | None
    next_call: str
    group: tuple[str, str]
    result: tuple[str, str]
    quoted: bool

    def listed(self, text: str, tools: Tools) -> str:
        """A text of these with the list of tools in its place."""
        return text.replace(LIST, self.between.join(_written(tool, self.bare, self.indent) for tool in tools))

    def calls(self, calls: Sequence[dict[str, Any]]) -> str:
        """The calls of one turn."""
        before, middle, after = self.call
        functions = [call["function"] for call in calls]
        return self.next_call.join(f"{before}{f['name']}{middle}{_json(f['arguments'])}{after}" for f in functions)

    def answered(self, content: str) -> str:
        """One result."""
        return (_json(content) if self.quoted else content).join(self.result)


def _json(value: Any, indent: int | None = None) -> str:
    """As Transformers' ``tojson`` has it."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _written(tool: dict[str, Any], bare: bool, indent: int | None) -> str:
    return _json(tool["function"] if bare else tool, indent)


# --- marker conversations -------------------------------------------------------------------------------------------


def tool(name: str, description: str, required: Sequence[str] = (), **properties: dict[str, Any]) -> dict[str, Any]:
    """A declaration with its keys in the order in which a TEMPLATE of ours writes them."""
    parameters = {"type": "object", "properties": properties} | ({"required": list(required)} if required else {})
    described = {"description": description} if description else {}
    return {"type": "function", "function": {"name": name, **described, "parameters": parameters}}


def calling(*calls: tuple[str, dict[str, Any]], text: str = "", **more: Any) -> dict[str, Any]:
    """An assistant's turn that calls functions; ids are as Mistral's templates want them."""
    return message("assistant", text, tool_calls=[
        {"id": f"Zid{n:06}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for n, (name, arguments) in enumerate(calls)], **more)


def result(content: str, number: int = 0) -> dict[str, Any]:
    return message("tool", content, tool_call_id=f"Zid{number:06}", name="Zresult")


_TOOLS = [tool(f"Ztool{n}", f"Zdescription{n}", ["Zkey"], Zkey={"type": "string"}) for n in (1, 2)]
_CALL, _OTHER_CALL = ("Zcall", {"Zkey": "Zvalue"}), ("Zother", {"Zkey": "Zothervalue"})
_RESULT, _OTHER_RESULT = "Zanswer", "Zsecondanswer"


def read_tools(jinja: Jinja, turns: Any) -> ToolTurns:
    """Takes the surroundings from renderings of marker words, and holds them against further conversations.

    Args:
        turns: the :class:`gemma_tune.ollama.turns.Turns` of conversations without tools.

    Raises:
        Unlike: tools have no place in the template, or one that a TEMPLATE cannot express.
    """
    try:
        if jinja(talk(FIRST), tools=_TOOLS) == jinja(talk(FIRST)):
            raise Unlike("the template knows no tools")
        if turns.system is None:
            raise Unlike("it has no turn of its own for a system message")
        return ToolTurns(**_read_list(jinja, turns), **_read_calls(jinja, turns), **_read_results(jinja, turns))
    except TemplateError as error:
        raise Unlike(f"it refuses a conversation with tools: {error}") from error


def _read_list(jinja: Jinja, turns: Any) -> dict[str, Any]:
    alone, form = _with_list(jinja(talk(FIRST), tools=_TOOLS))
    below, _ = _with_list(jinja(talk(FIRST, system=SYSTEM), tools=_TOOLS))
    opening, user = _before_user(split(alone, FIRST)[0], turns)
    before, after, _ = split(below, SYSTEM, FIRST)
    after, same = _before_user(after, turns)
    if user != same or (opening + user + before + after).count(LIST) > 2:
        raise Unlike("it writes its list of tools in several ways")
    return form | {"opening": opening, "system": (before, after), "user": user}


def _with_list(text: str) -> tuple[str, dict[str, Any]]:
    """The text with a sign in place of the list of tools, and how the list is written."""
    for bare, indent in itertools.product((False, True), (None, 4, 2)):
        first, second = (_written(each, bare, indent) for each in _TOOLS)
        before, found, rest = text.partition(first)
        between, also_found, after = rest.partition(second)
        if found and also_found:
            return before + LIST + after, {"bare": bare, "indent": indent, "between": between}
    raise Unlike("it does not write tools as JSON")


def _before_user(text: str, turns: Any) -> tuple[str, str]:
    """What stands before the first user's turn, and the beginning of that turn."""
    at = text.rfind(turns.user[0])
    if at < 0:
        raise Unlike("with tools, the user's turn is another")
    return text[:at], text[at:]


def _said(jinja: Jinja, turns: Any, *messages: dict[str, Any]) -> str:
    """What is written for the messages after a user's turn, with what asks for the answer."""
    return without(split(jinja([message("user", FIRST), *messages], tools=_TOOLS), FIRST)[1], turns.user[1])


def _read_calls(jinja: Jinja, turns: Any) -> dict[str, Any]:
    name, arguments = _CALL[0], _json(_CALL[1])
    marks = (name, arguments, _RESULT)
    start, middle, end, _ = _call_split(_said(jinja, turns, calling(_CALL), result(_RESULT)), *marks)
    start = without(start, turns.assistant[0])
    before = start.lstrip()
    after, found, _ = end.partition(turns.assistant[1])
    if not found:
        raise Unlike("a turn that calls a function ends in another way")
    with_text = _said(jinja, turns, calling(_CALL, text=REPLY), result(_RESULT))
    beside = None
    if REPLY in with_text:
        own, beside, _, _, _ = split(with_text, REPLY, *marks)
        if own != turns.assistant[0] or not beside.endswith(before):
            raise Unlike("a text beside a call is written in another way")
        beside = beside.removesuffix(before)
    return {"call": (before, middle, after), "alone": start.removesuffix(before), "beside": beside,
            "next_call": _between_calls(jinja, turns, before, after)}


def _call_split(text: str, *marks: str) -> list[str]:
    if "Zid0" in text:
        raise Unlike("it writes the ids of calls")
    try:
        return split(text, *marks)
    except Unlike:
        raise Unlike("it does not write a call as a name and JSON after it") from None


def _between_calls(jinja: Jinja, turns: Any, before: str, after: str) -> str:
    try:
        text = _said(jinja, turns, calling(_CALL, _OTHER_CALL), result(_RESULT), result(_OTHER_RESULT))
    except TemplateError:  # Llama 3: "This model only supports single tool-calls at once!"
        return ""
    _, between, _ = split(text, _json(_CALL[1]), _OTHER_CALL[0])
    if not between.startswith(after) or not between.endswith(before) or len(between) < len(after + before):
        raise Unlike("several calls of one turn are not written alike")
    return between.removeprefix(after).removesuffix(before)


def _read_results(jinja: Jinja, turns: Any) -> dict[str, Any]:
    call, answer = calling(_CALL), result(_RESULT)
    start, end = split(_said(jinja, turns, call, answer), _RESULT)
    if "Zresult" in start + end:
        raise Unlike("it writes names of functions beside their results")
    start = start.partition(_json(_CALL[1]))[2].partition(turns.assistant[1])[2]
    if not end.endswith(turns.prompt):
        raise Unlike("after a result, an answer is asked for in another way")
    end = end.removesuffix(turns.prompt)
    quoted = start.endswith('"') and end.startswith('"') and '"Z\\"' in _said(jinja, turns, call, result('Z"'))
    if quoted:
        start, end = start[:-1], end[1:]
    two = _said(jinja, turns, call, answer, result(_OTHER_RESULT, 1))
    _, between, _ = split(two, _json(_RESULT) if quoted else _RESULT, _json(_OTHER_RESULT) if quoted else _OTHER_RESULT)
    before = _common_end(start, between)
    after = between.removesuffix(before)
    if not end.startswith(after):
        raise Unlike("several results are not written alike")
    return {"group": (start.removesuffix(before), end.removeprefix(after)), "result": (before, after), "quoted": quoted}


def _common_end(one: str, other: str) -> str:
    shared = os.path.commonprefix([one[::-1], other[::-1]])
    return shared[::-1]


# --- what they are held against -------------------------------------------------------------------------------------

_WEATHER = tool("weather", "The weather <now> & later.", ["city"],
                city={"type": "string", "description": 'Where, "as such".\nNot empty.'},
                unit={"type": "string", "enum": ["°C", "K"]})
_EMPTY = tool("now", "")
_LISTS = tool("sum", "合计", ["xs"], xs={"type": "array", "items": {"type": "number"}, "description": "{a: [b, c]}"})
_PARIS = ("weather", {"city": "Paris, <b>\"x\"</b> \\ 巴黎", "days": [1, 2], "more": {"a": None, "b": []}})


def conversations(tools: ToolTurns) -> list[tuple[Messages, Tools | None]]:
    """Conversations with tools that reading them did not use, as far as a template has them."""
    asked, system = message("user", "Hi {{ a }}"), message("system", "Be brief.\n\nSei kurz.")
    text = "I look." if tools.beside is not None else ""
    told = [calling(_PARIS, text=text), result('{"t": 1}\n')]
    twice = [calling(_PARIS, ("now", {})), result("22 °C"), result("noon")]
    return [
        ([asked], [_WEATHER]),
        ([system, asked], [_WEATHER, _EMPTY, _LISTS]),
        ([system, asked, calling(("now", {})), result("noon")], [_EMPTY]),
        ([asked, *told, message("assistant", "Well."), message("user", SECOND), calling(_PARIS), result("1")],
         [_LISTS, _WEATHER]),
        ([asked, *twice, message("assistant", "Both."), message("user", SECOND)], [_WEATHER, _EMPTY]),
        ([asked, *told, message("assistant", "Well."), message("user", SECOND)], None),
    ]
