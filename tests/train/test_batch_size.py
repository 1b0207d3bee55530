"""``--batch-size auto``: enough steps, no more rows than help, and the same number when a training goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemma_tune.config.stages import TrainConfig
from gemma_tune.train.batch_size import LEAST_STEPS, MOST, proposed
from gemma_tune.train.plan import total_steps
from support.command import rows, write_rows
from support.training import stop_at

FLAGS = ("--rank", 4, "--dtype", "fp32", "--batch-size", "auto")
RUN = Path("runs/tiny-gemma")


@pytest.mark.parametrize(("number", "config", "device", "size"), [
    (100_000, {}, "cuda", 32), (100_000, {}, "cpu", 8), (1000, {"epochs": 1.0}, "cuda", 8), (1000, {"epochs": 4.0}, "cuda", 32),
    (1000, {"epochs": 4.0, "accumulation": 4}, "cuda", 8), (30, {"epochs": 1.0}, "cuda", 1), (100_000, {"max_steps": 3}, "cpu", 8)])
def test_the_largest_that_leaves_enough_steps(number, config, device, size):
    settings = TrainConfig(batch_size="auto", **config)
    found, why = proposed(number, settings, device)
    assert found == size and f"batch size {size}: proposed" in why
    for other in (found, 2 * found):
        steps = total_steps(number, TrainConfig(batch_size=other, **config | {"max_steps": 0}))
        assert other > MOST[device] or (steps >= LEAST_STEPS) == (other == found) or found == 1


@pytest.fixture
def prepared(cli, tiny, tmp_path) -> Path:
    assert cli("prepare", write_rows(tmp_path / "rows.jsonl", rows(40)), "--model", tiny).code == 0
    return RUN


def test_it_is_said_recorded_and_up_to_date(cli, prepared):
    plan = cli("train", *FLAGS, "--epochs", 6, "--dry-run", "--json")
    assert plan.code == 0 and plan.json["effective_batch"] == 2, plan.out
    done = cli("train", *FLAGS, "--epochs", 6, "--max-steps", 3, "--json")
    assert done.code == 0, done.err
    assert done.json["summary"]["batch_size"] == done.json["summary"]["effective_batch"] == 2
    assert "batch size 2: proposed, as 35 sequences then make 108 steps" in done.err
    assert cli("train", *FLAGS, "--epochs", 6, "--max-steps", 3, "--json").json["status"] == "up-to-date"
    number = cli("train", *FLAGS[:-1], 2, "--epochs", 6, "--max-steps", 3, "--json")
    assert number.code == 0 and number.json["status"] == "up-to-date", number.err


def test_a_training_goes_on_with_the_number_that_it_began_with(cli, prepared, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert cli("train", *FLAGS, "--epochs", 6).code == 130
        monkeypatch.setattr("gemma_tune.train.batch_size.LEAST_STEPS", 1)  # it would now propose another
    resumed = cli("train", *FLAGS, "--epochs", 6, "--max-steps", 0, "--json")
    assert resumed.code == 0, resumed.err
    assert resumed.json["summary"]["resumed_from_step"] == 2 and resumed.json["summary"]["batch_size"] == 2


def test_in_a_file_of_settings_and_with_pieces(cli, prepared, tmp_path):
    (tmp_path / "settings.yaml").write_text("train:\n  batch_size: auto\n  micro_batch: 1\n  max_steps: 2\n  rank: 4\n")
    done = cli("train", "--config", tmp_path / "settings.yaml", "--json")
    assert done.code == 0 and done.json["summary"]["micro_batch"] == 1, done.err
    recorded = json.loads((RUN / "manifest.json").read_text())["stages"]["train"]["config"]["batch_size"]
    assert recorded == {"value": "auto", "from": "file"}


@pytest.mark.parametrize(("value", "says"), [
    ("many", "expected a whole number or auto, found 'many'"), ("0", "below the least possible 1"), ("1.5", "expected a whole number or auto"),
    ("-2", "below the least possible 1"), ("", "is empty")])
def test_what_is_no_number_is_refused(cli, prepared, value, says):
    result = cli("train", f"--batch-size={value}")
    assert result.code == 2 and says in result.err, result.err
