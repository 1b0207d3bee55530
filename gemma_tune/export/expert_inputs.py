"""What each expert of a mixture is multiplied with, of the tokens that it got.

An expert gets a part of the tokens, often fewer than it has columns. It is taken to have got a few more, of which
nothing is known but how large each column is: so what its own tell of the columns together is believed the less, the
fewer they are, and one that got none is rounded by the columns' sizes alone. llama.cpp's importance matrix makes all
columns of such an expert alike, and believes a single token wholly.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from gemma_tune.gguf.compensated import Inputs, inputs_of
from gemma_tune.models.experts import ExpertProduct

# Tokens that each expert is taken to have got besides. In thousandths of a nat, what rounding 16 experts to q4_0 cost a
# small trained mixture on other text, with 0.1, 4 and 16 of them: 2.5, 1.8, 2.0 where the experts got 0 to 30 tokens,
# 1.6, 1.5, 1.4 with 0 to 104; 2.2 and 2.1 by mean squares alone, as llama.cpp does it, and 2.6 uncalibrated.
PRIOR = 8.0


class ExpertInputs:
    """The inputs of one tensor of all experts, kept as they are: XᵀX takes columns² numbers for each expert, 2 GB for a
    layer of Qwen 3 30B-A3B, whose inputs for 4,500 tokens take 150 MB.

    Args:
        product: by which the tensor is multiplied.
        parts: of so many columns errors are made up for by each other.
    """

    def __init__(self, product: ExpertProduct, parts: Sequence[int] = ()):
        self._parts = list(parts)
        self._count, _, self._columns = product.weight.shape
        self._shared, self.device = product.shared, product.weight.device
        self._seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def add(self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add inputs (some, columns), each for its experts (some, used), for each as often as its weight (some · used,)
        says."""
        weights = torch.ones(experts.numel(), device=x.device) if weights is None else weights
        self._seen.append((x.detach(), experts, weights.view(experts.shape)))

    @cached_property
    def importance(self) -> torch.Tensor:
        """fp32 (experts, columns): the sum of squares of each column, with the tokens that are taken to be besides."""
        sums = torch.zeros(self._count, self._columns, device=self.device)
        weights, counts = torch.zeros(2, self._count, device=self.device)
        for x, experts, own in self._seen:
            for n in range(experts.shape[1]):
                sums.index_add_(0, experts[:, n], x.float().square() * own[:, n:n + 1])
            weights.index_add_(0, experts.flatten(), own.flatten())
            counts.index_add_(0, experts.flatten(), torch.ones_like(own).flatten())
        self._besides = _besides(sums, weights, counts, self._shared)
        return sums + self._besides

    @property
    def known(self) -> bool:
        """Whether all numbers are finite."""
        return bool(torch.isfinite(self.importance).all())

    def of(self, expert: int) -> Inputs:
        """What is known of one expert's."""
        importance = self.importance[expert]
        own = [(x, *torch.nonzero(experts == expert, as_tuple=True), weights) for x, experts, weights in self._seen]
        x = torch.cat([x[at].float() * weights[at, n, None].sqrt() for x, at, n, weights in own])
        grams = [part.T @ part + besides.diag() for part, besides in
                 zip(x.split(self._parts, dim=1), self._besides[expert].split(self._parts), strict=True)]
        return inputs_of(grams, 1) or Inputs(importance.cpu().numpy(), None)


def _besides(sums: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor, shared: bool) -> torch.Tensor:
    """Squares of the inputs that experts are taken to have got besides, (experts, columns).

    A column is as large as it is for all experts together, where it means the same to each. What leads out of an expert
    has columns of its own, which count alike.
    """
    mean = sums.sum(0, keepdim=True) / weights.sum()
    if not shared:
        mean = torch.where(weights[:, None] > 0, sums.mean(1, keepdim=True) / weights[:, None], mean.mean())
    # So many tokens that count as much as the expert's own do on average.
    each = torch.where(weights > 0, weights / counts, torch.ones_like(weights))
    found = PRIOR * each[:, None] * mean.expand_as(sums)
    return torch.where(found.sum(1, keepdim=True) + sums.sum(1, keepdim=True) == 0, torch.ones_like(found), found)
