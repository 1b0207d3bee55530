"""Layers of the training's forward and backward pass without the passes over memory that plain autograd makes.

A small model's step is limited by memory as much as by products. Plain PEFT casts every activation to the adapter's
fp32 and multiplies there; RMSNorm and the rotary embedding are a dozen elementwise operations each, whose results
autograd keeps. Each is one autograd function here, with its derivative written out.

Nothing is replaced on trust: a norm or a rotation of another family is left as it is unless the function here gives
the same result on random input, see :func:`fast_layers`. Weights stay where they are, so the adapter is saved and
loaded by plain PEFT.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from gemma_tune.train.attention import causal_attention_or


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
        out = torch.nn.functional.linear(x, weight(), bias)
        out.addmm_(inner, narrow_b.t())
        ctx.weight, ctx.scale, ctx.same = weight, scale, dropped is x
        ctx.save_for_backward(dropped, inner, narrow_a, narrow_b)
        ctx.types = a.dtype, b.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dropped, inner, a, b = ctx.saved_tensors
        grad_inner = grad @ b
        grad_a = (grad_inner.t() @ dropped).to(ctx.types[0])
        grad_b = (grad.t() @ inner).to(ctx.types[1]).mul_(ctx.scale)
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ ctx.weight()
            if ctx.same:
                grad_x.addmm_(grad_inner, a)
        if not ctx.same and ctx.needs_input_grad[1]:
            grad_dropped = grad_inner @ a
        return grad_x, grad_dropped, None, None, grad_a, grad_b, None


class RMSNorm(torch.autograd.Function):
    """``x / sqrt(mean(x^2) + eps) * w`` over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467).

    Computed in fp32 and rounded once. Kept for the backward pass: x and one fp32 number per row.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        """Args: x (…, d); weight (d,) in fp32 or wider, frozen."""
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
        return inner.addcmul_(normed, along, value=-1).mul_(inverse).to(grad.dtype), None, None


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


@contextlib.contextmanager
def fast_layers(model: torch.nn.Module) -> Iterator[dict[str, int]]:
    """Compute with the functions above while the context lasts; afterwards the model is as it was.

    Args:
        model: a PEFT model whose base is frozen.

    Yields:
        How many layers of each kind were replaced.
    """
    with contextlib.ExitStack() as undo:
        counts = {"adapters": _replace_adapters(model, undo), "norms": _replace_norms(model, undo),
                  "rotations": _replace_rotations(model, undo)}
        _replace_attention(undo)
        yield counts


@contextlib.contextmanager
def compiled_layers(model: torch.nn.Module) -> Iterator[None]:
    """Compile the decoder's layers with ``torch.compile`` while the context lasts; the first steps then take long.

    The layers share one compilation per kind, which is why each is compiled by itself. Norms and rotations stay as
    they are, since the compiler fuses them; adapters multiply in the compute type, as :class:`LoraLinear` does. What
    goes into the first layer takes part in the backward pass as what goes into the others does, since the first would
    be compiled a second time otherwise.
    """
    from peft.tuners.lora import LoraLayer

    with contextlib.ExitStack() as undo:
        for layer in model.modules():
            if isinstance(layer, LoraLayer) and _dense(layer) is not None:
                undo.callback(setattr, layer, "__class__", type(layer))
                layer.__class__ = _seen_through(type(layer))
        for layer in _decoder_layers(model):
            undo.callback(setattr, layer, "_compiled_call_impl", None)
            layer.compile(dynamic=True)
        hook = model.get_input_embeddings().register_forward_hook(
            lambda module, ids, out: out.requires_grad_() if torch.is_grad_enabled() else out)
        undo.callback(hook.remove)
        yield


@contextlib.contextmanager
def not_compiled(model: torch.nn.Module) -> Iterator[None]:
    """In place of compiled layers the fast ones while the context lasts, as for a validation.

    Without gradients each layer would be compiled once more, and torch gives up after eight times.
    """
    layers = [(layer, layer._compiled_call_impl) for layer in _decoder_layers(model)]
    with contextlib.ExitStack() as undo:
        for layer, compiled in layers:
            undo.callback(setattr, layer, "_compiled_call_impl", compiled)
            layer._compiled_call_impl = None
        undo.enter_context(fast_layers(model))
        yield


def _decoder_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    return model.get_base_model().get_decoder().layers


def worth_compiling(before: float, after: float, compiling: float, batches: float) -> tuple[bool, str]:
    """Whether to go on with compiled layers, and the sentence that says why.

    What was spent on compiling is spent, so faster layers are kept also where they will not make up for it.

    Args:
        before, after: seconds of one and the same batch without and with compiled layers.
        compiling: seconds of the first batch with them.
        batches: how many such batches the training is worth.
    """
    if after >= before:
        return False, (f"compiling took {compiling:.0f} s and did not help ({after:.2f} s instead of {before:.2f} s "
                       "for the longest batch): going on without it")
    even = compiling / (before - after)
    verdict = "it pays" if even < batches else "it does not pay: leave --compile out next time"
    return True, (f"compiling took {compiling:.0f} s and saves {before - after:.2f} of {before:.2f} s on the longest "
                  f"batch: even after {even:,.0f} such batches, and this training is worth {batches:,.0f}; {verdict}")


def unsharded(weight: torch.Tensor) -> torch.Tensor:
    """The whole of a weight that FSDP keeps in shards; all processes have to ask for it."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def _set(undo: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until ``undo`` is closed."""
    own = vars(owner)
    undo.callback(partial(setattr, owner, name, own[name]) if name in own else partial(delattr, owner, name))
    setattr(owner, name, value)


