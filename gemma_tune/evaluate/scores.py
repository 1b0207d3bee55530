"""What is told of an answer: whether it is the one that the row has, how near it comes, and whether it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma_tune.measure.texts import chrf, same_text

LEAST_REPEATS, LEAST_REPEATED = 3, 24  # times and characters from which on an answer repeats itself
_MOST_LOOKED_AT = 20_000  # characters of an answer's end


def repeats_itself(text: str) -> bool:
    """Whether a text ends in a loop: the same stretch, three times or more and of 24 characters or more together.

    The last repetition may be cut off in the middle, where an answer ran into its limit.

    >>> repeats_itself("It is so. " + "A bond is a bond. " * 3), repeats_itself("Yes, yes, it is.")
    (True, False)
    """
    ends = text.rstrip()[-_MOST_LOOKED_AT:][::-1]
    # Less one: the last repetition has no white space behind it any more.
    return any(period + same >= max(LEAST_REPEATS * period - 1, LEAST_REPEATED)
               for period, same in enumerate(_same_as_start(ends)) if period)


def _same_as_start(text: str) -> list[int]:
    """For each place how many characters from there on are those that the text begins with (the Z algorithm)."""
    found = [0] * len(text)
    left = right = 0
    for n in range(1, len(text)):
        if n < right:
            found[n] = min(right - n, found[n - left])
        while n + found[n] < len(text) and text[found[n]] == text[n + found[n]]:
            found[n] += 1
        if n + found[n] > right:
            left, right = n, n + found[n]
    return found


def per_answer(answers: Sequence[Any], questions: Sequence[Any], judge: Any) -> dict[str, np.ndarray]:
    """Figures of each answer, float64: by their names, arrays of the questions that they can be told of.

    Args:
        answers: of one model, :class:`gemma_tune.answers.generation.Answer`.
        questions: :class:`gemma_tune.evaluate.rows.Question` of the same length.
        judge: whether an answer has the form that the built-in example teaches.
    """
    found = {"ended": np.array([a.ended for a in answers], np.float64),
             "length": np.array([a.tokens for a in answers], np.float64),
             "repeats": np.array([repeats_itself(a.text) for a in answers], np.float64)}
    known = [(a, q.reference) for a, q in zip(answers, questions, strict=True) if q.reference is not None]
    if known:
        found["exact_match"] = np.array([a.ended and same_text(a.text, r) for a, r in known], np.float64)
        found["chrf"] = chrf([a.text for a, _ in known], [r for _, r in known])
    judged = [a for a, q in zip(answers, questions) if q.judged]
    if judged:
        found["in_form"] = np.array([a.ended and judge(a.text) for a in judged], np.float64)
    return found
