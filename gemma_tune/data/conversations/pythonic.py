"""Tool calls that are written as Python calls functions, as ToolACE, Llama 4's prompts and LFM2 have them.

The assistant says ``[get_rate(currency="USD", days=[1, 2]), Close Account(id=7)]`` and nothing else, but for what it
says beside marks around that. The functions are a JSON list in the system prompt, which also says that calls are
written so, or the row's tools. By their names calls are told from other texts, as names with spaces are no Python.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from gemma_tune.base import strict_json
from gemma_tune.data.conversations.problems import Problem, quoted
from gemma_tune.data.conversations.turns import CALLING, CALLS, role_of

# How such a system prompt says that calls are written: [func1(params_name=params_value, …), func2(params)].
_EXAMPLE = re.compile(r"\[func\w*\(param[^\[\]]*\]")
# What it says about the list and about that; a template has words of its own for both. Nothing else is taken out.
_SENTENCES = re.compile("|".join((
    r"Here is a list of functions in JSON format that you can invoke\s*[:.]?", r"\0[ \t]*\.?",
    r"Should you decide to return the function call(?:\(s\)|s)?\s*[.,]?",
    r"(?:If you decide to invoke any of the function\(s\), you MUST )?put it in the format of\s*\[func[^\[\]]*\]\s*\.?",
    r"NO other text MUST be included\s*\.?", r"You SHOULD NOT include any other text in the response\s*\.?",
    r"You should only return the function calls? in (?:tools? calls? sections?|your response)\s*\.?")), re.IGNORECASE)
_MARKS = re.compile(r"<\|(tool_call|python)_start\|>(?s:(?P<calls>.*))<\|\1_end\|>")
_WORDS = {"true": True, "false": False, "null": None}  # JSON's words for what Python writes with a capital
_FAILED = {"name": "…", "arguments": {}}  # in place of calls whose problem is reported

Turns = list[Any]


def is_pythonic(turns: Any) -> bool:
    """Whether turns begin with a system prompt that declares functions which are called so."""
    return isinstance(turns, list) and _in_system(turns) is not None


def calls_apart(turns: Any, tools: Any, problems: list[Problem]) -> tuple[Any, Any]:
    """The turns with such calls as ``tool_calls`` and the results of several as turns of their own, and the tools.

    Args:
        turns: with the system prompt in front, if there is one.
        tools: the row's own; the system prompt's are looked for where there are none.
        problems: takes what cannot be read as it is meant.
    """
    described = None if tools or not isinstance(turns, list) else _in_system(turns)
    if not tools and described is None:
        return turns, tools
    if described is not None:
        first, key = turns[0], _key(turns[0])
        system, tools = described
        turns = [{**first, key: system}, *turns[1:]]
    names = _names(tools)
    found: Turns = []
    made: list[str] = []  # names of the calls that wait for results
    for number, turn in enumerate(turns, start=1):
        role = role_of(turn) if isinstance(turn, dict) else None
        if role == "assistant":
            turn, calls = _called(number, turn, names, described is not None, problems)
            made = [call["name"] for call in calls]
        found += _results(turn, made) if role == "tool" and made else [turn]
    return found, tools


def _in_system(turns: Turns) -> tuple[str, list[Any]] | None:
    """What the system prompt says, and the functions in it, where it has some that are called so."""
    first = turns[0] if turns and isinstance(turns[0], dict) else {}
    text = first.get(_key(first)) if role_of(first) == "system" else None
    return _described(text) if isinstance(text, str) else None


def _key(turn: dict[str, Any]) -> str:
    return "content" if turn.get("content") is not None else "value"


def _described(system: str) -> tuple[str, list[Any]] | None:
    """The system prompt without its functions and without what it says about calls, and the functions."""
    if not _EXAMPLE.search(system):
        return None
    for begin in re.finditer(r"\[\s*\{", system):
        try:
            value, end = strict_json.decode(system, begin.start())
        except ValueError:
            continue
        if all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in value):
            rest = _SENTENCES.sub("\0", f"{system[:begin.start()]}\0{system[end:]}")
            rest = re.sub(r"\s*\0[\s\0]*", _gap, rest).strip()
            return None if _EXAMPLE.search(rest) else (rest, value)
    return None


def _gap(taken_out: re.Match[str]) -> str:
    """What stands between what was before and behind, as far apart as both were from what was between them."""
    return "\n" * min(taken_out[0].count("\n"), 2) or " "


def _names(tools: Any) -> list[str]:
    """The names of tools, in any of the ways in which they are declared; the longest first, as some begin alike."""
    try:
        tools = strict_json.loads(tools) if isinstance(tools, str) else tools
    except ValueError:  # which is told where they are declared
        return []
    functions = [tool.get("function") if isinstance(tool, dict) and isinstance(tool.get("function"), dict) else tool
                 for tool in (tools if isinstance(tools, list) else [tools])]
    found = {one["name"] for one in functions if isinstance(one, dict) and isinstance(one.get("name"), str)}
    return sorted(filter(None, found), key=len, reverse=True)


def _called(number: int, turn: dict[str, Any], names: Sequence[str], certain: bool, problems: list[Problem]
            ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The turn with what it calls, and these calls; the turn itself where it calls nothing. ``certain`` where any text
    of that form is meant as a call."""
    key = _key(turn)
    text = turn.get(key)
    if not isinstance(text, str) or any(turn.get(name) for name in CALLS):
        return turn, []
    text, said = text.strip(), ""
    if marked := _MARKS.search(text):  # beside which LFM2 says what it does
        text, said = marked["calls"].strip(), f"{text[:marked.start()]}{text[marked.end():]}".strip()
    if not (text.startswith("[") and text.endswith("]") and text[:-1].rstrip().endswith(")")):
        return turn, []
    if _name_of(text[1:].lstrip(), names) is None and not (certain and re.match(r"\[\s*\w[^()\[\]\n]{0,80}\(", text)):
        return turn, []
    try:
        calls = [_call(piece, names) for piece in _pieces(text[1:-1])]
    except ValueError as e:
        written = f"write {e.written}, or " if isinstance(e, _WithoutName) else "write "
        problems.append(Problem("tool_calls", f"turn {number} calls tools as Python calls functions, and {e}",
                                f"{written}the calls as `tool_calls`, or leave the row out"))
        calls = [_FAILED]
    if not said and any(turn.get(name) in CALLING for name in ("role", "from")):  # which is nothing but calls
        return {**turn, key: calls}, calls
    return {**turn, key: said, "tool_calls": calls}, calls


