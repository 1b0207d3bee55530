"""Charts say what they leave out."""

from __future__ import annotations

import pytest

from gemma_tune.report.charts import loss_chart

CURVE = [(step, 3.0 - step / 50) for step in range(100)]


def test_a_loss_far_above_the_others_is_named():
    drawn = str(loss_chart([(0, 51.25), *CURVE[1:]], [], None))
    assert "drawn at the edge, up to 51.25" in drawn
    assert "edge" not in str(loss_chart(CURVE, [(0, 3.1)], None))


@pytest.mark.parametrize("evals", [[], [(3, 0.6)]])
def test_the_step_that_stays_is_drawn_as_the_key_below_says(evals):
    chart = loss_chart([(1, 2.0), (2, 1.0), (3, 0.5)], evals, 2)
    assert chart.count('class="kept"') == 1 and 'class="kept"' not in loss_chart([(1, 2.0), (2, 1.0)], evals, None)
