"""A few shapes for all batches of a training, so that a step that was captured once can be replayed for many.

Which rows go through the model together is known for the whole training before it begins (see
:class:`gemma_tune.train.batches.LengthGroupedBatches`), so the shapes are chosen from exactly those batches: lengths at
which padding costs least, and for each length a few numbers of trained positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma_tune.base.words import counted

GOAL = 0.05  # of the products of a training that may go into padding to a bucket, before another bucket is added
MOST_LENGTHS, MOST_COUNTS = 14, 2
STEP = 8  # lengths are multiples of it, as matrix units like
# A capture takes about as long as two steps that are not captured, and a replay is never slower than such a step.
WORTH = 3
WIDER = 2.0  # how much more work than its own a piece may cause in a larger bucket before it rather runs by itself


@dataclass(frozen=True)
class Bucket:
    """A shape: rows that go through the model at once, tokens of each, trained positions of all, and tokens of all that
    stand for parts of pictures."""

    rows: int
    length: int
    positions: int
    parts: int = 0

    def holds(self, rows: int, length: int, positions: int, parts: int = 0) -> bool:
        """Whether a piece of that size can be padded to this shape."""
        return (rows <= self.rows and length <= self.length and positions <= self.positions and parts <= self.parts)


@dataclass(frozen=True)
class Costs:
    """Work of one padded token in the layers, and of one trained position in the head, in the same unit."""

    token: float
    position: float

    def of(self, rows: int, length: int, positions: int) -> float:
        """Work of a piece."""
        return rows * length * self.token + positions * self.position


def costs_of(causal_lm: Any) -> Costs:
    """Of a model: numbers of its linear layers, and of its head. Each is gone through forward and backward once."""
    import torch

    head = causal_lm.get_output_embeddings()
    linear = sum(m.in_features * m.out_features for m in causal_lm.modules()
                 if isinstance(m, torch.nn.Linear) and m is not head)
    text = causal_lm.config.get_text_config()
    return Costs(linear, text.vocab_size * text.hidden_size)


def pieces_of(batches: Iterable[Sequence[int]], micro_batch: int) -> Iterator[Any]:
    """The rows of each piece of these batches, in which they go through the model."""
    return (batch[n:n + micro_batch] for batch in batches for n in range(0, len(batch), micro_batch))


def shapes_of_pieces(batches: Iterable[Sequence[int]], sequences: int, lengths: np.ndarray, trained: np.ndarray,
                     micro_batch: int, parts: np.ndarray | None = None) -> np.ndarray:
    """What goes through the model at once, piece by piece.

    Args:
        batches: rows of this process's forward passes, see ``Share.batches``; some may be empty.
        sequences: of each row: two where it is a pair.
        lengths, trained: tokens of each row's longest sequence, and how many of all are trained.
        parts: tokens of each row that stand for parts of pictures, where these are to be counted.

    Returns:
        (pieces, 3) int64: sequences, tokens of the longest, trained positions; with ``parts`` (pieces, 4), their sum.
    """
    more = [] if parts is None else [parts]
    found = [(sequences * len(part), lengths[part].max(), *(counts[part].sum() for counts in (trained, *more)))
             for part in pieces_of(batches, micro_batch)]
    return np.array(found, np.int64).reshape(-1, 3 + len(more))


class Buckets:
    """The shapes of a training, and how often each is met.

    Args:
        shapes: of its pieces, see :func:`shapes_of_pieces`.
        costs: what decides between shapes.

    Attributes:
        counts: how often each bucket is met; those met too rarely to pay are not among them.
    """

    def __init__(self, shapes: np.ndarray, costs: Costs):
        self.costs = costs
        self.counts: dict[Bucket, int] = {}
        if not len(shapes):
            return
        rows = int(shapes[:, 0].max())
        rounded = _rounded(shapes[:, 1], STEP)
        lengths = levels(rounded, np.full(len(shapes), rows), GOAL, MOST_LENGTHS)
        lengths = _without_rare(lengths, rounded)
        at = np.searchsorted(lengths, rounded)
        for n, length in enumerate(lengths):
            counts = _rounded(np.maximum(1, shapes[at == n, 2]), STEP)
            if len(counts) < WORTH:  # only the longest: nothing else holds it
                continue
            sizes = levels(counts, np.ones_like(counts), GOAL, min(MOST_COUNTS, max(1, len(counts) // 8)))
            sizes = _without_rare(sizes, counts)
            # Room for what is seen costs no products: there is as much as any piece of that length needs.
            parts = int(_rounded(shapes[at == n, 3], STEP).max()) if shapes.shape[1] > 3 else 0
            self.counts |= {Bucket(rows, int(length), int(size), parts): int(m)
                            for size, m in zip(sizes, _met(sizes, counts))}

    @property
    def largest(self) -> Bucket | None:
        """The one that needs most memory."""
        return max(self.counts, key=lambda b: (b.rows * b.length, b.positions), default=None)

    def find(self, rows: int, length: int, positions: int, parts: int = 0) -> Bucket | None:
        """The bucket in which a piece causes the least work; None if it is better off by itself."""
        costs = self.costs
        holding = [b for b in self.counts if b.holds(rows, length, positions, parts)]
        best = min(holding, key=lambda b: costs.of(b.rows, b.length, b.positions), default=None)
        if best and costs.of(best.rows, best.length, best.positions) > WIDER * costs.of(rows, length, positions):
            return None
        return best

    def described(self, padding: float, by_itself: int, pieces: int, what: str = "steps") -> str:
        """The choice in one line, with what :meth:`fit` found for so many pieces."""
        rest = f"; {by_itself:,} of {pieces:,} pieces fit none" if by_itself else ""
        return (f"{what} are captured in {counted(len(self.counts), 'shape')} of up to "
                f"{max(b.length for b in self.counts):,} tokens; padding adds {padding:.0%}{rest}")

    def fit(self, shapes: np.ndarray, tokens: int) -> tuple[float, int]:
        """Share that padding adds to ``tokens``, the real ones of all pieces of these shapes, and how many of the
        pieces no bucket holds."""
        padded = by_itself = 0
        different, met = np.unique(shapes, axis=0, return_counts=True)
        for (rows, length, *more), times in zip(different.tolist(), met.tolist()):
            bucket = self.find(rows, length, *more)
            padded += times * (bucket.rows * bucket.length if bucket else rows * length)
            by_itself += 0 if bucket else times
        return padded / tokens - 1, by_itself


def _met(sizes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """How many of the values are rounded up to each of the ascending sizes."""
    return np.bincount(np.searchsorted(sizes, values), minlength=len(sizes))


def _without_rare(sizes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Levels that are met often enough to pay, with those that the others before them are rounded up to; the largest
    always stays."""
    kept, waiting = [], 0
    for size, times in zip(sizes[:-1], _met(sizes, values)[:-1]):
        waiting += times
        if waiting >= WORTH:
            kept.append(size)
            waiting = 0
    return np.array([*kept, sizes[-1]], np.int64)


