"""Few shapes for all batches of a training: how many, which, and what padding to them costs."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tune.train.batches import LengthGroupedBatches, Share
from gemma_tune.train.buckets import WORTH, Bucket, Buckets, Costs, levels, shapes_of_pieces


def added(values, weights, chosen) -> float:
    """What rounding up to the chosen levels adds."""
    chosen = np.asarray(chosen)
    return float(((chosen[np.searchsorted(chosen, values)] - values) * weights).sum())


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 5)), min_size=1, max_size=9), st.integers(1, 4))
def test_levels_add_the_least_of_all_that_are_possible(pairs, most):
    values, weights = (np.array(x) for x in zip(*pairs))
    found = levels(values, weights, 0.0, most)
    different = sorted(set(values.tolist()))
    best = min(added(values, weights, [*some, different[-1]]) for size in range(min(most, len(different)))
               for some in combinations(different[:-1], size))
    assert len(found) <= most and set(found.tolist()) <= set(different) and found[-1] == different[-1]
    assert added(values, weights, found) == best


def test_no_more_levels_than_the_goal_asks_for():
    values = np.array([100, 101, 102, 200])
    assert levels(values, np.ones(4), 0.01, 9).tolist() == [102, 200]
    assert levels(values, np.ones(4), 0.99, 9).tolist() == [200]


def pieces(rows: int, batch: int, epochs: int, spread: float = 0.6):
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(5, spread, rows).astype(int), 12, 900)
    trained = np.maximum(1, (lengths * generator.uniform(0.2, 0.8, rows)).astype(int))
    sampler, batches = LengthGroupedBatches(lengths, Share(batch), 42, trained), []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        batches += sampler
    return shapes_of_pieces(batches, 1, lengths, trained, batch), int(lengths.sum()) * epochs


@pytest.mark.parametrize(("rows", "batch", "epochs"), [(1000, 8, 3), (1000, 4, 2), (5000, 8, 1), (3000, 16, 2)])
def test_padding_stays_under_15_percent(rows, batch, epochs):
    shapes, tokens = pieces(rows, batch, epochs)
    buckets = Buckets(shapes, Costs(1, 1.6))
    assert 0 < buckets.fit(shapes, tokens)[0] < 0.15
    assert len(buckets.counts) <= 28


def test_what_is_met_too_rarely_goes_into_a_larger_one_or_by_itself():
    shapes = np.array([(4, 96, 100)] * 9 + [(4, 80, 90)] + [(4, 900, 400)])
    buckets = Buckets(shapes, Costs(1, 1))
    assert set(buckets.counts) == {Bucket(4, 96, 104)} and buckets.counts[Bucket(4, 96, 104)] == 10
    assert buckets.find(4, 80, 90) == buckets.find(3, 96, 5) == Bucket(4, 96, 104)
    assert buckets.find(4, 900, 400) is None, "nothing holds it"
    assert buckets.find(1, 9, 3) is None, "it would cause many times its own work"
    assert "1 of 11 pieces fit none" in buckets.described(*buckets.fit(shapes, int((shapes[:, 0] * shapes[:, 1]).sum())), len(shapes))


def test_there_is_room_for_what_is_seen_in_any_piece_of_that_length():
    shapes = np.array([(4, 96, 100, 9), (4, 90, 100, 30), (4, 96, 40, 4), (4, 300, 90, 61)] * 9)
    buckets = Buckets(shapes, Costs(1, 1))
    assert {(b.length, b.parts) for b in buckets.counts} == {(96, 32), (304, 64)}
    for shape in shapes.tolist():
        assert buckets.find(*shape).parts >= shape[3]
    assert buckets.find(4, 96, 90, 32).length == 96 and buckets.find(4, 96, 90, 65) is None
    assert buckets.fit(shapes, int((shapes[:, 0] * shapes[:, 1]).sum())) == Buckets(shapes[:, :3], Costs(1, 1)).fit(
        shapes[:, :3], int((shapes[:, 0] * shapes[:, 1]).sum()))


def test_too_short_a_training_captures_nothing():
    assert not Buckets(np.array([(4, 96, 100)] * (WORTH - 1)), Costs(1, 1)).counts
    assert not Buckets(np.zeros((0, 3), np.int64), Costs(1, 1)).counts


def test_every_piece_of_a_bucket_fits_it():
    shapes, _ = pieces(700, 8, 2)
    buckets = Buckets(shapes, Costs(1, 1.6))
    for shape in shapes.tolist():
        if found := buckets.find(*shape):
            assert found.holds(*shape) and found.length % 8 == 0 and found.positions % 8 == 0
