"""LoRA layers whose forward and backward pass are the products that they need and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from gemma_tune.train.products import wide_product
from gemma_tune.train.undoing import set_until
from gemma_tune.train.unpacking import Room


class LoraLinear(torch.autograd.Function):
    """``x W^T + b + s (d A^T) B^T`` for a frozen W, with d = dropout(x) or x itself.

    LoRA as in Hu et al. 2021 (https://arxiv.org/abs/2106.09685, section 4.1). All products are in x's type; A and B
    are the fp32 master weights, rounded here, where they are small, rather than x cast up, which is large.
    """

    @staticmethod
    def forward(ctx, x, dropped, weight, bias, a, b, scale):
        """Args: x, dropped (n, in); weight: a callable that gives (out, in) in x's type; a (r, in); b (out, r)."""
        narrow_a, narrow_b = a.to(x.dtype), (b * scale).to(x.dtype)
        inner = dropped @ narrow_a.t()
        ctx.scale, ctx.types = scale, (a.dtype, b.dtype)
        return _base_and_adapter(ctx, x, dropped, weight, bias, inner, narrow_a, narrow_b)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dropped, inner, a, b = ctx.saved_tensors
        grad_inner = grad @ b
        grad_a = (grad_inner.t() @ dropped).to(ctx.types[0])
        grad_b = (grad.t() @ inner).to(ctx.types[1]).mul_(ctx.scale)
        return *_input_gradients(ctx, grad, grad_inner, a), None, None, grad_a, grad_b, None


class NarrowLoraLinear(torch.autograd.Function):
    """:class:`LoraLinear` for a GPU, where each cast is a kernel of its own: A and B come rounded, see
    :class:`NarrowCopies`, their gradients leave in the type in which products are added up, and the scale is a factor
    of products that are made anyway."""

    @staticmethod
    def forward(ctx, x, dropped, weight, bias, a, b, narrow_a, narrow_b, scale):
        """Args: as above; narrow_a (r, in) and narrow_b (out, r) in x's type, a and b for their gradients only."""
        inner = _scaled_product(dropped, narrow_a.t(), scale)
        ctx.scale, ctx.types = scale, (a.dtype, b.dtype)
        return _base_and_adapter(ctx, x, dropped, weight, bias, inner, narrow_a, narrow_b)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dropped, inner, a, b = ctx.saved_tensors
        grad_inner = _scaled_product(grad, b, ctx.scale)
        grad_a = wide_product(grad_inner.t(), dropped).to(ctx.types[0])
        grad_b = wide_product(grad.t(), inner).to(ctx.types[1])
        return *_input_gradients(ctx, grad, grad_inner, a), None, None, grad_a, grad_b, None, None, None


def _base_and_adapter(ctx: Any, x: torch.Tensor, dropped: torch.Tensor, weight: Callable[[], torch.Tensor],
                      bias: torch.Tensor | None, inner: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``x W^T + bias + inner b^T``, and what the backward pass needs of it."""
    out = torch.nn.functional.linear(x, weight(), bias)
    out.addmm_(inner, b.t())
    ctx.weight, ctx.same = weight, dropped is x
    ctx.save_for_backward(dropped, inner, a, b)
    return out


def _input_gradients(ctx: Any, grad: torch.Tensor, grad_inner: torch.Tensor,
                     a: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of x and of its copy under dropout; None for one that is not asked for, or is the other."""
    grad_x = grad_dropped = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ ctx.weight()
        if ctx.same:
            grad_x.addmm_(grad_inner, a)
    if not ctx.same and ctx.needs_input_grad[1]:
        grad_dropped = grad_inner @ a
    return grad_x, grad_dropped


def _scaled_product(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """``scale a b``, scaled before it is rounded."""
    return a @ b if scale == 1 else torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)


class NarrowCopies:
    """The adapters' weights rounded to the compute type, once for all layers and after each change instead of in each
    pass. Buffers keep their addresses, so that a captured step goes on reading what was last copied there."""

    def __init__(self, weights: Sequence[torch.Tensor]):
        self._weights = list(weights)
        self._copies: dict[torch.dtype, list[torch.Tensor]] = {}
        self._versions: list[int] = []

    def __len__(self) -> int:
        """How many weights there are."""
        return len(self._weights)

    def refresh(self) -> None:
        """Copy what the weights are now: to be called after an optimiser step whose next step is a replay.

        Outside of replays :meth:`of` finds changes by itself.
        """
        with torch.no_grad():
            for copies in self._copies.values():
                torch._foreach_copy_(copies, self._weights)
        self._versions = [weight._version for weight in self._weights]

    def of(self, index: int, dtype: torch.dtype) -> torch.Tensor:
        """Weight number ``index`` as ``dtype``."""
        if dtype not in self._copies:
            self._copies[dtype] = [torch.empty_like(w, dtype=dtype, requires_grad=False) for w in self._weights]
            self.refresh()
        elif self._weights[index]._version != self._versions[index]:
            self.refresh()
        return self._copies[dtype][index]


# ---- adapters --------------------------------------------------------------------------------------------------------

def replace_adapters(model: torch.nn.Module, undo: contextlib.ExitStack, narrow: bool) -> tuple[int, NarrowCopies]:
    """Put the functions above in the place of PEFT's.

    Args:
        narrow: keep rounded copies of the adapters' weights, as on a GPU.

    Returns:
        How many layers were replaced, and the copies (of nothing, unless ``narrow``).
    """
    from peft.tuners.lora import LoraLayer

    room = Room()
    found = [(layer, dense) for layer in model.modules()
             if isinstance(layer, LoraLayer) and (dense := dense_weight(layer, room))]
    copies = NarrowCopies([weight for layer, _ in found for weight in _factors(layer)] if narrow else [])
    for number, (layer, dense) in enumerate(found):
        rounded = partial(_copied, copies, number) if narrow else None
        ours = partial(_fused, layer, dense, rounded)
        set_until(undo, layer, "forward", partial(_adapted, layer, layer.forward, ours))
    return len(found), copies


def _factors(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    name = layer.active_adapters[0]
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def _copied(copies: NarrowCopies, number: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return copies.of(2 * number, dtype), copies.of(2 * number + 1, dtype)


def dense_weight(layer: Any, room: Room) -> Callable[[], torch.Tensor] | None:
    """A function that gives the base weight (out, in) in the compute type, for the next product; None for a layer that
    is left to PEFT.

    Args:
        room: where weights in 4 bits are unpacked.
    """
    base = layer.get_base_layer()
    names = layer.active_adapters
    plain = (len(names) == 1 and names[0] in layer.lora_A and names[0] not in layer.lora_variant and not layer.merged
             and not layer.lora_bias[names[0]] and not getattr(layer, "fan_in_fan_out", False))
    if not plain or not isinstance(base, torch.nn.Linear) or base.weight.requires_grad:
        return None
    if type(base) is torch.nn.Linear:
        return lambda: base.weight
    state = getattr(base.weight, "quant_state", None)
    # Weights that bitsandbytes has packed for answering on a CPU cannot be read back, see models.load_model.
    if type(base).__name__ == "Linear4bit" and state and not getattr(state, "packing_format_for_cpu", False):
        return lambda: room.unpacked(base.weight.data, base.weight.quant_state)
    return None


def _adapted(layer: Any, original: Callable, ours: Callable, x: torch.Tensor, *args: Any, **kwargs: Any):
    if layer.disable_adapters or layer.merged or args or kwargs:
        return original(x, *args, **kwargs)
    return ours(x)


def _fused(layer: Any, dense: Callable[[], torch.Tensor], rounded: Callable | None, x: torch.Tensor) -> torch.Tensor:
    name, weight = layer.active_adapters[0], layer.get_base_layer().weight
    # Under autocast a norm may hand on fp32. What a 4-bit weight is stored as says nothing.
    rows = x.reshape(-1, x.shape[-1]).to(getattr(weight, "quant_state", weight).dtype)
    dropout = layer.lora_dropout[name]
    dropped = rows if isinstance(dropout, torch.nn.Identity) or not layer.training else dropout(rows)
    given = rows, dropped, dense, layer.get_base_layer().bias, *_factors(layer)
    if rounded is None:
        out = LoraLinear.apply(*given, layer.scaling[name])
    else:
        out = NarrowLoraLinear.apply(*given, *rounded(rows.dtype), layer.scaling[name])
    return out.view(*x.shape[:-1], out.shape[-1])
