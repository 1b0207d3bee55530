"""Rounding by what a matrix is multiplied with: its output keeps more than by any rounding of weights alone."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import libgguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from gemma_tune.gguf import compensated
from gemma_tune.gguf.compensated import Inputs, Rounding, by_importance, calibrated, inputs_of
from gemma_tune.gguf.grid import GRIDS, grid_of
from gemma_tune.gguf.types import dequantise, quantise
from support.grids import chosen


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    """Inputs (600, 256) that depend on each other, as a model's do."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(40, 256, generator=generator)
    return torch.randn(600, 40, generator=generator) @ mix + 0.5 * torch.randn(600, 256, generator=generator)


@pytest.fixture(scope="module")
def weights() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((48, 256)).astype(np.float32) * 0.05


def off(x: torch.Tensor, weights: np.ndarray, data: np.ndarray, kind: Type) -> float:
    """How much of the output rounding changes."""
    exact = x @ torch.from_numpy(weights).T
    return float((x @ torch.from_numpy(dequantise(data, kind)).T - exact).norm() / exact.norm())


@pytest.mark.parametrize("kind", GRIDS, ids=lambda kind: kind.name)
def test_the_output_keeps_more_than_by_an_importance_matrix(x, weights, kind):
    inputs = inputs_of([x.T @ x], len(x))
    data, error = calibrated(weights, kind, inputs)
    ours = off(x, weights, data, kind)
    assert ours < 0.6 * off(x, weights, libgguf.quantize_rows(weights, kind, imatrix=inputs.importance), kind)
    assert ours < 0.6 * off(x, weights, quantise(weights, kind), kind)
    whole = float((x @ torch.from_numpy(weights).T).square().sum())
    assert (error / whole) ** 0.5 == pytest.approx(ours, rel=0.15)  # but for the damping


def test_columns_that_were_always_zero_and_too_few_rows_do_no_harm(x, weights):
    few = x[:3].clone()
    few[:, 7] = 0
    data, error = calibrated(weights, Type.Q4_0, inputs_of([few.T @ few], len(few)))
    assert np.isfinite(dequantise(data, Type.Q4_0)).all()
    assert error < 0.01 * float((few @ torch.from_numpy(weights).T).square().sum())
    nothing, error = calibrated(weights, Type.Q4_K, inputs_of([torch.zeros(256, 256)], 0))
    assert np.isfinite(dequantise(nothing, Type.Q4_K)).all()


def test_blocks_of_zeros_stay_zero_and_the_others_keep_more_all_the_same(x, weights):
    some = weights[:, :64].copy()
    some[:, :32] = 0
    inputs = inputs_of([x[:, :64].T @ x[:, :64]], len(x))
    data, error = calibrated(some, Type.Q4_0, inputs)
    assert error > 0 and not dequantise(data, Type.Q4_0)[:, :32].any()
    plain = by_importance(some, Type.Q4_0, inputs.importance)
    assert off(x[:, :64], some, data, Type.Q4_0) < 0.9 * off(x[:, :64], some, plain, Type.Q4_0)


def test_plain_rounding_stands_where_making_up_for_errors_is_worse(x, weights, monkeypatch):
    inputs = inputs_of([x.T @ x], len(x))
    plain = by_importance(weights, Type.Q4_0, inputs.importance)
    monkeypatch.setattr(compensated, "_compensated", lambda *_: (np.zeros_like(plain), 0.0))
    data, error = calibrated(weights, Type.Q4_0, inputs)
    assert np.array_equal(data, plain) and error > 0


def test_what_is_not_finite_is_not_known(x):
    gram = x.T @ x
    gram[3, 3] = float("nan")
    assert inputs_of([gram], len(x)) is None


def test_without_the_spread_it_is_ggmls_rounding_with_the_importance(x, weights):
    importance = x.square().mean(0).numpy()
    data, _ = calibrated(weights, Type.Q6_K, Inputs(importance, None))
    assert np.array_equal(data, libgguf.quantize_rows(weights, Type.Q6_K, imatrix=importance))


def test_rows_are_rounded_each_by_itself_and_what_was_made_is_kept(x, weights):
    inputs = inputs_of([x.T @ x], len(x))
    rounding = Rounding({"known": inputs}.get)
    assert rounding.knows("known", Type.Q4_K) is inputs
    assert rounding.knows("unknown", Type.Q4_K) is None
    assert rounding.knows("known", Type.F16) is None
    parts = b"".join(part.tobytes() for part in rounding.rounded("t", [weights[:20], weights[20:]], Type.Q4_K, inputs))
    whole, error = calibrated(weights, Type.Q4_K, inputs)
    assert parts == whole.tobytes()
    assert rounding.done["t"].sha256 == hashlib.sha256(parts).hexdigest()
    size = float((x @ torch.from_numpy(weights).T).square().sum())
    assert rounding.done["t"].error == pytest.approx((error / size) ** 0.5, rel=0.01)
    list(rounding.rounded("noted", [weights], Type.Q4_K, replace(inputs, output=2 * size)))
    assert rounding.done["noted"].error == pytest.approx((error / size / 2) ** 0.5)


