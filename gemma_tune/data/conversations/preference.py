"""Rows with a better and a worse answer to the same prompt, or with one answer that is marked as good or bad (KTO).

They become pairs and judged answers: a conversation, in which nothing but the answer is learned, and beside it the
turns of the worse answer, or the mark. Or plain conversations of the better answers, where that is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from gemma_tune.base.words import counted
from gemma_tune.data.conversations.layouts import (
    HISTORIES,
    SYSTEMS,
    Draft,
    alpaca,
    apart,
    assistant,
    declared,
    history,
    messages,
    said,
    sharegpt,
    text_of,
    turn_list,
    user,
    with_system,
)
from gemma_tune.data.conversations.marks import PAIRS, filled_pair, is_good, marked, pair_in
from gemma_tune.data.conversations.pictures import COLUMNS, pictures_in
from gemma_tune.data.conversations.problems import Problem, several
from gemma_tune.data.conversations.rendered import is_marked, prompt_apart, turns_beside, turns_in_text
from gemma_tune.data.conversations.turns import Turn
from gemma_tune.encoding.sequences import MARK, first_learned

_HH = re.compile(r"\n\n[ \t]*(?:Human|Assistant):")  # so Anthropic's HH-RLHF has whole conversations in one text
_ANSWERS = ("completion", "messages", "conversations", "output", "response", "answer")  # of a judged answer
_QUESTIONS = ("prompt", "question", "query", "input")


def is_preference(row: Mapping[str, Any], keys: Collection[str]) -> bool:
    """Whether a row holds a better and a worse answer, or one answer that is marked as either (KTO)."""
    return pair_in(keys) is not None or marked(row, keys) is not None


def chosen(row: Mapping[str, Any], problems: list[Problem]) -> Draft:
    """The conversation that ends with the better answer."""
    if is_good(row) is False:
        mark = marked(row, row.keys())
        problems.append(Problem("preference", f"the answer is marked as a bad one (`{mark}` is false)",
                                "leave the row out"))
    return better(row, problems)


def better(row: Mapping[str, Any], problems: list[Problem]) -> Draft:
    """The conversation that ends with the better answer, or with the only one, be it good or bad."""
    if (pair := filled_pair(row)) is not None:
        return _answered(row, pair[0], problems)
    key = _judged(row)
    if key == "messages":
        return messages(row, problems)
    if key == "conversations":
        return sharegpt(row, problems)
    return alpaca(row, problems) if _is_alpaca(row, key) else _answered(row, key, problems)


def _judged(row: Mapping[str, Any]) -> str:
    """The column of the answer that is marked."""
    return next((key for key in _ANSWERS if row.get(key) is not None), "output")


def _is_alpaca(row: Mapping[str, Any], key: str) -> bool:
    return key in ("output", "response") and (row.get("instruction") is not None or not _asked(row))


def worse(row: Mapping[str, Any], problems: list[Problem]) -> Draft | None:
    """The conversation that ends with the worse answer; None of a judged one.

    Of rows as they are prepared, ``rejected`` stands in place of the turns of ``messages`` that are learned.
    """
    pair = filled_pair(row)
    if pair is None:
        return None
    if pair[0] != "messages" or pair[1] == "rejected_messages":  # a whole conversation, as ms-swift has it
        return _answered(row, pair[1], problems)
    turns, answer, tools = turn_list(row.get("messages")), turn_list(row.get(pair[1])), _tools(row)
    if isinstance(answer, str):
        answer = [assistant(answer)]
    if not isinstance(turns, list) or not isinstance(answer, list):
        return Draft(answer, pair[1], tools)
    other = apart([*turns[:_first_learned(turns)], *answer], tools)
    return Draft(with_system(other, row, problems), pair[1], tools)


def _first_learned(turns: Sequence[Any]) -> int:
    """Where the answer begins: at the first of the assistant's turns that is to be learned, if any says so, else the
    last."""
    own = [n for n, turn in enumerate(turns) if isinstance(turn, dict) and turn.get("role") == "assistant"]
    if not any("train" in turns[n] for n in own):
        own = own[-1:]
    return next((n for n in own if turns[n].get("train") is not False), len(turns))


def answers_with_pictures(messages: Sequence[Turn], rejected: Sequence[Turn] | None) -> list[Problem]:
    """The problem of answers of several turns between which pictures are shown: what is compared is said to the same
    pictures.

    Args:
        messages: the conversation, of which the answer alone is learned; ``rejected`` the turns of a worse one.
    """
    if not pictures_in([*messages[first_learned(messages):], *(rejected or ())]):
        return []
    return [Problem("preference", "a picture stands inside the answer that is compared or judged",
                    "leave the row out, or let the answer begin behind the picture")]


class Pair(NamedTuple):
    """A conversation with the better answer, of which nothing else is learned, and the turns of the worse one."""

    messages: list[Turn]
    rejected: list[Turn]


def pair_of(better: list[Turn], worse: list[Turn], problems: list[Problem]) -> Pair | None:
    """What two conversations share is the prompt; what follows in each is its answer.

    Returns:
        None where they are no pair, which ``problems`` says.
    """
    if len({turns[0]["role"] == "system" for turns in (better, worse)}) == 2:  # one of both leaves it out
        system = better[:1] if better[0]["role"] == "system" else worse[:1]
        better, worse = (turns if turns[0]["role"] == "system" else [*system, *turns] for turns in (better, worse))
    shared = 0
    for one, other in zip(better, worse):
        if _unmarked(one) != _unmarked(other):
            break
        shared += 1
    answers = better[shared:], worse[shared:]
    if not any(answers) or _said(answers[0]) == _said(answers[1]):
        problems.append(Problem("same_answers", "both answers are the same" if better == worse else
                                "both answers are the same but for white space", "leave the pair out"))
    elif not all(answers):
        problems.append(Problem("preference", "one of the two conversations is the beginning of the other, so they are "
                                              "no two answers to the same prompt",
                                "give both an answer, or leave the pair out"))
    elif answers[0][0]["role"] != "assistant" or answers[1][0]["role"] != "assistant":
        problems.append(Problem("preference", "the two answers are to different prompts: after "
                                              f"{counted(shared, 'turn')} that both have, the "
                                              f"`{answers[0][0]['role']}` says something else",
                                "give both the same prompt, or leave the pair out"))
    else:
        return Pair(with_answer_alone(better, shared), answers[1])
    return None


def of_either(better: Sequence[Problem], key: str, worse: Sequence[Problem], other_key: str) -> list[Problem]:
    """Problems of both conversations of a pair; what is wrong with one of them alone says with which."""
    found = [_named(problem, key) if problem not in worse else problem for problem in better]
    return found + [_named(problem, other_key) for problem in worse if problem not in better]


def _named(problem: Problem, key: str) -> Problem:
    if f"`{key}`" in problem.reason:
        return problem
    return Problem(problem.code, f"the conversation with `{key}`: {problem.reason}", problem.fix)


def with_answer_alone(turns: list[Turn], first: int) -> list[Turn]:
    """The conversation, in which the assistant's turns before the answer are not learned.

    Args:
        first: the turn that the answer begins with.
    """
    return [{**turn, "train": False} if turn["role"] == "assistant" and n < first else
            _unmarked(turn) for n, turn in enumerate(turns)]


def last_answer(turns: Sequence[Turn]) -> int:
    """Where the last answer of a conversation begins: after the last turn that the user has."""
    return max((n + 1 for n, turn in enumerate(turns) if turn["role"] == "user"), default=0)


def _unmarked(turn: Turn) -> Turn:
    return {name: value for name, value in turn.items() if name != "train"}


def _said(turns: Sequence[Turn]) -> list[Turn]:
    """The turns without the white space around and between their words."""
    return [{name: " ".join(value.split()) if isinstance(value, str) else value
             for name, value in _unmarked(turn).items()} for turn in turns]


def _answered(row: Mapping[str, Any], key: str, problems: list[Problem]) -> Draft:
    """The conversation that ends with the answer in a column."""
    answer = turn_list(row.get(key))
    if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], str):
        answer = answer[0]  # a list of the only text there is
    if not isinstance(answer, (list, dict, type(None))) or several(key, answer):
        answer = said(f"`{key}`", answer, problems)
    if isinstance(answer, str):
        turns = _from_text(row, key, answer, problems)
    else:
        answer = [answer] if isinstance(answer, dict) else answer
        whole = not isinstance(answer, list) or _is_whole(answer)
        turns = answer if whole else [*_before(row, problems), *answer]
    tools = _tools(row)
    turns = apart(turns, tools) if isinstance(turns, list) else turns
    return Draft(with_system(turns, row, problems), key, tools)


def _is_whole(turns: list[Any]) -> bool:
    """Whether turns begin with a question, and so are a whole conversation."""
    first = turns[0] if turns and isinstance(turns[0], dict) else {}
    return (first.get("role") or first.get("from")) in ("user", "human", "system", "developer")


def _from_text(row: Mapping[str, Any], key: str, answer: str, problems: list[Problem]) -> list[Any]:
    """The turns of an answer that is text, with those of its prompt."""
    before, prompt = _prompt(row, problems)
    whole = turns_beside(answer, _compared_with(row, key))
    if whole and _is_meant(whole, answer, before):
        return whole
    if prompt is not None and (turns := _answered_text(prompt, answer)) is not None:
        return turns
    if not before:
        problems.append(Problem("no_messages", f"`{key}` is text, and there is no `prompt` that it answers",
                                "add a column `prompt`"))
    return [*(before or [user("…")]), assistant(answer)]


def _compared_with(row: Mapping[str, Any], key: str) -> Any:
    """The other one of a pair's answers."""
    pair = filled_pair(row)
    return row.get(pair[pair.index(key) - 1]) if pair and key in pair else None


