"""A list of turns, as any format has it, becomes a checked conversation.

A normalised turn has ``role`` (system, user, assistant, tool) and ``content`` (text, with its outer white space: what
becomes of that is for the chat template to say), and where they apply ``tool_calls``, ``tool_call_id``, ``name`` (of
the tool that answers), ``reasoning_content`` and ``"train": False``; the user's also ``pictures``, see ``pictures``.
Nothing else is kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gemma_tune.base import shell, strict_json
from gemma_tune.data.conversations import tools
from gemma_tune.data.conversations.learned import is_learned
from gemma_tune.data.conversations.names import exchange, role_fix, speaker_inside, suggested_keys, suggested_saying
from gemma_tune.data.conversations.order import check_answers, check_order
from gemma_tune.data.conversations.parts import joined
from gemma_tune.data.conversations.pictures import MEDIA, OWN, Column, again, beside, holds
from gemma_tune.data.conversations.places import Supply, said_by
from gemma_tune.data.conversations.problems import Problem, blank, damaged, kind, python_list, quoted, several
from gemma_tune.data.conversations.thoughts import (
    THINK,
    is_begun_by_prompt,
    reasoning,
    reasoning_once,
    without_thoughts,
)
from gemma_tune.data.conversations.uneven import evened

Turn = dict[str, Any]

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "ai": "assistant", "function_call": "assistant", "tool_call": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool", "tool_response": "tool",
    "ipython": "tool",
}
CALLING = ("function_call", "tool_call")  # roles of turns that are a call, as ShareGPT and ms-swift have it
CALLS = ("tool_calls", "function_call", "function_calls", "additional_kwargs")
PLAIN = ({"role", "content"}, {"from", "value"})


def conversation(messages: Any, problems: list[Problem], key: str = "messages", *, answered: bool = True,
                 mended: list[str] | None = None, pictures: Column | None = None) -> list[Turn]:
    """The normalised turns of ``messages``; what is wrong with them is added to ``problems``.

    Args:
        key: the column they come from, for the message.
        answered: whether it has to end with an answer to learn; else marks of what is learned are passed over.
        mended: takes what was done about turns that do not alternate; None where they stay as they are.
        pictures: those that stand beside the turns, for the places that are in them.
    """
    if problem := python_list(f"`{key}`", messages) or _broken_list(key, messages):
        problems.append(problem)
        return []
    if not isinstance(messages, list) or not messages:
        problems.append(Problem("no_messages", f"`{key}` is {'an empty list' if messages == [] else kind(messages)}, "
                                               "not a list of turns", 'write [{"role": "user", "content": "…"}, …]'))
        return []
    supply = pictures and _supply(pictures, dict(enumerate(messages, start=1)))
    turns = [_turn(number, messages, problems, answered, supply) for number in range(1, len(messages) + 1)]
    known = [turn for turn in turns if turn is not None]
    if supply and not problems and (problem := supply.unfit(known)):
        problems.append(problem)
    if len(known) == len(turns):  # where a role is unknown, the order cannot be judged
        known, numbers = _with_calls(known, messages)
        if known[0]["role"] == "system" and blank(known[0]["content"]) and len(known) > 1:
            known, numbers = known[1:], numbers[1:]  # as a column `system` that is empty
        if mended is not None:
            known, numbers, done = evened(known, numbers)
            mended += done
        found = _out_of_order(known, numbers, answered)
        alone = answered and mended is None and not problems
        problems += _with_a_way_out(found, known, numbers) if alone else found
    return known


def _out_of_order(turns: list[Turn], numbers: Sequence[int], answered: bool) -> list[Problem]:
    found: list[Problem] = []
    check_order(turns, numbers, found)
    if answered:
        check_answers(turns, found)
    return found


def _with_a_way_out(found: list[Problem], turns: list[Turn], numbers: Sequence[int]) -> list[Problem]:
    """The problems with what to type, where turns that are made to alternate have none."""
    if not found:
        return found
    even, theirs, done = evened([*map(dict, turns)], numbers)
    if not done or _out_of_order(even, theirs, True):
        return found
    return [replace(problem, fix=f"{problem.fix}; --on-uneven mend does so") for problem in found]


def _broken_list(key: str, text: Any) -> Problem | None:
    """The problem of a text that is meant to be a list of turns, as tables hold them, and is broken."""
    if not isinstance(text, str) or not text.lstrip().startswith("["):
        return None
    try:
        strict_json.loads(text)
    except ValueError as e:
        return Problem("not_json", f"`{key}` is text that is not JSON: {strict_json.reason(e)}",
                       "repair it, or leave the row out")
    return None


def _with_calls(turns: Sequence[Turn], messages: Sequence[Turn]) -> tuple[list[Turn], list[int]]:
    """The turns with their numbers in the row. ShareGPT writes a call below what the assistant says before it, and
    several calls below each other: that is one turn, with the number of the last call."""
    if not any("tool_calls" in turn for turn in turns):
        return [*turns], [*range(1, len(turns) + 1)]
    joined: list[Turn] = []
    numbers: list[int] = []
    at_once = _calls_at_once(turns, messages)
    for number, (turn, message) in enumerate(zip(turns, messages, strict=True), start=1):
        before = joined[-1] if joined else turn
        if _is_call(turn, message) and before["role"] == "assistant" and before.get("train") == turn.get("train"):
            if "tool_calls" not in before:
                turn = turn | joined.pop()
                numbers.pop()
            elif number in at_once:
                turn = joined.pop() | {"tool_calls": [*before["tool_calls"], *turn["tool_calls"]]}
                numbers.pop()
        joined.append(turn)
        numbers.append(number)
    return joined, numbers


def _is_call(turn: Turn, message: Turn) -> bool:
    return "tool_calls" in turn and any(message.get(key) in CALLING for key in ("role", "from"))


def _calls_at_once(turns: Sequence[Turn], messages: Sequence[Turn]) -> set[int]:
    """Numbers of ShareGPT's calls that follow another one, where as many results come behind them all."""
    found: set[int] = set()
    waiting: list[int] = []  # numbers of the calls in a row
    results = 0
    for number, (turn, message) in enumerate(zip([*turns, {"role": "end"}], [*messages, {}], strict=True), start=1):
        if waiting and turn["role"] == "tool":
            results += 1
            continue
        if len(waiting) == results:
            found.update(waiting[1:])
        if results or not _is_call(turn, message):
            waiting, results = [], 0
        if _is_call(turn, message):
            waiting.append(number)
    return found


