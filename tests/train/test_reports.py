"""``--report-to``: other programs are told what the log has, with the settings, and none of them can lose a training."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from gemma_tune.base.errors import UserError
from gemma_tune.base.listener import Listener
from gemma_tune.config.stages import TrainConfig
from gemma_tune.train.report_to import require
from support.command import QUICK
from support.training import adapter_bytes, stopped_at

RUN = Path("runs/tiny-gemma")
LONG = ("--epochs", 3, "--rank", 4, "--dtype", "fp32", "--save-steps", 2, "--eval-steps", 4)
LACKED = [name for name in ("wandb", "swanlab", "clearml") if not importlib.util.find_spec(name)]


def metrics() -> list[dict]:
    return [json.loads(line) for line in (RUN / "logs" / "metrics.jsonl").read_text().splitlines()]


class Recorder(TrainerCallback):
    """A program that is told things; the last one that was made is ``Recorder.last``."""

    last: Recorder
    fails_at: str | int | None = None

    def __init__(self):
        Recorder.last = self
        self.events, self.logs, self.directory = [], [], os.environ.get("WANDB_DIR")
        print("a word on standard output")

    def _take(self, event, args, state):
        self.events.append(event)
        if self.fails_at in (event, state.global_step):
            raise ConnectionError("the server is gone\nwith more lines")
        self.args = args

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._take("begin", args, state)
        self.began_at, self.steps, self.model = state.global_step, state.max_steps, model

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        self._take("log", args, state)
        self.logs.append((state.global_step, logs))
        assert model is self.model and state.is_world_process_zero

    def on_save(self, args, state, control, **kwargs):
        self._take("save", args, state)
        assert (Path(args.output_dir) / f"checkpoint-{state.global_step}").is_dir()

    def on_train_end(self, args, state, control, **kwargs):
        self._take("end", args, state)


@pytest.fixture
def recorder(monkeypatch):
    """Recorders in the places of two programs; one of them under a name whose files have a place."""
    monkeypatch.setattr(Recorder, "fails_at", None)
    plain = integration_utils.get_available_reporting_integrations
    for name in ("recorder", "wandb"):
        monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, name, Recorder)
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations",
                        lambda: [*plain(), "recorder", "wandb"])
    return Recorder


# --- before any work

@pytest.mark.skipif(len(LACKED) < 2, reason="they are installed")
def test_what_is_not_there_is_an_error_before_any_work(cli, data, tiny):
    first, second = LACKED[:2]
    for command in (("train", data), ("run", data)):
        result = cli(*command, "--model", tiny, "--report-to", f"tensorbord,{first}", "--report-to", second, "--json")
        assert result.code == 2 and not Path("runs").exists()
        error = result.json["error"]
        assert error["message"] == "3 programs cannot be reported to"
        assert error["problems"][0] == "--report-to tensorbord: there is no such program; did you mean `tensorboard`?"
        assert error["problems"][1].startswith(f"--report-to {first}: ") and "installed" in error["problems"][1]
        assert error["hint"] == f"install what is missing: pip install {first} {second}"


def test_what_is_not_there_is_told_where_processes_would_be_started_and_in_a_dry_run(cli, trained, monkeypatch):
    monkeypatch.setattr("gemma_tune.train.launch.launch", lambda *args: pytest.fail("started"))
    for flags in (("--num-processes", 2), ("--dry-run",), ()):
        result = cli("train", "--run", trained, "--report-to", "tensorbord", *flags)
        assert result.code == 2 and "did you mean `tensorboard`?" in result.err and "none, azure_ml" in result.err
    with pytest.raises(UserError, match="no such program"):
        require(["nothing"])


@pytest.mark.parametrize("message, command", [
    ("it needs x. Run `pip install x`.", "pip install x"),
    ("it needs comet-ml>=3.43.2 to be installed. Run `pip install comet-ml>=3.43.2`.", "pip install 'comet-ml>=3.43.2'"),
    ("it requires a package to be installed.", "pip install odd-one"), ("A variable is to be set.", None)])
def test_the_command_that_installs_it(monkeypatch, message, command):
    def lacks():
        raise ImportError(message)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "odd_one", lacks)
    with pytest.raises(UserError, match="--report-to odd_one: ") as raised:
        require(["odd_one"])
    assert raised.value.message.endswith(message)
    assert raised.value.hint.endswith(command) if command else "pip" not in raised.value.hint


def test_a_package_that_is_there_by_half_spoils_no_other(monkeypatch):
    def half():
        raise ModuleNotFoundError("No module named 'opentelemetry'")

    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", half)
    for name, made in (("wandb", half), ("mlflow", Recorder)):
        monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, name, made)
    require(["mlflow"])
    with pytest.raises(UserError, match="--report-to wandb: No module named 'opentelemetry'") as raised:
        require(["mlflow", "wandb"])
    assert raised.value.hint == "install what is missing: pip install wandb"


# --- what they are told

def test_they_are_told_what_the_log_has(cli, trained, recorder):
    before = adapter_bytes(trained)
    result = cli("train", *QUICK, "--force", "--report-to", "recorder,Recorder", "--json")
    assert result.code == 0, result.err
    told, log = recorder.last, metrics()
    assert [(step, values) for step, values in told.logs] == [
        (r["step"], {k: v for k, v in r.items() if k not in ("step", "steps")}) for r in log]
    assert {step for step, values in told.logs if "eval_loss" in values} == {0, 3}
    assert all(values.keys() >= {"loss", "learning_rate", "tokens", "grad_norm", "memory_bytes"}
               for _, values in told.logs if "eval_loss" not in values)
    assert told.events[0] == "begin" and told.events[-1] == "end" and "save" in told.events
    assert (told.began_at, told.steps) == (0, 3)
    settings = json.loads(told.args.to_json_string())
    assert settings == told.args.to_dict() == told.args.to_dict() | {
        "rank": 4, "learning_rate": 1e-3, "dtype": "fp32", "device": "cpu", "effective_batch": 4, "seed": 42,
        "model": settings["model"]} and str(trained) not in json.dumps(settings)
    assert told.args.run_name.startswith("tiny-gemma-")
    assert "a word" in result.err and "a word" not in result.out
    assert adapter_bytes(trained) == before, "to be watched changes nothing"
    assert cli("train", *QUICK, "--json").json["status"] == "up-to-date"


def test_a_training_that_goes_on_is_reported_from_there_under_the_same_name(cli, trained, recorder, monkeypatch):
    stopped = stopped_at(5, monkeypatch, *LONG, "--force", "--report-to", "recorder")
    assert "--report-to recorder" in stopped.err
    first = recorder.last
    assert [step for step, values in first.logs if "loss" in values] == [1, 2, 3, 4, 5]
    assert first.events[-1] == "end"
    assert cli("train", *LONG, "--report-to", "recorder").code == 0
    assert [step for step, values in recorder.last.logs if "loss" in values] == [6, 7, 8, 9]
    assert recorder.last.began_at == 5 and recorder.last.args.run_name == first.args.run_name


def test_files_go_into_the_logs_of_the_run_unless_the_user_has_a_place(cli, trained, recorder, monkeypatch):
    wandb = type(sys)("wandb")
    wandb.__spec__, wandb.finish = ModuleSpec("wandb", None), lambda: recorder.last.events.append("finished")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    assert cli("train", *QUICK, "--force", "--report-to", "wandb").code == 0
    assert Path(recorder.last.directory) == (trained / "logs").resolve() and "WANDB_DIR" not in os.environ
    assert recorder.last.events[-2:] == ["end", "finished"]
    monkeypatch.setenv("WANDB_DIR", "elsewhere")
    assert cli("train", *QUICK, "--force", "--report-to", "wandb").code == 0
    assert recorder.last.directory == os.environ["WANDB_DIR"] == "elsewhere"


def test_a_program_that_fails_loses_no_training(cli, trained, recorder, monkeypatch):
    before = adapter_bytes(trained)
    monkeypatch.setattr(recorder, "fails_at", 2)
    result = cli("train", *QUICK, "--force", "--report-to", "recorder")
    assert result.code == 0, result.err
    assert result.err.count("recorder is told nothing more, as it failed: the server is gone; ") == 1
    assert [step for step, _ in recorder.last.logs] == [0, 1] and adapter_bytes(trained) == before
    assert [r["step"] for r in metrics() if "loss" in r] == [1, 2, 3]


def test_a_program_that_cannot_begin_is_told_before_the_first_step(cli, trained, recorder, monkeypatch):
    before = adapter_bytes(trained)
    monkeypatch.setattr(recorder, "fails_at", "begin")
    result = cli("train", *QUICK, "--force", "--report-to", "recorder")
    assert result.code == 1 and "Error: --report-to recorder does not work here: the server is gone" in result.err
    assert recorder.last.events == ["begin"] and adapter_bytes(trained) == before
    assert cli("status", "--run", trained, "--json").json["stages"]["train"]["state"] == "done"


@pytest.mark.parametrize("rank, reported", [("0", ["recorder"]), ("1", [])])
def test_only_the_main_process_reports(recorder, monkeypatch, tmp_path, rank, reported):
    from gemma_tune.train.reports import Reports

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    run = SimpleNamespace(root=tmp_path, metrics=tmp_path / "logs" / "metrics.jsonl")
    session = SimpleNamespace(config=TrainConfig(report_to=("recorder",)), run=run, listener=Listener(),
                              model=SimpleNamespace(id="m", revision=None))
    found = Reports(session, SimpleNamespace(id="0123456789", compute="cpu fp32"),
                    SimpleNamespace(records=[], first_step=0))
    state = SimpleNamespace(global_step=0, max_steps=1, epoch=0.0, is_world_process_zero=rank == "0")
    found.trainer = SimpleNamespace(state=state, args=SimpleNamespace(max_steps=1), model=None, processing_class=None,
                                    control=None)
    recorder.last = None
    with found:
        assert [name for name in ("recorder",) if recorder.last] == reported
        found.log.records.append({"step": 1, "steps": 1, "loss": 1.0})
        found.on_log(None, state, None)
    assert recorder.last.logs == [(1, {"loss": 1.0})] if reported else recorder.last is None


# --- TensorBoard itself

def test_tensorboards_file_read_back(cli, trained, monkeypatch):
    """Stopped after step 5 and gone on with: one folder with every step once, and the settings."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    flags = (*LONG, "--report-to", "tensorboard")
    stopped_at(5, monkeypatch, *flags, "--force")
    done = cli("train", *flags)
    assert done.code == 0, done.err
    [folder] = (RUN / "logs" / "tensorboard").iterdir()
    assert len(list(folder.iterdir())) == 2 and f"reporting to tensorboard, in {folder}" in done.err
    found = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    log = metrics()
    for name, tag in (("loss", "train/loss"), ("eval_loss", "eval/loss"), ("learning_rate", "train/learning_rate"),
                      ("tokens", "train/tokens"), ("tokens_per_second", "train/tokens_per_second")):
        assert [(e.step, pytest.approx(e.value, rel=1e-6)) for e in found.Scalars(tag)] == [
            (r["step"], r[name]) for r in log if name in r], tag
    assert [r["step"] for r in log if "loss" in r] == [*range(1, 10)]
    assert {r["step"] for r in log if "eval_loss" in r} == {0, 4, 8, 9}
    settings = json.loads(found.Tensors("args/text_summary")[-1].tensor_proto.string_val[0])
    assert (settings["rank"], settings["epochs"], settings["dtype"]) == (4, 3.0, "fp32")


def test_what_was_written_after_the_checkpoint_counts_no_more(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from gemma_tune.train.reports import _event_writer

    for first, steps, value in ((0, range(1, 8), 1.0), (4, range(5, 8), 2.0)):
        writer = _event_writer(tmp_path / "events", first)
        for step in steps:
            writer.add_scalar("train/loss", value, step)
        writer.close()
    found = EventAccumulator(str(tmp_path / "events")).Reload().Scalars("train/loss")
    assert [(e.step, e.value) for e in found] == [(n, 1.0 if n < 5 else 2.0) for n in range(1, 8)]
