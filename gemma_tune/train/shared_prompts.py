"""Pairs of sequences that begin alike, as one row in which the beginning is there once.

The answers of a pair follow the same prompt, and what a causal model makes of it does not depend on what follows. So a
prompt goes through the model once instead of twice, forward and backward, and both answers see it, but not each other.
Nothing is padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gemma_tune.train.attention import Span
from gemma_tune.train.loss import IGNORE_INDEX

# Tokens from which on no further pair is put into a row. Products are as fast with so many as with more, while a mask
# that transformers makes for windows grows with the square.
LONG = 1024
_SAVES = 0.05  # share of the tokens from which on it is worth a row that other kernels see as one


@dataclass(frozen=True)
class SharedRow:
    """Pairs, one after the other; of each its beginning, the rest of the first sequence, that of the second.

    Attributes:
        input_ids, places: (1, length) int64, token ids and their places in their own sequences.
        positions, targets: (n,) int64, where each learned token is predicted, and which it is. Where both sequences
            of a pair learn the same token it is there twice.
        sequence: (n,) int64, the number of the sequence whose token that is.
        spans: what attention keeps apart.
    """

    input_ids: torch.Tensor
    places: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    sequence: torch.Tensor
    spans: list[Span]


def shared_rows(rows: Sequence[dict[str, Any]]) -> Iterator[SharedRow]:
    """Sequences, of which each even one may begin like the next, as rows of :data:`LONG` tokens or somewhat more.

    Args:
        rows: of ``open_tokens``, an even number.
    """
    made = _Row()
    for number in range(0, len(rows), 2):
        if made.length >= LONG:
            yield made.finished()
            made = _Row()
        made.add(number, rows[number], rows[number + 1])
    if made.length:
        yield made.finished()


def worth_sharing(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether sequences, taken in pairs, begin alike so far that it saves time."""
    if not rows or len(rows) % 2:
        return False
    saved = sum(alike(a["input_ids"], b["input_ids"]) for a, b in zip(rows[0::2], rows[1::2]))
    return saved >= _SAVES * sum(len(row["input_ids"]) for row in rows)


def alike(first: Any, second: Any) -> int:
    """How many tokens two sequences have in common from their beginning on."""
    size = min(len(first), len(second))
    [differ] = np.nonzero(np.asarray(first)[:size] != np.asarray(second)[:size])
    return int(differ[0]) if len(differ) else size


class _Row:
    """A row that pairs are added to."""

    def __init__(self) -> None:
        self.length = 0
        self.spans: list[Span] = []
        self.parts: dict[str, list[np.ndarray]] = {name: [] for name in ("ids", "places", "where", "targets", "own")}

    def add(self, number: int, first: dict[str, Any], second: dict[str, Any]) -> None:
        """Two sequences; the first has this number."""
        one, other = (np.asarray(row["input_ids"], np.int64) for row in (first, second))
        begin, common = self.length, alike(one, other)
        fork, branch = begin + common, begin + len(one)
        end = branch + len(other) - common
        self.spans.append(Span(slice(begin, branch), (slice(begin, branch),)))
        if branch < end:
            self.spans.append(Span(slice(branch, end), (slice(begin, fork), slice(branch, end))))
        self._append("ids", one, other[common:])
        self._append("places", np.arange(len(one)), np.arange(common, len(other)))
        for sequence, row, rest in ((number, first, fork), (number + 1, second, branch)):
            labels = np.asarray(row["labels"], np.int64)
            [learned] = np.nonzero(labels[1:] != IGNORE_INDEX)  # each is predicted one place before
            self._append("where", np.where(learned < common, begin, rest - common) + learned)
            self._append("targets", labels[learned + 1])
            self._append("own", np.full(len(learned), sequence))
        self.length = end

    def _append(self, name: str, *more: np.ndarray) -> None:
        self.parts[name] += more

    def finished(self) -> SharedRow:
        ids, places, where, targets, own = (torch.from_numpy(np.concatenate(part)) for part in self.parts.values())
        return SharedRow(ids[None], places[None], where, targets, own, self.spans)
