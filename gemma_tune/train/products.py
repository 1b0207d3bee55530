"""Products wider than their factors, where gradients are added up, and whether a device runs kernels of our own."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

import torch

from gemma_tune.base.machine import is_out_of_memory
from gemma_tune.base.words import first_line

MEND_TRITON = "it needs a C compiler and Python's headers: apt install gcc python3-dev, or the like"

_CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # to numbers around 1; bf16 keeps 8 bits


def how_to_get_triton() -> str:
    """What installs a Triton that fits this PyTorch, which brings it along on Linux alone."""
    if sys.platform == "win32":
        return f"pip install triton-windows, in the version that its page names for PyTorch {torch.__version__}"
    return "pip install --upgrade torch brings a Triton that fits it"


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def wide_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a b`` in fp32 or wider: on a GPU as it was added up, elsewhere rounded to the factors' type in between."""
    if a.is_cuda and at_least_fp32(a.dtype) != a.dtype:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).to(at_least_fp32(a.dtype))


def gradient_of(weight: torch.Tensor) -> torch.Tensor:
    """What a backward pass adds to by itself, so that no second gradient of the size of a vocabulary is made."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


@contextlib.contextmanager
def gradients_aside(weights: Sequence[torch.Tensor]) -> Iterator[None]:
    """Let weights be without gradients while the context lasts; what they get meanwhile is forgotten."""
    kept = [weight.grad for weight in weights]
    for weight in weights:
        weight.grad = None
    try:
        yield
    finally:
        for weight, grad in zip(weights, kept):
            weight.grad = grad


def has_kernels(device: torch.device) -> bool:
    """Whether the Triton kernels of ``train.fused`` run on this device."""
    return device.type == "cuda" and not kernels_fault(device)


@functools.cache
def kernels_fault(device: torch.device) -> str:
    """Why the Triton kernels do not run on a CUDA device; empty where they do.

    One is run to know: Triton needs a C compiler and Python's headers, which many machines do not have.
    """
    if find_spec("triton") is None:
        return f"Triton is not installed ({how_to_get_triton()})"
    try:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            off = {dtype: _norm_off(device, dtype) for dtype in _CLOSE}
    except Exception as e:  # noqa: BLE001 - a compiler that is missing, a driver too old: each has its own way
        if is_out_of_memory(e):  # which says nothing of the next time
            raise
        return f"{type(e).__name__}: {first_line(e)} ({MEND_TRITON})"
    wrong = [value for dtype, value in off.items() if not value < _CLOSE[dtype]]
    return f"a norm is off by {wrong[0]:.1e}" if wrong else ""


def _norm_off(device: torch.device, dtype: torch.dtype) -> float:
    from gemma_tune.train import fused

    x = torch.arange(1.0, 65.0, device=device).view(2, 32)
    found = fused.RMSNorm.apply(x.to(dtype), torch.ones(32, device=device), 1e-6)
    return (found.float() - x * x.square().mean(-1, keepdim=True).rsqrt()).abs().max().item()
