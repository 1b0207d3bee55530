"""Figures of the comparison as people read them, and what their intervals allow to say."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from gemma_tune.evaluate.markdown import report
from gemma_tune.evaluate.stage import _tell
from gemma_tune.report.tables import known_measures, measure_rows, short_rows, task_rows, verdict


def measure(difference, rows=5):
    return {"base": [1.0, 0.5, 1.5], "tuned": [2.0, 1.5, 2.5], "difference": difference, "rows": rows}


@pytest.mark.parametrize(("name", "difference", "said"), [
    ("loss", [-1.0, -1.5, -0.5], "better"), ("loss", [1.0, 0.5, 1.5], "worse"), ("chrf", [1.0, 0.5, 1.5], "better"),
    ("repeats", [0.5, 0.2, 0.8], "worse"), ("loss", [-1.0, -2.0, 0.1], "no clear difference"),
    ("length", [-9.0, -12.0, -5.0], "shorter"), ("length", [9.0, 5.0, 12.0], "longer"), ("chrf", [1.0, None, None], ""),
    ("ended", [0.0, 0.0, 0.0], "no clear difference")])
def test_a_verdict_needs_an_interval_without_zero(name, difference, said):
    assert verdict(name, measure(difference)) == said


def test_a_reward_with_a_weight_below_zero_is_better_lower():
    rose = measure([0.5, 0.25, 0.75])
    found = {"rewards/regex": rose | {"weight": -1.0}, "chrf": rose, "reward": rose, "rewards/json": rose | {"weight": 2.0}}
    assert [(row[0], row[-1]) for row in measure_rows({"measures": found})] == [
        ("reward of an answer", "better"), ("the reward regex alone", "worse"), ("the reward json alone", "better"),
        ("chrF against the row's own answer", "better")]


def test_rows_are_texts_with_intervals():
    summary = {"measures": {"ended": measure([0.5, 0.25, 0.75]), "loss": measure([-1.0, -1.25, -0.75], 1234)}}
    assert short_rows(summary) == [
        ("loss per learned token, nats", "1.000", "2.000", "-1.000 [-1.250, -0.750]", "better"),
        ("answers that end by themselves", "100 %", "200 %", "+50 % [+25 %, +75 %]", "better")]
    assert measure_rows(summary) == [
        ("loss per learned token, nats", "1,234", "1.000 [0.500, 1.500]", "2.000 [1.500, 2.500]",
         "-1.000 [-1.250, -0.750]", "better"),
        ("answers that end by themselves", "5", "100 % [50 %, 150 %]", "200 % [150 %, 250 %]", "+50 % [+25 %, +75 %]",
         "better")]


@pytest.mark.parametrize("damaged", [None, [], {"loss": None}, {"loss": {"rows": 3}}, {"loss": measure(["x", 1, 2])},
                                     {"loss": measure([1.0])}, {"loss": measure([1.0, 2.0, 3.0]) | {"rows": "many"}}])
def test_what_a_manifest_of_another_version_says_is_not_trusted(damaged):
    assert known_measures({"measures": damaged}) == {} and measure_rows({"measures": damaged}) == []


@pytest.mark.parametrize(("rows", "answers", "rough"), [(200, 10, 10), (200, 20, None), (12, 10, 10), (12, 30, 12)])
def test_intervals_of_few_rows_are_called_rough_whichever_figure_has_them(rows, answers, rough):
    """200 rows are measured by default, and 10 of them answered."""
    summary = {"rows": rows, "rows_there": 400, "measures": {"loss": measure([-1.0, -1.25, -0.75], rows),
                                                             "ended": measure([0.5, 0.25, 0.75], answers)}}
    said: list[str] = []
    session = SimpleNamespace(listener=SimpleNamespace(note=said.append, grid=lambda *_: None),
                              config=SimpleNamespace(data_file=None, max_new_tokens=9), model=SimpleNamespace(name="m"))
    _tell(session, summary)
    assert [text.split(" are")[0] for text in said] == ([f"figures of {rough} rows"] if rough else [])
    written = report(session, {**summary, "questions": 0, "answers": []})
    assert ("give rough intervals" in written) == (rough is not None)


def test_figures_of_tasks_have_their_standard_errors():
    found = task_rows({"tasks": {"arc": {"acc": {"base": [0.25, 0.02], "tuned": [0.5, None]}}}})
    assert found == [("arc", "acc", "0.25 ± 0.02", "0.5", "+0.250")]
    assert task_rows({}) == []
