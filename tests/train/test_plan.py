"""``train --dry-run``: its arithmetic, that it writes nothing, and what it says of settings that do little."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_tune.config.stages import TrainConfig
from gemma_tune.models.placement import best_device, choose_placement
from gemma_tune.train.memory import BatchChoice, Memory
from gemma_tune.train.plan import EFFICIENCY, Sizes, make_plan, total_steps
from gemma_tune.train.shape import ModelShape
from support.command import QUICK, rows, write_rows
from support.prepared import same_examples
from support.training import stopped_at

SHAPE = ModelShape(parameters=10**6, linear=10**6, active=10**6, adapter=10**4, adapter_active=10**4, adapted=7, experts=0, head=10**5, hidden=64, widest=128,
                   layers=2, attention=64, item=4, kept=lambda rows, length: rows * length)

NONE = Sizes(np.zeros(0, int), np.zeros(0, int), 0)


def choice_of(micro_batch: int) -> BatchChoice:
    return BatchChoice(micro_batch, False, Memory(1, 2, 3, 4, 5, 6, 7), 100, True, "they fit")


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 3), (1.1, 3), (1.2, 4), (0.9, 3), (0.1, 1)])
def test_a_part_of_an_epoch_is_rounded_to_whole_steps(epochs, steps):
    assert total_steps(10, TrainConfig(epochs=epochs, batch_size=4)) == steps  # 3 in an epoch


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"")
            for p in sorted(folder.rglob("*"))}


@pytest.fixture
def prepared(cli, tiny, data):
    assert cli("prepare", data, "--model", tiny, "--valid", 2).code == 0
    return Path("runs/tiny-gemma")


def test_the_plan_is_that_of_the_training(cli, prepared):
    flags = ("--epochs", 3, "--batch-size", 4, "--warmup", 0.3, "--rank", 4, "--dtype", "fp32")
    planned = cli("train", *flags, "--dry-run", "--json")
    assert planned.code == 0, planned.err
    plan = planned.json
    assert (plan["stage"], plan["status"], plan["run"]) == ("train", "planned", "runs/tiny-gemma")
    assert (plan["device"], plan["dtype"], plan["method"], plan["learning_rate"]) == (best_device(), "fp32", "sft", 2e-4)
    sequences = json.loads((prepared / "data/report.json").read_text())["train_rows"]
    assert sequences == plan["sequences"] == 10
    # 10 rows in batches of 4: 4, 4 and 2
    assert (plan["steps_per_epoch"], plan["steps"], plan["exposures"]) == (3, 9, 3.0)
    assert plan["warmup_steps"] == 3  # 30 % of 9, rounded
    assert (plan["micro_batch"], plan["pieces"], plan["accumulation"], plan["effective_batch"]) == (4, 1, 1, 4)
    assert plan["fits"] is True and plan["memory"]["total"] == sum(v for k, v in plan["memory"].items() if k != "total")
    done = cli("train", *flags, "--json").json["summary"]
    assert (done["steps"], done["tokens"]) == (plan["steps"], 3 * plan["tokens_per_epoch"])
    log = [json.loads(line) for line in (prepared / "logs/metrics.jsonl").read_text().splitlines()]
    rates = [r["learning_rate"] for r in log if "loss" in r]
    assert rates.index(max(rates)) == plan["warmup_steps"] or rates[plan["warmup_steps"]] == pytest.approx(max(rates))


def test_nothing_is_written(cli, prepared):
    before, others = files(prepared), set(os.listdir())
    result = cli("train", "--dry-run")
    assert result.code == 0 and result.out == ""
    for text in ("steps", "warm-up", "batch", "memory", "time", "each sequence is seen 4 times"):
        assert text in result.err
    assert files(prepared) == before and set(os.listdir()) == others


def test_quiet_with_json_is_json_alone(cli, prepared):
    result = cli("train", "--dry-run", "--json", "--quiet")
    assert result.json["sequences"] == 10 and "warm-up" not in result.err


def test_what_does_not_fit_is_said_and_is_no_error(cli, prepared, monkeypatch):
    monkeypatch.setattr("gemma_tune.train.job.available", lambda device: 500_000_000)
    result = cli("train", "--dry-run", "--json")
    assert result.code == 0 and result.json["fits"] is False and result.json["available"] == 500_000_000
    assert "does not fit: about " in result.err


def test_processes_on_a_cpu_share_its_memory(cli, prepared, monkeypatch):
    monkeypatch.setattr("gemma_tune.train.job.available", lambda device: 900_000_000)
    monkeypatch.setattr("gemma_tune.models.placement.best_device", lambda: "cpu")
    assert cli("train", "--dry-run", "--json", "--num-processes", 3).json["available"] == 300_000_000


def test_an_interrupted_training_goes_on_as_it_was_worked_on_unless_it_is_to_start_anew(cli, prepared, monkeypatch):
    flags = ("--rank", 4, "--dtype", "fp32", "--batch-size", 4)
    stopped_at(2, monkeypatch, *flags, "--micro-batch", 2)
    waiting, anew = (cli("train", *flags, "--dry-run", "--json", *more).json for more in ((), ("--force",)))
    assert (waiting["steps_done"], waiting["micro_batch"], anew["steps_done"], anew["micro_batch"]) == (2, 2, 0, 4)
    assert any("with its settings it goes on" in note for note in waiting["notes"])
    [lost] = [note for note in anew["notes"] if "an interrupted training" in note]
    assert "--force starts anew: it is lost" in lost
    other = cli("train", *flags[:4], "--batch-size", 1, "--dry-run", "--json")
    assert other.code == 0 and other.json["micro_batch"] == 1, other.err
    assert cli("train", *flags).code == 0
    assert re.search("micro_batch: 2 +# chosen here: as before", Path("runs/tiny-gemma/train.yaml").read_text()), "nobody asked for 2 now"


def test_data_is_not_prepared_for_it(cli, prepared, data):
    before = files(prepared)
    result = cli("train", data, "--dry-run", "--run", prepared)
    assert result.code == 2 and f"gemma-tune prepare --run {prepared} {data}" in result.err
    assert files(prepared) == before


def test_without_prepared_data_the_hint_is_prepare(cli, trained):
    manifest = json.loads((trained / "manifest.json").read_text())
    del manifest["stages"]["prepare"]
    (trained / "manifest.json").write_text(json.dumps(manifest))
    result = cli("train", "--dry-run")
    assert result.code == 2 and "gemma-tune prepare" in result.err


def test_settings_that_cannot_be_used_are_refused(cli, prepared):
    result = cli("train", "--dry-run", "--target-modules", "q_prj")
    assert result.code == 2 and "did you mean q_proj?" in result.err


@pytest.mark.parametrize(("flags", "says"), [
    (["--epochs", 1], "only 3 steps"), (["--max-steps", 1], "only 1 step:"),
    (["--max-steps", 1], "a larger --max-steps gives more"), (["--learning-rate", 0], "with a learning rate of 0 nothing is learned"),
    (["--epochs", 1], "a warm-up of 5% of 3 steps is rounded to none"),
    (["--batch-size", 64], "each step sees all 10 sequences")])
def test_what_rounding_makes_of_settings_is_said(cli, prepared, flags, says):
    result = cli("train", "--dry-run", "--json", *flags)
    assert any(says in note for note in result.json["notes"]) and says in " ".join(result.err.split())


def test_no_note_without_a_reason(cli, prepared):
    assert cli("train", "--dry-run", "--json", "--epochs", 20).json["notes"] == []


def test_no_validation_is_said(cli, tiny, data):
    assert cli("prepare", data, "--model", tiny, "--valid", 0).code == 0
    assert any("no validation" in note for note in cli("train", "--dry-run", "--json").json["notes"])


def test_an_earlier_training_on_this_device_says_how_fast_it_is(cli, trained):
    speed = json.loads((trained / "manifest.json").read_text())["stages"]["train"]["summary"]["tokens_per_second"]
    plan = cli("train", "--dry-run", "--json", *QUICK).json
    assert f"{speed:,.0f} tokens/s in the last training" in plan["basis"]
    assert "matrix product" in cli("train", "--dry-run", "--json", "--dtype", "bf16").json["basis"]


@pytest.mark.parametrize("others", [("--micro-batch", 1), ("--activation-checkpointing",), ("--dora",), ("--target-modules", "q_proj"),
                                    ("--num-processes", 2)])
def test_an_earlier_training_with_another_speed_by_its_settings_says_nothing(cli, trained, others):
    assert "matrix product" in cli("train", "--dry-run", "--json", *QUICK, *others).json["basis"]
    for same in (("--rank", 8), ("--epochs", 2), ("--learning-rate", 1e-4)):
        assert "in the last training" in cli("train", "--dry-run", "--json", *QUICK, *same).json["basis"]


def test_seconds_follow_from_tokens_and_speed():
    config = TrainConfig(epochs=2.0, batch_size=2)
    plan = make_plan(SHAPE, config, choose_placement("fp32"), choice_of(2), Sizes(np.array([30, 10, 20, 40]), np.array([20, 5, 10, 15]), 40),
                     Sizes(np.array([50]), np.array([10]), 50), tokens_per_second=10.0)
    # 2 x 100 tokens, and 50 validation tokens before, after each epoch, at half the price
    assert plan.seconds == pytest.approx((200 + 3 * 50 / 2) / 10)
    assert plan.padding == pytest.approx((2 * 40 + 2 * 20) / 100 - 1)
    assert (plan.tokens_per_epoch, plan.trained_tokens_per_epoch, plan.longest) == (100, 50, 40)
    one_by_one = make_plan(SHAPE, config, choose_placement("fp32"), choice_of(1), Sizes(np.array([30, 10, 20, 40]), np.array([20, 5, 10, 15]), 40),
                           Sizes(np.array([50]), np.array([10]), 50), tokens_per_second=10.0)
    assert (one_by_one.padding, one_by_one.pieces) == (0.0, 2)


def test_measured_time_grows_with_the_work(monkeypatch):
    monkeypatch.setattr("gemma_tune.train.plan.product_speed", lambda *_: 1e9)
    train = Sizes(np.full(8, 100), np.full(8, 50), 100)

    def seconds(choice=None, **settings):
        return make_plan(SHAPE, TrainConfig(batch_size=4, **settings), choose_placement("fp32"), choice or choice_of(4),
                         train, NONE).seconds

    # Per token: 4 x active + 6 x adapter + 14 x length x layers x attention; 4 x head for each learned token
    work = 800 * (4 * 10**6 + 6 * 10**4 + 14 * 100 * 2 * 64) + 400 * 4 * 10**5
    assert seconds(epochs=1.0) == pytest.approx(work / (EFFICIENCY * 1e9))
    assert seconds(epochs=3.0) == pytest.approx(3 * work / (EFFICIENCY * 1e9))
    again = BatchChoice(4, True, Memory(1, 2, 3, 4, 5, 6, 7), 100, True, "")
    assert seconds(again, epochs=1.0) == pytest.approx((work + 800 * 2 * 10**6) / (EFFICIENCY * 1e9))


@same_examples(300)
@given(st.integers(1, 500), st.integers(1, 16), st.integers(1, 4), st.floats(0.1, 8), st.integers(0, 50))
def test_exposures_are_rows_really_seen(sequences, batch, accumulation, epochs, most):
    config = TrainConfig(batch_size=batch, accumulation=accumulation, epochs=epochs, max_steps=most)
    fives = Sizes(np.full(sequences, 5), np.ones(sequences, int), 5)
    plan = make_plan(SHAPE, config, choose_placement("fp32"), choice_of(1), fives, NONE, tokens_per_second=1.0)
    step = batch * accumulation
    seen = sum(min(step, sequences - (n % plan.steps_per_epoch) * step) for n in range(plan.steps))
    assert plan.exposures * sequences == pytest.approx(seen)
    assert plan.steps == total_steps(sequences, config) >= 1 and 0 <= plan.warmup_steps <= plan.steps


def test_learned_tokens_are_counted_without_reading_them(cli, tiny, tmp_path):
    from gemma_tune.encoding.tokens import open_tokens
    from gemma_tune.train.job import sizes_of

    data = write_rows(tmp_path / "many.jsonl", rows(40))
    assert cli("prepare", data, "--model", tiny).code == 0
    sequences = open_tokens(Path("runs/tiny-gemma/data/tokens/train.arrow"))
    sizes = sizes_of(sequences, TrainConfig())
    assert sizes.trained.tolist() == [int((row["labels"] != -100).sum()) for row in sequences]
    assert sizes.lengths.tolist() == [len(row["input_ids"]) for row in sequences]


@pytest.mark.parametrize(("config", "said"), [
    (TrainConfig(max_steps=14), "25 sequences x 4 epochs in batches of 4: 28 steps, of which --max-steps does 14"),
    (TrainConfig(epochs=1.0), "25 sequences x 1 epoch in batches of 4: 7 steps"),
    (TrainConfig(epochs=1.0, max_steps=98),
     "25 sequences x 1 epoch in batches of 4: 7 steps; --max-steps makes them 98, 14 epochs")])
def test_what_ends_a_training_is_said(config, said):
    from gemma_tune.train.plan import described_steps

    assert described_steps(25, config) == said
