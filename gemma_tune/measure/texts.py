"""How near an answer's text comes to another one."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np


def same_text(answer: str, reference: str) -> bool:
    """Whether two answers are the same but for white space and how letters are composed (Unicode NFC).

    >>> same_text("It  rains.\\n", "It rains.")
    True
    """
    return plain_text(answer) == plain_text(reference)


def plain_text(text: str) -> str:
    """A text in which neither white space nor how letters are composed makes a difference."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def chrf(answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """chrF of each answer, 0 to 100: how many runs of up to six characters it shares with the reference.

    sacrebleu's chrF2 (Popović 2015), which needs no words and so serves Chinese as well; of each answer by itself.
    """
    from sacrebleu.metrics import CHRF

    metric = CHRF()
    return np.array([metric.sentence_score(a, [r]).score for a, r in zip(answers, references, strict=True)])
