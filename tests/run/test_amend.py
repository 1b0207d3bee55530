"""Figures that are found out after a result was recorded."""

from __future__ import annotations

import json

import pytest

from gemma_tune.run import amend as amending
from gemma_tune.run.amend import amend, result_id
from gemma_tune.run.manifest import read_manifest
from gemma_tune.run.session import open_session
from gemma_tune.run.stage import StageReport


@pytest.fixture
def added(trained):
    """``added(result, rank=3)`` amends the training of a run, with a text for people in the place of its data report."""
    session = open_session("prepare", trained)

    def add(result=None, text="new", **figures):
        record = read_manifest(trained)
        report = StageReport("prepare", "done", trained, record.stages["prepare"]["summary"], {}, 0.0)
        return amend(session, report, result or result_id(record, "prepare"), figures, {"data_report": text})

    return add


def test_figures_and_text_are_recorded_together(added, trained):
    before = read_manifest(trained).stages["prepare"]
    report = added(found=3)
    after = read_manifest(trained).stages["prepare"]
    assert report.summary["found"] == after["summary"]["found"] == 3
    assert after["summary"] == before["summary"] | {"found": 3} and after["ended"] == before["ended"]
    path = trained / after["outputs"]["data_report"]["path"]
    assert path.read_text() == "new" and after["outputs"]["data_report"]["bytes"] == 3
    assert {**after["outputs"], "data_report": 0} == {**before["outputs"], "data_report": 0}


def test_what_is_there_already_is_not_written_again(added, trained, monkeypatch):
    added(found=3)
    monkeypatch.setattr(amending, "put_results", lambda *_: pytest.fail("it was written"))
    assert added(found=3).summary["found"] == 3


def test_a_result_that_was_replaced_meanwhile_keeps_its_own_record(added, trained):
    before = (trained / "manifest.json").read_bytes()
    assert added(result=("another",), found=3).summary["found"] == 3
    assert (trained / "manifest.json").read_bytes() == before


def test_a_failure_leaves_record_and_text(added, trained, monkeypatch):
    before = {path: path.read_bytes() for path in (trained / "manifest.json", trained / "data" / "report.json")}
    monkeypatch.setattr(amending, "describe", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        added(found=3)
    assert {path: path.read_bytes() for path in before} == before
    assert not [*trained.rglob(".new-*")] and json.loads(before[trained / "manifest.json"])
