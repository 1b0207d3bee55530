"""``--reward``: what answers are scored by while a model learns from rewards, written as ``exact=1,json=0.5``, and
with an argument as ``regex=0.5:PATTERN``.

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
VALIDATED = 64  # validation prompts that are answered at most, spread over all: two batches
NAMES = (*AGAINST_REFERENCE, *ALONE, *WITH_ARGUMENT)
# Where a pattern or a command begins: it has commas, colons and equals signs of its own, and goes on to the end.
_TO_THE_END = re.compile(rf"(?:\A|(?<=,))\s*(?:{'|'.join(WITH_ARGUMENT)})\s*(?:=[^,:]*)?:")


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
    """What is written with commas between, one by one; a pattern or a command goes on to the end of its text.

    >>> apart(["exact=2,regex:[a-z]{1,3},json", "json"])
    ['exact=2', 'regex:[a-z]{1,3},json', 'json']
    """
    found: list[str] = []
    for text in texts:
        last = _TO_THE_END.search(text)
        found += [*text[:last.start()].split(","), text[last.start():]] if last else text.split(",")
    return [part for part in map(str.strip, found) if part]


def read(texts: Sequence[str]) -> list[Reward]:
    """The rewards that are written so, of which :func:`problems_of` finds nothing to say.

    >>> [(one.name, one.argument, one.weight) for one in read(["exact", "regex=0.5:a=4", "regex:c"])]
    [('exact', '', 1.0), ('regex', 'a=4', 0.5), ('regex_2', 'c', 1.0)]
    """
    found: list[Reward] = []
    for text in texts:
        kind, weight, argument = _parts(text)
        number = 1 + sum(one.kind == kind for one in found)
        found.append(Reward(kind if number == 1 else f"{kind}_{number}", kind, argument, float(weight or 1)))
    return found


def in_words(texts: Sequence[str]) -> str:
    """How rewards were read.

    >>> in_words(["exact=2", "regex:answer=4"])
    'exact with the weight 2, the pattern `answer=4`'
    """
    called = {"regex": "the pattern", "command": "the program"}
    return ", ".join((f"{called[one.kind]} `{one.argument}`" if one.argument else one.kind)
                     + (f" with the weight {one.weight:g}" if one.weight != 1 else "") for one in read(texts))


def _parts(text: str) -> tuple[str, str, str]:
    """Name, weight and argument as they are written, ``NAME[=WEIGHT][:ARGUMENT]``."""
    named, _, argument = text.partition(":")
    kind, _, weight = named.partition("=")
    return kind.strip(), weight.strip(), argument.strip()


def problems_of(texts: Sequence[str]) -> list[str]:
    """What is wrong with rewards that are written so."""
    found, seen = [], set()
    for text in texts:
        kind, weight, argument = _parts(text)
        if len(apart([text])) > 1:
            found.append(f"reward: {shown(text)} is several; write each of them by itself")
        elif kind not in NAMES:
            found.append(f"reward: {shown(text)} is not one of {', '.join((*AGAINST_REFERENCE, *ALONE))}, "
                         f"regex:PATTERN, command:PROGRAM, each perhaps with a weight, such as exact=2 or "
                         f"regex=0.5:PATTERN{near(kind, NAMES)}")
        elif (kind in WITH_ARGUMENT) != bool(argument):
            found.append(f"reward: {kind} takes no argument" if argument else
                         f"reward: {kind} needs {'a pattern' if kind == 'regex' else 'a program'} behind a colon")
        elif problem := _problem_of_weight(text, weight):
            found.append(f"reward: {problem}")
        elif (kind, argument) in seen:
            found.append(f"reward: {shown(text)} is there twice; give it a larger weight instead")
        elif kind == "regex" and (problem := _problem_of_pattern(argument)):
            found.append(f"reward: {shown(argument)} is no regular expression: {problem}")
        seen.add((kind, argument))
    return found


def _problem_of_weight(text: str, weight: str) -> str | None:
    if "=" not in text.partition(":")[0]:
        return None
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        return f"the weight {shown(weight)} of {shown(text)} is no number; write one such as 0.5"
    return None if value else f"with the weight 0, {shown(text)} counts for nothing; leave it out"


def _problem_of_pattern(pattern: str) -> str | None:
    import regex

    try:
        regex.compile(pattern)
    except (regex.error, OverflowError, RecursionError) as e:
        return str(e)
    return None