def _supply(pictures: Column, messages: Mapping[int, Any]) -> Supply:
    """The pictures for the places in turns, which are here by their numbers."""
    objects = {number: message for number, message in messages.items() if isinstance(message, dict)}
    asked = {number: message for number, message in objects.items() if role_of(message) == "user"}
    return Supply(pictures, asked, {number: turn for number, turn in objects.items() if number not in asked})


def _turn(number: int, messages: Sequence[Any], problems: list[Problem], answered: bool,
          supply: Supply | None) -> Turn | None:
    message = messages[number - 1]
    if not isinstance(message, dict):
        problems.append(Problem("not_an_object", f"turn {number} is {kind(message)}, not an object",
                                'write {"role": "user", "content": "…"}'))
        return None
    name, role = _named(message), role_of(message)
    if role is None:
        problems.append(_no_role(number, message, messages))
        return None
    content = said_by(message)
    turn: Turn = {"role": role, "content": ""}
    if name in CALLING:
        turn["tool_calls"] = tools.calls(f"turn {number}", content, problems)
        content = ""
    own = None
    if message.keys() not in PLAIN:
        _extras(number, message, turn, problems, answered)
        own = _own_pictures(number, message, role, problems)
    if role == "assistant" and isinstance(content, list):
        content = without_thoughts(f"turn {number}", content, turn, problems)
    _content(number, message, content, turn, problems, (own or supply) if role == "user" else None)
    if own and not problems and (problem := own.unfit([turn])):
        problems.append(problem)
    if role == "assistant" and "reasoning_content" not in turn and is_begun_by_prompt(turn["content"]):
        turn["content"] = f"{THINK[0]}\n{turn['content']}"
    begins = turn["content"].lstrip().startswith(THINK[0])
    if "reasoning_content" in turn and begins:
        reasoning_once(number, turn, problems)
    elif answered and role == "assistant" and begins and THINK[1] not in turn["content"]:
        problems.append(Problem("reasoning", f"turn {number} begins a thought ({THINK[0]}) that does not end",
                                "leave the row out, as it seems to be cut off, or end the thought with "
                                f"{THINK[1]}"))
    return turn


def _named(message: Turn) -> Any:
    """What a turn says that its role is."""
    name = message.get("role")
    return message.get("from") if name is None else name


def role_of(message: Turn) -> str | None:
    """The role of a turn under the name that is known here; None where a turn has none, or one that nobody knows."""
    name = _named(message)
    return ROLES.get(name) if isinstance(name, str) else None


_LOOKED_AT = 50  # turns of a conversation in which names of roles are looked for


def _no_role(number: int, message: Turn, messages: Sequence[Any]) -> Problem:
    """What is wrong with a turn that has no role, or one that nobody knows."""
    name, code = _named(message), "unknown_role"
    if name is None and (both := exchange(message)):
        return Problem(code, f"turn {number} has no `role`, but a question and its answer: {_keys(message)}",
                       f'write it as two turns: {{"role": "user", "content": …}} with `{both[0]}`, and {{"role": '
                       f'"assistant", "content": …}} with `{both[1]}`')
    if name is None and (inside := speaker_inside(message)):
        return Problem(code, f"turn {number} has no `role`, but `{inside}` says who speaks: {_keys(message)}",
                       f"write `{inside}` of each turn as its `role`, which is user or assistant, or a name for "
                       "--roles")
    if name is None and (named := suggested_keys(message)):
        return Problem(code, f"turn {number} has no `role`, but {_keys(message)}",
                       f"name its keys: --turn-keys {shell.quote(named)}")
    reason = f"turn {number} has the role {quoted(name)}; known are system, user, assistant, tool"
    if not isinstance(name, str):
        return Problem(code, reason, "rename the role")
    others = (_named(turn) for turn in messages[:_LOOKED_AT] if isinstance(turn, dict))
    return Problem(code, reason, role_fix(name, {other: ROLES.get(other.strip().lower()) for other in (*others, name)
                                                 if isinstance(other, str) and other not in ROLES}))


