"""``--continue``: a finished training goes on as if it had been longer from the beginning, or says what it does instead."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gemma_tune.config.stages import TrainConfig
from gemma_tune.train.plan import rate_at
from support.command import copied_run, rows, write_rows
from support.training import adapter_bytes, stopped_at

RUN = Path("runs/tiny-gemma")
RATE = ("--rank", 4, "--dtype", "fp32", "--learning-rate", 2e-3)
STEADY = (*RATE, "--schedule", "constant", "--warmup", 0, "--dropout", 0.1)


def metrics(run: Path = RUN) -> list[dict]:
    return [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]


def summary_of(run: Path = RUN) -> dict:
    return json.loads((run / "manifest.json").read_text())["stages"]["train"]["summary"]


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Of the losses: it takes a good part of so small a training."""
    monkeypatch.setattr("gemma_tune.train.stage.plot", lambda *_: None)


@pytest.fixture(scope="module")
def steady_once(tiny, tmp_path_factory) -> tuple[Path, bytes]:
    """A run of one epoch, to be copied; and the adapter of two epochs from the beginning."""
    from support.command import invoke

    place = tmp_path_factory.mktemp("steady")
    data = write_rows(place / "rows.jsonl", rows())
    run, whole = (place / name / "tiny-gemma" for name in ("runs", "whole"))
    assert invoke("prepare", data, "--model", tiny, "--run", run).code == 0
    shutil.copytree(run, whole)
    for folder, epochs in ((run, 1), (whole, 2)):
        result = invoke("train", *STEADY, "--epochs", epochs, "--run", folder)
        assert result.code == 0, result.err
    return run, adapter_bytes(whole)


@pytest.fixture
def steady(steady_once, tmp_path, tiny) -> Path:
    return copied_run(steady_once[0], tmp_path, tiny).relative_to(tmp_path)


def test_data_that_it_did_not_learn_take_no_place_of_those_that_it_did(cli, steady, tmp_path):
    def contents() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in (steady / "data").rglob("*") if path.is_file()}

    before, manifest = contents(), (steady / "manifest.json").read_bytes()
    result = cli("train", write_rows(tmp_path / "others.jsonl", rows(20)), "--continue", "--epochs", 2, "--run", steady)
    assert result.code == 2 and "--continue goes on with the rows that the finished training learned, and these are others" in result.err
    assert contents() == before and (steady / "manifest.json").read_bytes() == manifest
    assert cli("train", write_rows(tmp_path / "the_same.jsonl", rows()), "--continue", "--epochs", 2, "--run", steady).code == 0


def test_one_and_one_epoch_are_two_bit_for_bit(cli, steady, steady_once):
    result = cli("train", "--continue", "--epochs", 2, "--json")
    assert result.code == 0, result.err
    assert ("going on from checkpoint-3 of the finished training to step 6, on the constant schedule of all 6 steps; the "
            "learning rate was 0.002 in its last step, and is 0.002 in the next one") in result.err
    summary = result.json["summary"]
    assert (summary["steps"], summary["resumed_from_step"], len(summary["earlier_trainings"])) == (6, 3, 1)
    assert adapter_bytes(steady) == steady_once[1]
    assert "# Every setting of this training" in (about := (steady / "train.yaml").read_text()) and "It went on from a finished one" in about
    assert [r["step"] for r in metrics() if "loss" in r] == [1, 2, 3, 4, 5, 6]
    again = cli("train", "--continue", "--json")
    assert again.json["status"] == "up-to-date" and "more --epochs or --max-steps" in again.err
    assert cli("train", "--epochs", 2, "--json").json["status"] == "up-to-date"
    third = cli("train", "--continue", "--epochs", 0, "--max-steps", 7, "--json")
    assert third.code == 2
    third = cli("train", "--continue", "--epochs", 3, "--max-steps", 7, "--json")
    fourth = cli("train", "--continue", "--max-steps", 5)
    assert fourth.code == 2 and "with --continue give a larger --max-steps" in fourth.err
    planned = cli("train", "--continue", "--epochs", 9, "--dry-run", "--json")
    assert planned.json["steps"] == 27, "epochs take the place of steps that were asked for before"
    assert third.code == 0 and third.json["summary"]["steps"] == 7 and len(third.json["summary"]["earlier_trainings"]) == 2, third.err


