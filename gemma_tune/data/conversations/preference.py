"""Rows with a better and a worse answer: recognised, and on request the better one is learned."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from gemma_tune.data.conversations.layouts import (
    Draft,
    assistant,
    declared,
    history,
    said,
    text_of,
    turn_list,
    user,
    with_system,
)
from gemma_tune.data.conversations.problems import Problem, several

PAIRS = (("chosen", "rejected"), ("preferred_output", "non_preferred_output"), ("preferred", "dispreferred"),
         ("preferred", "rejected"))
# Anthropic's HH-RLHF keeps a whole conversation in one text.
_HH = re.compile(r"(?:\A|\n\n)[ \t]*(Human|Assistant):")


def is_preference(row: Mapping[str, Any], keys: Collection[str]) -> bool:
    """Whether a row holds a better and a worse answer, or one answer that is marked as either (KTO)."""
    return _pair(keys) is not None or _is_judged(row, keys)


def _pair(keys: Collection[str]) -> tuple[str, str] | None:
    return next((pair for pair in PAIRS if pair[0] in keys and pair[1] in keys), None)


def _filled_pair(row: Mapping[str, Any]) -> tuple[str, str] | None:
    filled = {key for key, value in row.items() if value is not None}
    return _pair(filled) or (None if _is_judged(row, filled) else _pair(row.keys()))


def _is_judged(row: Mapping[str, Any], keys: Collection[str]) -> bool:
    return isinstance(row.get("label"), bool) and "prompt" in keys and "completion" in keys


def refusal(row: Mapping[str, Any]) -> Problem:
    """Why preference rows are not learned unless that is asked for."""
    pair = _filled_pair(row)
    what = f"`{pair[0]}` and `{pair[1]}`" if pair else "`completion` with a `label`"
    return Problem("preference", f"this is a preference row ({what}): it says which answer is better, while training "
                                 "learns every answer that it is given",
                   "use --take chosen to learn the better answers")


def chosen(row: Mapping[str, Any], problems: list[Problem]) -> Draft:
    """The conversation that ends with the better answer."""
    pair = _filled_pair(row)
    if pair is None:
        if row["label"] is not True:
            problems.append(Problem("preference", "the answer is marked as a bad one (`label` is false)",
                                    "leave the row out"))
        key, answer = "completion", turn_list(row.get("completion"))
    else:
        key, answer = pair[0], turn_list(row.get(pair[0]))
    if not isinstance(answer, (list, dict, type(None))) or several(key, answer):
        answer = said(f"`{key}`", answer, problems)
    if isinstance(answer, str):
        turns = _from_text(row, key, answer, problems)
    else:
        answer = [answer] if isinstance(answer, dict) else answer
        whole = not isinstance(answer, list) or _role(answer) in ("user", "human", "system", "developer")
        turns = answer if whole else [*(_prompt(row, problems) or []), *answer]
    return Draft(with_system(turns, row, problems), key, _tools(row))


def _role(messages: list[Any]) -> Any:
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    return first.get("role") or first.get("from")


def _from_text(row: Mapping[str, Any], key: str, answer: str, problems: list[Problem]) -> list[Any]:
    if _HH.match(answer):
        return _spoken(answer)
    prompt = row.get("prompt")
    if isinstance(prompt, str) and _HH.match(prompt):
        return _spoken(f"{prompt.rstrip()} {answer.removeprefix(' ')}")
    before = _prompt(row, problems)
    if before is None:
        problems.append(Problem("no_messages", f"`{key}` is text, and there is no `prompt` that it answers",
                                "add a column `prompt`"))
    return [*(before or [user("…")]), assistant(answer)]


def _spoken(text: str) -> list[dict[str, str]]:
    pieces = _HH.split(text)
    # A space stands between a speaker and what is said.
    return [(user if who == "Human" else assistant)(words.removeprefix(" "))
            for who, words in zip(pieces[1::2], pieces[2::2])]


def _prompt(row: Mapping[str, Any], problems: list[Problem]) -> list[Any] | None:
    """The turns before the answer, from whichever column has them; None where no column does."""
    inner = row.get("input")
    if isinstance(inner, dict) and isinstance(inner.get("messages"), list):  # OpenAI
        return inner["messages"]
    for key in ("prompt", "conversations", "messages"):
        value = turn_list(row.get(key))
        if isinstance(value, list) and not several(key, value):
            return value
    if row.get("instruction") is not None:  # Alpaca
        parts = [text_of(row, key, problems) for key in ("instruction", "input")]
        return [*history(row, problems), user("\n\n".join(filter(str.strip, parts)))]
    key = next((key for key in ("prompt", "question", "query") if row.get(key) is not None), None)
    return None if key is None else [user(text_of(row, key, problems))]


def _tools(row: Mapping[str, Any]) -> Any:
    inner = row.get("input")
    return declared(inner) if isinstance(inner, dict) else declared(row)
