"""Figures of a step, read when the next one is under way: a GPU never waits for somebody to look at its numbers."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Figures:
    """What a step came to.

    Attributes:
        facts: what is known without asking the device.
        loss: in nats per trained token.
        norm: of the whole gradient, before clipping.
        norms: of each weight's gradient.
        more: what else was sent along.
    """

    facts: dict[str, Any]
    loss: float
    norm: float
    norms: list[float]
    more: list[float] = field(default_factory=list)


class LateFigures:
    """A queue of the figures of the last steps.

    Args:
        device: where they are computed. Only a CUDA device goes on while its numbers are on their way.
    """

    def __init__(self, device: torch.device):
        self._wait_for = 1 if device.type == "cuda" else 0
        self._waiting: deque[tuple[dict[str, Any], torch.Tensor, Any]] = deque()
        self._more = 0  # numbers that each step sends along

    def add(self, facts: dict[str, Any], loss: torch.Tensor, norm: torch.Tensor, norms: torch.Tensor,
            more: torch.Tensor | None = None) -> None:
        """Send a step's figures on their way; the tensors may be overwritten afterwards."""
        others = norms.new_zeros(0) if more is None else more
        self._more = len(others)
        together = torch.cat([loss[None].float(), norm[None].float(), norms.float(), others.float()]).detach()
        arrived = None
        if self._wait_for:
            here = torch.empty(together.shape, pin_memory=True)
            here.copy_(together, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            together = here
        self._waiting.append((facts, together, arrived))

    def read(self, everything: bool = False) -> list[Figures]:
        """Those that should have arrived, in order: all but the last step's, or ``everything``."""
        found = []
        while len(self._waiting) > (0 if everything else self._wait_for):
            facts, together, arrived = self._waiting.popleft()
            if arrived is not None:
                arrived.synchronize()
            loss, norm, *others = together.tolist()
            norms = others[:len(others) - self._more]
            found.append(Figures(facts, loss, norm, norms, others[len(norms):]))
        return found
