"""``--max-samples``: how many rows are taken of each DATA, written as ``1000``, ``general.jsonl=5000`` or
``general.jsonl=20%``, several of them with commas between."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fractions import Fraction

Most = int | Fraction  # rows, or a share of all rows that are taken
_PART = re.compile(r"\s*(?:(?P<name>.+?)=)??(?P<most>\d{1,18}(?P<share>(?:\.\d{1,6})?%)?)\s*(?:,|\Z)")


def most_rows(text: str | int | None) -> dict[str | None, Most] | None:
    """The numbers and shares by the name of their DATA; None as a name stands for each that is not named.

    Returns:
        None where the text is nothing of that form.

    >>> most_rows("1000,general.jsonl=20%")
    {None: 1000, 'general.jsonl': Fraction(1, 5)}
    """
    if not isinstance(text, str):
        return {} if text is None else {None: text}
    found: dict[str | None, Most] = {}
    at = 0
    while at < len(text):
        part = _PART.match(text, at)
        if part is None or part["name"] in found:
            return None
        found[part["name"]] = Fraction(part["most"][:-1]) / 100 if part["share"] else int(part["most"])
        at = part.end()
    return found or None


def as_text(most: Iterable[tuple[str | None, Most]]) -> str | int:
    """The other way round.

    >>> as_text([(None, 1000), ("general.jsonl", Fraction(1, 5))]), as_text([(None, 7)])
    ('1000,general.jsonl=20%', 7)
    >>> as_text([("a", Fraction(33_333_334, 10 ** 8)), ("b", Fraction(1, 10 ** 8))])
    'a=33.333334%,b=0.000001%'
    """
    parts = [(name, value if isinstance(value, int) else f"{float(100 * value):.6f}".rstrip("0").rstrip(".") + "%")
             for name, value in most]
    if len(parts) == 1 and parts[0][0] is None:
        return parts[0][1]
    return ",".join(f"{value}" if name is None else f"{name}={value}" for name, value in parts)


def problems_of(most: Mapping[str | None, Most] | None, said: str) -> list[str]:
    """What is wrong with such a text.

    Args:
        said: the text as a message shows it.
    """
    if most is None:
        return [f"max_samples: {said} is neither a number of rows, such as 1000, nor NAME=NUMBER or NAME=SHARE% of a "
                "DATA, such as general.jsonl=5000 or general.jsonl=20%, with commas between several, each once"]
    shares = [value for value in most.values() if isinstance(value, Fraction)]
    if isinstance(most.get(None), Fraction):
        return [f"max_samples: {said} is a share, which needs the name of its DATA, such as general.jsonl=20%"]
    if sum(shares) > 1:
        return [f"max_samples: the shares of {said} are more than 100% together"]
    if not all(most.values()):
        return [f"max_samples: {said} takes no row of a DATA; leave that DATA out instead"]
    return []