def test_the_plan_tells_the_time_of_the_steps_that_are_left(cli, steady, monkeypatch):
    anew = cli("train", *STEADY, "--epochs", 3, "--dry-run", "--json").json
    planned = cli("train", "--continue", "--epochs", 3, "--dry-run", "--json")
    assert (anew["steps"], anew["steps_done"], planned.json["steps"], planned.json["steps_done"]) == (9, 0, 9, 3)
    assert planned.json["seconds"] == pytest.approx(anew["seconds"] * 6 / 9)
    assert "for the 6 steps to go" in " ".join(planned.err.split())
    stopped_at(5, monkeypatch, "--continue", "--epochs", 3)
    waiting = cli("train", "--continue", "--epochs", 3, "--dry-run", "--json")
    assert waiting.json["steps_done"] == 5, waiting.err


def test_a_continuation_that_is_stopped_again_and_again_ends_as_without(cli, steady, steady_once, monkeypatch):
    """Killed before it saved anything; its checkpoint damaged; interrupted, after which `train` alone goes on."""
    from gemma_tune.train.trainer import GemmaTrainer

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(GemmaTrainer, "_save_checkpoint", killed)
        assert cli("train", "--continue", "--epochs", 2).code == 130
    checkpoints = steady / "training_checkpoints"
    assert (checkpoints / "checkpoint-3").is_dir() and cli("status", "--json").json["stages"]["train"]["state"] == "done"
    stopped_at(4, monkeypatch, "--continue", "--epochs", 2)
    (checkpoints / "checkpoint-4" / "optimizer.pt").write_bytes(b"")
    again = stopped_at(5, monkeypatch)
    assert "optimizer.pt was changed): the training goes on from the end of the finished one" in again.err
    assert "going on from checkpoint-3 of the finished training" in again.err
    assert cli("status", "--json").json["stages"]["train"]["state"] == "interrupted: checkpoint-5 is saved"
    result = cli("train", "--json")
    assert result.code == 0 and result.json["summary"]["resumed_from_step"] == 5, result.err
    last = [r for r in metrics() if "tokens" in r][-1]
    speed = last["tokens"] / last["training_seconds"]
    assert result.json["summary"]["tokens_per_second"] == pytest.approx(speed, rel=0.01), "of all parts, as the tokens are"
    assert len(result.json["summary"]["earlier_trainings"]) == 1 and adapter_bytes(steady) == steady_once[1]


def test_a_rate_that_had_fallen_rises_and_both_are_said(cli, steady):
    assert cli("train", *RATE, "--epochs", 2, "--schedule", "cosine", "--warmup", 0).code == 0
    result = cli("train", "--continue", "--epochs", 3, "--learning-rate", 1e-3, "--schedule", "linear",
                 "--eval-steps", 1, "--save-steps", 2, "--keep-checkpoints", 9)
    assert result.code == 0, result.err
    assert "do not match" not in result.err
    assert [r["step"] for r in metrics() if "eval_loss" in r] == [0, 3, 6, 7, 8, 9]
    assert {p.name for p in (steady / "training_checkpoints").glob("checkpoint-*")} == {
        f"checkpoint-{step}" for step in (3, 6, 8, 9)}
    old, new = TrainConfig(schedule="cosine", warmup=0.0), TrainConfig(schedule="linear", warmup=0.0)
    was, now, last = 2e-3 * rate_at(5, 6, old), 1e-3 * rate_at(6, 9, new), 1e-3 * rate_at(8, 9, new)
    assert (f"the learning rate was {was:.3g} in its last step, and is {now:.3g} in the next one and {last:.3g} in the "
            "last one") in result.err
    rates = [r["learning_rate"] for r in metrics() if "loss" in r]
    assert rates[5] == pytest.approx(was) and rates[6:] == pytest.approx(
        [1e-3 * rate_at(step, 9, new) for step in (6, 7, 8)])


