"""A device that is not the CPU and holds no numbers: what a GPU would be asked, where there is none.

Tensors on PyTorch's meta device stand for those of a GPU, under fake tensors, which know their device. What looks at a
number fails there, as does an operation on tensors of two devices. What would be copied from the CPU, or computed there
on its way to the device, is noted: inside of a CUDA graph neither can be. So is a tensor that is made of Python's numbers,
of which PyTorch sees nothing here: on a GPU it is made on the CPU and copied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

THERE = torch.device("meta")
# Operations that copy a single number of the CPU to the device (aten/src/ATen/native/TensorCompare.cpp and others), where
# most others hand it over with the call.
COPYING = {"_to_copy", "copy_", "where", "index_put", "index_put_"}
OF_NUMBERS = {"tensor", "as_tensor", "new_tensor", "asarray"}


class Operations(TorchDispatchMode):
    """The names of all operations, in order; under ``elsewhere`` those that have to do with another device's tensors.

    A single number (0 dimensions) of the CPU is handed over with the call, and counts for nothing, but where it is copied.
    """

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self.elsewhere: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        copies = func.overloadpacket.__name__ in COPYING and any(t.device.type == THERE.type for t in tensors)
        if any((t.ndim or copies) and t.device.type != THERE.type for t in tensors):
            self.elsewhere.append(str(func))
        return out


class _OfNumbers(TorchFunctionMode):
    """Notes tensors on :data:`THERE` that are made of what is none."""

    def __init__(self, elsewhere: list[str]):
        super().__init__()
        self.elsewhere = elsewhere

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in OF_NUMBERS and out.device.type == THERE.type and not isinstance(args[-1], torch.Tensor):
            self.elsewhere.append(name)
        return out


def operations_of(body: Any, parts: Sequence[Any], bucket: Any, weights: torch.Tensor) -> list[list[str]]:
    """The operations of a captured step's forward and backward pass, of each of these pieces."""
    found = []
    for part in parts:
        flat = body.filled(part, bucket)
        with Operations() as operations:
            body.loss(flat, bucket, weights).backward()
        found.append(operations.names)
    return found


@contextlib.contextmanager
def computing_there() -> Iterator[Operations]:
    """Compute on :data:`THERE`, with models that are there already."""
    with FakeTensorMode(allow_non_fake_inputs=True), Operations() as operations, _OfNumbers(operations.elsewhere):
        yield operations


def there(shape: torch.Size | int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor there, to be made within :func:`computing_there`."""
    return torch.empty(shape, dtype=dtype, device=THERE)
