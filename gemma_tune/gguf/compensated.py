"""Rounding that knows what the weights are multiplied with: the weights still to be rounded make up for an error.

Frantar et al. 2022, arXiv 2210.17323 (GPTQ), onto the grids of GGUF blocks: when a block's turn comes, ggml chooses its
scales, with the inputs' mean squares as importance, for the weights that would make up for all errors so far.

Written with a factor of XᵀX instead of one of its inverse: with XᵀX = R Rᵀ, R upper, rounding that changes a row of
weights by d changes its outputs by ‖d R‖; so each column takes the value that brings its number of d R nearest to zero.
The choices are the same, and no matrix is inverted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Protocol

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from gemma_tune.base.machine import cores
from gemma_tune.gguf.grid import GRIDS, grid_of, with_chosen
from gemma_tune.gguf.types import dequantise, libgguf

if TYPE_CHECKING:
    import torch

DAMPING = 0.01  # of the mean square, added to each: without it columns that hardly vary would take any error
_TRIES = 6  # with ten times the damping each
_BLOCK = 128  # columns to which the error of all before them in the block comes at once
_LEAST = 256  # rows that a thread takes: fewer take their columns, one after the other, hardly less time than these
_COMPARED = 32  # rows by which compensated rounding is compared with plain rounding


@dataclass(frozen=True)
class Inputs:
    """What a matrix was multiplied with, as far as its rounding depends on it.

    Args:
        importance: float32 (columns,), the mean square of each column.
        factors: float32, upper, of consecutive columns each, together all: times its transpose, XᵀX of these columns;
            None where an error is not to be made up for.
        output: sum of squares of what came out; None where nobody noted it.
        probes: float32 (some, columns), some of the inputs: what is written is checked with them; None without any.
        narrow: whether what earlier columns' errors make of later ones is computed in bf16, where that is fast. The
            errors of 4 bits came out the same to a thousandth.
    """

    importance: np.ndarray
    factors: tuple[torch.Tensor, ...] | None
    output: float | None = None
    probes: np.ndarray | None = None
    narrow: bool = False

    @property
    def device(self) -> torch.device | None:
        """Where what needs them is computed; None where it is not by factors."""
        return self.factors[0].device if self.factors else None


class InputsOfExperts(Protocol):
    """What the matrices of a tensor of all experts were multiplied with."""

    device: torch.device

    def of(self, expert: int) -> Inputs:
        """One expert's; made anew each time."""


def inputs_of(grams: Sequence[torch.Tensor], count: int) -> Inputs | None:
    """Of XᵀX and the number of rows of X; None where that is not finite.

    Args:
        grams: of consecutive columns, each (columns, columns) in fp32; below the diagonal nothing is read.
    """
    import torch

    diagonal = torch.cat([gram.diagonal() for gram in grams])
    if not torch.isfinite(diagonal).all():
        return None
    mean = diagonal.mean().clamp(min=1e-30)
    factors = [_factor(gram, DAMPING * mean) for gram in grams]
    importance = (diagonal / max(1, count)).float().cpu().numpy()
    return Inputs(importance, None if any(factor is None for factor in factors) else tuple(factors))


def _factor(gram: torch.Tensor, added: torch.Tensor) -> torch.Tensor | None:
    """The upper factor; None where more than 10⁵ times what is added to the diagonal would be needed for one."""
    import torch

    flipped = gram.flip(0, 1)  # its lower factor, flipped back, is the upper one that multiplies from the right
    for more in range(_TRIES):  # numbers of fp32 can make the matrix indefinite
        flipped.diagonal().copy_(gram.diagonal().flip(0) + 10 ** more * added)
        lower, failed = torch.linalg.cholesky_ex(flipped)
        if not failed:
            return lower.flip(0, 1).float()
    return None


@dataclass(frozen=True)
class Rounded:
    """What became of one matrix.

    Args:
        error: RMS of what rounding changes in its output, over the output's own, on the inputs that are known.
        sha256: of its bytes in the file.
        probes: see :class:`Inputs`; of experts one for each, (experts, columns), that could be one of its inputs.
    """

    error: float
    sha256: str
    probes: np.ndarray | None = None


