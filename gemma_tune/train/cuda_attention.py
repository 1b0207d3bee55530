"""Attention on a GPU by whichever of PyTorch's kernels is fastest for a shape.

Which one that is differs by length, heads and GPU, cuDNN makes a plan for each new shape, flash takes no head wider
than 256, and a window excludes several. So candidates are timed, forward and backward, once for each shape that a
training uses often, and only those count that can compute it, agree with attention in fp32 and can be captured. Any
other shape goes transformers' way.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from gemma_tune.base.capturing import capturing
from gemma_tune.base.words import first_line
from gemma_tune.train.attention import in_spans, plain_causal

REPEATS = 5
# Length of the difference against that of the result: in bf16 all kernels measure 0.2 to 0.8 %, a wrong mask 10 % and
# more.
TOLERANCE = 0.03
# Seconds: Windows resets a GPU that is not done with a kernel after two, and a GPU with a screen has such a limit too.
_LONGEST_WAIT = 0.2
_MATH_SCORES = 1 << 28  # more than so many scores, 1 GB in fp32, are not built

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, "int | None"], torch.Tensor]


class Shape(NamedTuple):
    """What a choice depends on; ``window`` is None where every earlier key is seen."""

    batch: int
    heads: int
    key_heads: int
    length: int
    width: int
    value_width: int
    dtype: torch.dtype
    window: int | None
    device: torch.device


class Kind(NamedTuple):
    """A layer's attention, whatever the rows; ``window`` as the layer has it."""

    heads: int
    key_heads: int
    width: int
    value_width: int
    dtype: torch.dtype
    window: int | None
    device: torch.device


class Choice(NamedTuple):
    """The fastest candidate, None where none can compute it; milliseconds or what was wrong for each."""

    name: str | None
    measured: dict[str, float | str]


_chosen: dict[Shape, Choice] = {}
_met: dict[Kind, float] = {}  # with the scale of its scores
_LEAST = 64  # tokens: shorter rows are taken for so long when candidates are timed


# ---- candidates ------------------------------------------------------------------------------------------------------
# Each takes q (batch, heads, length, d), k and v (batch, key heads, length, d) and gives (batch, length, heads, d).

def _sdpa(backend: SDPBackend, grouped: bool) -> Attention:
    def attention(q, k, v, scale, window):
        shared = q.shape[1] != k.shape[1]
        if shared and not grouped:
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        mask = _window_mask(q.shape[2], window, q.device) if window else None
        with sdpa_kernel([backend]):
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale,
                                               enable_gqa=shared and grouped)
        return out.transpose(1, 2)

    return attention


def _window_mask(length: int, window: int, device: torch.device) -> torch.Tensor:
    """Which keys each query sees (1, 1, length, length). Made on the device in each call, as nothing there is kept."""
    place = torch.arange(length, device=device)
    distance = place[:, None] - place
    return ((distance >= 0) & (distance < window))[None, None]


def _varlen(q, k, v, scale, window):
    batch, _, length, _ = q.shape
    ends = torch.arange(0, (batch + 1) * length, length, device=q.device, dtype=torch.int32)
    return _by_ends(q, k, v, scale, window, ends, length)


