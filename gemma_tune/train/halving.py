"""Successive halving: many candidates for a few steps, the better half of them for twice as many, and so on.

Jamieson and Talwalkar 2016 (https://arxiv.org/abs/1502.07943). Each rung trains anew with a schedule of its own length,
because a learning rate is judged by where its whole schedule ends. What is here knows of times and losses alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gemma_tune.config.stages import TrainConfig, TuneConfig

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the learning rate that train would take
LEAST_STEPS = 10  # of which a warm-up is one: fewer say more about the rows than about the rate


@dataclass(frozen=True)
class Candidate:
    """What is tried: everything else is as in the training that it is for.

    Attributes:
        rank: 0 where all weights are trained.
    """

    learning_rate: float
    rank: int

    def __str__(self) -> str:
        return f"learning rate {self.learning_rate:g}" + (f", rank {self.rank}" if self.rank else "")


@dataclass(frozen=True)
class Rung:
    """So many candidates, each trained for so many steps."""

    candidates: int
    steps: int


@dataclass(frozen=True)
class Costs:
    """Seconds that things take here.

    Attributes:
        step: of a training step.
        evaluation: of looking at the validation sequences.
        every: steps from one evaluation to the next; there is one at the end as well.
        change: of making an adapter of another rank.
    """

    step: float
    evaluation: float
    every: int
    change: float = 0.0

    def trial(self, steps: int) -> float:
        """Of training one candidate."""
        return steps * self.step + -(-steps // self.every) * self.evaluation

    def rungs(self, rungs: Sequence[Rung], ranks: int = 1) -> float:
        """Of all these rungs, in each of which candidates have so many different ranks."""
        return sum(rung.candidates * self.trial(rung.steps) + (ranks if ranks > 1 else 0) * self.change
                   for rung in rungs)


def candidates_for(config: TrainConfig, settings: TuneConfig) -> list[Candidate]:
    """All that are to be tried, those that are nearest to the training's own settings first."""
    own = config.learning_rate or 0.0
    rates = settings.learning_rates or tuple(float(f"{min(1.0, own * factor):.3g}") for factor in FACTORS)
    ranks = (0,) if config.full else settings.ranks or (config.rank,)
    found = {Candidate(rate, rank) for rank in ranks for rate in rates}
    return sorted(found, key=lambda c: (_apart(c.learning_rate, own) + _apart(c.rank, config.rank), c.learning_rate,
                                        c.rank))


def _apart(one: float, other: float) -> float:
    return round(abs(math.log(one / other)), 6) if one > 0 and other > 0 else 0.0


def plan_rungs(count: int, seconds: float, costs: Costs, *, least: int, most: int, ranks: int = 1) -> list[Rung]:
    """The longest rungs that fit into the time, as many of them as do; none where not even one does.

    Args:
        count: candidates of the first of them.
        least: steps of the first rung, at least.
        most: steps after which a training is at its end; the rung that reaches them is the last.
        ranks: different ones of the candidates.
    """
    sizes = [count]
    while sizes[-1] > 2:
        sizes.append(-(-sizes[-1] // 2))
    for number in range(len(sizes), 0, -1):
        low, high, found = least, most, None
        while low <= high:
            steps = (low + high) // 2
            rungs = list(_rungs(sizes[:number], steps, most))
            if costs.rungs(rungs, ranks) <= seconds:
                found, low = rungs, steps + 1
            else:
                high = steps - 1
        if found:
            return found
    return []


def _rungs(sizes: Sequence[int], steps: int, most: int) -> Iterator[Rung]:
    for size in sizes:
        yield Rung(size, min(steps, most))
        if steps >= most:
            return
        steps *= 2


def plan(candidates: Sequence[Candidate], seconds: float, costs: Costs, most: int) -> tuple[int, list[Rung]]:
    """How many candidates there is time for, and the rungs; (0, []) where it does not suffice for two.

    Args:
        candidates: in the order in which they are kept.
        most: steps of the whole training.
    """
    for count in range(len(candidates), 1, -1):
        ranks = len({candidate.rank for candidate in candidates[:count]})
        if rungs := plan_rungs(count, seconds, costs, least=min(LEAST_STEPS, most), most=most, ranks=ranks):
            return count, rungs
    return 0, []


def least_seconds(costs: Costs, most: int) -> float:
    """Of trying two candidates for as few steps as make sense."""
    return 2 * costs.trial(min(LEAST_STEPS, most)) + costs.change