def _keys(message: Turn) -> str:
    return ", ".join(quoted(key) for key in list(message)[:6])


def _own_pictures(number: int, message: Turn, role: str, problems: list[Problem]) -> Supply | None:
    """The pictures under a key of the turn itself, as Ollama has them."""
    if MEDIA.isdisjoint(message) and OWN not in message:
        return None
    found = beside(f" of turn {number}", message, problems)
    if role == "user" or not found and not holds(message.get(OWN)):
        return found and _supply(found, {number: {key: message[key] for key in message if key not in (*MEDIA, OWN)}})
    where = found.where if found else f"`{OWN}` of turn {number}"
    problems.append(Problem("picture", f"{where} has pictures, and the turn is the {role}'s",
                            "pictures are learned in turns of the user alone: move them there, or leave the row out"))
    return None


def _content(number: int, message: Turn, content: Any, turn: Turn, problems: list[Problem],
             supply: Supply | None) -> None:
    """Put what is said into a turn, and the pictures that stand in it."""
    role, pictures = turn["role"], []
    if role == "tool" and (isinstance(content, dict) or several("", content)):
        content = _as_json(content)
    elif isinstance(content, list) or supply and isinstance(content, str):
        said = joined(number, content if isinstance(content, list) else [{"text": content}], role, supply, problems)
        if said is None:
            return
        content, pictures = said
    if content is None and "tool_calls" in turn:
        content = ""
    if not isinstance(content, str):
        other_key = None if content is not None else suggested_saying(message)
        problems.append(Problem("not_text", f"the content of turn {number} is {kind(content)}, not text",
                                f"if `{other_key}` has it, name that: --turn-keys content={other_key}" if other_key
                                else "make it a string"))
        return
    if role == "user" and holds(message.get(OWN)):
        pictures += again(number, message[OWN], content, problems)
    turn["content"] = content
    if pictures:
        turn[OWN] = sorted(pictures, key=lambda picture: picture["at"])
    may_be_empty = (role == "tool" or "tool_calls" in turn or role == "system" and number == 1
                    or pictures or supply and supply.is_short)
    if not may_be_empty and blank(content):
        problems.append(Problem("empty_turn", f"turn {number} ({role}) is empty", "fill it or leave the row out"))
    elif damaged(content):
        problems.append(Problem("broken_text", f"turn {number} contains damaged characters",
                                "export the text as UTF-8 again"))


def _as_json(value: Any) -> Any:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return value


def _extras(number: int, message: Turn, turn: Turn, problems: list[Problem], answered: bool) -> None:
    where = f"turn {number}"
    made = _made(message)
    if made and turn["role"] == "assistant":
        turn["tool_calls"] = tools.calls(where, made, problems)
    elif made:
        problems.append(Problem("tool_order", f"{where} is `{turn['role']}` and calls tools; only `assistant` can",
                                "move the call into an assistant turn"))
    if message.get("tool_responses"):  # Gemma's own way, which holds several turns in one
        problems.append(Problem("tool_order", f"{where} carries `tool_responses`",
                                "write each as a turn of the role `tool`"))
    if turn["role"] == "tool":
        if (answered := tools.identifier(message.get("tool_call_id"))) is not None:
            turn["tool_call_id"] = answered
        names = (message.get("name"), message.get("tool_name"))  # OpenAI's key, and Ollama's
        if name := next((name.strip() for name in names if isinstance(name, str) and name.strip()), None):
            turn["name"] = name
        if damaged(f"{turn.get('tool_call_id')} {turn.get('name')}"):
            problems.append(Problem("broken_text", f"the name or id of {where} contains damaged characters",
                                    "export the text as UTF-8 again"))
    elif turn["role"] == "assistant":
        reasoning(where, message, turn, problems)
        if answered and not is_learned(where, message, problems):
            turn["train"] = False


def _made(message: Turn) -> Any:
    """The tool calls of a turn, under whichever name it has them."""
    kwargs = message.get("additional_kwargs")  # LangChain's place for what OpenAI's interface answers
    places = [message, kwargs] if isinstance(kwargs, dict) else [message]
    found = (tools.given(place.get(key)) for place in places for key in CALLS[:-1])
    return next((value for value in found if value), None)