def _is_meant(turns: list[Any], answer: str, before: list[Any] | None) -> bool:
    """Whether a conversation in the text of an answer is the row's own, with its prompt, and not what is answered."""
    if before is None or _HH.match(answer):
        return True
    prompt = before[-1].get("content") if before and isinstance(before[-1], dict) else None
    return isinstance(prompt, str) and _is_repeated(turns, prompt)


def _answered_text(prompt: str, answer: str) -> list[Any] | None:
    """The turns of a prompt that is written as a conversation up to the answer, with this; None of any other."""
    if found := prompt_apart(prompt, answer):
        return [*found[0], assistant(found[1])]
    if not _has_mark(prompt):
        return None
    # The prompt ends before the answer's mark, or with the words that both answers have first.
    begun = turns_in_text(prompt)
    if not _has_mark(answer) and (not begun or begun[-1]["role"] != "assistant"):
        return None
    turns = turns_in_text(prompt + answer)
    return turns if turns and turns[-1]["role"] == "assistant" else None


def _has_mark(text: str) -> bool:
    return is_marked(text) or _HH.match(text) is not None


def _is_repeated(turns: list[Any], prompt: str) -> bool:
    """Whether a text is what one of the turns says, or a conversation with which the turns begin."""
    if any(isinstance(said, str) and said.strip() == prompt.strip() for turn in turns if isinstance(turn, dict)
           for said in (turn.get("content"), turn.get("value"))):
        return True
    found = prompt_apart(prompt, "")
    return found is not None and turns[:len(found[0])] == found[0]


