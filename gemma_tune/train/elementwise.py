"""Norm, rotation and gated activation as autograd functions in PyTorch's own operations, and where a model has them.

Which of a family's layers they stand for is found by trying, in float64 on a CPU.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from gemma_tune.train.undoing import set_until, unsharded

# By their names in fused.
_ACTIVATIONS = {"gelu_tanh": partial(functional.gelu, approximate="tanh"), "gelu": functional.gelu,
                "silu": functional.silu}


class RMSNorm(torch.autograd.Function):
    """``x / sqrt(mean(x^2) + eps) * w`` over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467).

    Computed in fp32 and rounded once. Kept for the backward pass: x and one fp32 number per row.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        """Args: x (…, d); weight (d,) in fp32 or wider."""
        wide = x.to(weight.dtype) if x.dtype != weight.dtype else x.clone()
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        inverse = inverse.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return wide.mul_(inverse).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, inverse = ctx.saved_tensors
        inner = grad * weight
        normed = x * inverse
        along = torch.linalg.vecdot(inner, normed).unsqueeze(-1).div_(x.shape[-1])
        grad_weight = gradient_of_scale(grad, x, inverse) if ctx.needs_input_grad[1] else None
        return inner.addcmul_(normed, along, value=-1).mul_(inverse).to(grad.dtype), grad_weight, None


