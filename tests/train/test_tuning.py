"""What ``tune`` keeps of its trials, and what follows from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemma_tune.train.halving import Candidate
from gemma_tune.train.tuning import Begun, Trial, Tuning, read_tuning

LOW, MIDDLE, HIGH = (Candidate(rate, 8) for rate in (1e-4, 1.0000000000000002e-3, 0.1))
FILE = Path("tune.json")


def trial(candidate: Candidate, steps: int, loss: float | None, reason: str = "") -> Trial:
    return Trial(candidate.learning_rate, candidate.rank, steps, loss, 1.5, reason)


@pytest.fixture
def tuning() -> Tuning:
    found = Tuning("key", 10.0, [MIDDLE, LOW, HIGH], 4.0, [Begun(5, [MIDDLE, LOW, HIGH]), Begun(10, [LOW, MIDDLE])], setup=3.0)
    for one in (trial(MIDDLE, 5, 3.0), trial(LOW, 5, 2.5), trial(HIGH, 5, None, "the loss is nan"), trial(LOW, 10, 2.4)):
        found.add(one)
    return found


def test_what_is_saved_is_read(tuning):
    tuning.save(FILE)
    assert read_tuning(FILE) == tuning and tuning.spent == 6.0
    assert read_tuning(Path("none.json")) is None


@pytest.mark.parametrize("damage", [
    lambda text: text[:-30], lambda text: "[]", lambda text: "", lambda text: text.replace('"schema": 1', '"schema": 2'),
    lambda text: text.replace('"trials"', '"trails"'), lambda text: text.replace("2.5,", '"low",'),
    lambda text: text.replace("0.0001", "null"), lambda text: json.dumps(json.loads(text) | {"rungs": [5]})])
def test_what_cannot_be_read_is_nothing(tuning, damage):
    tuning.save(FILE)
    changed = damage(FILE.read_text())
    assert changed != FILE.read_text()
    FILE.write_text(changed)
    assert read_tuning(FILE) is None


def best(tuning: Tuning) -> tuple[int, Candidate] | None:
    return (tuning.decided[0].steps, tuning.decided[1][0].candidate) if tuning.decided else None


def test_the_last_whole_rung_decides(tuning):
    assert best(tuning) == (5, LOW), "the second one has a candidate without a trial"
    tuning.add(trial(MIDDLE, 10, 2.2))
    assert best(tuning) == (10, MIDDLE)


def test_what_diverged_in_a_longer_rung_is_out(tuning):
    tuning.add(trial(MIDDLE, 10, 4.5))
    assert best(tuning) == (10, LOW)
    tuning.trials[-2] = trial(LOW, 10, None, "the loss is inf")
    assert best(tuning) is None
    tuning.trials[-1] = trial(MIDDLE, 10, 3.9)
    assert best(tuning) == (10, MIDDLE)


def test_of_the_first_rung_two_do_and_one_does_not(tuning):
    tuning.rungs.pop()
    del tuning.trials[2:]
    assert best(tuning) == (5, LOW)
    tuning.trials.pop()
    assert best(tuning) is None


def test_of_equals_the_one_nearest_to_the_defaults_wins(tuning):
    tuning.trials[1] = trial(LOW, 5, 3.0)
    tuning.rungs.pop()
    assert best(tuning) == (5, MIDDLE)
