"""A CUDA graph that is captured, and what is left where that fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


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
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            yield graph
    except Exception as e:
        torch.cuda.set_stream(stream)  # a capture that was broken off leaves its own
        if isinstance(e, RuntimeError) and isinstance(e.__context__, RuntimeError):
            raise e.__context__ from None
        raise
