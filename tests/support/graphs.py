"""CUDA graphs without a GPU: what a capture records is the list of operations, and a replay does them again.

As on a GPU nothing is computed by a capture itself; a replay reads and writes the tensors that the capture saw, where they
are then, in the modes (gradients, dropout) that were on when it was captured; and whatever looks at a number breaks a
capture off. What PyTorch keeps of one that was broken off is kept here too: its allocators are not told of the end
(``CUDAGraph::capture_end``), so that the pool stays in use, and whoever gives memory back meets an assertion. The one of
pinned memory cannot be told later either (``ATen/core/CachingHostAllocator.h``), and refuses another capture into the pool.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gemma_tune.base import capturing

LOOKS = ("_local_scalar_dense", "aten.item", "nonzero", "masked_select", "aten.equal")  # item: in inference mode
DIRECTLY = ("tolist", "numpy", "__array__")  # methods that read numbers where they lie, which no operation tells of


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # what was changed that was there before
        self.own: set[int] = set()
        self.broken = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(name in str(func) for name in LOOKS):
            self.broken = True
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing")
        for tensor in _changed(func, args, kwargs):
            if _memory(tensor) not in self.own and _memory(tensor) not in self.before:
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self.before[_memory(tensor)] = whole, whole.clone()
        out = func(*args, **kwargs)
        known = {_memory(t) for t in _tensors((args, kwargs))}
        made = [t for t in _tensors(out) if _memory(t) not in known]
        self.own |= {_memory(t) for t in made}
        self.calls.append((func, args, kwargs, out if made else None))
        return out

    def refusing(self, name: str) -> Any:
        """What stands for a method that looks at numbers."""
        def refused(*args: Any, **kwargs: Any) -> None:
            self.broken = True
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")

        return refused

    def undo(self) -> None:
        for whole, copy in self.before.values():
            whole.copy_(copy)


def _changed(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    found = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[number] if number < len(args) else kwargs.get(argument.name)
            found += _tensors(given)
    return found


class Graph:
    """In place of ``torch.cuda.CUDAGraph``.

    Attributes:
        replays: how often any was replayed.
    """

    replays = 0

    def __init__(self) -> None:
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self._pool: int | None = None

    def ended(self, calls: list[tuple[Any, Any, Any, Any]], pool: int) -> None:
        """A capture went well."""
        self._calls, self._pool = calls, pool

    @property
    def names(self) -> list[str]:
        """Of the operations."""
        return [str(func) for func, *_ in self._calls]

    def pool(self) -> int:
        if self._pool is None:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
        return self._pool

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self._calls:
            found = func(*args, **kwargs)
            if out is None:
                continue
            for there, new in zip(_tensors(out), _tensors(found), strict=True):
                if _memory(there) != _memory(new):
                    there.copy_(new)
        Graph.replays += 1


class Captures:
    """In place of what :func:`gemma_tune.base.capturing.capturing` uses of PyTorch, and of its pools.

    As in PyTorch a pool is given up with the last of its graphs, and whoever captures into it then meets an assertion.

    Attributes:
        pools: the captures that each is in use for, by its handle.
        underway: handles of captures that the allocator takes to be going on, and ``pinned`` those of the allocator of pinned
            memory.
        order: the handles captured into, and ``names`` the operations that were, one after the other.
    """

    def __init__(self) -> None:
        self.pools: Counter = Counter()
        self.underway: list[int] = []
        self.pinned: list[int] = []
        self.order: list[int] = []
        self.names: list[list[str]] = []
        self.handles = 0

    def handle(self) -> int:
        self.handles += 1
        return self.handles

    @contextlib.contextmanager
    def graph(self, graph: Graph, pool: int | None = None, capture_error_mode: str = "global") -> Iterator[None]:
        """In place of ``torch.cuda.graph``."""
        self.empty_cache()
        handle = self.handle() if pool is None else pool
        if handle in self.pools and not self.pools[handle]:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp")
        self.pools[handle] += 1
        self.underway.append(handle)
        if handle in self.pinned:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.pinned.append(handle)
        recording = _Recording()
        try:
            with recording, contextlib.ExitStack() as patches:
                patches.enter_context(mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True))
                for name in DIRECTLY:
                    patches.enter_context(mock.patch.object(torch.Tensor, name, recording.refusing(name)))
                yield
        finally:
            recording.undo()
            if recording.broken:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            self.end_allocating(0, handle)
            self.pinned.remove(handle)
            weakref.finalize(graph, self.release, 0, handle)
            graph.ended(recording.calls, handle)
        self.order.append(handle)
        self.names.append(graph.names)

    def end_allocating(self, device: int, handle: int) -> None:
        if handle not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(handle)

    def release(self, device: int, handle: int) -> None:
        self.pools[handle] -= 1

    def empty_cache(self) -> None:
        gc.collect()
        if self.underway:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp")


def install(monkeypatch: Any) -> Captures:
    """Let everything capture with this double from here on."""
    found, Graph.replays = Captures(), 0
    for name, value in {"graph": found.graph, "CUDAGraph": Graph, "graph_pool_handle": found.handle, "synchronize": gc.collect,
                        "empty_cache": found.empty_cache, "current_device": lambda: 0, "current_stream": lambda: None,
                        "set_stream": lambda stream: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda.memory, "_cuda_endAllocateToPool", found.end_allocating)
    monkeypatch.setattr(torch.cuda.memory, "_cuda_releasePool", found.release)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(capturing, "_broken_off", {})
    return found