def test_what_differs_is_told_together_and_nothing_is_lost(cli, steady):
    before = adapter_bytes(steady)
    refused = cli("train", "--continue", "--rank", 8, "--seed", 7, "--epochs", 1, "--json")
    assert refused.code == 2
    assert refused.json["error"]["problems"] == [
        "rank: 4 then, 8 now", "seed: 42 then, 7 now", "epochs: 1 are 3 steps, and the finished training had 3"]
    assert cli("train", "--continue", "--force").code == 2
    assert adapter_bytes(steady) == before and (steady / "training_checkpoints" / "checkpoint-3").is_dir()
    data = write_rows(Path("more.jsonl"), rows(13))
    assert cli("prepare", data, "--run", steady).code == 0
    stale = cli("train", "--continue", "--epochs", 2)
    assert stale.code == 2 and "goes on with the same data and base model, but `prepare` has run again" in stale.err
    assert f"--from-adapter {steady}/tiny-gemma_lora_adapter" in " ".join(stale.err.split()) and adapter_bytes(steady) == before


def test_where_nothing_was_trained(cli, tiny, data):
    assert cli("prepare", data, "--model", tiny).code == 0
    result = cli("train", "--continue", "--epochs", 2)
    assert result.code == 2 and "runs/tiny-gemma has no finished training that could go on" in result.err


def test_without_it_the_message_says_that_it_exists(cli, steady):
    """And the command that it shows is one that works."""
    manifest = json.loads((steady / "manifest.json").read_text())
    manifest["stages"]["train"]["summary"]["training_seconds"] = 3600
    (steady / "manifest.json").write_text(json.dumps(manifest))
    refused = cli("train", "--epochs", 2, "--json")
    assert refused.code == 2
    shown = re.search(r"go on from it: (gemma-tune train .*?); or add --force", refused.json["error"]["hint"])[1]
    assert shown == "gemma-tune train --run runs/tiny-gemma --continue --epochs 2"
    assert f"to go on from the end of the finished training instead: {shown}" in refused.err
    assert "instead:" not in cli("train", "--rank", 8, "--epochs", 2).err
    planned = cli(*shlex.split(shown)[1:], "--dry-run")
    assert planned.code == 0 and "3 of these 6 steps are done: going on from checkpoint-3" in planned.err
    assert cli(*shlex.split(shown)[1:]).code == 0 and summary_of()["steps"] == 6


def test_where_the_checkpoint_is_gone_the_adapter_goes_on(cli, steady, monkeypatch):
    """Said aloud, with a fresh optimiser; interrupted it goes on by itself, and again after that."""
    before = load_file(steady / "tiny-gemma_lora_adapter" / "adapter_model.safetensors")
    shutil.rmtree(steady / "training_checkpoints")
    manifest = json.loads((steady / "manifest.json").read_text())
    manifest["stages"]["train"]["summary"] |= {"training_seconds": 100.0, "micro_batch": 2}
    (steady / "manifest.json").write_text(json.dumps(manifest))
    first, loss = summary_of(), summary_of()["eval_loss_after"]
    planned = cli("train", "--continue", "--epochs", 2, "--dry-run", "--json")
    assert planned.json["micro_batch"] == 2, "as many as before, though more fit"
    stopped = stopped_at(2, monkeypatch, "--continue", "--epochs", 2)
    assert ("no checkpoint of the finished training is left: going on from its adapter with a fresh optimiser, for the 3 "
            "steps missing of 6") in stopped.err
    assert metrics()[0]["step"] == 0 and metrics()[0]["eval_loss"] == pytest.approx(loss, rel=1e-6)
    result = cli("train", "--json")
    assert result.code == 0, result.err
    summary = result.json["summary"]
    assert (summary["resumed_from_step"], summary["steps"], summary["steps_before"]) == (5, 6, 3)
    # As where there is a checkpoint: figures of all steps, and the loss before the first of them.
    for name in ("eval_loss_before", "train_loss_first"):
        assert summary[name] == first[name]
    assert summary["tokens"] == 2 * first["tokens"] and 100 <= summary["training_seconds"] < 110
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / summary["training_seconds"], abs=0.1)
    assert "the weights are those of step 6 of 6" in " ".join(cli("status").err.split())
    assert cli("status", "--json").json["best"] == {"step": 6, "eval_loss": summary["eval_loss_after"]}
    after = load_file(steady / "tiny-gemma_lora_adapter" / "adapter_model.safetensors")
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    more = cli("train", "--continue", "--epochs", 3, "--json")
    assert more.code == 0, more.err
    last = more.json["summary"]
    assert (last["resumed_from_step"], last["steps"], last["steps_before"]) == (6, 9, 6)
    assert last["tokens"] == 3 * first["tokens"] and last["eval_loss_before"] == first["eval_loss_before"]
    assert "going on from checkpoint-3 of the finished training" in more.err
    shutil.rmtree(steady / "training_checkpoints")
    manifest = json.loads((steady / "manifest.json").read_text())
    manifest["stages"]["train"]["summary"]["micro_batch"] = None
    (steady / "manifest.json").write_text(json.dumps(manifest))
    planned = cli("train", "--continue", "--epochs", 4, "--dry-run")
    assert planned.code == 0 and "9 of these 12 steps are done" in planned.err and ", that of step" not in planned.err


