"""What a preference training learns from, one by one: pairs of answers to the same prompt, or judged answers.

A unit is what a training row is elsewhere: the batch size, epochs and steps count units. Each has one or two token
sequences, see :mod:`gemma_tune.encoding.tokens`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from gemma_tune.encoding.eye import PICTURES
from gemma_tune.encoding.tokens import answers_of, lengths_of, trained_of
from gemma_tune.train.batches import Batch, collate
from gemma_tune.train.loss import IGNORE_INDEX

PAIR = 2
# Share of padding from which on sequences go through the model one after the other. On a CPU a token of padding costs
# as much as any other, and few sequences at once are as fast as many.
_WASTE = 0.05


class Units(torch.utils.data.Dataset):
    """Pairs, or single answers that are good or bad, of prepared sequences.

    Args:
        sequences: of ``open_tokens``; of pairs, each chosen answer before its rejected one.
        size: 2 for pairs, 1 for single answers, which those of pairs can be as well.
        mismatched: whether each unit also has its prompt with the answer to another one, for KTO.

    A unit is a dictionary: ``sequences`` (rows of ``open_tokens``), ``good`` (bool for each), ``reference``
    (log-probability of each answer before the first step, in nats), ``mismatch`` (such a row, or None) with its
    ``mismatch_reference``, and ``input_ids`` and ``labels`` of the first sequence.

    Attributes:
        sizes, trained: tokens of each sequence, and learned ones (int64).
        lengths: tokens of each unit (int64); ``longest`` of the longest sequence.
        reference: of all sequences (float32), see :mod:`gemma_tune.train.reference`; ``mismatch_reference`` of all
            units.
    """

    def __init__(self, sequences: Any, size: int, mismatched: bool = False):
        self.sequences, self.size, self.mismatched = sequences, size, mismatched
        self.good = answers_of(sequences) > 0
        self.sizes, self.trained = lengths_of(sequences), trained_of(sequences)
        self.lengths = self.sizes.reshape(-1, size).sum(1)
        self.longest = int(self.sizes.max(initial=0))
        # Far from its own: answers to the same prompt stand beside each other.
        self.shift = max(1, len(self.sizes) // 2)
        self.reference = np.zeros(len(self.sizes), np.float32)
        self.mismatch_reference = np.zeros(len(self), np.float32)

    def __len__(self) -> int:
        return len(self.sizes) // self.size

    @property
    def liked(self) -> np.ndarray:
        """Learned tokens of each unit's good answers (int64)."""
        return (self.trained * self.good).reshape(-1, self.size).sum(1)

    @property
    def mismatch_sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of each unit's prompt with the answer to another one, and learned ones, where an answer ends its
        sequence, as all but a few do (int64)."""
        own = np.arange(len(self)) * self.size
        prompts, answers = (self.sizes - self.trained)[own], self.trained[(own + self.shift) % len(self.sizes)]
        sizes = np.minimum(prompts + answers, self.longest)
        return sizes, sizes - prompts

    def __getitem__(self, unit: int) -> dict[str, Any]:
        return self.__getitems__([unit])[0]

    def __getitems__(self, units: Sequence[int]) -> list[dict[str, Any]]:
        numbers = [self.size * unit + n for unit in units for n in range(self.size)]
        rows = self._rows(numbers)
        others = self._rows([(n + self.shift) % len(self.sizes) for n in numbers]) if self.mismatched else []
        found = []
        for unit, start in zip(units, range(0, len(numbers), self.size)):
            own = slice(start, start + self.size)
            found.append({
                "sequences": rows[own], "good": self.good[numbers[own]].tolist(),
                "reference": self.reference[numbers[own]].tolist(),
                "mismatch": _mismatch(rows[start], others[start], self.longest) if self.mismatched else None,
                "mismatch_reference": float(self.mismatch_reference[unit]),
                "input_ids": rows[start]["input_ids"], "labels": rows[start]["labels"]})
        return found

    def _rows(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        many = getattr(self.sequences, "__getitems__", None)
        return many(list(numbers)) if many and numbers else [self.sequences[n] for n in numbers]


def _mismatch(own: dict[str, Any], other: dict[str, Any], longest: int) -> dict[str, Any]:
    """The prompt of one sequence with the answer of another, no longer than ``longest`` tokens."""
    (prompt, _), (start, end) = _answer(own), _answer(other)
    ids = np.concatenate([own["input_ids"][:prompt], other["input_ids"][start:end]])[:longest]
    labels = np.concatenate([np.full(prompt, IGNORE_INDEX), other["labels"][start:end]])[:longest]
    return {"input_ids": ids, "labels": labels, PICTURES: own.get(PICTURES, [])}  # which all stand in the prompt


def _answer(row: dict[str, Any]) -> tuple[int, int]:
    """Where an answer begins and ends."""
    learned = np.flatnonzero(np.asarray(row["labels"]) != IGNORE_INDEX)
    return (int(learned[0]), int(learned[-1]) + 1) if len(learned) else (len(row["labels"]), len(row["labels"]))


def collate_units(units: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Units as a batch: they become tensors when they go through the model.

    Returns:
        ``units``, and ``lengths`` (units,) int64, the tokens of each; of units that a loader fetched also the facts of
        the whole step, see :class:`gemma_tune.train.batches.Batch`.
    """
    lengths = [sum(len(row["input_ids"]) for row in unit["sequences"]) for unit in units] or [0]
    batch: dict[str, Any] = {"units": list(units), "lengths": torch.tensor(lengths)}
    if isinstance(units, Batch):
        batch |= {"step_tokens": units.tokens, "step_trained": units.trained, "step_rows": units.step}
    return batch


def pieces_of(batch: dict[str, Any], units: int) -> Iterator[dict[str, Any]]:
    """The batch in parts of at most ``units`` units."""
    for start in range(0, len(batch["units"]), units):
        yield collate_units(batch["units"][start:start + units])


def together(rows: Sequence[dict[str, Any]], at_once: bool) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Sequences as batches, those of similar length together.

    Args:
        at_once: all as one batch, whatever their lengths.

    Yields:
        Numbers of the sequences in ``rows``, and the batch of them.
    """
    order = sorted(range(len(rows)), key=lambda n: (-len(rows[n]["input_ids"]), n))
    while order or at_once:
        taken = len(order) if at_once else _similar([len(rows[n]["input_ids"]) for n in order])
        yield order[:taken], collate([rows[n] for n in order[:taken]])
        order, at_once = order[taken:], False


def _similar(lengths: Sequence[int]) -> int:
    """How many of these, longest first, go together before padding takes too much."""
    tokens = 0
    for n, length in enumerate(lengths):
        tokens += length
        if (n + 1) * lengths[0] > (1 + _WASTE) * tokens:
            return n
    return len(lengths)
