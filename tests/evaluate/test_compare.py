"""Losses of both models, put together from sequences."""

from __future__ import annotations

import numpy as np
import pytest

from gemma_tune.evaluate.compare import _loss_pair
from gemma_tune.measure.likelihood import Wanted


def test_sequences_of_one_row_count_as_one():
    sequences = [Wanted(np.zeros((1, n + 1), np.int64), np.arange(n), np.zeros(n, np.int64)) for n in (1, 3, 4)]
    base, tuned = np.array([2.0, 6, 8]), np.array([1.0, 1, 4])
    loss = _loss_pair("", base, tuned, sequences, np.array([4, 4, 7]), 0)["loss"]
    assert (loss["rows"], loss["tokens"]) == (2, 8)
    assert (loss["base"][0], loss["tuned"][0]) == pytest.approx((2, 0.75))
    alone = _loss_pair("", base, tuned, sequences, np.array([4, 4, 4]), 0)["loss"]
    assert alone["rows"] == 1 and alone["base"] == [2, None, None], "of one row there is no interval"
