"""The ends of texts for validation, where there are so few of them that a whole one is too much to keep aside: what
comes behind is what a model that goes on writing has not seen."""

from __future__ import annotations

import numpy as np

MOST = 0.2  # of the texts that are kept aside whole, where no larger share is asked for
SHORTEST = 64  # tokens of an end that says something
_BORDERS = ("\n\n", "\n", "。", " ")  # behind which an end may begin, the best first


def are_few(texts: int, share: float) -> bool:
    """Whether one of so many texts is more than is kept aside.

    >>> are_few(1, 0.1), are_few(4, 0.1), are_few(5, 0.1), are_few(3, 0.4)
    (True, True, False, False)
    """
    return 0 < texts * max(share, MOST) < 1


def have_an_end(tokens: np.ndarray, share: float) -> np.ndarray:
    """Which texts are long enough for their end to be kept aside.

    Args:
        tokens: of each text, shape (texts,); 0 where it is none.

    Returns:
        bool, shape (texts,).
    """
    return share * tokens >= SHORTEST


def divided(text: str, share: float) -> tuple[str, str]:
    """A text's beginning, and its end of about that share of its characters: from a paragraph's border on, or a line's,
    a sentence's or a word's, where one is near. Together they are the text."""
    length = len(text.rstrip())
    wanted, reach = round(length * (1 - share)), int(length * share / 4)
    for border in _BORDERS:
        found = (text.rfind(border, wanted - reach, wanted), text.find(border, wanted, wanted + reach))
        if places := [place + len(border) for place in found if place >= 0]:
            wanted = min(places, key=lambda place: abs(place - wanted))
            break
    return text[:wanted], text[wanted:]