def gradient_of_scale(grad: torch.Tensor, x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Of the weight of a norm (d,), in the type of ``inverse``.

    Args:
        grad, x: (…, d), of the norm's result and its input.
        inverse: 1 / sqrt(mean(x^2) + eps), (…, 1).
    """
    return (grad * inverse).mul_(x).flatten(0, -2).sum(0)


class Rotation(torch.autograd.Function):
    """Rotary position embedding on halves (Su et al. 2021, arXiv 2104.09864): ``x cos + rotate_half(x) sin``."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        """Args: x (…, d); cos and sin broadcast to it."""
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        out = x * cos
        out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        out[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        half = grad.shape[-1] // 2
        out = grad * cos
        out[..., :half].addcmul_(grad[..., half:], sin[..., half:])
        out[..., half:].addcmul_(grad[..., :half], sin[..., :half], value=-1)
        return out, None, None


# ---- norms and rotations ---------------------------------------------------------------------------------------------

def replace_norms(model: torch.nn.Module, undo: contextlib.ExitStack, operations: Any) -> int:
    offsets: dict[type, float | None] = {}
    count = 0
    for norm in model.modules():
        kind, eps = type(norm), _epsilon(norm)
        whole = getattr(norm, "whole", None)  # it is trained; the base's own one came before it
        if not kind.__name__.endswith("RMSNorm") or eps is None or norm.weight.requires_grad and not whole:
            continue
        if kind not in offsets:
            offsets[kind] = _offset(norm, eps)
        if (offset := offsets[kind]) is None:
            continue
        weight = partial(_weight, whole, offset) if whole else _constant(norm, offset)
        set_until(undo, norm, "forward", partial(_normed, operations, weight=weight, eps=eps))
        count += 1
    return count


def _constant(norm: torch.nn.Module, offset: float) -> Callable[[], torch.Tensor]:
    """A function that gives the factors of a frozen norm (d,), in fp32 or wider."""
    weight = unsharded(norm.weight.detach()).to(torch.promote_types(norm.weight.dtype, torch.float32)) + offset
    return lambda: weight


def _weight(whole: Any, offset: float) -> torch.Tensor:
    """Those of one that is trained, see :class:`gemma_tune.train.whole.Whole`."""
    return whole.rounded("weight").float() + offset


def _normed(operations: Any, x: torch.Tensor, weight: Callable[[], torch.Tensor], eps: float) -> torch.Tensor:
    return operations.RMSNorm.apply(x, weight(), eps)


def _epsilon(norm: torch.nn.Module) -> float | None:
    """The eps of a norm with one weight vector and nothing else, None for any other module."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    one = [p.ndim for p in norm.parameters()] == [1] and hasattr(norm, "weight")
    return eps if isinstance(eps, float) and one and not norm._forward_hooks else None


def _offset(norm: torch.nn.Module, eps: float) -> float | None:
    """What a family adds to the stored weight (Gemma 1 to 3: 1; others: 0), found by trying; None if neither fits."""
    trial = copy.deepcopy(norm).to_empty(device="cpu").double()  # a norm on the meta device can be tried as well
    trial.weight = torch.nn.Parameter(torch.empty(norm.weight.shape, dtype=torch.float64))  # and one in shards
    with torch.no_grad():
        trial.weight.normal_(generator=torch.Generator().manual_seed(0))
        x = torch.randn(4, len(trial.weight), generator=torch.Generator().manual_seed(1))
        try:
            expected = trial(x)
        except (RuntimeError, TypeError):
            return None
        for offset in (0.0, 1.0):
            if _same(expected, RMSNorm.apply(x.double(), trial.weight + offset, eps)):
                return offset
    return None


def _same(a: Any, b: torch.Tensor) -> bool:
    return isinstance(a, torch.Tensor) and a.shape == b.shape and torch.allclose(a.double(), b.double(), atol=1e-5)


def _pair(rotation, q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return rotation.apply(q, cos, sin), rotation.apply(k, cos, sin)


def _single(rotation, x, cos, sin, unsqueeze_dim=1):
    return rotation.apply(x, cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim))


def replace_rotations(model: torch.nn.Module, undo: contextlib.ExitStack, operations: Any) -> int:
    name = "apply_rotary_pos_emb"
    attentions = [m for m in model.modules() if type(m).__name__.endswith("Attention")]
    count = 0
    for module in {type(m).__module__ for m in attentions}:
        source = sys.modules[module]
        if ours := _rotation_like(getattr(source, name, None)):
            set_until(undo, source, name, partial(ours, operations.Rotation))
            count += sum(type(m).__module__ == module for m in attentions)
    return count


def _rotation_like(theirs: Callable | None) -> Callable | None:
    """Our function, to be given a rotation, that has a family's arguments and result; None where none agrees."""
    if theirs is None:
        return None
    names = list(inspect.signature(theirs).parameters)
    tensors = torch.randn(4, 2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    angles = [tensors[2, :, 0], tensors[3, :, 0]]
    for ours in (_pair, _single):
        trial = partial(ours, Rotation)
        if names == list(inspect.signature(trial).parameters):
            heads = list(tensors[:2] if ours is _pair else tensors[:1])
            narrow = [x.bfloat16() for x in heads]  # some families give back the type of the heads, some the wider one
            partial_angles = [x[..., :4] for x in angles]  # some turn a part of each head and leave the rest
            cases = [[*heads, *angles], [*narrow, *angles], [*heads, *partial_angles]]
            return ours if all(_equal_results(theirs, trial, case) for case in cases) else None
    return None


def _equal_results(theirs: Callable, ours: Callable, tensors: list[torch.Tensor]) -> bool:
    """Whether both functions give the same numbers in the same type, or both refuse these shapes."""
    results = []
    for function in (theirs, ours):
        try:
            found = function(*tensors)
        except (RuntimeError, TypeError, ValueError, IndexError):
            found = ()
        results.append(found if isinstance(found, tuple) else (found,))
    expected, got = results
    return len(expected) == len(got) and all(e.dtype == g.dtype and _same(e, g) for e, g in zip(expected, got))


# ---- gates -----------------------------------------------------------------------------------------------------------

def replace_gates(model: torch.nn.Module, undo: contextlib.ExitStack, operations: Any) -> int:
    """Compute ``down_proj(act_fn(gate_proj(x)) * up_proj(x))`` with a fused activation, where there is one."""
    if not hasattr(operations, "GatedActivation"):
        return 0
    count = 0
    for module in model.modules():
        if kind := _gate_like(module):
            set_until(undo, module, "forward", partial(_gated, operations.GatedActivation, module, kind))
            count += 1
    return count


def _gated(activation: Any, module: Any, kind: str, x: torch.Tensor) -> torch.Tensor:
    return module.down_proj(activation.apply(module.gate_proj(x), module.up_proj(x), kind))


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def _gate_like(module: Any) -> str | None:
    """The activation with which a module's forward pass is that of a gated one, found by trying; None for any other."""
    if not all(isinstance(getattr(module, name, None), torch.nn.Module) for name in (*_PROJECTIONS, "act_fn")):
        return None
    if len(inspect.signature(module.forward).parameters) != 1 or "forward" in vars(module):
        return None
    trial, generator = copy.copy(module), torch.Generator().manual_seed(0)
    trial._modules = dict(module._modules)
    for name, sizes in zip(_PROJECTIONS, ((8, 16), (8, 16), (16, 8))):
        linear = torch.nn.Linear(*sizes, device="meta", dtype=torch.float64).to_empty(device="cpu")
        for parameter in linear.parameters():
            torch.nn.init.normal_(parameter, generator=generator)
        trial._modules[name] = linear
    x = torch.randn(2, 8, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        gate, up = trial.gate_proj(x), trial.up_proj(x)
        try:
            expected = type(module).forward(trial, x)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return None
        for kind, activation in _ACTIVATIONS.items():
            if isinstance(expected, torch.Tensor) and _same(expected, trial.down_proj(activation(gate) * up)):
                return kind
    return None
