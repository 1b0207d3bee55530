"""Experts in a checkpoint: all of a layer in one tensor (experts, rows, columns), or each with a matrix of its own.

A GGUF has the first kind alone, whose rows are those of the second, one expert's below the other's. Gate and up can be
one matrix in a checkpoint, and two in the file. GPT-OSS stores each matrix the other way round.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from gemma_tune.base.errors import UserError
from gemma_tune.base.tensors import StoredTensor
from gemma_tune.gguf.architectures.experts import columns_of, in_model
from gemma_tune.gguf.architectures.parts import TensorSpec

PACKED = ("_blocks", "_scales")  # what tensors of experts in MXFP4 end in, where GPT-OSS was released so
_FOUR_BITS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
# One of several matrices that a GGUF has as one tensor: an expert's, or what makes a stream of states in Gemma 3n.
_ONE = re.compile(r"(.+\.(?:experts|altup_projections|altup_unembed_projections))\.(\d+)\.(.+)")
_Found = TypeVar("_Found")


def together(found: Mapping[str, _Found]) -> dict[str, tuple[_Found, ...]]:
    """What a checkpoint has by name → by the name without an expert's number, in the order of the experts; where their
    numbers are not 0, 1, 2, …, by the names as they are."""
    numbered: dict[str, dict[int, str]] = {}
    for name in found:
        if one := _ONE.fullmatch(name):
            numbered.setdefault(f"{one[1]}.{one[3]}", {})[int(one[2])] = name
    whole = {name: [members[n] for n in range(len(members))] for name, members in numbered.items()
             if members.keys() == set(range(len(members))) and name not in found}
    taken = {name for members in whole.values() for name in members}
    return {name: (item,) for name, item in found.items() if name not in taken} | {
        name: tuple(found[member] for member in members) for name, members in whole.items()}


def experts_of(stored: Mapping[str, Sequence[StoredTensor]], spec: TensorSpec
               ) -> Sequence[Member] | None:
    """What each expert has of ``spec`` where that is a half of a larger tensor in the checkpoint, or goes by its name.

    Args:
        stored: see :func:`together`.
        spec: what the checkpoint is asked for, and does not have.

    Returns:
        None where it has no such tensor either.
    """
    name, half = in_model(str(spec.source))
    whole, shape = stored.get(name, ()), spec.shape
    if spec.turned and len(shape) == 3 and not whole:
        return _packed([stored.get(f"{name}{part}", ()) for part in PACKED], shape, half)
    if spec.turned and len(whole) == 1:
        return _turned(whole[0], shape, half)
    if len(shape) < 3 or len(whole) != 1:
        return None
    rows, columns = shape[1:]
    if whole[0].shape != (shape[0], rows * (1 if half is None else 2), columns):
        return None
    size = whole[0].bytes // math.prod(whole[0].shape)
    starts = (n * whole[0].shape[1] + rows * (half or 0) for n in range(shape[0]))
    return tuple(replace(whole[0], shape=(rows, columns), offset=whole[0].offset + start * columns * size)
                 for start in starts)


def matrices_of(stored: Mapping[str, Sequence[StoredTensor]], spec: TensorSpec) -> Sequence[Member]:
    """One matrix (rows, columns) for each expert of ``spec``, however the checkpoint has them.

    Args:
        stored: see :func:`together`.

    Raises:
        UserError: the checkpoint does not have them.
    """
    members = stored.get(str(spec.source), ())
    apart = len(members) == spec.shape[0] and all(member.shape == spec.shape[1:] for member in members)
    found = members if apart else experts_of(stored, spec)
    if found is None:
        raise UserError(f"the weights have no {spec.source} of shape {spec.shape}",
                        "merge again from the original base model")
    return found


def _turned(whole: StoredTensor, shape: tuple[int, ...], half: int | None) -> Sequence[Columns] | None:
    """As :func:`experts_of`: of matrices (experts, columns, rows), or of vectors (experts, numbers)."""
    experts, length, *columns = shape
    if whole.shape != (experts, *columns, length * (1 if half is None else 2)):
        return None
    if not columns:
        return (Columns(whole, half, turned=False),)
    size = whole.bytes // experts
    return tuple(Columns(replace(whole, shape=whole.shape[1:], offset=whole.offset + n * size), half)
                 for n in range(experts))


def _packed(parts: Sequence[Sequence[StoredTensor]], shape: tuple[int, ...], half: int | None
            ) -> Sequence[Packed] | None:
    """As :func:`experts_of`: of experts in MXFP4."""
    experts, rows, columns = shape
    stored = (experts, rows * (1 if half is None else 2), columns // 32)
    if any(len(part) != 1 or part[0].dtype != "U8" for part in parts):
        return None
    blocks, scales = (part[0] for part in parts)
    if blocks.shape != (*stored, 16) or scales.shape != stored:
        return None
    one = [[replace(part, shape=part.shape[1:], offset=part.offset + n * (part.bytes // experts))
            for part in (blocks, scales)] for n in range(experts)]
    return tuple(Packed(*each, half) for each in one)


@dataclass(frozen=True)
class Packed:
    """A matrix in MXFP4, or every second row of it: numbers of four bits, of which 32 share a power of two (OCP
    Microscaling Formats 1.0).

    Args:
        blocks: uint8 (rows, columns / 32, 16), of each byte the lower half first.
        scales: uint8 (rows, columns / 32), exponents that begin at -127.
        half: 0 or 1, the row to begin with; None for all.
    """

    blocks: StoredTensor
    scales: StoredTensor
    half: int | None
    dtype = "BF16"  # which holds all of its numbers

    @property
    def name(self) -> str:
        return self.blocks.name

    @property
    def shape(self) -> tuple[int, ...]:
        rows, groups, _ = self.blocks.shape
        return rows // (1 if self.half is None else 2), groups * 32

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop`` as float32, fewer where there are no more.

        Raises:
            UserError: as of a single tensor.
        """
        step = 1 if self.half is None else 2
        blocks, scales = (np.frombuffer(part.raw(step * start, step * stop), np.uint8).reshape(-1, *part.shape[1:])
                          [columns_of(self.half)] for part in (self.blocks, self.scales))
        numbers = _FOUR_BITS[np.stack([blocks & 15, blocks >> 4], -1)]
        powers = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
        return (numbers.reshape(*scales.shape, 32) * powers[..., None]).reshape(len(scales), -1)


