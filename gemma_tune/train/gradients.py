"""The gradients of what is trained: at addresses that stay, summed over the processes, checked and clipped in one go.

A graph of kernels that was captured adds to the addresses that it saw, so on a CUDA GPU the gradients of all weights
are views of one tensor, and the weights those of another. That also makes clearing, clipping, summing over the
processes and the optimiser's step (:mod:`gemma_tune.train.adamw`) one kernel each, which Python starts in no time. On a
CPU it is so where modules are trained as a whole, whose gradients would be made anew in each step.
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
        fixed: whether weights and gradients stay where they are for the whole training, as one tensor each; the
            weights, all fp32 and on one device, are moved there.

    Attributes:
        begun: whether batches of a step may have added to them, as their trainer says; none has after :meth:`clear`.
    """

    begun = False

    def __init__(self, weights: Mapping[str, torch.nn.Parameter], fixed: bool):
        self.names, self.weights, self.fixed = list(weights), list(weights.values()), fixed
        self.device = self.weights[0].device
        # Nats per trained token of the step so far, of this process; summed with the gradients.
        self.loss = torch.zeros((), device=self.device)
        if not fixed:
            return
        lines = torch.tensor([0, *(-(-weight.numel() // _ALIGNED) for weight in self.weights)]).cumsum(0)
        self._starts, self._size = (lines[:-1] * _ALIGNED).tolist(), int(lines[-1]) * _ALIGNED
        self._lines = lines.to(self.device)  # at which line each weight begins, and where the last one ends
        self._flat = torch.zeros(self._size + 1, device=self.device)
        self.loss = self._flat[self._size]
        self.weights_as_one = self.room()
        self.settle()

    def settle(self) -> None:
        """Have weights and gradients, which are cleared, at their places: also after somebody moved the model, which
        can be to where it is already (accelerate, with several processes on a CPU)."""
        if self.fixed:
            for weight, place in zip(self.weights, self.parts(self.weights_as_one)):
                if weight.data_ptr() != place.data_ptr():
                    weight.data = place.copy_(weight.detach())
            self._views = self.parts(self.as_one)  # the others' memory is where the model was moved to
        self.clear()

    @property
    def as_one(self) -> torch.Tensor:
        """All gradients at their fixed places (n,), with zeros between them."""
        return self._flat[:-1]

    def room(self) -> torch.Tensor:
        """A number for each of the weights, laid out as they are (n,): zeros."""
        return torch.zeros(self._size, device=self.device)

    def parts(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """What of a tensor that is laid out so belongs to each weight, as a view of the weight's shape."""
        return [whole[start:start + w.numel()].view_as(w) for start, w in zip(self._starts, self.weights)]

    def clear(self) -> None:
        """Begin a step."""
        self.begun = False
        if not self.fixed:
            self.loss.zero_()
            for weight in self.weights:
                weight.grad = None
            return
        self._flat.zero_()
        for weight, view in zip(self.weights, self._views):
            if weight.grad is not view:  # looking takes less time than setting
                weight.grad = view

    def saved(self) -> list[torch.Tensor | None]:
        """A copy, for :meth:`restore`. At fixed places it is one tensor, of which the loss is the last number."""
        if self.fixed:
            return [self._flat.clone()]
        return [self.loss.clone(), *(None if w.grad is None else w.grad.clone() for w in self.weights)]

    def flat(self) -> torch.Tensor:
        """A copy of all gradients, one after the other (n,)."""
        if self.fixed:
            return self.as_one.clone()
        return torch.cat(self._each())

    def _each(self) -> list[torch.Tensor]:
        return [(torch.zeros_like(w) if w.grad is None else w.grad).flatten() for w in self.weights]

    def restore(self, saved: list[torch.Tensor | None] | None) -> None:
        """Be as they were when that copy was made; nothing, where there is none."""
        self.clear()
        if saved is None:
            return
        self.begun = True
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
        flat = self._flat if self.fixed else torch.cat([*self._each(), self.loss[None]])
        torch.distributed.all_reduce(flat)
        if self.fixed:
            return
        *parts, loss = flat.split([*(w.numel() for w in self.weights), 1])
        self.loss.copy_(loss[0])
        for weight, part in zip(self.weights, parts):
            weight.grad = part.view_as(weight)

    @property
    def computed(self) -> list[str]:
        """Names of the weights that have a gradient: a layer that takes no part in the loss has none, or zeros where
        the places are fixed."""
        if self.fixed:
            return self.names
        return [name for name, weight in zip(self.names, self.weights) if weight.grad is not None]

    def norms(self) -> torch.Tensor:
        """Euclidean norm of each :attr:`computed` gradient (weights,), in fp32; not finite where a number is not."""
        if self.fixed:
            lines = torch.linalg.vector_norm(self.as_one.view(-1, _ALIGNED), dim=1)
            # Unsafe: whether the offsets are right would be looked up on the device, and waited for.
            return torch.segment_reduce(lines.square(), "sum", offsets=self._lines, unsafe=True).sqrt()
        return torch.stack(torch._foreach_norm([w.grad for w in self.weights if w.grad is not None]))

    def clip(self, norm: torch.Tensor, most: float) -> None:
        """Scale all so that the norm of everything together, which is ``norm``, becomes ``most`` if it is more."""
        factor = (most / (norm + 1e-6)).clamp(max=1.0)
        if self.fixed:
            self.as_one.mul_(factor)
        else:
            torch._foreach_mul_([w.grad for w in self.weights if w.grad is not None], factor)
