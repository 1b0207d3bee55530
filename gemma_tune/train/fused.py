"""The layers' elementwise work on a GPU as single Triton kernels, forward and backward.

In eager PyTorch a norm, a rotation or a gated activation is a dozen kernels, each of which reads and writes the whole
tensor; here each is one, computed in fp32 and rounded once. Nothing depends on the data: the kernels can be captured in
a CUDA graph, and are the same for all batches of a model (:mod:`gemma_tune.train.ahead`). Importing this module needs
Triton, so it is imported only where a GPU is used; under Triton's interpreter it also runs on a CPU, which is how it is
tested. For float64 all of it computes in float64.

Tensors come as attention makes them, as transposed views, so rows are addressed by strides and results keep the layout
of what came in.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from gemma_tune.train.elementwise import gradient_of_scale

_VOCABULARY_BLOCK = 8192  # logits of a row at a time: 16 for each of 512 threads
_FLAT_BLOCK = 1024  # elements per program of an activation: 8 bf16 numbers, one 16-byte read, for each of 128 threads


def _wide(*tensors: torch.Tensor) -> Any:
    """The type to compute in, as Triton names it."""
    return tl.float64 if torch.float64 in {t.dtype for t in tensors} else tl.float32


def _four(x: torch.Tensor) -> torch.Tensor:
    """x as (n0, n1, n2, d) with d contiguous; a copy only where no strides describe that."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.flatten(0, -4) if x.ndim > 4 else x[(None,) * (4 - x.ndim)]