@dataclass(frozen=True)
class Columns:
    """All columns of a matrix in a file, or every second one.

    Args:
        half: 0 or 1, the column to begin with; None for all.
        turned: whether they are to be rows.
    """

    stored: StoredTensor
    half: int | None
    turned: bool = True

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def dtype(self) -> str:
        return self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.stored.shape
        columns //= 1 if self.half is None else 2
        return (columns, rows) if self.turned else (rows, columns)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop`` as float32, fewer where there are no more.

        Raises:
            UserError: as of a single tensor.
        """
        picked = columns_of(self.half)
        if not self.turned:
            return np.ascontiguousarray(self.stored.rows(start, stop)[:, picked])
        return np.ascontiguousarray(self.stored.rows()[:, picked][:, start:stop].T)


@dataclass(frozen=True)
class Stack:
    """Matrices of one shape, one below the other.

    Args:
        members: at least one.
    """

    members: Sequence[Member]

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows of all of them as float32 (stop - start, columns), fewer where there are no more.

        Raises:
            UserError: as of a single tensor.
        """
        size = self.members[0].shape[0]
        stop = min(stop, size * len(self.members))
        return np.concatenate([self.members[n].rows(max(0, start - n * size), stop - n * size)
                               for n in range(start // size, -(-stop // size))])


@dataclass(frozen=True)
class Filled:
    """A matrix with rows of zeros below it.

    Args:
        count: how many.
    """

    stored: StoredTensor
    count: int

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop`` as float32, fewer where there are no more.

        Raises:
            UserError: as of a single tensor.
        """
        own = self.stored.shape[0]
        zeros = max(0, min(stop, own + self.count) - max(start, own))
        found = [self.stored.rows(start, stop)] if start < own else []
        return np.concatenate([*found, np.zeros((zeros, self.stored.shape[1]), np.float32)])


Member = StoredTensor | Columns | Packed
Source = Member | Stack | Filled


def by_rows(members: Sequence[Member], spec: TensorSpec) -> Source:
    """What is read row by row of a tensor of the file, from the checkpoint's one tensor or one for each expert, see
    :func:`together`."""
    shape = spec.shape
    if spec.zero_rows:
        return Filled(members[0], spec.zero_rows)
    if len(shape) < 3:
        return members[0]
    if len(members[0].shape) < 3:
        return Stack(members)
    return replace(members[0], shape=(math.prod(shape[:-1]), shape[-1]))