def _by_ends(q, k, v, scale, window, ends, longest):
    """Attention of rows that lie one after the other, whatever the batch says.

    Args:
        ends: (rows + 1,) int32: where each begins, and where the last ends.
        longest: no row is longer.
    """
    from torch.nn.attention.varlen import varlen_attn

    batch, heads, length, _ = q.shape
    given: dict[str, Any] = {"scale": scale, "window_size": (window - 1 if window else -1, 0)}
    if heads != k.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            given["enable_gqa"] = True
        else:
            k, v = (t.repeat_interleave(heads // k.shape[1], 1) for t in (k, v))
    packed = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    return varlen_attn(*packed, ends, ends, longest, longest, **given).view(batch, length, heads, v.shape[-1])


CANDIDATES: dict[str, Attention] = {  # in the order in which they are tried
    "cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION, grouped=True),
    "flash": _sdpa(SDPBackend.FLASH_ATTENTION, grouped=True),
    "varlen": _varlen,
    "cudnn, keys repeated": _sdpa(SDPBackend.CUDNN_ATTENTION, grouped=False),
    "efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION, grouped=False),
    "math": _sdpa(SDPBackend.MATH, grouped=True),
}


def _worth_trying(name: str, shape: Shape, found: dict[str, float | str]) -> bool:
    """On an H100 cuDNN was fastest of all wherever there is no window, then flash, and others took 3 to 10 times as
    long; importing what varlen needs takes seconds."""
    if name in ("cudnn", "flash", "varlen"):
        # Flash takes no mask, and without a window varlen is flash.
        return name == "cudnn" or (name == "varlen") == bool(shape.window)
    if any(isinstance(value, float) for value in found.values()):
        return False
    if name == "cudnn, keys repeated":
        return shape.heads != shape.key_heads
    return name != "math" or shape.batch * shape.heads * shape.length ** 2 <= _MATH_SCORES


# ---- choosing --------------------------------------------------------------------------------------------------------

def choose(shape: Shape, scale: float) -> Choice:
    """Time the candidates for a shape, unless that was done before; not inside a capture.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    if shape not in _chosen:
        if _capturing(shape.device):
            raise RuntimeError("attention cannot be measured while a CUDA graph is captured")
        with (torch.random.fork_rng([shape.device] if shape.device.type == "cuda" else []), torch.enable_grad(),
              warnings.catch_warnings()):
            warnings.simplefilter("ignore")  # PyTorch says in several why a candidate cannot be taken
            try:
                _chosen[shape] = _measured(shape, scale)
            except torch.OutOfMemoryError as e:  # of measuring alone: transformers' own is taken
                _chosen[shape] = Choice(None, {"memory": first_line(e)})
    return _chosen[shape]


def choose_for(rows: int, length: int) -> None:
    """Choose for all layers that were met so far what attends over so many rows of so many tokens.

    Candidates are timed at the next power of two, once for all lengths up to there; not inside a capture.
    """
    longer = max(_LEAST, 1 << (length - 1).bit_length())
    for kind, scale in list(_met.items()):
        window = kind.window if kind.window and kind.window < length else None
        shape = Shape(rows, *kind[:2], length, *kind[2:5], window, kind.device)
        if shape not in _chosen:
            _chosen[shape] = choose(shape._replace(length=longer), scale)


def forget_layers() -> None:
    """What was met so far is of a model that is done with: another one need not be able to do what it asked."""
    _met.clear()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _measured(shape: Shape, scale: float) -> Choice:
    inputs, above = _random_inputs(shape)
    expected = _reference(inputs, above, scale, shape)
    found: dict[str, float | str] = {}
    for name, attention in CANDIDATES.items():
        if not _worth_trying(name, shape, found):
            continue
        run = functools.partial(_forward_and_backward, attention, inputs, above, scale, shape.window)
        try:
            errors = [_distance(got, wanted) for got, wanted in zip(_first_group(run(), shape), expected)]
            if not all(e < TOLERANCE for e in errors):  # NaN compares as false
                found[name] = f"off by {max(errors):.3g}"
                continue
            if shape.window and attention is not _varlen and _has_graphs(shape.device):
                _refuse_uncapturable(attention, inputs, above, scale, shape.window)
            found[name] = _milliseconds(run)
        except (RuntimeError, TypeError, ValueError, ImportError, AttributeError) as e:
            found[name] = first_line(e)
    times = {name: value for name, value in found.items() if not isinstance(value, str)}
    return Choice(min(times, key=times.__getitem__) if times else None, found)


def _has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def _refuse_uncapturable(attention: Attention, inputs: list[torch.Tensor], above: torch.Tensor, scale: float,
                         window: int) -> None:
    """Capture a candidate by itself, as one with a mask can refuse: on an H100 PyTorch's in fp32 did (torch 2.11), and
    no step of such a training was captured.

    Raises:
        RuntimeError: it cannot be captured.
    """
    # As leaves of its own: autograd works on the stream where a leaf was used first.
    leaves = [t.detach().requires_grad_() for t in inputs]
    with capturing():
        _forward_and_backward(attention, leaves, above, scale, window)


def _random_inputs(shape: Shape) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k, v as a model makes them, views of (batch, length, heads, d), and a gradient (batch, length, heads, d)."""
    generator = torch.Generator(shape.device).manual_seed(0)

    def randn(heads: int, width: int) -> torch.Tensor:
        return torch.randn(shape.batch, shape.length, heads, width, device=shape.device, dtype=shape.dtype,
                           generator=generator)

    sizes = ((shape.heads, shape.width), (shape.key_heads, shape.width), (shape.key_heads, shape.value_width))
    return [randn(*size).transpose(1, 2).requires_grad_() for size in sizes], randn(shape.heads, shape.value_width)


def _forward_and_backward(attention, inputs, above, scale, window) -> tuple[torch.Tensor, ...]:
    out = attention(*inputs, scale, window)
    return out, *torch.autograd.grad(out, inputs, above)


def _first_group(results: tuple[torch.Tensor, ...], shape: Shape) -> list[torch.Tensor]:
    """Of the first row the heads that share the first key head: what they give does not depend on any others."""
    out, q, k, v = results
    size = shape.heads // shape.key_heads
    return [out[:1, :, :size], q[:1, :size], k[:1, :1], v[:1, :1]]


def _reference(inputs: list[torch.Tensor], above: torch.Tensor, scale: float, shape: Shape) -> list[torch.Tensor]:
    """Output and gradients of the first group in fp32, from scores that are written out."""
    above, q, k, v = (t.detach().float() for t in _first_group((above, *inputs), shape))
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    seen = _window_mask(shape.length, shape.window or shape.length, shape.device)
    out = (scale * (q @ k.transpose(-1, -2))).masked_fill(~seen, -torch.inf).softmax(-1) @ v
    out = out.transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), above)]


