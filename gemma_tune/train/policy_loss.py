"""The loss of answers that a model has sampled, by what they are worth, and how far it is from the model before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from gemma_tune.train.token_losses import TokenLosses


def ratios(losses: torch.Tensor) -> torch.Tensor:
    """Of each token its probability now to that when it was sampled (n,): 1, its derivative that of the
    log-probability.

    Args:
        losses: minus the log-probability of each token (n,), in nats, with gradient.
    """
    return (losses.detach() - losses).exp()


def policy_loss(losses: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """What tokens add to the loss of a step, before it is divided by the number of its tokens (scalar).

    Args:
        losses: see :func:`ratios`.
        advantages: of its answer (n,).
    """
    return -(advantages * ratios(losses)).sum()


def divergences(losses: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Of each token how far the model is from another one (n,), in nats: ``r - log r - 1`` of the ratio r of the other
    one's probability to its own, the estimator k3 of the Kullback-Leibler divergence (Schulman 2020,
    http://joschu.net/blog/kl-approx.html; Shao et al. 2024, https://arxiv.org/abs/2402.03300, eq. 4).

    Times :func:`ratios`, as the tokens were sampled by what changes: so the gradient is that of the divergence, without
    bias (DeepSeek-V3.2, https://arxiv.org/abs/2512.02556), as with TRL's ``use_bias_correction_kl``, its default.

    Args:
        losses: see :func:`ratios`; ``reference``, that of the other model.
    """
    log_ratio = losses - reference
    return (log_ratio.exp() - log_ratio - 1) * ratios(losses)


class WeightsBefore:
    """What is trained, as it was before the first step, which takes its place again for a moment.

    Args:
        weights: that are trained, as they are now.
    """

    def __init__(self, weights: Iterable[torch.nn.Parameter]):
        self._weights = list(weights)
        self._before = [weight.detach().clone() for weight in self._weights]

    @contextlib.contextmanager
    def put_back(self) -> Iterator[None]:
        """The model as it was, while the context lasts."""
        now = [weight.detach().clone() for weight in self._weights]
        self._copy(self._before)
        try:
            yield
        finally:
            self._copy(now)

    @torch.no_grad()
    def _copy(self, values: Iterable[torch.Tensor]) -> None:
        for weight, value in zip(self._weights, values):
            weight.copy_(value)  # and not its address: what is rounded notices the change


class PolicyLoss:
    """The loss of sampled answers.

    Args:
        token_losses: how they go through the model.
        beta: weight of the divergence from the model before.
        evaluating: a context in which a model has neither dropout nor gradients.

    Attributes:
        before: that model; None before it is known, where the one of now stands for it.
        divergence: the sum over all tokens so far (scalar), in nats.
    """

    def __init__(self, token_losses: TokenLosses, beta: float = 0.0,
                 evaluating: Callable[[], contextlib.AbstractContextManager[None]] = torch.no_grad):
        self.token_losses, self.beta, self._evaluating = token_losses, beta, evaluating
        self.before: WeightsBefore | None = None
        self.divergence = torch.zeros((), device=token_losses.device)

    def of(self, model: Any, rows: list[dict[str, Any]], sizes: list[int], advantages: torch.Tensor) -> torch.Tensor:
        """What these answers add to the loss of a step (scalar), before it is divided by the number of its tokens.

        Args:
            rows: with ``input_ids`` and ``labels``.
            sizes: how many of them, one after the other, may begin alike.
            advantages: of each (rows,), where the model computes.
        """
        reference = self._reference(model, rows, sizes) if self.beta else None
        found = []
        for number, (losses, row) in enumerate(self.token_losses.parts(model, rows, sizes)):
            loss = policy_loss(losses, advantages[row])
            if reference:
                divergence = divergences(losses, reference[number]).sum()
                self.divergence += divergence.detach()
                loss = loss + self.beta * divergence
            found.append(loss)
        return torch.stack(found).sum()

    def _reference(self, model: Any, rows: list[dict[str, Any]], sizes: list[int]) -> list[torch.Tensor]:
        """Losses of the tokens in the model before, by the same parts."""
        with self._evaluating(), self.before.put_back() if self.before else contextlib.nullcontext():
            return [losses for losses, _ in self.token_losses.parts(model, rows, sizes)]
