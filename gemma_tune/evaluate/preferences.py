"""Whether the better answer is the likelier one: of pairs of answers, and of answers that are marked as good or bad.

The difference between the models' margins, log p(chosen) - log p(rejected) of each, is the implicit reward's margin at
beta 1 (Rafailov et al., Direct Preference Optimization, 2023, equation 5). A pair is ``{"messages", "rejected"}``, the
latter in place of the turns that are learned, a judged answer ``{"messages", "kto_tag"}``; or ``{"prompt", "chosen",
"rejected"}`` and ``{"prompt", "completion", "label"}``. Each may have ``tools``.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def answers_in(row: PreparedRow) -> list[tuple[int, PreparedRow]]:
    """The answers of a preference row, each as a conversation of which it alone is learned, with its mark: 1 of a
    chosen or good one, -1 of a rejected or bad one. No other row has any."""
    tools = {"tools": row["tools"]} if row.get("tools") else {}
    if "messages" in row:
        conversation = {"messages": row["messages"], **tools}
        if "rejected" in row:
            return [(1, conversation), (-1, {"messages": [*_asked(row["messages"]), *row["rejected"]], **tools})]
        return [(1 if row["kto_tag"] else -1, conversation)] if "kto_tag" in row else []
    if "prompt" not in row:
        return []
    asked = [{**turn, "train": False} if turn["role"] == "assistant" else turn for turn in row["prompt"]]
    marks = {"chosen": 1, "rejected": -1, "completion": 1 if row.get("label") else -1}
    return [(mark, {"messages": [*asked, *row[key]], **tools}) for key, mark in marks.items() if key in row]


def _asked(messages: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """What stands before the first turn that is learned."""
    learned = (n for n, m in enumerate(messages) if m["role"] == "assistant" and m.get("train") is not False)
    return messages[:next(learned)]


def better_of(row: PreparedRow) -> PreparedRow | None:
    """The conversation with the answer that is worth learning; None of a bad one. Other rows are as they are."""
    answers = answers_in(row)
    return next((conversation for mark, conversation in answers if mark > 0), None) if answers else row


def preferences_of(rows: Sequence[PreparedRow], encoder: Encoder) -> Preferences | None:
    """The answers of rows that hold any; None if no row is of this kind.

    Args:
        encoder: as the rows were laid out; an answer that is longer than its limit is not divided.
    """
    answered = [answers for row in rows if (answers := answers_in(row))]
    if not answered:
        return None
    whole = Encoder(encoder.chat, encoder.max_length, "drop" if encoder.on_long == "split" else encoder.on_long)
    wanted = map(_wanted, whole.encode([conversation for answers in answered for _, conversation in answers]))
    found = [[(mark, next(wanted)) for mark, _ in answers] for answers in answered]
    complete = [answers for answers in found if all(one is not None for _, one in answers)]
    better, worse = ([one for answers in complete for mark, one in answers if mark == which and one]
                     for which in (1, -1))
    return Preferences(better, worse, len(answered[0]) == 2, len(found) - len(complete))


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
