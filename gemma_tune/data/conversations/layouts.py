"""Rows of single columns (Alpaca, prompt and completion, named columns) and of ShareGPT as lists of turns.

A reader takes a row and a list of problems, which it adds to, and returns a :class:`Draft`: turns that still have to be
checked. A text that cannot be used is replaced by a stand-in, so that the rest of its row is judged as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from gemma_tune.base import shell, strict_json
from gemma_tune.data.conversations.blocks import blocks_apart
from gemma_tune.data.conversations.hermes import calls_apart
from gemma_tune.data.conversations.learned import MARKS
from gemma_tune.data.conversations.names import exchange
from gemma_tune.data.conversations.pictures import COLUMNS, holds
from gemma_tune.data.conversations.problems import Problem, kind, python_list, several
from gemma_tune.data.conversations.pythonic import calls_apart as python_calls_apart
from gemma_tune.data.conversations.pythonic import is_pythonic
from gemma_tune.data.conversations.turns import role_of

STAND_IN = "…"
SYSTEMS = ("system", "system_prompt", "system_message")
HISTORIES = ("history", "chat_history")


class Draft(NamedTuple):
    """Turns as a row has them: ``key`` is the column they come from, for messages; ``tools`` its declarations."""

    messages: Any
    key: str = "messages"
    tools: Any = None


def user(content: Any) -> dict[str, Any]:
    """A user turn."""
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    """An assistant turn."""
    return {"role": "assistant", "content": content}


def text_of(row: Mapping[str, Any], key: str, problems: list[Problem]) -> str:
    """A column that is text or missing."""
    return _text(f"`{key}`", row.get(key), problems)


def _text(where: str, value: Any, problems: list[Problem]) -> str:
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # a column of whole numbers is one by itself in Parquet and JSON, and text in a CSV file
    problem = python_list(where, value, turns=True) if isinstance(value, str) else _not_text(where, value)
    if problem is None:
        return value
    problems.append(problem)
    return STAND_IN


def _not_text(where: str, value: Any) -> Problem:
    if isinstance(value, (bool, float)):
        ways = "true, True, yes" if isinstance(value, bool) else "5, 5.0, 5.00"
        return Problem("not_text", f"{where} is {kind(value)}, not text, and there are several ways to write it "
                                   f"({ways})", f"make {where} a string, as it is to be learned")
    return several(where, value) or Problem("not_text", f"{where} is {kind(value)}, not text", f"make {where} a string")


def said(where: str, value: Any, problems: list[Problem]) -> Any:
    """What a turn says: a text, or what may be parts of one or missing, which is judged with its turn."""
    judged_later = value is None or isinstance(value, dict) or isinstance(value, list) and not several(where, value)
    return value if judged_later else _text(where, value, problems)


def turn_list(value: Any) -> Any:
    """A list of turns that a table holds as JSON text; anything else as it is, for a text may be any JSON, too."""
    found = strict_json.list_in(value)
    turns = isinstance(found, list) and found and all(
        isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in found)
    return found if turns else value


def turns_in(value: Any) -> Any:
    """A list of turns, also one of questions together with their answers (Firefly, ms-swift, XTuner), each of which
    becomes two turns, or of texts that are said in turn, the user's first (LIMA, UltraChat); anything else as it is,
    such as texts that are objects themselves.

    What else stands beside a question stays with its turn; a mark of what is learned goes with the answer, and the
    system prompt of the first becomes a turn.
    """
    found = strict_json.list_in(value)
    if isinstance(found, list) and len(found) > 1 and all(isinstance(text, str) for text in found) and not all(
            text.lstrip().startswith("{") for text in found):
        return [(user, assistant)[n % 2](text) for n, text in enumerate(found)]
    if not isinstance(found, list) or not found or not all(
            isinstance(both, dict) and both.keys().isdisjoint(("role", "from")) and exchange(both) for both in found):
        return turn_list(value)
    first, *others = found
    system = first.get("system")
    turns = [{"role": "system", "content": system}] if isinstance(system, str) else []
    if turns:
        first = {key: said for key, said in first.items() if key != "system"}
    return turns + [turn for both in (first, *others) for turn in _two_turns(both)]


def _two_turns(both: Mapping[str, Any]) -> list[dict[str, Any]]:
    keys = exchange(both)
    question, answer = both[keys[0]], both[keys[1]]
    beside = {key: value for key, value in both.items() if key not in keys}
    marks = {key: beside.pop(key) for key in MARKS if key in beside}
    return [beside | user(question), marks | assistant(answer)]


def is_conversation(value: Any) -> bool:
    """Whether a row is nothing but its list of turns."""
    return isinstance(value, list) and any(isinstance(turn, dict) and ("role" in turn or "from" in turn)
                                           for turn in value)


def with_system(messages: Any, row: Mapping[str, Any], problems: list[Problem]) -> Any:
    """The turns, with the row's own column ``system`` (or another of ``SYSTEMS``) in front, unless it is there already.

    Two system texts that differ are a problem: nobody can say which one the model will be served with.
    """
    named = [name for name in SYSTEMS if row.get(name) not in (None, "", [])]
    if not named or not isinstance(messages, list):
        return messages
    texts = {name: _system_text(row, name, problems) for name in named}
    systems = {text.strip(): name for name, text in reversed(texts.items()) if text.strip()}
    if len(systems) > 1:
        names = " and ".join(f"`{name}`" for name in reversed(systems.values()))
        problems.append(Problem("system_inside", f"the row has several system texts that differ: {names}",
                                "leave one of them in the row"))
        return messages
    for system, name in systems.items():
        first = messages[0] if messages and isinstance(messages[0], dict) else {}
        if role_of(first) != "system":
            return [{"role": "system", "content": texts[name]}, *messages]
        if not any(isinstance(said, str) and said.strip() == system for said in (first.get("content"),
                                                                                 first.get("value"))):
            problems.append(Problem("system_inside", f"`{name}` of the row and the system message of its turns differ",
                                    "leave one of them in the row"))
    return messages


def _system_text(row: Mapping[str, Any], name: str, problems: list[Problem]) -> str:
    """A system prompt that is text, or a list of nothing but parts of text, as Anthropic and Bedrock have it."""
    parts = row[name]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None
             for part in parts] if isinstance(parts, list) else [None]
    return "\n".join(texts) if all(isinstance(text, str) for text in texts) else text_of(row, name, problems)


def declared(row: Mapping[str, Any]) -> Any:
    """The tools of a row, under either of OpenAI's names."""
    return row.get("functions") if row.get("tools") is None else row["tools"]


