"""A CPU without instructions for bf16, where weights are kept in it, on any machine and for tiny models."""

from __future__ import annotations

from typing import Any

import torch

from gemma_tune.models import narrow, placement
from gemma_tune.models.placement import Placement

NARROW = Placement("cpu", torch.float32, "test", stored=torch.bfloat16)


def without_instructions(monkeypatch: Any) -> None:
    """Small weights are kept narrow as well, and there is no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(placement, "bf16_instructions", lambda: "")
    monkeypatch.setattr(narrow, "LEAST", 1)
