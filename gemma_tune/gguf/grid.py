"""The numbers that a block of a GGUF file can hold, and which of them it does: bytes to grids, and choices to bytes.

A block keeps scales, and for each weight a small whole number q: the weight is ``low + step · q``. Layouts as in ggml's
``ggml-common.h`` and ``ggml-quants.c``.
"""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

GRIDS = (Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K)

_BITS = {Type.Q4_0: 4, Type.Q4_1: 4, Type.Q5_0: 5, Type.Q5_1: 5, Type.Q8_0: 8, Type.Q2_K: 2, Type.Q3_K: 3, Type.Q4_K: 4,
         Type.Q5_K: 5, Type.Q6_K: 6}
# The q that stands for zero. That of Q8_0 is 127: ggml rounds to -127 … 127, and one below would be out of balance.
_CENTRED = {Type.Q4_0: 8, Type.Q5_0: 16, Type.Q8_0: 127, Type.Q3_K: 4, Type.Q6_K: 32}


@dataclass(frozen=True)
class Grid:
    """What the blocks of some rows can hold.

    Args:
        low: float32 (rows, columns), the weight for q = 0.
        step: float32 (rows, columns), from one q to the next; zero or negative where a block has such a scale.
        levels: q is 0 … levels − 1.
    """

    low: np.ndarray
    step: np.ndarray
    levels: int


def grid_of(data: np.ndarray, kind: Type) -> Grid:
    """The grid of rows in a type out of :data:`GRIDS`.

    Args:
        data: uint8 (rows, bytes of a row).
    """
    low, step, each = _scales(_blocks(data, kind), kind)
    low, step = (np.repeat(part, each, axis=-1).reshape(len(data), -1) for part in (low, step))
    return Grid(low, step, 255 if kind == Type.Q8_0 else 1 << _BITS[kind])


def with_chosen(data: np.ndarray, kind: Type, q: np.ndarray) -> np.ndarray:
    """The same blocks, with their scales, that hold other q: uint8 (rows, bytes of a row)."""
    blocks = _blocks(data, kind).copy()
    _pack(blocks, kind, q.astype(np.uint8).reshape(*blocks.shape[:2], -1))
    return blocks.reshape(data.shape)


def _blocks(data: np.ndarray, kind: Type) -> np.ndarray:
    return np.ascontiguousarray(data).reshape(len(data), -1, gguf.GGML_QUANT_SIZES[kind][1])


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at a byte offset of each block, as float32 (…, 1)."""
    return np.ascontiguousarray(blocks[..., at:at + 2]).view(np.float16).astype(np.float32)


# ---- scales ----------------------------------------------------------------------------------------------------------

def _scales(blocks: np.ndarray, kind: Type) -> tuple[np.ndarray, np.ndarray, int]:
    """Low and step, float32 (rows, blocks, groups of a block), and how many weights share one."""
    if kind in (Type.Q4_1, Type.Q5_1):
        return _half(blocks, 2), _half(blocks, 0), 32
    if kind in (Type.Q4_K, Type.Q5_K):
        scales, minima = _six_bits(blocks[..., 4:16])
        return -_half(blocks, 2) * minima, _half(blocks, 0) * scales, 32
    if kind == Type.Q2_K:
        both = blocks[..., :16]
        return -_half(blocks, 82) * (both >> 4), _half(blocks, 80) * (both & 15), 16
    if kind == Type.Q3_K:
        step, each = _half(blocks, 108) * _sixteen_of_six_bits(blocks[..., 96:108]), 16
    elif kind == Type.Q6_K:
        step, each = _half(blocks, 208) * blocks[..., 192:208].view(np.int8).astype(np.float32), 16
    else:
        step, each = _half(blocks, 0), 32
    return -step * _CENTRED[kind], step, each


def _six_bits(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight scales and eight minima out of twelve bytes, see ``get_scale_min_k4``."""
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=-1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=-1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _sixteen_of_six_bits(packed: np.ndarray) -> np.ndarray:
    """Sixteen scales from -32 to 31 out of twelve bytes, see ``dequantize_row_q3_K``."""
    low = np.concatenate([packed[..., :8] & 15, packed[..., :8] >> 4], axis=-1)
    high = packed[..., 8:, None] >> _SHIFTS[:, 0] & 3  # (…, 4 bytes, 4 scales that are four apart)
    return (low | np.swapaxes(high, -1, -2).reshape(low.shape) << 4).astype(np.float32) - 32


# ---- what is chosen --------------------------------------------------------------------------------------------------

# Where the four low bits of the weights lie, and where the others do: the bytes, and how many weights a run of bytes
# serves. Of each run the low nibbles come first.
_NIBBLES = {Type.Q4_0: (2, 16), Type.Q4_1: (4, 16), Type.Q5_0: (6, 16), Type.Q5_1: (8, 16), Type.Q4_K: (16, 32),
            Type.Q5_K: (48, 32)}
_FIFTH = {Type.Q5_0: 2, Type.Q5_1: 4}
# Where the two low bits lie of which a byte has those of four weights, 32 apart.
_PAIRS_OF_BITS = {Type.Q2_K: 16, Type.Q3_K: 32}
_SHIFTS = np.array([0, 2, 4, 6], np.uint8)[:, None]


def _packed_bits(bits: np.ndarray) -> np.ndarray:
    """One bit of each of 256 weights in 32 bytes, each of which has those of eight weights that are 32 apart."""
    groups = np.swapaxes(bits.reshape(*bits.shape[:-1], 8, 32), -1, -2)
    return np.packbits(groups, axis=-1, bitorder="little")[..., 0]


def _pack(blocks: np.ndarray, kind: Type, q: np.ndarray) -> None:
    """Write the q, uint8 (rows, blocks, weights of a block), into blocks."""
    if kind == Type.Q8_0:
        blocks[..., 2:] = (q.astype(np.int16) - 127).astype(np.int8).view(np.uint8)
        return
    if kind == Type.Q6_K:
        halves = q.reshape(*q.shape[:2], 2, 128)
        blocks[..., :128] = ((halves[..., :64] & 15) | (halves[..., 64:] & 15) << 4).reshape(*q.shape[:2], 128)
        high = (halves >> 4).reshape(*q.shape[:2], 2, 4, 32) << _SHIFTS
        blocks[..., 128:192] = np.bitwise_or.reduce(high, axis=-2).reshape(*q.shape[:2], 64)
        return
    if kind in _PAIRS_OF_BITS:
        at = _PAIRS_OF_BITS[kind]
        low = (q & 3).reshape(*q.shape[:2], 2, 4, 32) << _SHIFTS
        blocks[..., at:at + 64] = np.bitwise_or.reduce(low, axis=-2).reshape(*q.shape[:2], 64)
        if kind == Type.Q3_K:
            blocks[..., :32] = _packed_bits(q >> 2)
        return
    at, run = _NIBBLES[kind]
    pairs = q.reshape(*q.shape[:2], -1, 2, run) & 15
    blocks[..., at:] = (pairs[..., 0, :] | pairs[..., 1, :] << 4).reshape(*q.shape[:2], -1)
    if kind in _FIFTH:
        blocks[..., _FIFTH[kind]:_FIFTH[kind] + 4] = np.packbits(q >> 4, axis=-1, bitorder="little")
    if kind == Type.Q5_K:
        blocks[..., 16:48] = _packed_bits(q >> 4)
