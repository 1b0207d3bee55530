"""What the blocks of a GGUF file hold, read without the code that wrote them."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType as Type

from gemma_tune.gguf.grid import grid_of
from gemma_tune.gguf.types import dequantise


def chosen(data: np.ndarray, kind: Type) -> np.ndarray:
    """The q of each weight, uint8 (rows, columns), by ggml's own reading of the bytes; 0 where the steps are none."""
    grid = grid_of(data, kind)
    steps = (dequantise(data, kind) - grid.low) / np.where(grid.step == 0, 1, grid.step)
    return np.where(grid.step == 0, 0, steps.round()).astype(np.uint8)
