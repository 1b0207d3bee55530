"""Blocks of a GGUF as grids: what they hold is what ggml reads, and what is put into them is read back."""

from __future__ import annotations

import numpy as np
import pytest

from gemma_tune.gguf.grid import GRIDS, grid_of, with_chosen
from gemma_tune.gguf.types import dequantise, quantise
from support.grids import chosen


@pytest.fixture
def weights() -> np.ndarray:
    """Among them a block of zeros and one of all but zeros."""
    rows = np.random.default_rng(0).standard_normal((7, 512)).astype(np.float32) * 0.05
    rows[3, :256], rows[2, 256:] = 0, 1e-9
    return rows


@pytest.mark.parametrize("kind", GRIDS, ids=lambda kind: kind.name)
def test_a_grid_holds_what_ggml_reads(weights, kind):
    data = quantise(weights, kind)
    grid, q = grid_of(data, kind), chosen(data, kind)
    assert q.shape == weights.shape and q.max() < grid.levels
    np.testing.assert_allclose(grid.low + grid.step * q, dequantise(data, kind), rtol=1e-6, atol=1e-9)
    assert np.array_equal(dequantise(with_chosen(data, kind, q), kind), dequantise(data, kind))


@pytest.mark.parametrize("kind", GRIDS, ids=lambda kind: kind.name)
def test_any_choice_is_read_back(weights, kind):
    data = quantise(weights, kind)
    grid = grid_of(data, kind)
    q = np.random.default_rng(1).integers(0, grid.levels, weights.shape).astype(np.uint8)
    other = with_chosen(data, kind, q)
    np.testing.assert_allclose(dequantise(other, kind), grid.low + grid.step * q, rtol=1e-6, atol=1e-9)
    assert np.array_equal(grid_of(other, kind).step, grid.step) and np.array_equal(grid_of(other, kind).low, grid.low)