def is_apart(row: Mapping[str, Any]) -> bool:
    """Whether the prompt is one text that is taken apart."""
    _, prompt = _prompt(row, [])
    return prompt is not None and _answered_text(prompt, "…") is not None


def _before(row: Mapping[str, Any], problems: list[Problem]) -> list[Any]:
    """The turns before an answer that is a list of turns itself."""
    before, prompt = _prompt(row, problems)
    found = None if prompt is None else prompt_apart(prompt, "")
    return found[0] if found else before or []


def _prompt(row: Mapping[str, Any], problems: list[Problem]) -> tuple[list[Any] | None, str | None]:
    """The turns before the answer, from whichever columns have them, or None where no column does; and their text where
    they are made of nothing else."""
    names = _asked(row)
    if not names:
        return None, None
    if names == ("input",) and isinstance(row["input"], dict):  # OpenAI
        return row["input"]["messages"], None
    past = history(row, problems) if HISTORIES[0] in names else []
    value = turn_list(row.get(names[0]))
    if isinstance(value, list) and not several(names[0], value):
        return [*past, *_without_answer(row, value)], None
    parts = [text_of(row, name, problems) for name in names if name not in HISTORIES]
    text = "\n\n".join(filter(str.strip, parts))
    return [*past, user(text)], None if past else text


