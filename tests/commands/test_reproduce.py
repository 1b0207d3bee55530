"""``train.yaml``: the settings of a training, from which the same adapter comes again."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from gemma_tune.config.settings_file import load_yaml
from gemma_tune.config.stages import TrainConfig
from gemma_tune.models.placement import choose_placement
from gemma_tune.run.session import open_session
from gemma_tune.train import processes, shape
from gemma_tune.train.memory import BatchChoice
from gemma_tune.train.record import SettingsRecord
from support.command import QUICK
from support.training import adapter_bytes, stopped_at

RUN, FILE = Path("runs/tiny-gemma"), Path("runs/tiny-gemma/train.yaml")


def digest(run: Path = RUN) -> str:
    return hashlib.sha256(adapter_bytes(run)).hexdigest()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without what takes most of the time here: pictures, memory by shapes, and looking for garbage."""
    monkeypatch.setattr(shape, "_kept", lambda *_: 1 << 20)
    monkeypatch.setattr("gemma_tune.train.stage.plot", lambda *_: None)
    monkeypatch.setattr(gc, "collect", lambda *_: 0)


@pytest.fixture
def other_defaults(monkeypatch):
    """As if a later version had other defaults, of its own and of the family."""
    new = {"epochs": 1.0, "alpha": 8.0, "warmup": 0.5, "schedule": "linear", "seed": 7, "batch_size": 2, "keep": "last"}
    names = [f.name for f in dataclasses.fields(TrainConfig)]
    before = dict(zip(names, TrainConfig.__init__.__defaults__, strict=True))
    assert all(before[name] != value for name, value in new.items())
    monkeypatch.setattr(TrainConfig.__init__, "__defaults__", tuple((before | new).values()))
    monkeypatch.setattr("gemma_tune.run.session.family_defaults", lambda *_: ({"learning_rate": 3e-6}, ["other"]))


def test_the_file_of_a_training_asks_for_what_that_training_was(cli, trained):
    assert cli("train", "--rank", 4, "--dtype", "auto", "--max-steps", 2, "--force").code == 0
    assert cli("train", "--config", FILE, "--json").json["status"] == "up-to-date", "`auto` came to the type that it names"


def test_the_same_adapter_comes_again_also_from_other_defaults(cli, trained, request):
    fresh = shutil.copytree(trained, trained.with_name("fresh"))
    assert cli("train", "--rank", 4, "--dtype", "auto", "--max-steps", 4, "--batch-size", "auto", "--lr", 2e-3, "--force").code == 0
    first, text = digest(), FILE.read_text()
    request.getfixturevalue("other_defaults")
    again = cli("train", "--config", FILE, "--run", fresh, "--force", "--json")
    assert again.code == 0, again.err
    assert digest(fresh) == first
    assert (fresh / "train.yaml").read_text().split("train:")[0] == text.split("train:")[0]
    assert load_yaml(fresh / "train.yaml") == load_yaml(FILE)


def test_every_setting_is_there_with_where_it_came_from(cli, trained):
    Path("s.yaml").write_text("train: {alpha: 16}\n")
    done = cli("train", *QUICK, "--batch-size", "auto", "--config", "s.yaml", "--run", RUN)
    assert done.code == 0, done.err
    settings = load_yaml(FILE)["train"]
    assert settings.keys() == {f.name for f in dataclasses.fields(TrainConfig)}
    assert all(settings[name] is not None for name in ("learning_rate", "micro_batch", "activation_checkpointing"))
    said = {line.split(":")[0].strip(): line.partition("# ")[2] for line in FILE.read_text().splitlines() if line[0] == " "}
    assert said["rank"] == "given" and said["alpha"] == "of a settings file" and said["seed"] == "default"
    assert said["batch_size"] == "chosen here" and settings["batch_size"] == 1
    assert said["micro_batch"].startswith("chosen here: ") and settings["micro_batch"] == 1
    assert settings["target_modules"] == "all" and settings["dtype"] == "fp32"
    about = FILE.read_text().split("train:\n")[0]
    for part in ("base model: tiny-gemma", "tokens: sha256 ", "computed on cpu with", "torch 2", "trl ", "peft ", "transformers "):
        assert part in about
    assert str(Path.cwd()) not in FILE.read_text()
    [told] = [line for line in done.err.splitlines() if "settings: " in line]
    assert "rank 4 (given)" in told and "alpha 16 (of a settings file)" in told and "runs/tiny-gemma/train.yaml" in told
    assert "warmup" not in told
    again = cli("train", "--config", FILE, "--force").err
    [told] = [line for line in again.splitlines() if "settings: " in line]
    assert "rank 4 (of a settings file)" in told and "warmup" not in told, "what differs, wherever it came from"


