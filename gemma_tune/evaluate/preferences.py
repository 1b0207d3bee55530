"""Whether the better answer is the likelier one: of pairs of answers, and of answers that are marked as good or bad.

The difference between the models' margins, log p(chosen) - log p(rejected) of each, is the implicit reward's margin at
beta 1 (Rafailov et al., Direct Preference Optimization, 2023, equation 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma_tune.encoding.chat_format import FormatError
from gemma_tune.encoding.sequences import MARK, Encoder, PreparedRow, marks_of
from gemma_tune.measure.intervals import compare
from gemma_tune.measure.likelihood import Wanted, wanted_of


@dataclass(frozen=True)
class Preferences:
    """Answers of which it is known that they are better or worse than others, as tokens to predict.

    Args:
        better, worse: the whole answers; ``better[n]`` and ``worse[n]`` are a pair where ``paired``.
        left_out: rows of which an answer does not fit.
    """

    better: list[Wanted]
    worse: list[Wanted]
    paired: bool
    left_out: int = 0

    @property
    def sequences(self) -> list[Wanted]:
        """All of them, the better ones first."""
        return [*self.better, *self.worse]

    def measures(self, base: np.ndarray, tuned: np.ndarray, seed: int) -> dict[str, Any]:
        """Measures by name, as :func:`gemma_tune.measure.intervals.compare` gives them.

        Args:
            base, tuned: negative log-likelihoods of :attr:`sequences`, in nats (n,).
        """
        split = len(self.better)
        logs = {"better": (-base[:split], -tuned[:split]), "worse": (-base[split:], -tuned[split:])}
        found = {}
        if self.paired and split:
            tokens = [np.array([len(w.labels) for w in side], np.float64) for side in (self.better, self.worse)]
            pairs = list(zip(logs["better"], logs["worse"], strict=True))  # of each model
            found["preferred"] = [_share(better - worse) for better, worse in pairs]
            found["preferred_per_token"] = [_share(better / tokens[0] - worse / tokens[1]) for better, worse in pairs]
            found["margin"] = [better - worse for better, worse in pairs]
        found |= {f"{name}_log_probability": list(sides) for name, sides in logs.items() if len(sides[0])}
        return {name: compare(*sides, seed=seed).as_json() for name, sides in found.items()}


def _share(margins: np.ndarray) -> np.ndarray:
    """1 where the better answer is likelier, half of that where none is."""
    return (np.sign(margins) + 1) / 2


def better_of(row: PreparedRow) -> PreparedRow | None:
    """The conversation with the answer that is worth learning; None of a bad one. Other rows are as they are."""
    if marks_of(row) == [-1]:
        return None
    return {name: value for name, value in row.items() if name not in ("rejected", MARK)}


def preferences_of(rows: Sequence[PreparedRow], encoder: Encoder) -> Preferences | None:
    """The answers of rows that hold any; None if no row is of this kind.

    Args:
        encoder: as the rows were laid out; an answer that is longer than its limit is not divided.
    """
    compared = [row for row in rows if marks_of(row) != [0]]
    if not compared:
        return None
    whole = Encoder(encoder.chat, encoder.max_length, "drop" if encoder.on_long == "split" else encoder.on_long)
    better, worse, left_out = [], [], 0
    for row, outcome in zip(compared, whole.encode(compared)):
        marks = marks_of(row)
        # Of a judged answer in several sequences, earlier ones, of dropped reasoning, end before the answer does.
        wanted = [] if isinstance(outcome, FormatError) else [
            *filter(None, map(wanted_of_sequence, outcome.kept[-len(marks):]))]
        left_out += len(wanted) < len(marks)
        for mark, one in zip(marks, wanted if len(wanted) == len(marks) else ()):
            (better if mark > 0 else worse).append(one)
    return Preferences(better, worse, len(marks_of(compared[0])) == 2, left_out)


def wanted_of_sequence(sequence: Any) -> Wanted | None:
    """What is learned of a sequence, as tokens to predict."""
    row = {"input_ids": sequence.ids, "labels": sequence.labels, "pictures": [name for name, _ in sequence.pictures]}
    return next(iter(wanted_of([row])), None)
