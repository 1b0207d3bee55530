"""Which options of a command are settings of which stage."""

from __future__ import annotations

from gemma_tune.cli.request import Request


def test_data_and_pictures_of_run_are_those_of_prepare_alone():
    of_run = Request({"data": None, "columns": None, "pictures": "photos", "questions": 3}, {}, ())
    assert of_run.given("eval") == {"questions": 3}
    assert of_run.given("prepare") == {"data": None, "columns": None, "pictures": "photos"}
    of_eval = Request({"data": "held-out.jsonl", "pictures": "photos", "questions": 3}, {}, ())
    assert of_eval.given("eval") == of_eval.options