@pytest.mark.parametrize(("rows", "parts"), [(40, [40]), (500, [500]), (600, [300, 300]), (1200, [400, 400, 400])])
def test_a_thread_takes_so_many_rows_that_it_pays(rows, parts, monkeypatch):
    """They take each other's time, as each goes from column to column."""
    seen, plain = [], compensated._part
    monkeypatch.setattr(compensated, "cores", lambda: 3)
    monkeypatch.setattr(compensated, "_part", lambda rows, **how: seen.append(len(rows)) or plain(rows, **how))
    rounding, x = Rounding(lambda source: None), torch.eye(32)
    weights = np.random.default_rng(0).standard_normal((rows, 32)).astype(np.float32)
    assert sum(len(data) for data in rounding.rounded("w", [weights], Type.Q8_0, inputs_of([x], 32))) == rows
    assert sorted(seen) == parts


def test_the_threads_of_a_product_are_as_they_were(x, weights):
    before = torch.get_num_threads()
    list(Rounding({}.get).rounded("t", [weights], Type.Q4_0, inputs_of([x.T @ x], len(x))))
    with ThreadPoolExecutor(1) as pool:
        assert torch.get_num_threads() == pool.submit(torch.get_num_threads).result() == before


def test_the_factor_times_its_transpose_is_the_product_of_the_inputs(x):
    gram = x.T @ x
    [upper] = inputs_of([gram.triu()], len(x)).factors
    assert torch.equal(upper, upper.triu())
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(256)
    torch.testing.assert_close(upper @ upper.T, damped, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("kind", [Type.Q4_1, Type.Q5_K], ids=lambda kind: kind.name)
def test_each_column_makes_up_for_those_before_it_as_in_gptq(x, weights, kind):
    """By the paper's own words: errors over the diagonal of the factor of the inverse are spread over what is left."""
    gram = (x.T @ x).double()
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    spread = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    importance, left = x.square().mean(0).numpy(), torch.from_numpy(weights).double()
    expected, size = torch.empty(weights.shape, dtype=torch.uint8), GGML_QUANT_SIZES[kind][0]
    for start in range(0, 256, size):  # scales of a block are those of its weights as they are by then
        block = np.ascontiguousarray(left[:, start:start + size].float().numpy())
        grid = grid_of(libgguf.quantize_rows(block, kind, imatrix=importance[start:start + size]), kind)
        low, step = (torch.from_numpy(part).double() for part in (grid.low, grid.step))
        for n in range(size):
            at = start + n
            q = ((left[:, at] - low[:, n]) / step[:, n]).round().clamp(0, grid.levels - 1)
            expected[:, at] = q
            error = (left[:, at] - low[:, n] - step[:, n] * q) / spread[at, at]
            left[:, at:] -= error[:, None] * spread[at, at:]
    found = chosen(calibrated(weights, kind, inputs_of([x.T @ x], len(x)))[0], kind)
    assert (found == expected.numpy()).mean() > 0.995  # fp32 decides otherwise where two are as near


def test_in_parts_each_part_makes_up_for_its_own_errors(x, weights):
    gram = x.T @ x
    halves = inputs_of([gram[:128, :128], gram[128:, 128:]], len(x))
    data, error = calibrated(weights, Type.Q4_1, halves)
    apart = [calibrated(weights[:, part], Type.Q4_1, inputs_of([gram[part, part]], len(x)))
             for part in (slice(128), slice(128, None))]
    assert error == pytest.approx(sum(one for _, one in apart), rel=0.1)  # but for the damping
    ours = off(x, weights, data, Type.Q4_1)
    assert ours < 0.9 * off(x, weights, libgguf.quantize_rows(weights, Type.Q4_1, imatrix=halves.importance), Type.Q4_1)


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_K], ids=lambda kind: kind.name)
def test_products_in_bf16_round_as_well(kind):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(600, 512, generator=generator) * torch.rand(512, generator=generator)
    rows = (torch.randn(64, 512, generator=generator) / 50).numpy()
    wide = inputs_of([x.T @ x], len(x))
    narrow = replace(wide, narrow=True)
    (data, error), (other, near) = calibrated(rows, kind, wide), calibrated(rows, kind, narrow)
    assert not np.array_equal(data, other), "it is not used"
    real = [float(((x @ torch.from_numpy(dequantise(d, kind) - rows).T) ** 2).sum()) for d in (data, other)]
    assert real[1] == pytest.approx(real[0], rel=0.02) and near == pytest.approx(error, rel=0.02)
    plain = by_importance(rows, kind, wide.importance)
    assert real[1] < 0.9 * float(((x @ torch.from_numpy(dequantise(plain, kind) - rows).T) ** 2).sum())
