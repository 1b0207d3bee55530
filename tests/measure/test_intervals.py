"""Bootstrap intervals: as wide as theory says, and of the difference as narrow as pairing makes it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gemma_tune.measure.intervals import compare


def test_an_interval_of_a_mean_is_as_wide_as_its_standard_error_says():
    values = np.random.default_rng(3).normal(5.0, 2.0, 400)
    found = compare(values, values + 1).base
    error = values.std() / np.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)


def test_it_holds_the_truth_about_as_often_as_it_says():
    random, inside = np.random.default_rng(5), 0
    for seed in range(200):
        found = compare(random.normal(0.0, 1.0, 60), np.zeros(60), seed=seed).base
        inside += found.low <= 0 <= found.high
    assert 0.88 <= inside / 200 <= 0.99


def test_what_is_hard_about_a_row_cancels_out_of_the_difference():
    base = np.random.default_rng(7).normal(0.0, 10.0, 200)
    tuned = base - 0.5 + np.random.default_rng(8).normal(0.0, 0.1, 200)
    found = compare(base, tuned)
    assert found.base.high - found.base.low > 2
    assert found.difference.high - found.difference.low < 0.1
    assert found.difference.low < -0.5 < found.difference.high or found.difference.value == pytest.approx(-0.5, abs=0.02)


def test_rows_weigh_as_much_as_they_have_tokens():
    nats, tokens = np.array([10.0, 90.0]), np.array([10, 30])
    found = compare(nats, nats * 2, tokens, change=np.exp)
    assert found.base.value == pytest.approx(np.exp(100 / 40))
    assert found.tuned.value == pytest.approx(np.exp(200 / 40))
    assert found.difference.value == pytest.approx(found.tuned.value - found.base.value)
    assert found.base.low >= np.exp(1) - 1e-9 and found.base.high <= np.exp(3) + 1e-9


def test_of_one_row_nothing_is_known_but_the_value_and_the_seed_decides_the_rest():
    one = compare(np.array([3.0]), np.array([2.0])).as_json()
    assert one == {"base": [3.0, None, None], "tuned": [2.0, None, None], "difference": [-1.0, None, None], "rows": 1}
    values = np.arange(30.0)
    assert compare(values, values, seed=1) == compare(values, values, seed=1) != compare(values, values, seed=2)
    assert json.loads(json.dumps(compare(values, values).as_json()))["rows"] == 30


def test_many_rows_are_drawn_in_parts_that_fit_memory():
    values = np.random.default_rng(1).random(8_000)
    found = compare(values, values)
    assert found.difference.as_json() == [0.0, 0.0, 0.0]
    assert found.base.high - found.base.low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(8_000), rel=0.15)
