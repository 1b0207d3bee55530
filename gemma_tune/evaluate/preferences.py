"""Whether the better answer is the likelier one: of pairs of answers, and of answers that are marked as good or bad.

The difference between the models' margins, log p(chosen) - log p(rejected) of each, is the implicit reward's margin at
beta 1 (Rafailov et al., Direct Preference Optimization, 2023, equation 5). Prepared rows: a pair is ``{"prompt",
"chosen", "rejected"}``, a judged answer ``{"prompt", "completion", "label"}``, each with ``tools`` or without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma_tune.encoding.chat_format import FormatError
from gemma_tune.encoding.sequences import Encoder, PreparedRow
from gemma_tune.measure.intervals import compare
from gemma_tune.measure.likelihood import Wanted


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


def is_preference(row: Mapping[str, Any]) -> bool:
    """Whether a prepared row is a pair or a judged answer."""
    return "prompt" in row and ("chosen" in row or "completion" in row)


def as_conversation(row: PreparedRow, answer: str) -> PreparedRow:
    """A preference row with one of its answers, as a conversation of which that answer alone is learned.

    Args:
        answer: its key: ``chosen``, ``rejected`` or ``completion``.
    """
    asked = [{**turn, "train": False} if turn["role"] == "assistant" else turn for turn in row["prompt"]]
    return {"messages": [*asked, *row[answer]], **({"tools": row["tools"]} if row.get("tools") else {})}


def better_of(row: PreparedRow) -> PreparedRow | None:
    """The conversation with the answer that is worth learning; None of a bad one. Other rows are as they are."""
    if not is_preference(row):
        return row
    if "chosen" in row:
        return as_conversation(row, "chosen")
    return as_conversation(row, "completion") if row["label"] else None


def preferences_of(rows: Sequence[PreparedRow], encoder: Encoder) -> Preferences | None:
    """The answers of rows that hold any; None if no row is of this kind.

    Args:
        encoder: as the rows were laid out; an answer that is longer than its limit is not divided.
    """
    pairs, judged = ([row for row in rows if is_preference(row) and key in row] for key in ("chosen", "completion"))
    if not pairs and not judged:
        return None
    whole = Encoder(encoder.chat, encoder.max_length, "drop" if encoder.on_long == "split" else encoder.on_long)
    if pairs:
        sides = [[_wanted(outcome) for outcome in whole.encode([as_conversation(row, side) for row in pairs])]
                 for side in ("chosen", "rejected")]
        both = [(better, worse) for better, worse in zip(*sides, strict=True) if better and worse]
        return Preferences([better for better, _ in both], [worse for _, worse in both], True, len(pairs) - len(both))
    answers = [_wanted(outcome) for outcome in whole.encode([as_conversation(row, "completion") for row in judged])]
    good, bad = ([wanted for row, wanted in zip(judged, answers, strict=True) if wanted and row["label"] is label]
                 for label in (True, False))
    return Preferences(good, bad, False, len(judged) - len(good) - len(bad))


def _wanted(outcome: Any) -> Wanted | None:
    """The tokens of an answer; None where it is too long, or cannot be rendered."""
    if isinstance(outcome, FormatError) or not outcome.kept:
        return None
    return wanted_of_sequence(outcome.kept[-1])  # earlier ones, of dropped reasoning, end before the answer does


def wanted_of_sequence(sequence: Any) -> Wanted | None:
    """What is learned of a sequence, as tokens to predict; nothing predicts the first."""
    labels = np.zeros(len(sequence.ids), bool)
    for start, end in sequence.spans:
        labels[start:end] = True
    at = np.flatnonzero(labels[1:])
    ids = np.asarray(sequence.ids, np.int64)
    return Wanted(ids[None, :at[-1] + 1], at, ids[at + 1]) if len(at) else None
