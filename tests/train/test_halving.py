"""Which candidates there are, and how many of them for how long there is time for."""

from __future__ import annotations

import itertools

import pytest

from gemma_tune.config.stages import TrainConfig, TuneConfig
from gemma_tune.train.halving import (
    LEAST_STEPS,
    Candidate,
    Costs,
    Rung,
    candidates_for,
    least_seconds,
    plan,
    plan_rungs,
)

OWN = TrainConfig(learning_rate=2e-4, rank=16)
COSTS = Costs(step=1.0, evaluation=2.0, every=1000)


def test_the_defaults_are_around_the_trainings_own_rate():
    found = candidates_for(OWN, TuneConfig())
    assert found[0] == Candidate(2e-4, 16)
    assert [c.learning_rate for c in found] == [2e-4, 1e-4, 4e-4, 5e-5, 8e-4]


def test_named_ones_are_tried_with_each_other_and_once():
    found = candidates_for(OWN, TuneConfig(learning_rates=(1e-3, 1e-4, 1e-3), ranks=(8, 64)))
    assert set(found) == {Candidate(rate, rank) for rate in (1e-3, 1e-4) for rank in (8, 64)} and len(found) == 4
    assert found[0] == Candidate(1e-4, 8), "half of each is nearer than anything else"


def test_no_rate_is_above_the_largest_possible():
    assert {c.learning_rate for c in candidates_for(TrainConfig(learning_rate=0.6), TuneConfig())} == {0.15, 0.3, 0.6, 1.0}


@pytest.mark.parametrize(("seconds", "expected"), [
    (1e9, [Rung(5, 500)]),  # the whole training for each
    (1000, [Rung(5, 51), Rung(3, 102), Rung(2, 204)]),
    (211, [Rung(5, 10), Rung(3, 20), Rung(2, 40)]),
    (209, [Rung(5, 17), Rung(3, 34)]),
    (61, [Rung(5, 10)]), (59, [])])
def test_rungs_are_as_long_as_there_is_time(seconds, expected):
    assert plan_rungs(5, seconds, COSTS, least=10, most=500) == expected


def test_no_plan_takes_longer_than_there_is_time_and_more_time_is_not_wasted():
    for count, seconds, most in itertools.product((2, 3, 7), (50, 200, 1000, 5000), (5, 30, 400)):
        rungs = plan_rungs(count, seconds, COSTS, least=min(LEAST_STEPS, most), most=most)
        if not rungs:
            continue
        assert COSTS.rungs(rungs) <= seconds
        assert [r.candidates for r in rungs] == sorted((r.candidates for r in rungs), reverse=True)
        assert all(r.steps <= most for r in rungs)
        longer = [Rung(r.candidates, r.steps + 2 ** n) for n, r in enumerate(rungs)]
        assert rungs[-1].steps == most or COSTS.rungs(longer) > seconds


def test_candidates_far_away_are_left_out_where_time_is_short():
    candidates = candidates_for(OWN, TuneConfig())
    assert plan(candidates, 100, COSTS, 500)[0] == 5
    count, rungs = plan(candidates, 40, COSTS, 500)
    assert (count, rungs) == (3, [Rung(3, 11)])
    assert plan(candidates, 23.9, COSTS, 500) == (0, [])
    assert least_seconds(COSTS, 500) == 24 and plan(candidates, 24, COSTS, 500) == (2, [Rung(2, 10)])
    assert plan(candidates, 11, COSTS, 3) == (2, [Rung(2, 3)]), "no longer than the training itself"


def test_evaluations_and_other_ranks_take_their_time():
    costs = Costs(step=1.0, evaluation=5.0, every=10, change=100.0)
    assert costs.trial(25) == 25 + 3 * 5
    assert costs.rungs([Rung(4, 10), Rung(2, 20)]) == 4 * 15 + 2 * 30
    assert costs.rungs([Rung(4, 10), Rung(2, 20)], ranks=2) == 4 * 15 + 2 * 30 + 4 * 100
