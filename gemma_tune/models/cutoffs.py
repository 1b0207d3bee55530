"""Gemma 3n's sparse layers without a number that is sent to the GPU in each pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch


def with_cutoffs(model: Any) -> Any:
    """The model, whose sparse layers know where they cut off: transformers makes a tensor of it on the CPU in every
    pass and copies it to the GPU, which cannot be captured in a CUDA graph.

    A layer that computes something else than what stands here is left as it is.
    """
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    for module in model.modules():
        theirs, share = getattr(module, "_gaussian_topk", None), getattr(module, "activation_sparsity", 0.0)
        if theirs is None or not 0.0 < share < 1.0:
            continue
        # A single number of the CPU is handed over with the call.
        ours = partial(_above, torch.distributions.Normal(0, 1).icdf(torch.tensor(share, dtype=torch.float32)))
        if all(torch.equal(ours(x.to(dtype)), theirs(x.to(dtype))) for dtype in (torch.float32, torch.bfloat16)):
            module._gaussian_topk = ours
    return model


def _above(deviations: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """By how much inputs (…, n) are above so many standard deviations over their mean, else 0."""
    mean, deviation = inputs.mean(-1, keepdim=True), inputs.std(-1, keepdim=True, unbiased=False)
    return torch.relu(inputs - (mean + deviation * deviations.type(inputs.dtype)))
