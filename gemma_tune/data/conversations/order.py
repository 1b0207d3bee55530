"""The order of a conversation's turns: who may speak when, and which call each result of a tool answers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from gemma_tune.data.conversations.problems import Problem, quoted

Turn = dict[str, Any]


def check_order(turns: list[Turn], numbers: Sequence[int], problems: list[Problem]) -> None:
    """User and assistant alternate; after a call come its results, then the assistant again, or the user's next turn,
    where nobody answered the call."""
    awaited = ("user",)  # roles that may come now
    caller = 0  # number of the turn whose call was the last
    with_tools = False
    said = ""  # by the assistant, since the user's last turn
    for number, turn in zip(numbers, turns):
        role = turn["role"]
        if role == "system":
            if number > 1:
                problems.append(Problem("system_inside", f"turn {number} is a system message; it can only be the first",
                                        "join it with the first one" if turns[0]["role"] == "system" else
                                        "move it to the front"))
            continue
        if role not in awaited:
            problems.append(_misplaced(number, role, awaited, caller, said))
        elif role == "user" and "tool" in awaited and _is_json(turn["content"]):
            problems.append(Problem("tool_order", f"turn {number} is `user` and says JSON, as the result of the tool "
                                                  f"call in turn {caller} would",
                                    "give it the role `tool`, or leave the row out"))
        if role == "user":
            awaited, said = ("assistant",), ""
        elif role == "tool":
            with_tools, awaited = True, ("assistant", "tool")
        elif "tool_calls" in turn:
            awaited, caller = ("tool", "user"), number
        else:
            awaited, said = ("user",), turn["content"]
    if with_tools:
        _match_results(turns, numbers, problems)


def _is_json(text: str) -> bool:
    """Whether a text is an object or a list in JSON, as programs answer and people seldom write."""
    if not text.lstrip().startswith(("{", "[")):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def check_answers(turns: Sequence[Turn], problems: list[Problem]) -> None:
    """Whether a conversation ends with an answer, and one of its answers is learned."""
    if turns[-1]["role"] != "assistant":
        problems.append(Problem("no_answer", f"the conversation ends with `{turns[-1]['role']}`; there is no answer to "
                                             "learn", "leave the last turn out, or put the answer behind it"))
    elif all(turn.get("train") is False for turn in turns if turn["role"] == "assistant"):
        problems.append(Problem("nothing_to_learn", "every assistant turn says that it is not to be learned",
                                "leave the row out, or let an answer be learned: \"train\": true"))


_AS_PYTHON = re.compile(r"\s*\[\s*\w[^()\n]{0,80}\([^\n]*\)\s*\]\s*\Z")  # [f(a=1), g()], as ToolACE has it


def _misplaced(number: int, role: str, awaited: tuple[str, ...], caller: int, said: str) -> Problem:
    if role == "tool" and _AS_PYTHON.match(said):
        return Problem("tool_order", f"turn {number} is the result of a tool that is called in the text before it, as "
                                     f"Python calls functions: {quoted(said)}",
                       "write the call as `tool_calls`, and the functions that the system prompt describes as `tools`; "
                       "or leave the row out")
    if role == "tool":
        return Problem("tool_order", f"turn {number} is the result of a tool that was not called before it",
                       "put the assistant's `tool_calls` before it, or leave the row out")
    if awaited == ("tool", "user"):
        return Problem("tool_order", f"turn {number} is `{role}` where the result of the tool call in turn {caller} is "
                                     "expected", "add the result as a turn of the role `tool`")
    begins = role == "assistant" and awaited == ("user",) and number <= 2
    fix = "remove it, or put a user's turn before it" if begins else "join neighbouring turns of the same role"
    return Problem("alternation", f"turn {number} is `{role}` where `{awaited[0]}` is expected; roles alternate and "
                                  "begin with `user`", fix)


def _match_results(turns: list[Turn], numbers: Sequence[int], problems: list[Problem]) -> None:
    """Give every result the name of its tool, by the call's id or else by position, and check the ids.

    Results go into the order of their calls, as many templates show no ids.
    """
    made: list[Turn] = []
    caller = 0
    results: list[tuple[int, Turn]] = []
    for place, (number, turn) in enumerate(zip([*numbers, 0], [*turns, {"role": "end"}])):
        if turn["role"] == "tool":
            results.append((number, turn))
            continue
        if made and results:
            _match(caller, made, results, problems)
            turns[place - len(results):place] = _in_order(made, [result for _, result in results])
        made, caller, results = turn.get("tool_calls", []), number, []


def _in_order(made: Sequence[Turn], results: list[Turn]) -> list[Turn]:
    places = {call.get("id"): place for place, call in enumerate(made)}
    answered = [result.get("tool_call_id") for result in results]
    told_apart = len(places) == len(made) and len(set(answered)) == len(answered)
    if None in answered or not told_apart or not places.keys() >= {*answered}:
        return results
    return sorted(results, key=lambda result: places[result["tool_call_id"]])


def _match(caller: int, made: Sequence[Turn], results: Sequence[tuple[int, Turn]], problems: list[Problem]) -> None:
    by_id = {call["id"]: call for call in made if "id" in call}
    for position, (number, result) in enumerate(results):
        answered = result.get("tool_call_id")
        if answered is not None and len(by_id) == len(made) and answered not in by_id:
            problems.append(Problem("tool_order", f"turn {number} answers the tool call {quoted(answered)}, "
                                                  f"which turn {caller} does not make", "correct its `tool_call_id`"))
        call = by_id.get(answered) or (made[position] if position < len(made) else None)
        if call is not None:
            result.setdefault("name", call["function"]["name"])
    answers = {result.get("tool_call_id") for _, result in results}
    if None not in answers and (missing := [name for name in by_id if name not in answers]):
        problems.append(Problem("tool_order", f"the tool call {quoted(missing[0])} of turn {caller} has no result",
                                "add its result as a turn of the role `tool`"))