def test_a_file_in_a_run_is_about_that_run(cli, trained):
    shutil.copytree(trained, trained.with_name("newer"))
    assert cli("train", *QUICK, "--run", RUN, "--force").code == 0
    assert cli("status", "--json").json["run"] == "runs/tiny-gemma"
    (Path("runs/newer/manifest.json")).touch()
    assert cli("status", "--json").json["run"] == "runs/newer"
    assert "run: runs/tiny-gemma" in cli("train", "--config", FILE).err
    assert "run: runs/newer" in cli("train", "--config", FILE, "--run", "runs/newer", "--dry-run").err
    assert open_session("train", config=FILE).run.root == RUN
    assert open_session("train", "runs/newer", config=FILE).run.root == Path("runs/newer")


def test_what_the_file_leaves_open_is_not_as_before(cli, trained):
    assert cli("train", *QUICK, "--target-modules", "q_proj", "--alpha", 7).code == 0
    Path("s.yaml").write_text("train: {target_modules: [], alpha: 7}\n")
    assert open_session("train", RUN, config="s.yaml").config.target_modules == ()
    assert open_session("train", RUN).config.target_modules == ("q_proj",)


def test_a_stopped_training_has_its_file_and_goes_on_with_it(cli, trained, monkeypatch):
    flags = ("--epochs", 2, "--rank", 4, "--dtype", "fp32", "--lr", 2e-3, "--force")
    assert cli("train", *flags).code == 0
    whole = digest()
    manifest = json.loads((RUN / "manifest.json").read_text())
    del manifest["stages"]["train"]
    (RUN / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(RUN / "tiny-gemma_lora_adapter")
    stopped_at(4, monkeypatch, *flags)
    status = cli("status")
    assert "interrupted" in status.err and "train.yaml" in status.err
    resumed = cli("train", "--config", FILE, "--json")
    assert resumed.code == 0, resumed.err
    assert resumed.json["summary"]["resumed_from_step"] == 4 and digest() == whole


def test_the_file_is_named_and_may_be_changed(cli, trained):
    status = cli("status")
    assert "tiny-gemma_lora_adapter" in status.err and "train.yaml" in status.err
    FILE.write_text("train: {rank: 3}\n")
    assert cli("status", "--json").json["stages"]["train"]["state"] == "done"
    FILE.unlink()
    assert cli("status", "--verify", "--json").json["stages"]["train"]["state"] == "done"


@pytest.fixture
def record(trained):
    session = open_session("train", RUN)
    FILE.unlink()
    memory = SimpleNamespace(total=0)
    return SettingsRecord(session, choose_placement("fp32"), BatchChoice(4, False, memory, 0, True, "they fit"))


def test_what_a_training_had_to_change_is_in_the_file(record):
    del record.session.manifest.stages["train"]
    record.begin()
    before, fresh = FILE.read_bytes(), FILE.with_name(".new-train.yaml")
    record.end(SimpleNamespace(micro_batch=4, compiled=False))
    assert fresh.read_bytes() == before
    record.end(SimpleNamespace(micro_batch=2, compiled=False))
    assert yaml.safe_load(fresh.read_text())["train"]["micro_batch"] == 2
    [said] = [line for line in fresh.read_text().splitlines() if "micro_batch:" in line]
    assert said.endswith("# chosen here: memory ran out with more"), said
    assert FILE.read_bytes() == before


def test_while_a_finished_training_has_its_file_there_another_one_does_not_write_it(record):
    record.begin()
    assert not FILE.exists()


def test_of_several_processes_one_writes(record, monkeypatch):
    monkeypatch.setattr(processes, "is_main", lambda: False)
    record.begin()
    record.end(SimpleNamespace(micro_batch=2, compiled=False))
    assert not FILE.exists()
