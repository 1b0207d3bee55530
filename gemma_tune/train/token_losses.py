"""The losses of the learned tokens of some sequences, each with the number of its sequence.

Sequences of similar length go through the model together, or those that begin alike as one, see
:mod:`gemma_tune.train.shared_prompts`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from gemma_tune.encoding.eye import PICTURES
from gemma_tune.train.attention import within
from gemma_tune.train.batches import trained_positions
from gemma_tune.train.looking import Shown
from gemma_tune.train.packed import unpackable
from gemma_tune.train.shared_prompts import shared_rows, worth_sharing
from gemma_tune.train.units import together

_SAME = 0.02  # share of a log-probability, and of a nat per token, that two ways to compute it may differ by in bf16
Parts = Iterator[tuple[torch.Tensor, torch.Tensor]]


class TokenLosses:
    """How sequences go through the model.

    Args:
        device: where the model computes.
        at_once: all of them as one batch, whatever their lengths.
        shown: pictures of the training, where it has any.
        temperature: what logits are divided by before they become probabilities.

    Attributes:
        shares: those that begin alike go as one.
    """

    def __init__(self, device: torch.device, at_once: bool, shown: Shown | None = None, temperature: float = 1.0):
        self.device, self.at_once, self.shares, self.shown = device, at_once, False, shown
        self._asked = {"each": True, "temperature": temperature}

    def parts(self, model: Any, rows: Sequence[dict[str, Any]], sizes: Sequence[int]) -> Parts:
        """Losses of learned tokens (n,) in nats, and the numbers of their rows, by batches.

        Args:
            sizes: how many rows, one after the other, may begin alike.
        """
        # A prompt that goes through once has no place for pictures, whose parts see each other.
        if self.shares and not has_pictures(rows) and worth_sharing(rows, sizes):
            return self._shared(model, rows, sizes)
        return self._apart(model, rows)

    def _apart(self, model: Any, rows: Sequence[dict[str, Any]]) -> Parts:
        for chosen, batch in together(rows, self.at_once):
            positions, targets = trained_positions(batch["labels"])
            row = positions // batch["labels"].shape[1]
            ids, positions, targets = (t.to(self.device, non_blocking=True)
                                       for t in (batch["input_ids"], positions, targets))
            seen = {"seen": self.shown.inputs(batch["input_ids"], batch[PICTURES], self.device)} if (
                self.shown and PICTURES in batch) else {}
            yield (model(input_ids=ids, positions=positions, targets=targets, **self._asked, **seen)["losses"],
                   torch.tensor(chosen or [0])[row].to(self.device, non_blocking=True))

    def _shared(self, model: Any, rows: Sequence[dict[str, Any]], sizes: Sequence[int]) -> Parts:
        for row in shared_rows(rows, sizes):
            with within(row.spans):
                losses = model(input_ids=row.input_ids, position_ids=row.places, positions=row.positions,
                               targets=row.targets, **self._asked)["losses"]
            yield losses, row.sequence

    def can_share(self, trainer: Any, rows: Sequence[dict[str, Any]] | None) -> bool:
        """Whether the model makes the same of sequences where what they begin with goes through once; tried on some.

        Args:
            trainer: the :class:`gemma_tune.train.trainer.GemmaTrainer`.
            rows: a group of such sequences; None where there is none.
        """
        # What is computed again in a backward pass would not know any more what attention keeps apart.
        if rows is None or self.at_once or trainer.args.activation_checkpointing or unpackable(trainer.causal_lm):
            return False
        with trainer.evaluating():
            apart, tokens = by_answer(*_joined(self._apart(trainer.model, rows)), len(rows))
            try:
                shared, _ = by_answer(*_joined(self._shared(trainer.model, rows, [len(rows)])), len(rows))
            except RuntimeError:  # a layer's attention is of another kind
                return False
        return bool(((shared - apart).abs() <= _SAME * (apart.abs() + tokens)).all())


def _joined(parts: Parts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses and their rows (n,) of all batches, and for each that it is learned."""
    losses, rows = map(torch.cat, zip(*parts))
    return losses, rows, torch.ones_like(rows)


def has_pictures(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether any of these sequences has."""
    return any(row.get(PICTURES) for row in rows)


def by_answer(losses: torch.Tensor, answer: torch.Tensor, learned: torch.Tensor, count: int,
              ) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of answers (count,) and their learned tokens (count,), of the losses (n,) of tokens in nats.

    Args:
        answer: (n,) int64, whose token it is; ``learned`` (n,) int64 is 0 for one that only fills up.
    """
    zeros = losses.new_zeros(count)
    return -zeros.index_add(0, answer, losses), torch.zeros_like(zeros, dtype=torch.long).index_add(0, answer, learned)