def _tile(rows: int, width: int) -> dict[str, Any]:
    """What :func:`_launch` takes: how many programs, rows and columns of each, and its warps."""
    columns = triton.next_power_of_2(width)
    per = max(1, 2048 // columns)
    warps = 4 if per * columns <= 4096 else 8 if columns <= 16_384 else 16
    return {"programs": triton.cdiv(rows, per), "ROWS": per, "COLUMNS": columns, "num_warps": warps}


_compiling: ContextVar[bool] = ContextVar("compiling", default=False)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Compile what is launched on the meta device while the context lasts, in this thread."""
    token = _compiling.set(True)
    try:
        yield
    finally:
        _compiling.reset(token)


def _launch(kernel: Any, first: torch.Tensor, *more: Any, programs: int, **constants: Any) -> None:
    """Run so many programs of a kernel; on the meta device, which has no numbers, there is nothing to do."""
    if not first.is_meta:
        kernel[(programs,)](first, *more, **constants)
    elif _compiling.get():
        kernel.warmup(first, *more, grid=(programs,), **constants)


# One kernel for all numbers of rows: Triton would compile another one where such a number is divisible by 16, or is 1,
# and each new shape of a batch would cost tenths of a second. What it knows of widths and strides makes reads wide.
_rows_alike = functools.partial(triton.jit, do_not_specialize=["count", "n1", "n2"])


@triton.jit
def _offsets(rows, n1, n2, s0, s1, s2):
    """Where rows of (n0, n1, n2, d) begin. In 64 bits: a long batch has more than 2^31 elements."""
    rows = rows.to(tl.int64)
    return ((rows // (n1 * n2)) * s0 + ((rows // n2) % n1) * s1 + (rows % n2) * s2)[:, None]


# ---- RMSNorm ---------------------------------------------------------------------------------------------------------

@_rows_alike
def _norm_forward(x, weight, out, inverse, count, width, eps, n1, n2, x0, x1, x2, o0, o1, o2,
                  WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    inside = (rows < count)[:, None] & (columns < width)
    value = tl.load(x + _offsets(rows, n1, n2, x0, x1, x2) + columns, mask=inside, other=0.0).to(WIDE)
    factor = tl.rsqrt(tl.sum(value * value, 1) / width + eps)
    scale = tl.load(weight + columns, mask=columns < width, other=0.0).to(WIDE)
    tl.store(out + _offsets(rows, n1, n2, o0, o1, o2) + columns, value * factor[:, None] * scale, mask=inside)
    tl.store(inverse + rows, factor, mask=rows < count)


@_rows_alike
def _norm_backward(x, weight, inverse, grad, out, count, width, n1, n2, x0, x1, x2, g0, g1, g2, o0, o1, o2,
                   WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    inside = (rows < count)[:, None] & (columns < width)
    factor = tl.load(inverse + rows, mask=rows < count, other=0.0)[:, None]
    normed = tl.load(x + _offsets(rows, n1, n2, x0, x1, x2) + columns, mask=inside, other=0.0).to(WIDE) * factor
    inner = tl.load(grad + _offsets(rows, n1, n2, g0, g1, g2) + columns, mask=inside, other=0.0).to(WIDE)
    inner = inner * tl.load(weight + columns, mask=columns < width, other=0.0).to(WIDE)
    along = (tl.sum(inner * normed, 1) / width)[:, None]
    tl.store(out + _offsets(rows, n1, n2, o0, o1, o2) + columns, (inner - normed * along) * factor, mask=inside)


class RMSNorm(torch.autograd.Function):
    """``x / sqrt(mean(x^2) + eps) * w`` over the last dimension; keeps x and one number per row."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        """Args: x (…, d) in any float type; weight (d,) in fp32 or wider, the family's offset in it."""
        rows = _four(x)
        out = torch.empty_like(rows)
        _, n1, n2, width = rows.shape
        count, wide = rows.numel() // width, _wide(x)
        inverse = torch.empty(count, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        _launch(_norm_forward, rows, weight, out, inverse, count, width, eps, n1, n2, *rows.stride()[:3],
                *out.stride()[:3], WIDE=wide, **_tile(count, width))
        ctx.save_for_backward(x, weight, inverse)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, inverse = ctx.saved_tensors
        rows, above = _four(x), _four(grad)
        out = torch.empty_like(rows)
        _, n1, n2, width = rows.shape
        _launch(_norm_backward, rows, weight, inverse, above, out, len(inverse), width, n1, n2, *rows.stride()[:3],
                *above.stride()[:3], *out.stride()[:3], WIDE=_wide(x), **_tile(len(inverse), width))
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = gradient_of_scale(grad, x, inverse.view(*x.shape[:-1], 1))
        return out.view(x.shape), grad_weight, None


# ---- rotary embedding ------------------------------------------------------------------------------------------------

@_rows_alike
def _rotate(x, cos, sin, out, count, half, n1, n2, x0, x1, x2, c0, c1, c2, s0, s1, s2, o0, o1, o2,
            BACK: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    inside = (rows < count)[:, None] & (columns < half)
    at = x + _offsets(rows, n1, n2, x0, x1, x2) + columns
    low = tl.load(at, mask=inside, other=0.0).to(WIDE)
    high = tl.load(at + half, mask=inside, other=0.0).to(WIDE)
    at = cos + _offsets(rows, n1, n2, c0, c1, c2) + columns
    low_cos = tl.load(at, mask=inside, other=0.0).to(WIDE)
    high_cos = tl.load(at + half, mask=inside, other=0.0).to(WIDE)
    at = sin + _offsets(rows, n1, n2, s0, s1, s2) + columns
    low_sin = tl.load(at, mask=inside, other=0.0).to(WIDE)
    high_sin = tl.load(at + half, mask=inside, other=0.0).to(WIDE)
    if BACK:
        new_low = low * low_cos + high * high_sin
        new_high = high * high_cos - low * low_sin
    else:
        new_low = low * low_cos - high * low_sin
        new_high = high * high_cos + low * high_sin
    at = out + _offsets(rows, n1, n2, o0, o1, o2) + columns
    tl.store(at, new_low, mask=inside)
    tl.store(at + half, new_high, mask=inside)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype, back: bool) -> torch.Tensor:
    rows = _four(x)
    cos, sin = (_four(t.expand(x.shape)) for t in (cos, sin))
    out = torch.empty_like(rows, dtype=dtype)
    _, n1, n2, width = rows.shape
    count = rows.numel() // width
    _launch(_rotate, rows, cos, sin, out, count, width // 2, n1, n2, *rows.stride()[:3], *cos.stride()[:3],
            *sin.stride()[:3], *out.stride()[:3], BACK=back, WIDE=_wide(x, cos), **_tile(count, width // 2))
    return out.view(x.shape)


class Rotation(torch.autograd.Function):
    """``x cos + rotate_half(x) sin``, in the layout of x and in the wider type of x and cos."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        """Args: x (…, d), d even; cos and sin (…, d) broadcast to it.

        Raises:
            ValueError: angles for another width than d.
        """
        if x.shape[-1] % 2 or not cos.shape[-1] == sin.shape[-1] == x.shape[-1]:
            raise ValueError(f"heads of {x.shape[-1]} and angles of {cos.shape[-1]}")
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return _turn(x, cos, sin, torch.result_type(x, cos), back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _turn(grad, *ctx.saved_tensors, ctx.dtype, back=True), None, None


# ---- gated activation ------------------------------------------------------------------------------------------------

@triton.jit
def _tanh(x):
    return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0


@triton.jit
def _activated(x, KIND: tl.constexpr):
    """The activation of x and its derivative. Hendrycks and Gimpel 2016, arXiv 1606.08415, section 2."""
    if KIND == "gelu_tanh":
        root: tl.constexpr = 0.7978845608028654  # sqrt(2 / pi)
        tangent = _tanh(root * (x + 0.044715 * x * x * x))
        share = 0.5 * (1.0 + tangent)
        slope = 0.5 * x * (1.0 - tangent * tangent) * root * (1.0 + 0.134145 * x * x)
    elif KIND == "gelu":
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        slope = x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        share = 1.0 / (1.0 + tl.exp(-x))
        slope = x * share * (1.0 - share)
    return x * share, share + slope


@triton.jit
def _gate_forward(gate, up, out, count, KIND: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value, _ = _activated(tl.load(gate + at, mask=at < count, other=0.0).to(WIDE), KIND)
    tl.store(out + at, value * tl.load(up + at, mask=at < count, other=0.0).to(WIDE), mask=at < count)


@triton.jit
def _gate_backward(gate, up, grad, grad_gate, grad_up, count, KIND: tl.constexpr, WIDE: tl.constexpr,
                   BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value, slope = _activated(tl.load(gate + at, mask=at < count, other=0.0).to(WIDE), KIND)
    above = tl.load(grad + at, mask=at < count, other=0.0).to(WIDE)
    tl.store(grad_up + at, above * value, mask=at < count)
    tl.store(grad_gate + at, above * tl.load(up + at, mask=at < count, other=0.0).to(WIDE) * slope, mask=at < count)


class GatedActivation(torch.autograd.Function):
    """``act(gate) * up`` (Shazeer 2020, arXiv 2002.05202); keeps gate and up."""

    @staticmethod
    def forward(ctx, gate, up, kind):
        """Args: gate, up of one shape and type; kind: "gelu_tanh", "gelu" or "silu"."""
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        _launch(_gate_forward, gate, up, out, gate.numel(), KIND=kind, WIDE=_wide(gate), BLOCK=_FLAT_BLOCK,
                programs=triton.cdiv(gate.numel(), _FLAT_BLOCK))
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        grad, grad_gate, grad_up = grad.contiguous(), torch.empty_like(gate), torch.empty_like(up)
        _launch(_gate_backward, gate, up, grad, grad_gate, grad_up, gate.numel(), KIND=ctx.kind, WIDE=_wide(gate),
                BLOCK=_FLAT_BLOCK, programs=triton.cdiv(gate.numel(), _FLAT_BLOCK))
        return grad_gate, grad_up, None


# ---- cross-entropy ---------------------------------------------------------------------------------------------------

@triton.jit
def _capped(product, softcap, scale, CAP: tl.constexpr):
    """A logit, scaled and capped, and its derivative with respect to the product."""
    value = product * scale
    slope = scale
    if CAP:
        bend = _tanh(value / softcap)
        value = bend * softcap
        slope = scale * (1.0 - bend * bend)
    return value, slope


@triton.jit
def _some_logits(logits, at, vocabulary, softcap, scale, CAP: tl.constexpr, WIDE: tl.constexpr):
    value, slope = _capped(tl.load(logits + at, mask=at < vocabulary, other=0.0).to(WIDE), softcap, scale, CAP)
    return tl.where(at < vocabulary, value, -float("inf")), slope


@triton.jit
def _cross_entropy(logits, targets, loss, own, stride, vocabulary, softcap, scale, CAP: tl.constexpr,
                   GRAD: tl.constexpr, IGNORED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """A row's loss; with GRAD the gradient in place of its logits, but the target's share, which goes to ``own``."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    target = tl.load(targets + row)
    columns = tl.arange(0, BLOCK)
    if target == IGNORED:
        tl.store(loss + row, 0.0)
        if GRAD:
            tl.store(own + row, 0.0)
            for start in range(0, vocabulary, BLOCK):
                tl.store(logits + start + columns, tl.zeros((BLOCK,), WIDE), mask=start + columns < vocabulary)
    else:
        hit, hit_slope = _capped(tl.load(logits + target).to(WIDE), softcap, scale, CAP)
        # The sum runs along for each of BLOCK columns; only the maximum is found for each block.
        value, _ = _some_logits(logits, columns, vocabulary, softcap, scale, CAP, WIDE)
        maximum = tl.max(value, 0)
        sums = tl.exp(value - maximum)
        for start in range(BLOCK, vocabulary, BLOCK):
            value, _ = _some_logits(logits, start + columns, vocabulary, softcap, scale, CAP, WIDE)
            larger = tl.maximum(maximum, tl.max(value, 0))
            sums = sums * tl.exp(maximum - larger) + tl.exp(value - larger)
            maximum = larger
        spread = maximum + tl.log(tl.sum(sums, 0))
        tl.store(loss + row, spread - hit)
        if GRAD:
            tl.store(own + row, (tl.exp(hit - spread) - 1.0) * hit_slope)
            tl.debug_barrier()  # every thread has read the target's logit
            for start in range(0, vocabulary, BLOCK):
                at = start + columns
                value, slope = _some_logits(logits, at, vocabulary, softcap, scale, CAP, WIDE)
                tl.store(logits + at, tl.where(at == target, 0.0, tl.exp(value - spread) * slope), mask=at < vocabulary)


def cross_entropy_(logits: torch.Tensor, targets: torch.Tensor, softcap: float | None, scale: float, ignored: int,
                   with_grad: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Losses of rows of raw logits and, in place of the logits, their gradient without the targets' own share.

    That share, softmax_y - 1, would be lost in bf16 where the model is sure of its answer, so it is given back in fp32
    and the place of the target in the gradient is 0.

    Args:
        logits: (rows, vocabulary), each row contiguous; the products before ``scale`` and ``softcap``.
        targets: (rows,) token ids, ``ignored`` for a row with loss 0 and gradient 0.
        with_grad: else the logits stay as they are, and there is no share.

    Returns:
        Losses (rows,) in nats and the targets' shares (rows,), both in fp32 or wider.
    """
    rows, vocabulary = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    loss = torch.empty(rows, dtype=wide, device=logits.device)
    own = torch.empty_like(loss) if with_grad else None
    block = min(_VOCABULARY_BLOCK, triton.next_power_of_2(vocabulary))
    _launch(_cross_entropy, logits, targets, loss, loss if own is None else own, logits.stride(0), vocabulary,
            softcap or 1.0, scale, CAP=bool(softcap), GRAD=with_grad, IGNORED=ignored, WIDE=_wide(logits), BLOCK=block,
            num_warps=16, programs=rows)
    return loss, own
