"""The output head for a few answers at a time, in parts of its matrix.

MKL lays a matrix out anew for each product in fp32, which takes longer than a product with a few rows. Gemma 3 270M's
head (262,144 x 640, AVX2, one thread) took 0.21 s for ten rows as a whole, and 0.14 s in parts that stay in a CPU's
cache, with the same numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

ENTRIES = 1024  # of the vocabulary in a part
MOST = 16  # rows; more are worth laying out the matrix as a whole, and a single one needs no layout


@contextlib.contextmanager
def head_in_parts(model: Any) -> Iterator[None]:
    """While the context lasts, let a model on a CPU multiply its head with a few rows part by part.

    What is no plain matrix in fp32, as one with an adapter on it, or in 4 or 16 bits, is left as it is.
    """
    import torch

    head = model.get_output_embeddings()
    if (type(head) is not torch.nn.Linear or type(head.weight) is not torch.nn.Parameter or "forward" in vars(head)
            or head.bias is not None or head.weight.device.type != "cpu" or head.weight.dtype != torch.float32
            or len(head.weight) <= ENTRIES or not torch.backends.mkl.is_available()):
        yield
        return
    plain = head.forward

    def forward(states: torch.Tensor) -> torch.Tensor:
        rows = states.reshape(-1, states.shape[-1])
        if not 1 < len(rows) <= MOST or torch.is_grad_enabled():
            return plain(states)
        logits = states.new_empty(len(rows), len(head.weight))
        for part, to in zip(head.weight.split(ENTRIES), logits.split(ENTRIES, dim=1), strict=True):
            torch.mm(rows, part.t(), out=to)
        return logits.view(*states.shape[:-1], -1)

    head.forward = forward
    try:
        yield
    finally:
        del head.forward
