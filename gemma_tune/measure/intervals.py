"""Bootstrap intervals over rows: how far a figure may be off because of which rows were measured.

Percentile intervals (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). The base and the tuned
model are drawn with the same rows, so what is hard about a row cancels out of their difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
DRAWS = 2000
_CELLS = 1 << 22  # of the matrix of draws by rows that are made at a time: 32 MB


@dataclass(frozen=True)
class Interval:
    """A figure, and where it lies with a probability of 95 %; ``low`` and ``high`` are None of a single row."""

    value: float
    low: float | None
    high: float | None

    def as_json(self) -> list[float | None]:
        """``[value, low, high]``."""
        return [self.value, self.low, self.high]


@dataclass(frozen=True)
class Compared:
    """A figure of the base and the tuned model on the same rows, and their difference, tuned less base."""

    base: Interval
    tuned: Interval
    difference: Interval
    rows: int

    def as_json(self) -> dict[str, object]:
        """As the manifest keeps it."""
        return {"base": self.base.as_json(), "tuned": self.tuned.as_json(), "difference": self.difference.as_json(),
                "rows": self.rows}


def compare(base: np.ndarray, tuned: np.ndarray, weights: np.ndarray | None = None, seed: int = 0,
            change: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> Compared:
    """Compare sums of rows, divided by the sum of their weights: a mean per token, or per row.

    Args:
        base: float (rows,), and ``tuned`` of the same rows.
        weights: (rows,), such as tokens; 1 for each row where none are given.
        change: what is made of the mean, such as ``np.exp`` for a perplexity.
    """
    rows = len(base)
    weights = np.ones(rows) if weights is None else np.asarray(weights, np.float64)
    parts = np.stack([np.asarray(base, np.float64), np.asarray(tuned, np.float64), weights], 1)
    whole = parts.sum(0)
    values = [float(change(whole[n] / whole[2])) for n in (0, 1)]
    if rows < 2:
        return Compared(*(Interval(v, None, None) for v in (*values, values[1] - values[0])), rows)
    random = np.random.default_rng(seed)
    step = max(1, _CELLS // rows)
    drawn = np.concatenate([
        random.multinomial(rows, np.full(rows, 1 / rows), size=min(step, DRAWS - start)) @ parts
        for start in range(0, DRAWS, step)])
    first, second = (change(drawn[:, n] / drawn[:, 2]) for n in (0, 1))
    return Compared(_interval(values[0], first), _interval(values[1], second),
                    _interval(values[1] - values[0], second - first), rows)


def _interval(value: float, draws: np.ndarray) -> Interval:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))