class _WithoutName(ValueError):
    """An argument by its place alone: which parameter it is for stands in code that nobody has here."""

    def __init__(self, name: str, arguments: str, argument: str):
        super().__init__(f"in {quoted(f'{name}({arguments})')} an argument has no name: {quoted(argument)}")
        self.written = f"it with the names of {name}'s parameters, as in {name}(NAME=VALUE)"


def _name_of(text: str, names: Sequence[str]) -> str | None:
    """The declared function with whose call a text begins."""
    return next((name for name in names if text.startswith(name) and text[len(name):].lstrip().startswith("(")), None)


def _call(text: str, names: Sequence[str]) -> dict[str, Any]:
    name = _name_of(text, names)
    if name is None:
        raise ValueError(f"{quoted(text.partition('(')[0])} is none of the declared ones")
    inside = text[len(name):].lstrip()
    if not inside.endswith(")"):
        raise ValueError(f"something stands behind the call of {name}")
    arguments: dict[str, Any] = {}
    for piece in _pieces(inside[1:-1]):
        argument, is_named, value = (part.strip() for part in piece.partition("="))
        if not is_named or not re.fullmatch(r"[^\W\d][\w.$-]*", argument):
            raise _WithoutName(name, inside[1:-1], piece)
        if argument in arguments:
            raise ValueError(f"{name} has the argument `{argument}` twice")
        arguments[argument] = _value(value, f"the argument `{argument}` of {name}")
    return {"name": name, "arguments": arguments}


_OPEN, _CLOSE = "([{", ")]}"
_TOKEN = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[(\[{]|[)\]}]|,|['"]""", re.DOTALL)


def _pieces(text: str) -> Iterator[str]:
    """What stands between commas, but for those inside of brackets and texts."""
    depth, begin = 0, 0
    for token in _TOKEN.finditer(text):
        if token[0] in _OPEN:
            depth += 1
        elif token[0] in _CLOSE:
            depth -= 1
            if depth < 0:
                raise ValueError("a bracket is closed that was not opened")
        elif token[0] in ("'", '"'):
            raise ValueError("a text has no end")
        elif token[0] == "," and depth == 0:
            yield text[begin:token.start()].strip()
            begin = token.end()
    if depth:
        raise ValueError("a bracket is not closed")
    if text[begin:].strip():  # behind a last comma there may be nothing
        yield text[begin:].strip()


def _value(text: str, what: str) -> Any:
    """A value that Python writes, where JSON has it as well."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a backslash that escapes nothing
            return strict_json.loads(json.dumps(_literal(ast.parse(text, mode="eval").body)))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as e:
        raise ValueError(f"{what} is no value: {quoted(text)}") from e


def _literal(node: ast.expr) -> Any:
    """As ``ast.literal_eval`` has it, and JSON's words; a key that stands twice is no value."""
    if isinstance(node, ast.Name) and node.id in _WORDS:
        return _WORDS[node.id]
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_literal(one) for one in node.elts]
    if isinstance(node, ast.Dict):
        keys = [ast.literal_eval(key) for key in node.keys if key is not None]
        if len({*keys}) < len(node.keys) or not all(isinstance(key, str) for key in keys):
            raise ValueError("keys")
        return dict(zip(keys, map(_literal, node.values), strict=True))
    return ast.literal_eval(node)


def _results(turn: dict[str, Any], made: Sequence[str]) -> list[dict[str, Any]]:
    """A turn of the results of all calls, ``[{"name": …, "results": …}, …]`` in their order, as one for each."""
    key = _key(turn)
    found = strict_json.list_in(turn.get(key))
    if not isinstance(found, list) or not all(
            isinstance(one, dict) and one.keys() == {"name", "results"} for one in found) or (
            [one["name"] for one in found] != [*made]):
        return [turn]
    return [{**turn, key: one["results"] if isinstance(one["results"], str) else json.dumps(
        one["results"], ensure_ascii=False)} for one in found]
