"""Rounding that knows what the weights are multiplied with: an error is made up for by the weights still to be rounded.

Frantar et al. 2022, arXiv 2210.17323 (GPTQ), algorithm 1, onto the grids of GGUF blocks: their scales are chosen first, by
ggml with the inputs' mean squares as importance, and stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

from gemma_tune.gguf.grid import grid_of, with_chosen

DAMPING = 0.01  # of the mean square, added to each: without it columns that hardly vary would take any error
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


def inputs_of(gram: torch.Tensor, count: int) -> Inputs:
    """Of XᵀX, (columns, columns) in fp32 or fp64, and the number of rows of X."""
    diagonal = gram.diagonal()
    importance = (diagonal / max(1, count)).float().cpu().numpy()
    mean, damping = diagonal.mean().clamp(min=1e-30), DAMPING
    while True:
        damped = gram.clone()
        damped.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            spread, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed:
                return Inputs(importance, spread.float())
        damping *= 10  # numbers of fp32 made the matrix indefinite


def calibrated(rows: np.ndarray, kind: Type, inputs: Inputs) -> np.ndarray:
    """float32 ``rows`` (rows, columns) as bytes of a type out of ``grid.GRIDS``: uint8 (rows, bytes of a row)."""
    import libgguf

    rows = np.ascontiguousarray(rows, np.float32)
    data = libgguf.quantize_rows(rows, kind, imatrix=np.maximum(inputs.importance, 1e-9 * inputs.importance.max()))
    if inputs.spread is None:
        return data
    device = inputs.spread.device
    grid = grid_of(data, kind)
    # Columns first: each step works on one column of all rows.
    left, low, step = (torch.from_numpy(np.ascontiguousarray(part.T)).to(device) for part in (rows, grid.low, grid.step))
    return with_chosen(data, kind, _compensated(left, low, step, grid.levels, inputs.spread).T.cpu().numpy())


def _compensated(left: torch.Tensor, low: torch.Tensor, step: torch.Tensor, levels: int,
                 spread: torch.Tensor) -> torch.Tensor:
    """The q (columns, rows) of weights (columns, rows), which are changed."""
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
