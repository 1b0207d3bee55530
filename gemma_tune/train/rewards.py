"""What answers are worth: the scores that ``--reward`` names, of each answer, and their sum by weight."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from gemma_tune.config.rewards import Reward
from gemma_tune.measure.texts import chrf, plain_text, same_text
from gemma_tune.train.reward_program import RewardProgram

# A number as people write it: thousands in groups of three, a fraction or decimals. A hyphen between two words or
# numbers is no sign.
_NUMBER = re.compile(r"(?:(?<![\w)\]])[-−])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[/⁄]\d+)?")
_AS_PYTHON = str.maketrans({",": None, "−": "-", "⁄": "/"})
_LONGEST = 1000  # characters of one that is read as such


@dataclass(frozen=True)
class Scored:
    """An answer, and what it is scored by.

    Attributes:
        messages: turns of the prompt; ``tools`` are those on offer.
        answer: the text that the model said, without what it thought before.
        reference: what the row says there.
        ended: whether the model ended the answer itself.
    """

    messages: Sequence[dict[str, Any]]
    answer: str
    reference: str
    ended: bool
    tools: Sequence[dict[str, Any]] | None = None


def last_number(text: str) -> Fraction | None:
    """The value of the last number in a text; None where there is none, or only one divided by zero.

    >>> last_number("so 1,200 - 3 = 1,197."), last_number("about 3/4"), last_number("minus -0.50"), last_number("no")
    (Fraction(1197, 1), Fraction(3, 4), Fraction(-1, 2), None)
    """
    found = _NUMBER.findall(unicodedata.normalize("NFKC", text))
    if not found or len(found[-1]) > _LONGEST:
        return None
    number, _, below = found[-1].translate(_AS_PYTHON).partition("/")
    return Fraction(number) / int(below or 1) if int(below or 1) else None


def _number(one: Scored) -> float:
    wanted = last_number(one.reference)
    return float(wanted is not None and last_number(one.answer) == wanted)


def _json(one: Scored) -> float:
    try:
        json.loads(one.answer, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _contains(one: Scored) -> float:
    return float(plain_text(one.reference) in plain_text(one.answer))


_PLAIN: dict[str, Callable[[Scored], float]] = {
    "exact": lambda one: float(same_text(one.answer, one.reference)), "contains": _contains, "number": _number,
    "json": _json, "ended": lambda one: float(one.ended),
    "chrf": lambda one: float(chrf([one.answer], [one.reference])[0]) / 100}


class Scorer:
    """Scores answers; a context manager, as programs of ``command:`` run while it lasts.

    Args:
        rewards: what for.

    Raises:
        UserError: a program cannot be started.
    """

    def __init__(self, rewards: Sequence[Reward]):
        self.rewards = list(rewards)
        self.weights = np.array([reward.weight for reward in self.rewards])
        self._programs: list[RewardProgram] = []
        try:
            self._of = [self._function(reward) for reward in self.rewards]
        except BaseException:
            self.close()
            raise

    def _function(self, reward: Reward) -> Callable[[Sequence[Scored]], Sequence[float]]:
        if reward.kind == "command":
            program = RewardProgram(reward.argument)
            self._programs.append(program)
            return lambda all_of_them: program.scores([_as_json(one) for one in all_of_them])
        if reward.kind == "regex":
            pattern = re.compile(reward.argument)
            return lambda all_of_them: [float(pattern.search(one.answer) is not None) for one in all_of_them]
        score = _PLAIN[reward.kind]
        return lambda all_of_them: [score(one) for one in all_of_them]

    def scores(self, answers: Sequence[Scored]) -> np.ndarray:
        """Of each answer by each reward (answers, rewards), float64, without their weights.

        Raises:
            WorkFailed: a program did not say what an answer is worth.
        """
        found = [score(answers) for score in self._of]
        return np.array(found, np.float64).reshape(len(self.rewards), len(answers)).T

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the programs."""
        for program in self._programs:
            program.close()


def _as_json(one: Scored) -> str:
    """What a program reads of an answer, on one line."""
    value = {"prompt": list(one.messages), **({"tools": list(one.tools)} if one.tools else {}),
             "answer": one.answer, "reference": one.reference, "ended": one.ended}
    return json.dumps(value, ensure_ascii=False)
