"""Matrix products whose result is wider than their factors."""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def wide_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a b`` in fp32 or wider: on a GPU as it was added up, elsewhere rounded to the factors' type in between."""
    if a.is_cuda and at_least_fp32(a.dtype) != a.dtype:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).to(at_least_fp32(a.dtype))


@functools.cache
def _triton() -> bool:
    return find_spec("triton") is not None


def has_kernels(device: torch.device) -> bool:
    """Whether the Triton kernels of ``train.fused`` run on this device."""
    return device.type == "cuda" and _triton()
