"""Losses of both models, put together from sequences."""

from __future__ import annotations

import numpy as np
import pytest

from gemma_tune.evaluate.compare import _loss_pair, worse_at_the_rows
from gemma_tune.evaluate.markdown import _quoted
from gemma_tune.measure.likelihood import Wanted


def test_sequences_of_one_row_count_as_one():
    sequences = [Wanted(np.zeros((1, n + 1), np.int64), np.arange(n), np.zeros(n, np.int64)) for n in (1, 3, 4)]
    base, tuned = np.array([2.0, 6, 8]), np.array([1.0, 1, 4])
    loss = _loss_pair("", base, tuned, sequences, np.array([4, 4, 7]), 0)["loss"]
    assert (loss["rows"], loss["tokens"]) == (2, 8)
    assert (loss["base"][0], loss["tuned"][0]) == pytest.approx((2, 0.75))
    alone = _loss_pair("", base, tuned, sequences, np.array([4, 4, 4]), 0)["loss"]
    assert alone["rows"] == 1 and alone["base"] == [2, None, None], "of one row there is no interval"


def test_better_answers_that_became_less_likely_while_they_are_preferred_are_not_called_not_learned():
    """As DPO and KTO let happen: what helps is another thing than where nothing was learned."""
    loss = {"base": [5.269, 5, 6], "tuned": [5.375, 5, 6], "difference": [0.106, 0.082, 0.137]}
    learned, lost = {"difference": [11.0, 10.2, 11.7]}, {"difference": [-0.5, -1.0, 0.3]}
    assert "prefers the better answers by more" in worse_at_the_rows({"loss": loss, "margin": learned})
    assert "a larger --beta" in worse_at_the_rows({"loss": loss, "margin": learned})
    for measures in ({"loss": loss}, {"loss": loss, "margin": lost}):
        assert worse_at_the_rows(measures).endswith("it has not learned what they hold, or was trained on something else")
    assert worse_at_the_rows({"loss": loss | {"difference": [0.1, -0.1, 0.3]}, "margin": learned}) is None


@pytest.mark.parametrize("code", ["```\n<b>\n```", "~~~\n```\n<b>\n~~~", "```\n```python\n<b>\n```", "````\n```\n<b>\n````"])
def test_html_shows_as_it_is_behind_code_whatever_fences_are_in_that(code):
    lines = _quoted(f"{code}\n<img src=x>")
    assert lines[-1] == "> &lt;img src=x>" and "> <b>" in lines


def test_html_shows_as_it_is_behind_code_within_a_line():
    assert _quoted("```a = 1```\n<img src=x>") == ["> ```a = 1```", "> &lt;img src=x>"]
