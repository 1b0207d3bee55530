"""``--reward``: what answers are scored by while a model learns from rewards, written as ``exact=1,json=0.5``.

No heavy import: ``gemma-tune --help`` loads this module.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gemma_tune.base.words import near, shown

# Against the row's own answer, and of the answer alone.
AGAINST_REFERENCE, ALONE = ("exact", "contains", "number", "chrf"), ("json", "ended")
WITH_ARGUMENT = ("regex", "command")
NAMES = (*AGAINST_REFERENCE, *ALONE, *WITH_ARGUMENT)
_WEIGHT = re.compile(r"=\s*([-+]?(?:\d+\.?\d*|\.\d+))\s*\Z")
# A comma before a reward's name: in patterns and commands there are commas, too.
_BETWEEN = re.compile(rf",(?=\s*(?:{'|'.join((*AGAINST_REFERENCE, *ALONE))})\s*(?:=|,|\Z)|\s*(?:"
                      rf"{'|'.join(WITH_ARGUMENT)}):)")


@dataclass(frozen=True)
class Reward:
    """One of the things that answers are scored by.

    Attributes:
        name: what logs call it; of several of a kind the later ones have a number.
        kind: one of :data:`NAMES`.
        argument: the pattern, or the program with its arguments; else empty.
        weight: what its score is multiplied by before all are added.
    """

    name: str
    kind: str
    argument: str = ""
    weight: float = 1.0


def apart(texts: Iterable[str]) -> list[str]:
    """What is written with commas between, one by one.

    >>> apart(["exact=2,regex:[a-z]{1,3}", "json"])
    ['exact=2', 'regex:[a-z]{1,3}', 'json']
    """
    return [part for text in texts for part in map(str.strip, _BETWEEN.split(text)) if part]


def read(texts: Sequence[str]) -> list[Reward]:
    """The rewards that are written so, of which :func:`problems_of` finds nothing to say.

    >>> [(one.name, one.argument, one.weight) for one in read(["exact", "regex:a=b=0.5", "regex:c"])]
    [('exact', '', 1.0), ('regex', 'a=b', 0.5), ('regex_2', 'c', 1.0)]
    """
    found: list[Reward] = []
    for text in texts:
        kind, argument, weight = _parts(text)
        number = 1 + sum(one.kind == kind for one in found)
        found.append(Reward(kind if number == 1 else f"{kind}_{number}", kind, argument, weight))
    return found


def _parts(text: str) -> tuple[str, str, float]:
    weight = _WEIGHT.search(text)
    kind, _, argument = (text[:weight.start()] if weight else text).partition(":")
    return kind.strip(), argument.strip(), float(weight[1]) if weight else 1.0


def problems_of(texts: Sequence[str]) -> list[str]:
    """What is wrong with rewards that are written so."""
    found, seen = [], set()
    for text in texts:
        kind, argument, weight = _parts(text)
        if kind not in NAMES:
            found.append(f"reward: {shown(text)} is not one of {', '.join((*AGAINST_REFERENCE, *ALONE))}, "
                         f"regex:PATTERN, command:PROGRAM, each perhaps with a weight, such as exact=2"
                         f"{near(kind, NAMES)}")
        elif (kind in WITH_ARGUMENT) != bool(argument):
            found.append(f"reward: {kind} takes no argument" if argument else
                         f"reward: {kind} needs {'a pattern' if kind == 'regex' else 'a program'} behind a colon")
        elif not weight or not math.isfinite(weight):
            found.append(f"reward: with the weight {weight:g}, {shown(text)} counts for nothing; leave it out")
        elif len(apart([text])) > 1:
            found.append(f"reward: {shown(text)} reads as several; put the comma into brackets, as [,]")
        elif (kind, argument) in seen:
            found.append(f"reward: {shown(text)} is there twice; give it a larger weight instead")
        elif kind == "regex" and (problem := _problem_of(argument)):
            found.append(f"reward: {shown(argument)} is no regular expression: {problem}")
        seen.add((kind, argument))
    return found


def _problem_of(pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as e:
        return str(e)
    return None
