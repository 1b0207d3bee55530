"""The gradients of the adapter: at addresses that stay, summed over the processes, checked and clipped in one go.

A graph of kernels that was captured adds to the addresses that it saw, so on a GPU the gradients of all weights are
views of one tensor, which also makes clearing, clipping and summing them over the processes one kernel each.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from gemma_tune.train import processes

_ALIGNED = 64  # numbers: kernels read whole lines of memory


class Gradients:
    """What the trained weights have in ``grad``, as one.

    Args:
        weights: the trained weights by name.
        fixed: whether the gradients stay where they are for the whole training, as one tensor.
    """

    def __init__(self, weights: Mapping[str, torch.nn.Parameter], fixed: bool):
        self.names, self.weights, self.fixed = list(weights), list(weights.values()), fixed
        self.device = self.weights[0].device
        # Nats per trained token of the step so far, of this process; summed with the gradients.
        self.loss = torch.zeros((), device=self.device)
        if fixed:
            starts, end = [], 0
            for weight in self.weights:
                starts.append(end)
                end += -(-weight.numel() // _ALIGNED) * _ALIGNED
            self._flat = torch.zeros(end + 1, device=self.device)
            self.loss = self._flat[end]
            self._views = [self._flat[start:start + w.numel()].view_as(w) for start, w in zip(starts, self.weights)]
            self.clear()

    def clear(self) -> None:
        """Begin a step."""
        if not self.fixed:
            self.loss.zero_()
            for weight in self.weights:
                weight.grad = None
            return
        self._flat.zero_()
        for weight, view in zip(self.weights, self._views):
            weight.grad = view

    def saved(self) -> list[torch.Tensor | None]:
        """A copy, for :meth:`restore`. At fixed places it is one tensor, of which the loss is the last number."""
        if self.fixed:
            return [self._flat.clone()]
        return [self.loss.clone(), *(None if w.grad is None else w.grad.clone() for w in self.weights)]

    def flat(self) -> torch.Tensor:
        """A copy of all gradients, one after the other (n,)."""
        if self.fixed:
            return self._flat[:-1].clone()
        return torch.cat([(torch.zeros_like(w) if w.grad is None else w.grad).flatten() for w in self.weights])

    def restore(self, saved: list[torch.Tensor | None]) -> None:
        """Be as they were when that copy was made."""
        self.clear()
        if self.fixed:
            self._flat.copy_(saved[0])
            return
        self.loss.copy_(saved[0])
        for weight, grad in zip(self.weights, saved[1:]):
            weight.grad = None if grad is None else grad.clone()

    def sum_over_processes(self) -> None:
        """Each process has computed its rows' share of the step."""
        if not processes.joined():
            return
        flat = self._flat if self.fixed else torch.cat([self.flat(), self.loss[None]])
        torch.distributed.all_reduce(flat)
        if self.fixed:
            return
        *parts, loss = flat.split([*(w.numel() for w in self.weights), 1])
        self.loss.copy_(loss[0])
        for weight, part in zip(self.weights, parts):
            weight.grad = part.view_as(weight)

    @property
    def computed(self) -> list[str]:
        """Names of the weights that have a gradient: a layer that takes no part in the loss has none."""
        return [name for name, weight in zip(self.names, self.weights) if weight.grad is not None]

    def norms(self) -> torch.Tensor:
        """Euclidean norm of each :attr:`computed` gradient (weights,), in fp32; not finite where a number is not."""
        return torch.stack(torch._foreach_norm([w.grad for w in self.weights if w.grad is not None]))

    def clip(self, norm: torch.Tensor, most: float) -> None:
        """Scale all so that the norm of everything together, which is ``norm``, becomes ``most`` if it is more."""
        factor = (most / (norm + 1e-6)).clamp(max=1.0)
        if self.fixed:
            self._flat[:-1] *= factor
        else:
            torch._foreach_mul_([w.grad for w in self.weights if w.grad is not None], factor)
