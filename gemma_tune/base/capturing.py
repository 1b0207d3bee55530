"""A CUDA graph that is captured, and what is left where that fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Graphs whose capture CUDA broke off, with their pools: PyTorch's allocators may still ask them whose turn it is.
_broken_off: dict[Any, Any] = {}


@contextlib.contextmanager
def capturing(pool: Any = None) -> Iterator[Any]:
    """Capture what the GPU is told while the context lasts; yields the graph.

    Other threads, such as one that reads data, may use the GPU meanwhile.

    Args:
        pool: memory that is shared with other graphs, none of which runs at the same time.

    Raises:
        RuntimeError: something cannot be captured; of two reasons the first, as the second says that ending it failed.
    """
    import torch

    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            yield graph
    except BaseException as e:
        torch.cuda.set_stream(stream)  # a capture that was broken off leaves its own
        _end(graph, pool)
        if isinstance(e, RuntimeError) and isinstance(e.__context__, RuntimeError):
            raise e.__context__ from None
        raise


def is_closed(pool: Any) -> bool:
    """Whether PyTorch refuses to capture into a pool, as it does once CUDA has broken a capture off there."""
    return pool in _broken_off.values()


def grouped_products_wait(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch's products by expert look on the CPU at how many tokens each has, so that a GPU is waited for and
    nothing can be captured: all but those in bf16 of compute capability 9 and 10 do (``_grouped_mm_cuda`` in
    ``aten/src/ATen/native/cuda/GroupedBlas.cpp``)."""
    import torch

    fast = device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] in (9, 10)
    return device.type == "cuda" and not fast


def _end(graph: Any, pool: Any) -> None:
    """Tell PyTorch's allocator that a capture is over which CUDA has broken off.

    ``CUDAGraph::capture_end`` raises before it does so (``aten/src/ATen/cuda/CUDAGraph.cpp``). Then the pool stays in
    use for good, memory is not given back any more when it gets scarce, and ``empty_cache`` does nothing or, in some
    versions, ends in an assertion. The allocator of pinned memory cannot be told, see :func:`is_closed`.
    """
    import torch

    try:
        graph.pool()  # which only a graph has whose capture was ended
    except RuntimeError:
        _broken_off[graph] = pool
        with contextlib.suppress(RuntimeError, AttributeError):  # it had not begun, or another version of PyTorch
            torch.cuda.memory._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            torch.cuda.memory._cuda_releasePool(torch.cuda.current_device(), pool)
