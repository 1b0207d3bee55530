"""What a training is going to do, line by line."""

from __future__ import annotations

import pytest

from gemma_tune.train.overview import _rounded


@pytest.mark.parametrize(("number", "text"), [
    (999, "999"), (999_499, "999,499"), (999_500, "1 million"), (268_098_176, "268 million"),
    (999_885_952, "1 billion"), (4_300_079_472, "4.3 billion")])
def test_parameters_have_three_figures(number, text):
    """999,885,952 are those of Gemma 3 1B."""
    assert _rounded(number) == text
