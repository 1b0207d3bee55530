"""What answers are worth: the scores that ``--reward`` names, of each answer, and their sum by weight."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import regex

from gemma_tune.base.errors import WorkFailed
from gemma_tune.base.words import shown
from gemma_tune.config.rewards import Reward
from gemma_tune.measure.texts import chrf, plain_text, same_text
from gemma_tune.rewards.last_number import last_number
from gemma_tune.rewards.program import GO_ON, RewardProgram

MOST_SECONDS = 10.0  # that a pattern is looked for in one answer


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
    wanted = plain_text(one.reference)
    return float(bool(wanted) and wanted in plain_text(one.answer))


def _found(pattern: regex.Pattern, answer: str) -> float:
    try:
        return float(pattern.search(answer, timeout=MOST_SECONDS) is not None)
    except TimeoutError as e:
        raise WorkFailed(f"--reward regex:{pattern.pattern} was looked for over {MOST_SECONDS:g} seconds in the answer "
                         f"{shown(answer)}", "write it without choices that match the same, and without a repetition "
                         "in what is repeated") from e


_PLAIN: dict[str, Callable[[Scored], float]] = {
    "exact": lambda one: float(same_text(one.answer, one.reference)), "contains": _contains, "number": _number,
    "json": _json, "ended": lambda one: float(one.ended),
    "chrf": lambda one: float(chrf([one.answer], [one.reference])[0]) / 100}


class Scorer:
    """Scores answers; a context manager, as programs of ``command:`` run while it lasts.

    Args:
        rewards: what for.
        then: what to do once a program that failed is mended, for hints.

    Raises:
        UserError: a program cannot be started.
    """

    def __init__(self, rewards: Sequence[Reward], then: str = GO_ON):
        self.rewards, self._then = list(rewards), then
        self.weights = np.array([reward.weight for reward in self.rewards])
        self._programs: list[RewardProgram] = []
        try:
            self._of = [self._function(reward) for reward in self.rewards]
        except BaseException:
            self.close()
            raise

    def _function(self, reward: Reward) -> Callable[[Sequence[Scored]], Sequence[float]]:
        if reward.kind == "command":
            program = RewardProgram(reward.argument, self._then)
            self._programs.append(program)
            return lambda all_of_them: program.scores([_as_json(one) for one in all_of_them])
        if reward.kind == "regex":
            pattern = regex.compile(reward.argument)
            return lambda all_of_them: [_found(pattern, one.answer) for one in all_of_them]
        score = _PLAIN[reward.kind]
        return lambda all_of_them: [score(one) for one in all_of_them]

    def scores(self, answers: Sequence[Scored]) -> np.ndarray:
        """Of each answer by each reward (answers, rewards), float64, without their weights.

        Raises:
            WorkFailed: a program did not say what an answer is worth, or a pattern was looked for too long.
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
    """What a program reads of an answer, on one line, in ASCII: it may read as its locale does."""
    value = {"prompt": list(one.messages), **({"tools": list(one.tools)} if one.tools else {}),
             "answer": one.answer, "reference": one.reference, "ended": one.ended}
    return json.dumps(value)
