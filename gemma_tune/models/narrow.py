"""Weights kept in 16 bits whose products are in fp32: for a CPU without instructions for bf16, where fp32 does not fit.

There a product of bf16 numbers is a plain loop. Here a weight is widened just before its product, into one place that
is used again, as new memory costs more than the widening: 26 million numbers took 69 ms in pages that are new, 9 ms in
that place. Nothing is lost, as a bf16 number is an fp32 number, and such is what most checkpoints hold. Measured with
one thread (AVX2, AMD EPYC), milliseconds of a product with a layer of Gemma 3 4B, 10,240 x 2,560:

    tokens    fp32   bf16 as a type   here
       512     324            2,580    332
        64      64              309     72
         8      21               39     17
         1     5.2              5.9    7.5

For few tokens pieces of the weight stay in the cache until they are multiplied; that is why 4 to 32 tokens are as fast
as in fp32, whose weight is read from memory in twice as many bytes. For a single one the widening itself remains.

Each product with a whole weight is the fp32 model's bit for bit. One in pieces is so along the weight's rows, as far as
the library adds up a row's numbers in the same order for fewer rows (measured: MKL does); the backward pass of a weight
of more than ``PLACE`` numbers adds up pieces, so that it is off by rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from gemma_tune.models.placement import PLACE

LEAST = 1 << 18  # numbers of a weight from which on it is kept narrow
PIECE = 1 << 20  # and for few tokens: 4 MB, which a cache holds
FEW = 64  # tokens
_ALIGNED = 64  # rows of a weight: MKL is slower where rows of a result begin at any address
_aten = torch.ops.aten


class Place:
    """Memory that one weight after the other is made in: the next one overwrites the last."""

    def __init__(self) -> None:
        self._numbers = torch.empty(0)

    def of(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Room for numbers of a shape, with whatever was there."""
        if self._numbers.dtype != dtype or len(self._numbers) < shape.numel():
            self._numbers = torch.empty(0)  # first, as both together might be too much
            with torch.inference_mode(False):  # what is made there can be written to nowhere else
                self._numbers = torch.empty(shape.numel(), dtype=dtype)
        return self._numbers[:shape.numel()].view(shape)

    def widened(self, kept: torch.Tensor) -> torch.Tensor:
        """The same numbers in fp32, until the next ones are asked for."""
        return self.of(kept.shape, torch.float32).copy_(kept)


class Narrow(torch.Tensor):
    """A frozen weight that passes for one in fp32, and is in 16 bits.

    Products widen it in pieces (``mm``, and so linear layers and both directions of autograd; grouped ones of experts),
    lookups widen what they look up, and views are views. Any other operation gets a widened copy. Of what writes to it
    there is ``index_copy_`` alone, for the rows of new tokens, which are rounded to its 16 bits.

    Attributes:
        kept: the numbers, in bf16 or fp16.
        place: where they are widened.
    """

    @staticmethod
    def __new__(cls, kept: torch.Tensor, place: Place) -> Narrow:
        return torch.Tensor._make_wrapper_subclass(cls, kept.shape, strides=kept.stride(), dtype=torch.float32,
                                                   device=kept.device)

    def __init__(self, kept: torch.Tensor, place: Place) -> None:
        self.kept, self.place = kept, place

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_: Any) -> str:
        return f"Narrow({tuple(self.shape)}, kept in {self.kept.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _COPIES or func.is_view and func is not _aten.view.dtype:
            return _view(func, *args, **kwargs)
        if func is _aten.index_copy_.default and isinstance(args[0], Narrow):
            _write_rows(*args)
            return args[0]
        if func in _LOOKUPS and isinstance(args[0], Narrow):
            return func(args[0].kept, *args[1:], **kwargs).float()
        if (ours := _PRODUCTS.get(func)) and (found := ours(*args, **kwargs)) is not None:
            return found
        if (found := func.decompose(*args, **kwargs)) is not NotImplemented:  # in inference mode nobody did it before
            return found
        _refuse_writes(func, args)
        return func(*map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()})


_COPIES = {_aten.clone.default}
_LOOKUPS = {_aten.embedding.default, _aten.index_select.default, _aten.index.Tensor}


def _view(func: Any, weight: Narrow, *args: Any, **kwargs: Any) -> Any:
    with torch.inference_mode(weight.is_inference()):  # a view is what the tensor is, whoever asks for it
        found = func(weight.kept, *args, **kwargs)
        several = isinstance(found, (list, tuple))
        return [Narrow(part, weight.place) for part in found] if several else Narrow(found, weight.place)


def _write_rows(weight: Narrow, dim: int, index: torch.Tensor, rows: torch.Tensor) -> None:
    weight.kept.index_copy_(dim, index, rows.to(weight.kept.dtype))


def widened(weight: torch.Tensor) -> torch.Tensor:
    """A weight as a plain tensor for several products, until another one is multiplied; of a :class:`Narrow` one that
    has more than ``PLACE`` numbers, itself."""
    return weight.place.widened(weight.kept) if isinstance(weight, Narrow) and weight.numel() <= PLACE else weight


