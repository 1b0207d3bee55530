"""Weights in 4 bits, unpacked for a product on a CPU.

From 32 MB on the allocator gives a tensor's memory back to the system as soon as it is free (glibc's largest threshold
of ``mmap``), so that each unpacked weight would come in pages that are new: measured with one thread, 10,240 x 2,560
numbers in fp32 took 76 ms to unpack, three quarters of which the pages did. Here all large weights are unpacked into
one place, in pieces whose own memory is kept by the allocator: 30 ms.
"""

from __future__ import annotations

from typing import Any

import torch

from gemma_tune.models.narrow import Place

LARGE = 32 << 20  # bytes of an unpacked weight
PIECE = 1 << 20  # numbers


class Room:
    """Where weights are unpacked, one after the other: the next one overwrites the last."""

    def __init__(self) -> None:
        self._place = Place()

    def unpacked(self, packed: torch.Tensor, state: Any) -> torch.Tensor:
        """A weight (out, in) in the type that it computes in, the same numbers as bitsandbytes gives; of a large one
        until the next one is asked for.

        Args:
            packed: two numbers in each byte, as bitsandbytes stores them.
            state: its ``QuantState``.
        """
        from bitsandbytes.functional import dequantize_4bit

        if packed.device.type != "cpu" or state.shape.numel() * state.dtype.itemsize < LARGE or not _in_rows(state):
            return dequantize_4bit(packed, state)
        weight = self._place.of(state.shape, state.dtype)
        rows = max(1, PIECE // weight.shape[1])
        pieces = packed.view(torch.uint8).view(len(weight), -1).split(rows)
        for part, piece, scales in zip(weight.split(rows), pieces, _scales(state).split(rows)):
            # In one column: a single row would be taken for a weight that is transposed.
            part.copy_(dequantize_4bit(piece.reshape(-1, 1), _like(state, scales.flatten(), part.shape)))
        return weight


def _in_rows(state: Any) -> bool:
    """Whether each row has scales of its own."""
    return len(state.shape) == 2 and state.shape[1] % state.blocksize == 0


def _scales(state: Any) -> torch.Tensor:
    """(out, blocks of a row) in fp32."""
    from bitsandbytes.functional import dequantize_blockwise

    scales = state.absmax
    if state.nested:  # double quantisation, QLoRA (Dettmers et al. 2023, arXiv 2305.14314, section 3)
        scales = dequantize_blockwise(scales, state.state2) + state.offset
    return scales.float().view(state.shape[0], -1)


def _like(state: Any, scales: torch.Tensor, shape: torch.Size) -> Any:
    from bitsandbytes.functional import QuantState

    return QuantState(scales, shape, state.code, state.blocksize, state.quant_type, state.dtype)