def _asked(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns that the turns before the answer come from."""
    inner = row.get("input")
    if isinstance(inner, dict) and isinstance(inner.get("messages"), list):
        return ("input",)
    for key in ("prompt", "conversations", "messages"):
        value = turn_list(row.get(key))
        if isinstance(value, list) and not several(key, value):
            if key != "prompt" and isinstance(row.get("prompt"), str) and _without_answer(row, value) == value:
                continue  # a whole conversation about which nothing is known, beside a text that is the question
            return (key, *(HISTORIES if key == "prompt" else ()))
    if row.get("instruction") is not None:  # Alpaca
        return ("instruction", "input", *HISTORIES)
    key = next((key for key in _QUESTIONS if row.get(key) is not None), None)
    return () if key is None else (key, *(("input",) if key != "input" else ()), *HISTORIES)


def _without_answer(row: Mapping[str, Any], turns: list[Any]) -> list[Any]:
    """Turns without a last one that is one of the row's answers, which stand in columns of their own."""
    last = turns[-1] if turns and isinstance(turns[-1], dict) else {}
    answers = [row.get(key) for pair in PAIRS for key in pair if isinstance(row.get(key), str)]
    said = last.get("content", last.get("value"))
    return turns[:-1] if last and said in answers else turns


def columns_read(row: Mapping[str, Any]) -> set[str]:
    """Names of the columns that become part of a pair, or of a judged answer; what only repeats them counts as read."""
    pair, always = filled_pair(row), {*SYSTEMS, *COLUMNS, "tools", "functions"}
    if pair is not None:
        if pair[0] == "messages":
            return always | {*pair}
        return always | {*pair} | _read_with(row, row.get(pair[0]))
    key, mark = _judged(row), marked(row, row.keys()) or MARK
    if key in ("messages", "conversations"):
        return always | {key, mark}
    if _is_alpaca(row, key):
        return always | {"instruction", "input", "context", "passage", key, mark, *HISTORIES}
    return always | {key, mark} | _read_with(row, row.get(key))


def _read_with(row: Mapping[str, Any], answer: Any) -> set[str]:
    """Of the columns beside an answer, those of its prompt: none but a repetition of it where the answer is a whole
    conversation."""
    turns = turn_list(answer)
    if isinstance(turns, str) and (whole := turns_in_text(turns)) and _is_meant(whole, turns, _prompt(row, [])[0]):
        turns = whole
    read: set[str] = set()
    if not isinstance(turns, list) or not _is_whole(turns):
        read, turns = {*_asked(row)}, _prompt(row, [])[0] or []
    return read | {key for key in (*_QUESTIONS, "instruction", "conversations", "messages") if key in row
                   and (isinstance(row[key], str) and _is_repeated(turns, row[key])
                        or _begins(turns, turn_list(row[key])))}


def _begins(turns: list[Any], value: Any) -> bool:
    return isinstance(value, list) and bool(value) and turns[:len(value)] == value


def _tools(row: Mapping[str, Any]) -> Any:
    inner = row.get("input")
    return declared(inner) if isinstance(inner, dict) else declared(row)
