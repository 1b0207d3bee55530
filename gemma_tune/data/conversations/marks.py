"""Which columns of a row say what is better: a pair of answers, or a mark of good or bad beside one answer (KTO)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from gemma_tune.data.conversations.problems import Problem
from gemma_tune.encoding.sequences import MARK

PAIRS = (("chosen", "rejected"), ("preferred_output", "non_preferred_output"), ("preferred", "dispreferred"),
         ("preferred", "rejected"), ("messages", "rejected"), ("messages", "rejected_response"),
         ("messages", "rejected_messages"), ("response", "rejected_response"))
# The marks of a judged answer: LLaMA-Factory's `kto_tag`; and TRL's, which is one only beside these columns.
_LABELS = ("label", "标签")
_BESIDE_LABEL = {("prompt", "completion"): "prompt-completion", ("messages",): "messages",
                 ("conversations",): "sharegpt", ("instruction", "output"): "alpaca",
                 ("instruction", "response"): "alpaca"}
# What people write beside an answer to say that it is good or bad, and that no class of texts is called.
_LIKE_A_MARK = frozenset((
    "good", "bad", "yes", "no", "correct", "incorrect", "right", "wrong", "chosen", "rejected", "like", "dislike",
    "thumbs_up", "thumbs_down", "-1", "好", "差", "坏", "是", "否", "对", "错", "正确", "错误", "优", "劣"))


_ONE_OF_EACH = frozenset(worse for _, worse in PAIRS)  # few rows have one


def pair_in(keys: Collection[str]) -> tuple[str, str] | None:
    """The columns of a better and a worse answer."""
    if _ONE_OF_EACH.isdisjoint(keys):
        return None
    return next((pair for pair in PAIRS if pair[0] in keys and pair[1] in keys), None)


def filled_pair(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """The same of a row, whose columns may be there and empty."""
    filled = {key for key, value in row.items() if value is not None}
    return pair_in(filled) or (None if marked(row, filled) else pair_in(row.keys()))


# What answers were given, beside which a pair whose figures are the same says nothing.
_SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"),
           ("rating_chosen", "rating_rejected"), ("chosen-rating", "rejected-rating"))
_SCORED = frozenset(better for better, _ in _SCORES)


def tied(row: Mapping[str, Any]) -> Problem | None:
    """What is wrong with a pair whose better answer has no higher score than the other one."""
    for better, worse in () if _SCORED.isdisjoint(row) else _SCORES:
        scores = [_score(row.get(better)), _score(row.get(worse))]
        if None not in scores and scores[0] <= scores[1]:  # which is false of nan, as tables write what is missing
            return Problem("preference", f"`{better}` is {row[better]} and `{worse}` is {row[worse]}, so that the one "
                                         "is not the better answer", "leave the pair out, or the scores if they mean "
                                                                     "something else")
    return None


def _score(value: Any) -> float | None:
    """A figure, also in text, as tables (CSV) have it."""
    try:
        return float(value) if isinstance(value, (int, float, str)) else None
    except (ValueError, OverflowError):
        return None


def marked(row: Mapping[str, Any], keys: Collection[str]) -> str | None:
    """The column that marks the row's one answer."""
    label = _label_in(row)
    if MARK not in row and label is None:
        return None
    if _truth(row.get(MARK), numbers=True) is not None:
        return MARK
    beside = _beside(keys)
    # Beside a whole conversation a number may be a class of anything; beside a completion it is TRL's mark.
    numbers = beside == "prompt-completion"
    return label if beside and label and _truth(row[label], numbers) is not None else None


def is_good(row: Mapping[str, Any]) -> bool | None:
    """The mark of a judged answer; None of a pair."""
    mark = None if filled_pair(row) else marked(row, row.keys())
    return None if mark is None else _truth(row[mark], numbers=True)


def unclear(row: Mapping[str, Any]) -> Problem | None:
    """What is wrong with the mark of a row that has one which cannot be read, or two that contradict each other: as a
    conversation without a mark its bad answer would be learned."""
    name = _label_in(row)
    if MARK not in row and name is None:
        return None
    filled = {key for key, value in row.items() if value is not None}
    if pair_in(filled):
        return None
    if MARK in filled and (tag := _truth(row[MARK], numbers=True)) is None:
        return Problem("preference", f"`{MARK}` is {row[MARK]!r}, and a mark is true or false, or 1 or 0",
                       "write true for a good answer and false for a bad one")
    format = _beside(filled)
    if format is None or name is None:
        return None
    label = _truth(row[name], numbers=True)
    if MARK in filled:
        return None if label in (None, tag) else Problem(
            "preference", f"`{MARK}` and `{name}` contradict each other", f"keep one of them: rename `{name}`")
    value = row[name]
    if label is None and _is_like_a_mark(value):
        return Problem("preference", f"`{name}` is {value!r} beside an answer: a mark of good and bad answers is true "
                                     "or false", f"write true and false to learn which answers are good; or --format "
                                                 f"{format} learns every answer, whatever its `{name}`")
    return None


def seeming_mark(row: Mapping[str, Any], apart_from: Collection[str | None]) -> str | None:
    """A column, but those, that may say whether the row's answer is a good one, whatever it is called."""
    return next((key for key, value in row.items() if key not in apart_from and (
        isinstance(value, bool) or _is_like_a_mark(value) or _truth(value, numbers=key in _LABELS) is not None)), None)


def _is_like_a_mark(value: Any) -> bool:
    return (isinstance(value, (str, int)) and not isinstance(value, bool)
            and str(value).strip().lower() in _LIKE_A_MARK)


def _label_in(row: Mapping[str, Any]) -> str | None:
    """The first column of that name that is not empty."""
    return next((name for name in _LABELS if row.get(name) is not None), None)


def _beside(keys: Collection[str]) -> str | None:
    """The format of the conversation that a label stands beside."""
    return next((format for names, format in _BESIDE_LABEL.items() if all(name in keys for name in names)), None)


def _truth(value: Any, numbers: bool) -> bool | None:
    """True or false, also as tables (CSV) have it, and with ``numbers`` as 1 and 0."""
    if isinstance(value, str):
        words = {"true": True, "false": False} | ({"1": True, "0": False} if numbers else {})
        return words.get(value.strip().lower())
    if isinstance(value, bool) or numbers and isinstance(value, (int, float)) and value in (0, 1):
        return bool(value)
    return None
