"""Which rows become validation data: properties of the choice, whatever the hashes are."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tune.prepare.split import choose_valid

HASHES = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=40)
# Few different values, so that groups of rows with the same prompt occur.
GROUPED = st.lists(st.sampled_from([0, 1, 2**62, 2**63 - 1, 2**63, 2**64 - 2**20, 2**64 - 1]), min_size=1, max_size=30)
VALID = st.one_of(st.floats(0, 0.9), st.integers(1, 40), st.just(0))


def chosen(hashes, valid):
    return choose_valid(np.array(hashes, dtype=np.uint64), valid)


@given(st.one_of(HASHES, GROUPED), VALID)
@settings(max_examples=300, deadline=None)
def test_equal_prompts_stay_together_and_no_side_is_empty(hashes, valid):
    mask = chosen(hashes, valid)
    assert mask.dtype == bool and mask.shape == (len(hashes),)
    assert not {h for h, m in zip(hashes, mask) if m} & {h for h, m in zip(hashes, mask) if not m}
    if len(set(hashes)) > 1 and valid > 0:
        assert mask.any() and not mask.all()
    else:
        assert not mask.any()


@given(st.one_of(HASHES, GROUPED), VALID, st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_the_order_of_the_rows_does_not_matter(hashes, valid, random):
    order = list(range(len(hashes)))
    random.shuffle(order)
    mask = chosen(hashes, valid)
    assert chosen([hashes[n] for n in order], valid).tolist() == mask[order].tolist()


@given(HASHES, HASHES, st.floats(0.01, 0.9))
@settings(max_examples=200, deadline=None)
def test_added_rows_move_no_others(hashes, more, share):
    # Fixed rows on either side, so that no side has to be filled.
    hashes = [0, 2**64 - 1, *hashes]
    assert chosen(hashes + more, share)[: len(hashes)].tolist() == chosen(hashes, share).tolist()


@given(HASHES, st.floats(0.01, 0.9))
@settings(max_examples=200, deadline=None)
def test_a_share_is_a_share_of_the_range_of_hashes(hashes, share):
    mask = chosen([0, *hashes, 2**64 - 1], share)[1:-1]
    assert mask.tolist() == [Fraction(h, 2**64) < Fraction(share) for h in hashes]


@given(st.one_of(HASHES, GROUPED), st.integers(1, 40))
@settings(max_examples=300, deadline=None)
def test_a_number_is_never_exceeded_but_by_a_single_prompt(hashes, number):
    mask = chosen(hashes, number)
    sizes = {h: hashes.count(h) for h in set(hashes)}
    if mask.sum() > number:
        [group] = {h for h, m in zip(hashes, mask) if m}
        assert sizes[group] == min(sizes.values()) > number
    elif len(sizes) > 1:
        left = min(number, len(hashes) - 1) - int(mask.sum())
        assert all(size > left for h, size in sizes.items() if not mask[hashes.index(h)]), "another prompt would fit"


def test_a_share_ends_before_its_border():
    assert chosen([0, 2**63 - 1, 2**63, 2**64 - 1], 0.5).tolist() == [True, True, False, False]


def test_a_number_takes_the_smallest_hashes_that_fit():
    hashes = [5, 9, 5, 7, 1, 5]
    assert chosen(hashes, 1).tolist() == [False, False, False, False, True, False]
    assert chosen(hashes, 3).tolist() == [False, True, False, True, True, False]  # the three 5s are passed over
    assert chosen(hashes, 4).tolist() == [True, False, True, False, True, True]
    assert chosen([5, 5, 5, 9, 9], 1).tolist() == [False, False, False, True, True]  # none fits: the fewest rows
    assert chosen([1, 2, 3], 100).tolist() == [True, True, False]  # one is left to train on


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_of_many_rows_a_share_is_hit_closely(share):
    mask = choose_valid(np.random.default_rng(0).integers(0, 2**64, 100_000, dtype=np.uint64), share)
    assert mask.mean() == pytest.approx(share, abs=0.005)


def test_without_rows_nothing_is_chosen():
    assert chosen([], 0.1).shape == (0,)


@given(st.one_of(HASHES, GROUPED), st.floats(0.01, 0.5), st.integers(0, 8))
@settings(max_examples=200, deadline=None)
def test_a_share_gives_at_least_so_many_rows_and_only_adds_the_next_prompts(hashes, share, fewest):
    plain, mask = chosen(hashes, share), choose_valid(np.array(hashes, dtype=np.uint64), share, fewest)
    assert mask[plain].all(), "what the share takes stays"
    assert mask.sum() <= max(plain.sum(), 2 * fewest)
    if len(set(hashes)) > 1:
        assert mask.any() and not mask.all()
    if len(set(hashes)) == len(hashes):
        assert mask.sum() >= min(fewest, len(hashes) - 1) or len(hashes) < 2
        taken = [h for h, m in zip(hashes, mask) if m]
        assert not taken or max(taken) <= min((h for h, m in zip(hashes, mask) if not m), default=2**64)


def test_of_few_rows_chance_takes_no_more_than_a_fifth():
    from gemma_tune.prepare.split import fewest_valid, most_valid

    random = np.random.default_rng(1)
    for rows in (2, 3, 5, 10, 17, 18, 30, 80, 200):
        for _ in range(50):
            hashes = random.integers(0, 2**64, rows, dtype=np.uint64)
            kept = int(choose_valid(hashes, 0.1, fewest_valid(rows), most_valid(rows)).sum())
            assert max(1, fewest_valid(rows)) <= kept <= (1 if rows < 18 else max(fewest_valid(rows), rows / 5 + 1))


@pytest.mark.parametrize(("rows", "expected"), [(12, 0), (17, 0), (18, 3), (29, 4), (30, 5), (99, 5), (10**6, 5)])
def test_the_fewest_validation_rows_where_nobody_chose(rows, expected):
    from gemma_tune.prepare.split import fewest_valid

    assert fewest_valid(rows) == expected


def test_a_prompt_with_many_rows_is_not_kept_aside_whole():
    """Which has the lowest hash by chance; another one of those that there are is."""
    hashes = np.array([1] * 20 + [7] * 3 + [2**63 + n for n in range(7)], np.uint64)
    chosen = choose_valid(hashes, 0.1, 5, 6)
    assert not chosen[:20].any() and 1 <= chosen.sum() <= 6
    assert choose_valid(hashes, 0.1)[:20].all(), "of a share that was chosen it is"
    alone = choose_valid(np.array([1] * 20 + [9] * 10, np.uint64), 0.1, 5, 6)
    assert (~alone[:20]).all() and alone[20:].all(), "the smaller one where all are larger"