# ---- adapters --------------------------------------------------------------------------------------------------------

def _replace_adapters(model: torch.nn.Module, undo: contextlib.ExitStack) -> int:
    from peft.tuners.lora import LoraLayer

    count = 0
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and (dense := _dense(layer)) is not None:
            _set(undo, layer, "forward", partial(_adapted, layer, layer.forward, partial(_fused, layer, dense)))
            count += 1
    return count


def _dense(layer: Any) -> Callable[[], torch.Tensor] | None:
    """A function that gives the base weight (out, in) in the compute type; None for a layer that is left to PEFT."""
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
        from bitsandbytes.functional import dequantize_4bit

        return lambda: dequantize_4bit(base.weight.data, base.weight.quant_state)
    return None


def _adapted(layer: Any, original: Callable, ours: Callable, x: torch.Tensor, *args: Any, **kwargs: Any):
    if layer.disable_adapters or layer.merged or args or kwargs:
        return original(x, *args, **kwargs)
    return ours(x)


def _fused(layer: Any, dense: Callable[[], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    name = layer.active_adapters[0]
    rows = x.reshape(-1, x.shape[-1])
    if layer.get_base_layer().weight.is_floating_point():  # under autocast a norm may hand on fp32
        rows = rows.to(layer.get_base_layer().weight.dtype)
    dropout = layer.lora_dropout[name]
    dropped = rows if isinstance(dropout, torch.nn.Identity) or not layer.training else dropout(rows)
    out = LoraLinear.apply(rows, dropped, dense, layer.get_base_layer().bias, layer.lora_A[name].weight,
                           layer.lora_B[name].weight, layer.scaling[name])
    return out.view(*x.shape[:-1], out.shape[-1])


@functools.cache
def _seen_through(kind: type) -> type:
    """PEFT's kind of layer with the same in operations that a compiler can see through.

    A class and no function for each layer: by that the compiler would tell the layers apart and compile every one.
    """
    class SeenThrough(kind):
        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.disable_adapters or self.merged or args or kwargs:
                return kind.forward(self, x, *args, **kwargs)
            name = self.active_adapters[0]
            a, b = self.lora_A[name].weight.to(x.dtype), (self.lora_B[name].weight * self.scaling[name]).to(x.dtype)
            linear = torch.nn.functional.linear
            return self.get_base_layer()(x) + linear(linear(self.lora_dropout[name](x), a), b)

    return SeenThrough


# ---- norms and rotations ---------------------------------------------------------------------------------------------

def _replace_norms(model: torch.nn.Module, undo: contextlib.ExitStack) -> int:
    offsets: dict[type, float | None] = {}
    count = 0
    for norm in model.modules():
        kind, eps = type(norm), _epsilon(norm)
        if not kind.__name__.endswith("RMSNorm") or eps is None or norm.weight.requires_grad:
            continue
        if kind not in offsets:
            offsets[kind] = _offset(norm, eps)
        if (offset := offsets[kind]) is not None:
            weight = unsharded(norm.weight.detach()).to(torch.promote_types(norm.weight.dtype, torch.float32)) + offset
            _set(undo, norm, "forward", partial(_normed, weight=weight, eps=eps))
            count += 1
    return count


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return RMSNorm.apply(x, weight, eps)


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


def _pair(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return Rotation.apply(q, cos, sin), Rotation.apply(k, cos, sin)


def _single(x, cos, sin, unsqueeze_dim=1):
    return Rotation.apply(x, cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim))


def _replace_rotations(model: torch.nn.Module, undo: contextlib.ExitStack) -> int:
    name = "apply_rotary_pos_emb"
    attentions = [m for m in model.modules() if type(m).__name__.endswith("Attention")]
    count = 0
    for module in {type(m).__module__ for m in attentions}:
        source = sys.modules[module]
        if ours := _rotation_like(getattr(source, name, None)):
            _set(undo, source, name, ours)
            count += sum(type(m).__module__ == module for m in attentions)
    return count


def _replace_attention(undo: contextlib.ExitStack) -> None:
    from transformers import masking_utils
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

    # Rows are never packed here; to find that out, the library would wait for the GPU, or make a mask in a capture.
    _set(undo, masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    theirs = FUNCTIONS["sdpa"]
    undo.callback(FUNCTIONS.__setitem__, "sdpa", theirs)
    FUNCTIONS["sdpa"] = causal_attention_or(theirs)


def _rotation_like(theirs: Callable | None) -> Callable | None:
    """Our function with the arguments and the result of a family's own, None where there is none that agrees."""
    if theirs is None:
        return None
    names = list(inspect.signature(theirs).parameters)
    tensors = torch.randn(4, 2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    angles = [tensors[2, :, 0], tensors[3, :, 0]]
    for ours in (_pair, _single):
        if names == list(inspect.signature(ours).parameters):
            heads = list(tensors[:2] if ours is _pair else tensors[:1])
            narrow = [x.bfloat16() for x in heads]  # some families give back the type of the heads, some the wider one
            partial_angles = [x[..., :4] for x in angles]  # some turn a part of each head and leave the rest
            cases = [[*heads, *angles], [*narrow, *angles], [*heads, *partial_angles]]
            return ours if all(_equal_results(theirs, ours, case) for case in cases) else None
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