def messages(row: Mapping[str, Any], problems: list[Problem]) -> Draft:
    """OpenAI: ``messages``, ``tools``."""
    return _turns_and_tools(row, "messages", problems)


def sharegpt(row: Mapping[str, Any], problems: list[Problem]) -> Draft:
    """``conversations`` (or ``conversation``) with ``from`` and ``value``; ``system``, ``tools``."""
    key = "conversations" if row.get("conversations") is not None or "conversation" not in row else "conversation"
    return _turns_and_tools(row, key, problems)


def _turns_and_tools(row: Mapping[str, Any], key: str, problems: list[Problem]) -> Draft:
    """The turns in a column with the tools of the row, or else with those that its system turn has (GLM-4)."""
    turns, tools = turns_in(row.get(key)), declared(row)
    if not isinstance(turns, list):
        return Draft(turns, key, tools)
    first = turns[0] if turns and isinstance(turns[0], dict) else {}
    if not tools and first.get("tools") and role_of(first) == "system":
        tools = first["tools"]
        turns = [{name: value for name, value in first.items() if name != "tools"}, *turns[1:]]
    turns = with_system(apart(turns, tools), row, problems)
    turns, tools = python_calls_apart(turns, tools, problems)
    return Draft(turns, key, tools)


def with_calls_as_text(row: Any) -> str | None:
    """What ``--columns`` would be for a row whose calls are taken out of what is said by its system prompt, so that
    they stay there."""
    key = next((key for key in ("messages", "conversations", "conversation") if isinstance(row, dict)
                and isinstance(turn_list(row.get(key)), list)), None)
    system = next((name for name in SYSTEMS if key and row.get(name)), None)
    if key is None or not is_pythonic(with_system(turn_list(row[key]), row, [])):
        return None
    return f"turns={key}" + (f",system={system}" if system else "")


def apart(turns: list[Any], tools: Any) -> list[Any]:
    """The turns with calls and results that stand inside what is said in their own places; a text that looks like a
    call is one where there are tools."""
    if any(isinstance(turn, dict) and isinstance(turn.get("content"), list) for turn in turns):
        turns = blocks_apart(turns)
    if tools or any(isinstance(turn, dict) and role_of(turn) == "tool" for turn in turns):
        turns = calls_apart(turns)
    return turns


def alpaca(row: Mapping[str, Any], problems: list[Problem]) -> Draft:
    """``instruction``, ``input``, ``output``, with ``system`` and ``history``; Dolly's ``context``, ``response``."""
    # One after the other, so that a row has its problems in the order in which it is read.
    parts = [text_of(row, key, problems) for key in ("instruction", "input", "context", "passage")]
    question = "\n\n".join(filter(str.strip, parts))
    key = "output" if row.get("output") is not None else "response"
    turns = [*history(row, problems), user(question), assistant(said(f"`{key}`", row.get(key), problems))]
    return Draft(with_system(turns, row, problems))


