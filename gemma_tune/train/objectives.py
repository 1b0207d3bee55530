"""Losses on pairs and judged answers, as functions of the log-probabilities of whole answers.

All take sums over the learned tokens of an answer, in nats, of the model in training and of the reference: the model
before its first step. They give a loss for each pair or answer, which the caller averages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

# Largest mean log-probability of a token that ORPO takes the odds of: at 0 they would be infinite.
_SURE = -1e-6


@dataclass(frozen=True)
class Answers:
    """Log-probabilities of answers (n,), fp32.

    Attributes:
        now: of the model in training, with its gradient.
        reference: of the model before its first step; zeros where a method has none.
        tokens: learned ones of each answer (n,).
    """

    now: torch.Tensor
    reference: torch.Tensor
    tokens: torch.Tensor

    @property
    def ratio(self) -> torch.Tensor:
        """log p / p_reference of each answer."""
        return self.now - self.reference

    @property
    def mean(self) -> torch.Tensor:
        """Log-probability per token."""
        return self.now / self.tokens.clamp(min=1)

    def __getitem__(self, which: torch.Tensor | slice) -> Answers:
        return Answers(self.now[which], self.reference[which], self.tokens[which])


def sigmoid_loss(chosen: Answers, rejected: Answers, beta: float, smoothing: float) -> torch.Tensor:
    """DPO (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, eq. 7): ``-log s(beta (r_w - r_l))``.

    With ``smoothing`` e it is cDPO (Mitchell 2023, https://ericmitchell.ai/cdpo.pdf), which takes e of the pairs to
    be the wrong way round: ``-(1 - e) log s(beta d) - e log s(-beta d)``.
    """
    difference = beta * (chosen.ratio - rejected.ratio)
    return -(1 - smoothing) * logsigmoid(difference) - smoothing * logsigmoid(-difference)


def ipo_loss(chosen: Answers, rejected: Answers, beta: float) -> torch.Tensor:
    """IPO (Azar et al. 2023, https://arxiv.org/abs/2310.12036, eq. 17): ``(r_w - r_l - 1 / (2 beta))^2``.

    Ratios are means over the tokens of an answer, so that the target does not depend on how long answers are.
    """
    difference = chosen.ratio / chosen.tokens.clamp(min=1) - rejected.ratio / rejected.tokens.clamp(min=1)
    return (difference - 1 / (2 * beta)) ** 2


def log_odds_ratio(chosen: Answers, rejected: Answers) -> torch.Tensor:
    """ORPO (Hong et al. 2024, https://arxiv.org/abs/2403.07691, eq. 4): log of odds(chosen) / odds(rejected).

    With p the mean probability of a token, in the geometric sense, ``odds = p / (1 - p)``.
    """
    def log_odds(answers: Answers) -> torch.Tensor:
        mean = answers.mean.clamp(max=_SURE)
        return mean - torch.log(-torch.expm1(mean))

    return log_odds(chosen) - log_odds(rejected)


def orpo_loss(chosen: Answers, rejected: Answers, beta: float) -> torch.Tensor:
    """The part of ORPO's loss that compares (eq. 6 there, whose lambda is ``beta``): ``-beta log s(log odds ratio)``.

    The other part is the mean loss of the tokens of chosen answers.
    """
    return -beta * logsigmoid(log_odds_ratio(chosen, rejected))


def kto_loss(answers: Answers, good: torch.Tensor, beta: float, divergence: torch.Tensor,
             weights: tuple[float, float]) -> torch.Tensor:
    """KTO (Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, eq. 7): ``w (1 - s(+-beta (r - z)))``.

    Args:
        good: (n,) bool; the sign is + for these.
        divergence: z, how far the model is from the reference on answers to other prompts; no gradient.
        weights: w of good and of bad answers.
    """
    sign = torch.where(good, 1.0, -1.0)
    weight = torch.where(good, *weights)
    return weight * (1 - torch.sigmoid(sign * beta * (answers.ratio - divergence)))