def _rounded(values: np.ndarray, step: int) -> np.ndarray:
    return -(-values // step) * step


def levels(values: np.ndarray, weights: np.ndarray, goal: float, most: int) -> np.ndarray:
    """The fewest values to which all can be rounded up at the cost of ``goal``, at most ``most`` of them.

    For each number of levels those that add least, by dynamic programming over the different values.

    Args:
        values: positive integers.
        weights: how much each counts.
        goal: share of the weighted sum that rounding up may add.

    Returns:
        The levels, ascending; the last is the largest value.
    """
    different, where = np.unique(values, return_inverse=True)
    weight = np.bincount(where.ravel(), weights=weights)
    total = float((different * weight).sum())
    before = np.concatenate([[0.0], np.cumsum(weight)])  # weight of all values up to here
    # least[j]: the padded sum of the first j values if the last of them is a level.
    least = different * before[1:]
    choice = [np.full(len(different), -1)]
    number = 1
    while number < most and least[-1] > (1 + goal) * total and number < len(different):
        # cost[i, j]: levels end at i, and values i+1 … j are rounded up to value j.
        cost = least[:, None] + different[None, :] * (before[None, 1:] - before[1:, None])
        cost[np.tril_indices(len(different))] = np.inf
        choice.append(cost.argmin(0))
        least = cost.min(0)
        number += 1
    found, at = [], len(different) - 1
    for chosen in reversed(choice):
        found.append(different[at])
        at = chosen[at]
        if at < 0:
            break
    return np.array(found[::-1], np.int64)