def _wide(value: Any) -> Any:
    if isinstance(value, Narrow):
        return value.kept.float()
    return type(value)(map(_wide, value)) if type(value) in (list, tuple) else value


def _refuse_writes(func: Any, args: Any) -> None:
    written = [value for value, told in zip(args, func._schema.arguments)
               if isinstance(value, Narrow) and told.alias_info and told.alias_info.is_write]
    if written:
        raise RuntimeError(f"{func} would write to a weight that is kept in {written[0].kept.dtype} and frozen")


# ---- products --------------------------------------------------------------------------------------------------------

def _mm(a: Any, b: Any, *, out: torch.Tensor | None = None) -> torch.Tensor | None:
    return _product(a, b, None, out)


def _addmm(bias: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> torch.Tensor | None:
    if beta != 1 or alpha != 1 or isinstance(bias, Narrow) or bias.shape[-1] != b.shape[1]:
        return None
    return _product(a, b, bias, None)


def _grouped_mm(a: Any, b: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> torch.Tensor | None:
    """Rows of ``a`` (n, k), sorted by expert, with the matrices ``b`` (experts, k, m); ``offs`` are their ends."""
    if isinstance(a, Narrow) or a.ndim != 2 or b.ndim != 3 or offs is None or bias is not None:
        return None
    out, start = a.new_zeros(len(a), b.shape[2]), 0
    for matrix, end in zip(b.kept, offs.tolist()):
        if end > start:
            _product(a[start:end], Narrow(matrix, b.place), None, out[start:end])
        start = end
    return out


def _product(a: Any, b: Any, bias: torch.Tensor | None, out: torch.Tensor | None) -> torch.Tensor | None:
    """``a b + bias`` for a (n, k) and a narrow b (k, m); None for what is no such product.

    Args:
        bias: (m,) or (n, m).
        out: where it is to be.
    """
    if isinstance(a, Narrow) or not isinstance(b, Narrow) or a.dtype != torch.float32:
        return None
    turned = b.kept.t().is_contiguous()  # the weight (out, in) of a linear layer on its way forward
    if not turned and not b.kept.is_contiguous():
        return None
    stored = b.kept.t() if turned else b.kept
    most = PIECE if turned and len(a) < FEW else PLACE
    rows = max(1, most // max(1, stored.shape[1]))
    rows = max(_ALIGNED, rows // _ALIGNED * _ALIGNED)
    pieces = (b.place.widened(part) for part in stored.split(rows))
    out = a.new_empty(len(a), b.shape[1]) if out is None else out
    if turned:
        biases = [None] * -(-len(stored) // rows) if bias is None else bias.split(rows, -1)
        for target, piece, own in zip(out.split(rows, 1), pieces, biases):
            _into(target, a, piece.t(), own)
        return out
    for number, (part, piece) in enumerate(zip(a.split(rows, 1), pieces)):
        if number:
            out.addmm_(part, piece)
        else:
            _into(out, part, piece, bias)
    return out


def _into(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> None:
    if bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


_PRODUCTS = {_aten.mm.default: _mm, _aten.mm.out: _mm, _aten.addmm.default: _addmm,
             _aten._grouped_mm.default: _grouped_mm}


# ---- models ----------------------------------------------------------------------------------------------------------

def is_large(numbers: torch.Tensor) -> bool:
    """Whether a parameter is one of those that are kept narrow: matrices, also of experts together, but small ones."""
    return numbers.ndim > 1 and numbers.is_floating_point() and numbers.numel() >= LEAST


@contextlib.contextmanager
def loading_narrow(dtype: torch.dtype | None) -> Iterator[None]:
    """transformers reads large parameters in ``dtype`` meanwhile, whatever it is told for the model: else they would
    all be there in fp32 first. None changes nothing."""
    from transformers import PreTrainedModel

    theirs = PreTrainedModel._get_dtype_plan

    def plan(model: Any, wanted: torch.dtype) -> dict[str, torch.dtype]:
        # It is asked when the model has shapes and no numbers; each is read in the type that it has there.
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if type(parameter) is torch.nn.Parameter and is_large(parameter):  # and none that will be in 4 bits
                    module._parameters[name] = torch.nn.Parameter(parameter.to(dtype), parameter.requires_grad)
        return theirs(model, wanted)

    if dtype is not None:
        PreTrainedModel._get_dtype_plan = plan
    try:
        yield
    finally:
        PreTrainedModel._get_dtype_plan = theirs


def keep_narrow(model: torch.nn.Module, dtype: torch.dtype) -> int:
    """Let the large parameters of a model be :class:`Narrow` ones, which are frozen; returns how many there are.

    Args:
        model: in fp32, but for those.
        dtype: bf16 or fp16.
    """
    place = Place()
    kept: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and is_large(parameter):
                if id(parameter) not in kept:  # a head may be the embedding
                    kept[id(parameter)] = torch.nn.Parameter(Narrow(parameter.detach().to(dtype), place), False)
                module._parameters[name] = kept[id(parameter)]
    return len(kept)
