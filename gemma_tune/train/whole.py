"""Modules that are trained as a whole: fp32 weights that the optimiser changes, and a rounded copy to compute with.

Steps are too small for bf16, so the weights themselves are fp32. The forward pass takes them as the base has its own:
rounded, by the code of the module's class. What a validation measures is thus what is saved.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from gemma_tune.lora.whole import EMBEDDING, LINEAR, copies_in, kind_of
from gemma_tune.train.adapters import NarrowCopies
from gemma_tune.train.products import gradient_of, wide_product


class Rounded(torch.autograd.Function):
    """A weight as it is computed with; its gradient is that of the weight."""

    @staticmethod
    def forward(ctx, weight, narrow):
        """Args: weight in fp32, narrow the same in the compute type."""
        ctx.dtype = weight.dtype
        return narrow.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad.to(ctx.dtype), None


class WholeLinear(torch.autograd.Function):
    """``x W^T + b``, all three of which have a gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias, narrow, narrow_bias):
        """Args: x (n, in); weight (out, in) and bias (out,) or None in fp32, and the same in the type of x."""
        ctx.save_for_backward(x)
        ctx.narrow, ctx.dtype = narrow, weight.dtype
        return torch.nn.functional.linear(x, narrow, narrow_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (grad @ ctx.narrow if wanted[0] else None, wide_product(grad.t(), x).to(ctx.dtype),
                grad.sum(0, dtype=ctx.dtype) if wanted[2] else None, None, None)


class Rows(torch.autograd.Function):
    """Rows of a table. Their gradients are added where they belong: one of the whole table, of a Gemma's vocabulary
    larger than all its layers, would be made and added to the other for each piece of a batch."""

    @staticmethod
    def forward(ctx, weight, narrow, ids, padding):
        """Args: weight (entries, d) in fp32, narrow the same in the compute type, ids (n,); padding an entry that does
        not learn, as that of PyTorch's own embedding, or None."""
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding = weight, padding
        return narrow.index_select(0, ids)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (ids,) = ctx.saved_tensors
        if ctx.padding is not None:
            grad = grad.masked_fill((ids == ctx.padding).unsqueeze(1), 0)
        gradient_of(ctx.weight).index_add_(0, ids, grad.to(ctx.weight.dtype))
        return None, None, None, None


class Whole:
    """The weights of a module that is trained as a whole, and how it takes them.

    Args:
        copies: of all such weights.
        numbers: which of them are the module's, by name.
        dtype: of the base's own.
    """

    def __init__(self, module: torch.nn.Module, copies: NarrowCopies, numbers: dict[str, int], dtype: torch.dtype):
        self._weights = dict(module.named_parameters(recurse=False))
        self._copies, self._numbers, self.dtype = copies, numbers, dtype

    def narrow(self, name: str) -> torch.Tensor:
        """A weight rounded, without a gradient."""
        weight = self._weights[name]
        if weight.dtype == self.dtype:
            return weight.detach()
        return self._copies.of(self._numbers[name], self.dtype)

    def rounded(self, name: str) -> torch.Tensor:
        """The same, whose gradient is that of the weight."""
        return Rounded.apply(self._weights[name], self.narrow(name))

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """As a linear layer."""
        bias = self._weights.get("bias")
        out = WholeLinear.apply(x.reshape(-1, x.shape[-1]).to(self.dtype), self._weights["weight"], bias,
                                self.narrow("weight"), None if bias is None else self.narrow("bias"))
        return out.view(*x.shape[:-1], out.shape[-1])

    def embedding(self, like: torch.nn.Module, padding: int | None, ids: torch.Tensor) -> torch.Tensor:
        """As an embedding with this padding, which may do something with the rows; ``like`` is one of its class.

        It looks its rows up in a table of those that are wanted, in their order.
        """
        rows = Rows.apply(self._weights["weight"], self.narrow("weight"), ids.reshape(-1), padding)
        return functional_call(like, {"weight": rows}, (torch.arange(ids.numel(), device=ids.device).view(ids.shape),))

    def other(self, like: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As any other module of the class of ``like``."""
        return functional_call(like, {name: self.rounded(name) for name in self._weights}, args, kwargs)


def train_whole(model: Any) -> NarrowCopies:
    """Let the modules of a PEFT model that are trained as a whole compute so from now on, beginning with what the base
    has: beside one in 4 bits TRL has rounded the copies.

    Returns:
        The rounded copies, to be refreshed after each step; of nothing, where there are no such modules.
    """
    pairs = copies_in(model).values()
    weights = {id(p): p for _, module in pairs for p in module.parameters(recurse=False)}
    for base, module in pairs:
        for name, weight in module.named_parameters(recurse=False):
            began = base.get_parameter(name).detach()
            if {weight.dtype, began.dtype} != {torch.float32}:  # else PEFT's copy is one bit for bit
                weight.data = began.to(torch.float32, copy=True)
    numbers = {key: number for number, key in enumerate(weights)}
    copies = NarrowCopies([*weights.values()])
    for base, module in pairs:
        own = {name: numbers[id(p)] for name, p in module.named_parameters(recurse=False)}
        whole = Whole(module, copies, own, next(base.parameters()).dtype)
        module.forward = _forward(module, whole)
        module.whole = whole
    return copies


def _forward(module: torch.nn.Module, whole: Whole) -> Callable[..., torch.Tensor]:
    kind = kind_of(module)
    if kind == LINEAR:
        return whole.linear
    like = copy.copy(module)
    vars(like).pop("forward", None)  # it has its class's own
    like._parameters = dict(module._parameters)
    if kind == EMBEDDING:
        like.padding_idx = None  # the number of a row among those that are wanted says nothing
        return partial(whole.embedding, like, module.padding_idx)
    return partial(whole.other, like)
