"""Rounding that knows what the weights are multiplied with: the weights still to be rounded make up for an error.

Frantar et al. 2022, arXiv 2210.17323 (GPTQ), algorithm 1, onto the grids of GGUF blocks: their scales are chosen first,
by ggml with the inputs' mean squares as importance, and stay.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from gguf import GGMLQuantizationType as Type

from gemma_tune.gguf.grid import GRIDS, grid_of, with_chosen
from gemma_tune.gguf.types import libgguf

if TYPE_CHECKING:
    import torch

DAMPING = 0.01  # of the mean square, added to each: without it columns that hardly vary would take any error
_TRIES = 6  # with ten times the damping each
_BLOCK = 128  # columns after which the error goes on to all others at once


@dataclass(frozen=True)
class Inputs:
    """What a matrix was multiplied with, as far as its rounding depends on it.

    Args:
        importance: float32 (columns,), the mean square of each column.
        spread: float32 (columns, columns), upper: the Cholesky factor of the inverse of XᵀX; None where an error is not
            to be made up for, as in an embedding, whose rows are used by themselves too.
    """

    importance: np.ndarray
    spread: torch.Tensor | None


def inputs_of(gram: torch.Tensor, count: int) -> Inputs | None:
    """Of XᵀX, (columns, columns) in fp32 or fp64, and the number of rows of X; None where that is not finite."""
    import torch

    diagonal = gram.diagonal()
    if not torch.isfinite(diagonal).all():
        return None
    importance = (diagonal / max(1, count)).float().cpu().numpy()
    mean = diagonal.mean().clamp(min=1e-30)
    for more in range(_TRIES):  # numbers of fp32 can make the matrix indefinite
        damped = gram.clone()
        damped.diagonal().add_(DAMPING * 10 ** more * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            spread, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed:
                return Inputs(importance, spread.float())
    return Inputs(importance, None)


@dataclass(frozen=True)
class Rounded:
    """What became of one matrix.

    Args:
        error: RMS of what rounding changes in its output, over the output's own, on the inputs that are known.
        sha256: of its bytes in the file.
    """

    error: float
    sha256: str


class Rounding:
    """Rounds the matrices of one file.

    Args:
        inputs: of the matrix that the checkpoint calls so; None where nothing is known of it.
    """

    def __init__(self, inputs: Callable[[str], Inputs | None]):
        self._inputs = inputs
        self.done: dict[str, Rounded] = {}

    def knows(self, source: str | None, kind: Type) -> Inputs | None:
        return self._inputs(source) if source and kind in GRIDS and libgguf is not None else None

    def rounded(self, name: str, chunks: Iterable[np.ndarray], kind: Type, inputs: Inputs) -> Iterator[np.ndarray]:
        """Some float32 rows (rows, columns) at a time as bytes: uint8 (rows, bytes of a row)."""
        digest, off, size = hashlib.sha256(), 0.0, 0.0
        for rows in chunks:
            data, error, whole = calibrated(rows, kind, inputs)
            digest.update(data.data)
            off, size = off + error, size + whole
            yield data
        self.done[name] = Rounded((off / size) ** 0.5 if size else 0.0, digest.hexdigest())


def calibrated(rows: np.ndarray, kind: Type, inputs: Inputs) -> tuple[np.ndarray, float, float]:
    """Round rows to a type out of ``grid.GRIDS``.

    Args:
        rows: float32 (rows, columns).

    Returns:
        uint8 (rows, bytes of a row); the sum of squares of what that changes in the output; that of the output.
    """
    import torch

    rows = np.ascontiguousarray(rows, np.float32)
    data = libgguf.quantize_rows(rows, kind, imatrix=np.maximum(inputs.importance, 1e-9 * inputs.importance.max()))
    found = [data]
    if inputs.spread is not None:
        grid = grid_of(data, kind)
        # Columns first: each step works on one column of all rows.
        left, low, step = (torch.from_numpy(np.ascontiguousarray(part.T)).to(inputs.spread.device)
                           for part in (rows, grid.low, grid.step))
        q = _compensated(left, low, step, grid.levels, inputs.spread)
        found.append(with_chosen(data, kind, q.T.cpu().numpy()))
    # By ggml's own reading of the bytes. Where an error cannot be made up for, plain rounding stands.
    off = [_energy(libgguf.dequantize_rows(one, kind) - rows, inputs) for one in found]
    best = int(np.argmin(off))
    return found[best], off[best], _energy(rows, inputs)


def _energy(weights: np.ndarray, inputs: Inputs) -> float:
    """Sum of squares of the output of weights (rows, columns): ‖W U⁻¹‖², as XᵀX = U⁻¹U⁻ᵀ."""
    import torch

    if inputs.spread is None:
        return float((np.square(weights).sum(0, dtype=np.float64) * inputs.importance).sum())
    own = torch.from_numpy(weights).to(inputs.spread.device)
    return float(torch.linalg.solve_triangular(inputs.spread, own, upper=True, left=False).square().sum())


def _compensated(left: torch.Tensor, low: torch.Tensor, step: torch.Tensor, levels: int,
                 spread: torch.Tensor) -> torch.Tensor:
    """The q (columns, rows) of weights (columns, rows), which are changed."""
    import torch

    per_step = torch.where(step == 0, 0.0, 1 / step)
    q = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
    for start in range(0, len(left), _BLOCK):
        stop = min(start + _BLOCK, len(left))
        part, errors = left[start:stop], torch.empty_like(left[start:stop])
        for n, at in enumerate(range(start, stop)):
            whole = ((part[n] - low[at]) * per_step[at]).round_().clamp_(0, levels - 1)
            q[at] = whole
            errors[n] = (part[n] - torch.addcmul(low[at], step[at], whole)) / spread[at, at]
            part[n + 1:].addr_(spread[at, at + 1:stop], errors[n], alpha=-1)
        left[stop:].addmm_(spread[start:stop, stop:].T, errors, alpha=-1)
    return q