def test_an_adapter_that_the_training_began_with_is_not_what_goes_on(cli, steady):
    shutil.copytree(steady / "tiny-gemma_lora_adapter", "given")
    assert cli("train", *STEADY, "--epochs", 1, "--from-adapter", "given").code == 0
    went_on = cli("train", "--continue", "--epochs", 2)
    assert went_on.code == 0 and "the training began with the adapter ../../given: rank 4" in went_on.err
    assert "starting from" not in went_on.err


@pytest.mark.parametrize("gone", ["nothing", "best.safetensors", "all"])
def test_the_best_of_the_earlier_part_still_counts(cli, steady, monkeypatch, gone):
    """Also where only the run's adapter is left of it."""
    before, summary = adapter_bytes(steady), summary_of()
    checkpoints = steady / "training_checkpoints"
    if gone == "all":
        shutil.rmtree(checkpoints)
    elif gone != "nothing":
        (checkpoints / gone).unlink()
    monkeypatch.setattr("gemma_tune.train.job.rate_at", lambda *_: -0.3)  # steps that go the wrong way
    result = cli("train", "--continue", "--epochs", 2, "--json")
    assert result.code == 0, result.err
    assert result.json["summary"]["eval_loss_after"] == pytest.approx(summary["eval_loss_after"], rel=1e-6)
    assert result.json["summary"]["kept_step"] == summary["kept_step"]
    assert adapter_bytes(steady) == before


def test_one_that_early_stopping_ended_needs_another_patience(cli, steady, monkeypatch):
    flags = (*STEADY, "--epochs", 3, "--eval-steps", 1)
    with monkeypatch.context() as patch:
        from gemma_tune.train.best import Best

        patch.setattr(Best, "exhausted", property(lambda self: len(self.losses) > 2))
        assert cli("train", *flags, "--early-stopping", 2, "--force").code == 0
        assert summary_of()["steps"] == 2
        refused = cli("train", "--continue", "--epochs", 4)
    assert refused.code == 2 and "would end it again at once" in refused.err and "--early-stopping 0" in refused.err
    result = cli("train", "--continue", "--early-stopping", 0, "--json")
    assert result.code == 0 and result.json["summary"]["steps"] == 9, result.err
    assert result.json["summary"]["resumed_from_step"] == 2, "saved where it ended, though no save was due"


