"""The loss of some pairs or judged answers, by the log-probabilities that a model gives whole answers.

The head gives the loss of each learned token and its gradient in one pass; the chain rule scales that gradient by what
the answer's loss asks for. So whole logits never exist, and a step costs what learning the same tokens costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gemma_tune.config.stages import TrainConfig
from gemma_tune.train.looking import Shown
from gemma_tune.train.objectives import Answers, ipo_loss, kto_loss, orpo_loss, sigmoid_loss
from gemma_tune.train.token_losses import TokenLosses, by_answer
from gemma_tune.train.units import PAIR

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


class PreferenceLoss(TokenLosses):
    """The losses of ``--method``.

    Args:
        settings: of ``train``: the method and what belongs to it.
        device: where the model computes.
        at_once: all sequences go through the model as one batch, whatever their lengths.
        shown: pictures of the training, where it has any.

    Attributes:
        divergence: KTO's z for the units that are worked on (scalar).
        shares: see :class:`gemma_tune.train.token_losses.TokenLosses`.
    """

    def __init__(self, settings: TrainConfig, device: torch.device, at_once: bool, shown: Shown | None = None):
        super().__init__(device, at_once, shown)
        self.settings = settings
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
        parts = [*self.parts(model, rows, [PAIR] * (len(rows) // PAIR))]
        if not parts:
            empty = torch.zeros(0, device=self.device)
            return empty, empty
        loss, number = map(torch.cat, zip(*parts))
        logps, count = by_answer(loss, number, torch.ones_like(number), len(rows))
        # Where a process has no unit in a pass that all of them make, its loss is the zero that has a gradient.
        return (logps, count) if rows else (-loss, count)