def history(row: Mapping[str, Any], problems: list[Problem]) -> list[dict[str, Any]]:
    """Earlier turns of a row: pairs of a question and its answer, or turns."""
    name = next((name for name in HISTORIES if row.get(name) is not None), "history")
    pairs = strict_json.list_in(row.get(name))
    if pairs in (None, "", []):
        return []
    if problem := python_list(f"`{name}`", pairs):
        problems.append(problem)
        return []
    if isinstance(pairs, list) and isinstance(turn_list(pairs), list) and all(isinstance(p, dict) for p in pairs):
        return [*pairs]  # a list of its own, as more is put behind them
    if not isinstance(pairs, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in pairs):
        problems.append(Problem("not_text", f"`{name}` is not a list of pairs of a question and its answer",
                                'write [["question", "answer"], …]'))
        return []
    return [role(said(f"{what} in `{name}`", text, problems)) for pair in pairs
            for role, what, text in zip((user, assistant), ("a question", "an answer"), pair)]


def prompt_completion(row: Mapping[str, Any], problems: list[Problem]) -> Draft:
    """``prompt`` and ``completion``, each a text or a list of turns; answers inside the prompt are not learned."""
    turns: list[Any] = history(row, problems)
    if beside := next((name for name in ("context", "passage") if row.get(name)), None):
        columns = shell.quote(f"user=prompt,assistant=completion,context={beside}")
        problems.append(Problem("unread_column", f"the row has `{beside}` beside `prompt` and `completion`",
                                f"use --columns {columns} to put it below the prompt, or without the last to leave it "
                                "out"))
    for key, turn in (("prompt", user), ("completion", assistant)):
        value = turn_list(row.get(key))
        if not isinstance(value, list) or several(key, value):
            turns.append(turn(text_of(row, key, problems)))
        else:
            turns += map(_not_learned, value) if key == "prompt" else value
    tools = declared(row)
    return Draft(with_system(apart(turns, tools), row, problems), "prompt", tools)


def _not_learned(turn: Any) -> Any:
    """A turn of a prompt, in which the assistant may have spoken, unless it says itself what is learned."""
    if not isinstance(turn, dict) or not turn.keys().isdisjoint(MARKS):
        return turn
    return {**turn, "train": False} if role_of(turn) == "assistant" else turn


def columns(row: Mapping[str, Any], names: Mapping[str, str], problems: list[Problem]) -> Draft:
    """The columns named on the command line: ``{"user": "question", "assistant": "answer"}``; and ``history``.

    A column ``turns`` holds a list of turns instead; ``context`` is put below the question, and ``reasoning`` is
    what is thought before the answer. Pictures, in ``images`` or the usual columns, are read elsewhere.
    """
    if "turns" in names:
        return _named_turns(row, names, problems)
    turns = []
    for role in ("system", "user", "assistant"):
        if role == "user" and any(is_history(row.get(name)) for name in HISTORIES):
            turns += history(row, problems)
        if role not in names:
            continue
        text = text_of(row, names[role], problems)
        if text.strip() and role == "user" and "context" in names:
            text = "\n\n".join(filter(str.strip, (text, text_of(row, names["context"], problems))))
        pictures = [names["images"]] if "images" in names else COLUMNS
        if text.strip() or role == "user" and any(holds(row.get(name)) for name in pictures):  # which may say it all
            turns.append({"role": role, "content": text})
        elif role != "system":
            if names[role] in row:
                problems.append(Problem("empty_turn", f"the column `{names[role]}` is empty",
                                        "fill it or leave the row out"))
            else:
                there = ", ".join(f"`{key}`" for key in list(row)[:8])
                problems.append(Problem("missing_column", f"the column `{names[role]}` is missing; the row has {there}",
                                        "correct --columns, or leave the row out"))
            turns.append({"role": role, "content": STAND_IN})
    if "reasoning" in names:
        turns[-1]["reasoning_content"] = text_of(row, names["reasoning"], problems)
    return Draft(turns if "system" in names else with_system(turns, row, problems),
                 tools=row.get(names["tools"]) if "tools" in names else None)


def is_history(value: Any) -> bool:
    """Whether a column of that name is a list, and so holds earlier turns, or is one as Python shows it."""
    past = strict_json.list_in(value)
    return isinstance(past, list) or python_list("", past) is not None


def _named_turns(row: Mapping[str, Any], names: Mapping[str, str], problems: list[Problem]) -> Draft:
    key, tools = names["turns"], row.get(names["tools"]) if "tools" in names else declared(row)
    turns = turns_in(strict_json.list_in(row.get(key)))
    if isinstance(turns, list):
        turns = apart(turns, tools)
    if "system" in names:
        return Draft(with_system(turns, {"system": row.get(names["system"])}, problems), key, tools)
    return Draft(with_system(turns, row, problems), key, tools)
