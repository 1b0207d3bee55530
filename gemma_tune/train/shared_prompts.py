"""Sequences that begin alike, such as those of a pair, as one row in which the beginning is there once.

The answers of a pair follow the same prompt, and what a causal model makes of it does not depend on what follows. So a
prompt goes through the model once instead of twice, forward and backward, and both answers see it, but not each other;
so it is with a group of answers that were sampled for a prompt. Nothing is padded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gemma_tune.train.attention import Span
from gemma_tune.train.loss import IGNORE_INDEX

# Tokens from which on no further group is put into a row. Products are as fast with so many as with more, while a mask
# that transformers makes for windows grows with the square.
LONG = 1024
_SAVES = 0.05  # share of the tokens from which on it is worth a row that other kernels see as one


@dataclass(frozen=True)
class SharedRow:
    """Groups, one after the other; of each its beginning, the rest of the first sequence, and those of the others.

    Attributes:
        input_ids, places: (1, length) int64, token ids and their places in their own sequences.
        positions, targets: (n,) int64, where each learned token is predicted, and which it is. Where several sequences
            of a group learn the same token it is there as often.
        sequence: (n,) int64, the number of the sequence whose token that is.
        spans: what attention keeps apart.
    """

    input_ids: torch.Tensor
    places: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    sequence: torch.Tensor
    spans: list[Span]


def shared_rows(rows: Sequence[dict[str, Any]], sizes: Sequence[int]) -> Iterator[SharedRow]:
    """Sequences as rows of :data:`LONG` tokens or somewhat more.

    Args:
        rows: of ``open_tokens``, those that may begin alike one after the other.
        sizes: how many these are, of each group.
    """
    made = _Row()
    for number, group in _groups(rows, sizes):
        if made.length >= LONG:
            yield made.finished()
            made = _Row()
        made.add(number, group)
    if made.length:
        yield made.finished()


def _groups(rows: Sequence[dict[str, Any]], sizes: Sequence[int]) -> Iterator[tuple[int, Sequence[dict[str, Any]]]]:
    """The number of each group's first sequence, and its sequences."""
    ends = list(itertools.accumulate(sizes))
    for size, end in zip(sizes, ends):
        yield end - size, rows[end - size:end]


def worth_sharing(rows: Sequence[dict[str, Any]], sizes: Sequence[int]) -> bool:
    """Whether the sequences of each group begin alike so far that it saves time."""
    if not rows or len(rows) != sum(sizes):
        return False
    saved = sum(alike(group[0]["input_ids"], other["input_ids"]) for _, group in _groups(rows, sizes)
                for other in group[1:])
    return saved >= _SAVES * sum(len(row["input_ids"]) for row in rows)


def alike(first: Any, second: Any) -> int:
    """How many tokens two sequences have in common from their beginning on."""
    size = min(len(first), len(second))
    [differ] = np.nonzero(np.asarray(first)[:size] != np.asarray(second)[:size])
    return int(differ[0]) if len(differ) else size


class _Row:
    """A row that groups are added to."""

    def __init__(self) -> None:
        self.length = 0
        self.spans: list[Span] = []
        self.parts: dict[str, list[np.ndarray]] = {name: [] for name in ("ids", "places", "where", "targets", "own")}

    def add(self, number: int, group: Sequence[dict[str, Any]]) -> None:
        """Sequences, the first of which has this number; each other one branches off from it."""
        begin, one = self.length, np.asarray(group[0]["input_ids"], np.int64)
        for sequence, row in enumerate(group, number):
            ids = np.asarray(row["input_ids"], np.int64)
            common = 0 if sequence == number else alike(one, ids)
            branch, end = self.length, self.length + len(ids) - common
            if branch < end:
                before = [slice(begin, begin + common)] if common else []
                self.spans.append(Span(slice(branch, end), (*before, slice(branch, end))))
            self._append("ids", ids[common:])
            self._append("places", np.arange(common, len(ids)))
            labels = np.asarray(row["labels"], np.int64)
            [learned] = np.nonzero(labels[1:] != IGNORE_INDEX)  # each is predicted one place before
            self._append("where", np.where(learned < common, begin, branch - common) + learned)
            self._append("targets", labels[learned + 1])
            self._append("own", np.full(len(learned), sequence))
            self.length = end

    def _append(self, name: str, more: np.ndarray) -> None:
        self.parts[name].append(more)

    def finished(self) -> SharedRow:
        ids, places, where, targets, own = (torch.from_numpy(np.concatenate(part)) for part in self.parts.values())
        return SharedRow(ids[None], places[None], where, targets, own, self.spans)