def _distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.float() - expected).norm() / expected.norm()).item()


def _milliseconds(run: Callable[[], Any]) -> float:
    """What the GPU needs for one call, once all is planned. It is kept waiting until the calls are lined up: Python
    needs longer to make them than it to do them, and a captured step has no Python in it."""
    run()
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    calling = time.perf_counter() - began  # what the GPU does meanwhile is not waited for
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(int(min(calling * REPEATS * 1.5, _LONGEST_WAIT) * 2e9))  # in cycles, of at most 2 GHz
    begin.record()
    for _ in range(REPEATS):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / REPEATS


# ---- rows one after the other ----------------------------------------------------------------------------------------

_ends: torch.Tensor | None = None


@contextlib.contextmanager
def packed_rows(ends: torch.Tensor) -> Iterator[None]:
    """Let attention in a model keep rows apart that lie one after the other, while the context lasts.

    Args:
        ends: (rows + 1,) int32, see :func:`_by_ends`; it has to stay where it is as long as captured steps use it.
    """
    global _ends
    _ends = ends
    try:
        yield
    finally:
        _ends = None


def try_packed() -> None:
    """Run the kernel for such rows, forward and backward, for all layers that were met so far; not inside a capture.

    Raises:
        RuntimeError: it cannot compute one of them.
    """
    for kind, scale in _met.items():
        _try_packed(kind, scale)


@functools.cache
def _try_packed(kind: Kind, scale: float) -> None:
    sizes = ((kind.heads, kind.width), (kind.key_heads, kind.width), (kind.key_heads, kind.value_width))
    q, k, v = (torch.zeros(1, heads, _LEAST, width, dtype=kind.dtype, device=kind.device, requires_grad=True)
               for heads, width in sizes)
    ends = torch.tensor([0, 1, _LEAST], dtype=torch.int32, device=kind.device)
    with torch.enable_grad():
        _by_ends(q, k, v, scale, kind.window, ends, _LEAST).sum().backward()


# ---- in a model ------------------------------------------------------------------------------------------------------

def fastest_attention_or(theirs: Any) -> Any:
    """transformers' attention function ``theirs`` with the chosen one in its place wherever the two mean the same.

    A shape for which nothing was chosen is theirs too, see :func:`choose_for`.

    Args:
        theirs: transformers' function for SDPA.
    """
    def attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs):
        if in_spans():
            raise RuntimeError("rows cannot share a beginning: attention on a GPU does not know their parts")
        plain = plain_causal(module, query, key, value, attention_mask, dropout, is_causal, kwargs)
        if _ends is not None and not plain:
            raise RuntimeError("rows cannot be packed: a layer's attention is more than causal")
        if plain:
            length, window = query.shape[2], kwargs.get("sliding_window")
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            sizes = query.shape[1], key.shape[1], query.shape[3], value.shape[3], query.dtype
            _met[Kind(*sizes, window, query.device)] = scale
            # Without a mask there is no window, whatever the layer says; within it, it hides nothing.
            window = window if attention_mask is not None and window < length else None
            if _ends is not None:
                return _by_ends(query, key, value, scale, window, _ends, length), None
            shape = Shape(query.shape[0], *sizes[:2], length, *sizes[2:], window, query.device)
            choice = _chosen.get(shape)
            if choice and choice.name:
                return CANDIDATES[choice.name](query, key, value, scale, window), None
        return theirs(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal,
                      **kwargs)

    return attention
