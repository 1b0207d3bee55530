"""What a training is going to do, line by line."""

from __future__ import annotations

import pytest

from gemma_tune.config.stages import TrainConfig
from gemma_tune.train.batch_size import proposed
from gemma_tune.train.memory import BatchChoice, Memory
from gemma_tune.train.overview import _batch, _rounded
from gemma_tune.train.plan import described_steps, surprises


@pytest.mark.parametrize(("number", "text"), [
    (999, "999"), (999_499, "999,499"), (999_500, "1 million"), (268_098_176, "268 million"),
    (999_885_952, "1 billion"), (4_300_079_472, "4.3 billion")])
def test_parameters_have_three_figures(number, text):
    """999,885,952 are those of Gemma 3 1B."""
    assert _rounded(number) == text


@pytest.mark.parametrize(("method", "rows"), [("sft", "sequences"), ("dpo", "pairs"), ("orpo", "pairs"), ("kto", "answers")])
def test_rows_are_called_what_they_are(method, rows):
    config = TrainConfig(method=method, batch_size=8)
    choice = BatchChoice(4, False, Memory(1, 2, 3, 4, 5, 6, 7), 100, True, "they fit")
    assert _batch(config, choice, False) == f"8 {rows} a step; 4 at once (they fit)"
    assert described_steps(5, config).startswith(f"5 {rows} x ")
    assert surprises(5, 20, config) == [f"a batch of 8 is more than there is: each step sees all 5 {rows}"]
    assert f"as 5 {rows} then make" in proposed(5, config, "cpu")[1]