def test_a_forced_training_that_fails_at_once_leaves_the_log_of_the_finished_one(cli, steady, monkeypatch):
    """Which a continuation needs."""
    from gemma_tune.train.trainer import GemmaTrainer

    before = metrics()
    with monkeypatch.context() as patch:
        patch.setattr(GemmaTrainer, "probe", lambda self: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
        assert cli("train", "--epochs", 1, "--seed", 5, "--force").code == 2
    assert metrics() == before


# ---- a training that takes the place of a finished one, and does not come to its end

OTHER = ("--epochs", 2, "--seed", 5, "--rank", 2, "--eval-steps", 1, "--force")


def left_by_the_training(run: Path) -> dict[str, bytes]:
    places = [run / "train.yaml", run / "logs" / "metrics.jsonl", *(run / "training_checkpoints").rglob("*"),
              *(run / "tiny-gemma_lora_adapter").iterdir()]
    return {str(path.relative_to(run)): path.read_bytes() for path in places if path.is_file()}


def fails(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("killed", [False, True], ids=["fails", "killed"])
def test_one_that_fails_before_it_saved_anything_leaves_all_of_the_finished_one(cli, steady, steady_once, monkeypatch, killed):
    from gemma_tune.train.trainer import GemmaTrainer

    before, best = left_by_the_training(steady), cli("status", "--json").json["best"]
    with monkeypatch.context() as patch:
        patch.setattr(GemmaTrainer, "_save_checkpoint", fails)
        if killed:
            patch.setattr("gemma_tune.train.stage.put_back", lambda *_: None)
        assert cli("train", *OTHER).code == 1
    status = cli("status", "--json").json
    assert status["best"] == best and status["stages"]["train"]["state"] == "done"
    if not killed:
        assert left_by_the_training(steady) == before
        assert len(metrics()) > 1 and (steady / "logs" / "failed.jsonl").is_file()
    assert "3 of these 6 steps are done: going on from checkpoint-3" in cli("train", "--continue", "--epochs", 2, "--dry-run").err
    assert cli("train", "--continue", "--epochs", 2).code == 0
    assert adapter_bytes(steady) == steady_once[1], "from the finished one's checkpoint, with its optimiser"


def test_one_that_can_go_on_has_its_place_until_it_ends(cli, steady, monkeypatch):
    """The finished one's log, settings and last checkpoint stay beside it, and go when it is recorded."""
    settings, best, summary = (steady / "train.yaml").read_bytes(), cli("status", "--json").json["best"], summary_of()
    aside = steady / "training_checkpoints" / f"finished-{summary['training_id']}"
    stopped_at(2, monkeypatch, *OTHER)
    status = cli("status", "--json")
    assert status.json["best"] == best and "lowest validation loss so far" in " ".join(status.err.split())
    assert (steady / "train.yaml").read_bytes() == settings and summary_of() == summary
    assert {"checkpoint-3", "metrics.jsonl"} <= {path.name for path in aside.iterdir()}
    with monkeypatch.context() as patch:  # anew once more, which fails: the interrupted one is gone, the finished one not
        from gemma_tune.train.trainer import GemmaTrainer

        patch.setattr(GemmaTrainer, "_save_checkpoint", fails)
        assert cli("train", *OTHER).code == 1
    assert not aside.exists() and (steady / "training_checkpoints" / "checkpoint-3").is_dir()
    stopped_at(2, monkeypatch, *OTHER)
    assert cli("train").code == 0 and summary_of()["resumed_from_step"] == 2
    assert not aside.exists() and b"seed: 5" in (steady / "train.yaml").read_bytes()


@pytest.mark.parametrize("moves", [1, 2, 3])
def test_what_is_set_aside_survives_an_end_amid_coming_back(cli, steady, monkeypatch, moves):
    """Whoever ends the command between two of the moves: the next one brings back the rest, and removes nothing."""
    from gemma_tune.train import aside
    from gemma_tune.train.trainer import GemmaTrainer

    before = left_by_the_training(steady)
    rename, done = aside._rename, []

    def ends(path, place):
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(rename(path, place))

    with monkeypatch.context() as patch:
        patch.setattr(GemmaTrainer, "_save_checkpoint", fails)
        patch.setattr("gemma_tune.train.stage.put_back", lambda *_: None)
        assert cli("train", *OTHER).code == 1
    with monkeypatch.context() as patch:
        patch.setattr(aside, "_rename", ends)
        assert cli("train", "--seed", 7, "--force").code == 130 and len(done) == moves
    kept = cli("train", "--json")
    assert kept.code == 0 and kept.json["status"] == "up-to-date", "which brings back what it finds"
    assert left_by_the_training(steady) == before
    assert not [*(steady / "training_checkpoints").glob("finished-*")]
