"""The loss of some pairs or judged answers, by the log-probabilities that a model gives whole answers.

The head gives the loss of each learned token and its gradient in one pass; the chain rule scales that gradient by what
the answer's loss asks for. So whole logits never exist, and a step costs what learning the same tokens costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gemma_tune.config.stages import TrainConfig
from gemma_tune.encoding.eye import PICTURES
from gemma_tune.train.attention import within
from gemma_tune.train.batches import trained_positions
from gemma_tune.train.looking import Shown
from gemma_tune.train.objectives import Answers, ipo_loss, kto_loss, orpo_loss, sigmoid_loss
from gemma_tune.train.shared_prompts import shared_rows, worth_sharing
from gemma_tune.train.units import PAIR, together

# Sums over units and answers that the log's figures are made of.
SUMS = ("units", "good", "bad", "good_reward", "bad_reward", "won", "good_logp", "bad_logp", "good_tokens", "compared",
        "imitated")


@dataclass
class PieceLoss:
    """Of some units.

    Attributes:
        compared: sum over units of what compares answers (scalar).
        imitated: sum over the tokens of good answers of their loss, in nats (scalar).
        sums: (len(SUMS),) fp32, without gradient.
    """

    compared: torch.Tensor
    imitated: torch.Tensor
    sums: torch.Tensor


class PreferenceLoss:
    """The losses of ``--method``.

    Args:
        settings: of ``train``: the method and what belongs to it.
        device: where the model computes.
        at_once: all sequences go through the model as one batch, whatever their lengths.
        shown: pictures of the training, where it has any.

    Attributes:
        divergence: KTO's z for the units that are worked on (scalar).
        shares: sequences that begin alike go through the model as one, see :mod:`gemma_tune.train.shared_prompts`.
    """

    def __init__(self, settings: TrainConfig, device: torch.device, at_once: bool, shown: Shown | None = None):
        self.settings, self.device, self.at_once, self.shares, self.shown = settings, device, at_once, False, shown
        self.divergence = torch.zeros((), device=device)

    @property
    def imitation(self) -> float:
        """The weight of the loss of good answers' tokens."""
        return 1.0 if self.settings.method == "orpo" else self.settings.sft_weight

    def of(self, model: Any, units: Sequence[dict[str, Any]]) -> PieceLoss:
        """The loss of some units, which need no memory for logits but a chunk of them."""
        logps, tokens = self.log_probabilities(model, [row for unit in units for row in unit["sequences"]])
        if not units:
            return PieceLoss(logps.sum(), -logps.sum(), torch.zeros(len(SUMS), device=logps.device))
        good = torch.tensor([mark for unit in units for mark in unit["good"]], dtype=torch.bool, device=logps.device)
        reference = torch.tensor([r for unit in units for r in unit["reference"]], device=logps.device)
        there = torch.ones(len(units), dtype=torch.bool, device=logps.device)
        return self.of_answers(Answers(logps, reference, tokens), good, there)

    def of_answers(self, answers: Answers, good: torch.Tensor, there: torch.Tensor) -> PieceLoss:
        """The loss of units whose answers' log-probabilities are known. Nothing in it depends on the data but numbers.

        Args:
            good: (answers,) bool: the better one of a pair, or one that was judged good.
            there: (units,) bool: false for those that only fill up.
        """
        compared = torch.where(there, self._compared(answers, good), 0.0).sum()
        answered = there[:, None].expand(-1, len(good) // len(there)).flatten()
        imitated = -torch.where(good & answered, answers.now, 0.0).sum()
        with torch.no_grad():
            of_answers = self._sums_of(answers, good & answered, ~good & answered, there)
            return PieceLoss(compared, imitated, torch.stack([*of_answers, compared, imitated]).float())

    def _compared(self, answers: Answers, good: torch.Tensor) -> torch.Tensor:
        settings = self.settings
        if settings.method == "kto":
            return kto_loss(answers, good, settings.strength, self.divergence,
                            (settings.good_weight, settings.bad_weight))
        chosen, rejected = answers[0::PAIR], answers[1::PAIR]
        if settings.method == "orpo":
            return orpo_loss(chosen, rejected, settings.strength)
        if settings.dpo_loss == "ipo":
            return ipo_loss(chosen, rejected, settings.strength)
        return sigmoid_loss(chosen, rejected, settings.strength, settings.label_smoothing)

    def _sums_of(self, answers: Answers, good: torch.Tensor, bad: torch.Tensor, there: torch.Tensor,
                 ) -> list[torch.Tensor]:
        reward = self.settings.strength * self._score(answers)
        won = (reward[0::PAIR] > reward[1::PAIR]) & there if len(there) < len(good) else torch.zeros_like(there)

        def total(values: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
            return torch.where(which, values, 0).sum()

        return [there.sum(), good.sum(), bad.sum(), total(reward, good), total(reward, bad), won.sum(),
                total(answers.now, good), total(answers.now, bad), total(answers.tokens, good)]

    def _score(self, answers: Answers) -> torch.Tensor:
        """What rewards are ``beta`` times: the log-ratio to the reference; ORPO has none, and means over tokens."""
        return answers.mean if self.settings.method == "orpo" else answers.ratio

    def log_probabilities(self, model: Any, rows: Sequence[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the learned tokens of each sequence together: (rows,) fp32 in nats, and how many they are (rows,)."""
        # A prompt that goes through once has no place for pictures, whose parts see each other.
        shared = self.shares and not has_pictures(rows) and worth_sharing(rows)
        parts = [*(self._shared if shared else self._apart)(model, rows)]
        if not parts:
            empty = torch.zeros(0, device=self.device)
            return empty, empty
        loss, number = map(torch.cat, zip(*parts))
        logps, count = by_answer(loss, number, torch.ones_like(number), len(rows))
        # Where a process has no unit in a pass that all of them make, its loss is the zero that has a gradient.
        return (logps, count) if rows else (-loss, count)

    def _apart(self, model: Any, rows: Sequence[dict[str, Any]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Losses of learned tokens (n,), and the numbers of their rows, by batches."""
        for chosen, batch in together(rows, self.at_once):
            positions, targets = trained_positions(batch["labels"])
            row = positions // batch["labels"].shape[1]
            ids, positions, targets = (t.to(self.device, non_blocking=True)
                                       for t in (batch["input_ids"], positions, targets))
            seen = {"seen": self.shown.inputs(batch["input_ids"], batch[PICTURES], self.device)} if (
                self.shown and PICTURES in batch) else {}
            yield (model(input_ids=ids, positions=positions, targets=targets, each=True, **seen)["losses"],
                   torch.tensor(chosen or [0])[row].to(self.device, non_blocking=True))

    def _shared(self, model: Any, rows: Sequence[dict[str, Any]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for row in shared_rows(rows):
            with within(row.spans):
                losses = model(input_ids=row.input_ids, position_ids=row.places, positions=row.positions,
                               targets=row.targets, each=True)["losses"]
            yield losses, row.sequence


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