class Rounding:
    """Rounds the matrices of one file.

    Args:
        inputs: of the matrix that the checkpoint calls so; None where nothing is known of it.
    """

    def __init__(self, inputs: Callable[[str], Inputs | InputsOfExperts | None]):
        self._inputs = inputs
        self.done: dict[str, Rounded] = {}

    def knows(self, source: str | None, kind: Type) -> Inputs | InputsOfExperts | None:
        return self._inputs(source) if source and kind in GRIDS and libgguf is not None else None

    def rounded(self, name: str, chunks: Iterable[np.ndarray], kind: Type, inputs: Inputs | InputsOfExperts,
                each: int = 0) -> Iterator[np.ndarray]:
        """Some float32 rows (rows, columns) at a time as bytes: uint8 (rows, bytes of a row).

        Args:
            each: of experts, rows of one, below which the next one's come.
        """
        digest, off, size = hashlib.sha256(), 0.0, 0.0
        probes: list[np.ndarray] = []
        of_one = isinstance(inputs, Inputs)
        known = zip(chunks, repeat(inputs)) if of_one else _by_expert(chunks, inputs, each, probes)
        with _each_on_one_core(inputs) as pool:
            for rows, own in known:
                parts = np.array_split(rows, max(1, min(len(rows) // _LEAST, cores()))) if pool else [rows]
                for data, error, whole in (pool.map if pool else map)(partial(_part, kind=kind, inputs=own), parts):
                    digest.update(data.data)
                    off, size = off + error, size + whole
                    yield data
        size = inputs.output if of_one and inputs.output is not None else size
        self.done[name] = Rounded((off / size) ** 0.5 if size else 0.0, digest.hexdigest(),
                                  inputs.probes if of_one else np.stack(probes))


def _by_expert(chunks: Iterable[np.ndarray], inputs: InputsOfExperts, each: int, probes: list[np.ndarray]
               ) -> Iterator[tuple[np.ndarray, Inputs]]:
    """Rows of one expert, with what that is multiplied with, of which one is added to ``probes``."""
    start = 0
    for rows in chunks:
        while len(rows):
            expert, done = divmod(start, each)
            if not done:
                own = inputs.of(expert)
                probes.append(_drawn(own, expert))
            part, rows = np.split(rows, [each - done])
            start += len(part)
            yield part, own


def _drawn(inputs: Inputs, seed: int) -> np.ndarray:
    """A random input, with the mean squares and products of those that are known: float32 (columns,)."""
    import torch

    normal = np.random.default_rng(seed).standard_normal(len(inputs.importance)).astype(np.float32)
    if inputs.factors is None:
        return normal * np.sqrt(inputs.importance)
    return torch.cat([factor @ torch.from_numpy(normal[columns]).to(factor.device)
                      for columns, factor in _ranges(inputs.factors)]).cpu().numpy()


@contextmanager
def _each_on_one_core(inputs: Inputs | InputsOfExperts) -> Iterator[ThreadPoolExecutor | None]:
    """Threads for parts of the rows; None where a GPU computes.

    Each works through its columns alone: threads that wait for each other after every column of every row take many
    times as long where another process wants the cores as well.
    """
    import torch

    if inputs.device and inputs.device.type != "cpu":
        yield None
        return
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(cores(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)  # which a thread has changed for those that start after it


def _part(rows: np.ndarray, kind: Type, inputs: Inputs) -> tuple[np.ndarray, float, float]:
    return *calibrated(rows, kind, inputs), _energy(rows, inputs) if inputs.output is None else 0.0


def calibrated(rows: np.ndarray, kind: Type, inputs: Inputs) -> tuple[np.ndarray, float]:
    """Round rows to a type out of ``grid.GRIDS``.

    Args:
        rows: float32 (rows, columns).

    Returns:
        uint8 (rows, bytes of a row), and the sum of squares of what that changes in the output.
    """
    rows = np.ascontiguousarray(rows, np.float32)
    if inputs.factors is None:
        data = by_importance(rows, kind, inputs.importance)
        return data, _energy(dequantise(data, kind) - rows, inputs)
    parts = [_compensated(rows[:, columns], kind, inputs.importance[columns], factor, inputs.narrow)
             for columns, factor in _ranges(inputs.factors)]
    better = np.concatenate([data for data, _ in parts], axis=1)
    some = slice(None, None, max(1, len(rows) // _COMPARED))
    plain = _energy(dequantise(by_importance(rows[some], kind, inputs.importance), kind) - rows[some], inputs)
    # By ggml's own reading of the bytes. Where an error cannot be made up for, plain rounding stands.
    if _energy(dequantise(better[some], kind) - rows[some], inputs) <= plain:
        return better, sum(error for _, error in parts)
    data = by_importance(rows, kind, inputs.importance)
    return data, _energy(dequantise(data, kind) - rows, inputs)


def by_importance(rows: np.ndarray, kind: Type, importance: np.ndarray) -> np.ndarray:
    """float32 rows (rows, columns) as ggml rounds them with an importance of each column: uint8 (rows, bytes)."""
    return libgguf.quantize_rows(rows, kind, imatrix=np.maximum(importance, 1e-9 * importance.max(initial=0)))


def _energy(weights: np.ndarray, inputs: Inputs) -> float:
    """Sum of squares of the output of weights (rows, columns)."""
    import torch

    if inputs.factors is None:
        return float((np.square(weights).sum(0, dtype=np.float64) * inputs.importance).sum())
    return sum(float((torch.from_numpy(weights[:, columns]).to(factor.device) @ factor).square().sum())
               for columns, factor in _ranges(inputs.factors))


def _ranges(factors: Iterable[torch.Tensor]) -> Iterator[tuple[slice, torch.Tensor]]:
    """Each factor with the columns that it is of."""
    start = 0
    for factor in factors:
        yield slice(start, start + len(factor)), factor
        start += len(factor)


def _compensated(rows: np.ndarray, kind: Type, importance: np.ndarray, factor: torch.Tensor,
                 narrow: bool) -> tuple[np.ndarray, float]:
    """Round rows (rows, columns): uint8 (rows, bytes of a row), and the sum of squares of what that changes in the
    output."""
    import torch

    size, diagonal = GGML_QUANT_SIZES[kind][0], factor.diagonal().tolist()
    # Columns first: each step works on one column of all rows.
    weights = torch.from_numpy(np.ascontiguousarray(rows.T)).to(factor.device)
    changed, error = torch.empty_like(weights), torch.zeros((), dtype=torch.float64, device=factor.device)
    far = changed.bfloat16() if narrow else changed  # the same for products with many columns
    data = []
    for start in range(0, len(weights), size):
        stop = start + size
        off = (factor[:start, start:stop].T.to(far.dtype) @ far[:start]).float()  # d R of these columns, so far
        block = _Block(weights[start:stop], kind, importance[start:stop])
        block.choose_scales(_inverse(factor[start:stop, start:stop]).T @ off)
        for first in range(start, stop, _BLOCK):
            last = min(first + _BLOCK, stop)
            for at in range(first, last):
                block.round(at - start, off[at - start], 1 / diagonal[at], out=changed[at])
                off[at - start:last - start].addr_(factor[at, at:last], changed[at])
            off[last - start:].addmm_(factor[first:last, last:stop].T, changed[first:last])
        if narrow:
            far[start:stop] = changed[start:stop]
        error += off.square().sum(dtype=torch.float64)
        data.append(block.data())
    return np.concatenate(data, axis=1), float(error)


def _inverse(upper: torch.Tensor) -> torch.Tensor:
    """Of an upper triangular matrix. To multiply many rows by it takes a fraction of the time of solving for them."""
    import torch

    return torch.linalg.solve_triangular(upper, torch.eye(len(upper), device=upper.device), upper=True)


class _Block:
    """Columns that share their blocks in the file.

    Args:
        weights: fp32 (columns, rows).
        importance: of these columns.
    """

    def __init__(self, weights: torch.Tensor, kind: Type, importance: np.ndarray):
        import torch

        self._weights, self._kind, self._importance = weights, kind, importance
        self._q = torch.empty(weights.shape, dtype=torch.uint8, device=weights.device)

    def choose_scales(self, off: torch.Tensor) -> None:
        """For the weights less ``off`` (columns, rows)."""
        import torch

        wanted = np.ascontiguousarray((self._weights - off).T.cpu().numpy())
        self._data = by_importance(wanted, self._kind, self._importance)
        grid = grid_of(self._data, self._kind)
        self._low, self._step = (torch.from_numpy(np.ascontiguousarray(part.T)).to(off.device)
                                 for part in (grid.low, grid.step))
        self._per_step, self._most = torch.where(self._step == 0, 0.0, 1 / self._step), grid.levels - 1

    def round(self, n: int, off: torch.Tensor, factor: float, out: torch.Tensor) -> None:
        """Round column ``n`` less ``factor`` times ``off``, and write into ``out`` what that changes, all (rows,)."""
        import torch

        wanted = torch.sub(self._weights[n], off, alpha=factor)
        whole = wanted.sub_(self._low[n]).mul_(self._per_step[n]).round_().clamp_(0, self._most)
        self._q[n] = whole
        torch.addcmul(self._low[n], self._step[n], whole, out=out).sub_(self._weights[n])

    def data(self) -> np.ndarray:
        """uint8 (rows, bytes of a row)."""
        return with_chosen(self._data, self._kind, self._q.T.cpu().numpy())
