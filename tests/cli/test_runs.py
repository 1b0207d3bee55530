"""``status`` and ``runs``: figures and sizes, nothing large is read, nothing heavy is imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.cells import cell_len

from gemma_tune.base import fingerprints
from gemma_tune.base.errors import UserError
from gemma_tune.base.words import small_size
from gemma_tune.cli import screen, status
from gemma_tune.cli.run_figures import best_so_far, disk_usage
from gemma_tune.cli.run_tables import show_runs
from gemma_tune.cli.runs import age
from gemma_tune.run.directory import RunDir
from support.command import ROOT

ADAPTER = "tiny-gemma_lora_adapter"
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "numpy", "gguf", "httpx", "huggingface_hub", "pyarrow",
         "matplotlib"}


def imported(*arguments: str, cwd: Path) -> set[str]:
    trace = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, cwd=cwd,
                           env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1", "PYTHONPATH": str(ROOT)}, check=True)
    return {line.rsplit("|", 1)[-1].strip() for line in trace.stderr.splitlines() if line.startswith("import time:")}


def test_status_has_figures_sizes_and_the_best_step(cli, trained):
    result = cli("status", "--json")
    train = result.json["stages"]["train"]
    summary = json.loads((trained / "manifest.json").read_text())["stages"]["train"]["summary"]
    assert train["summary"] == summary
    assert train["outputs"][ADAPTER] == disk_usage(trained / ADAPTER) == train["bytes"] - train["outputs"]["train.yaml"]
    assert result.json["bytes"] == disk_usage(trained) > train["bytes"]
    for said in ("11 for training, 1 for validation", f"{ADAPTER} ({small_size(train['outputs'][ADAPTER])})",
                 f"the weights are those of step {summary['kept_step']} of {summary['steps']}"):
        assert said in " ".join(result.err.split()), result.err
    first = summary["eval_loss_before"]
    assert f"validation loss {first:.3f} to {summary['eval_loss_after']:.3f}" in " ".join(result.err.split())
    log = [json.loads(line) for line in (trained / "logs/metrics.jsonl").read_text().splitlines()]
    lowest = min((r["eval_loss"], r["step"]) for r in log if "eval_loss" in r)
    assert result.json["best"] == {"step": lowest[1], "eval_loss": lowest[0]}


def test_the_lowest_loss_is_found_among_others(tmp_path):
    run = RunDir(tmp_path, "x")
    assert best_so_far(run.metrics) is None
    run.metrics.parent.mkdir()
    run.metrics.write_text("".join(json.dumps(r) + "\n" for r in (
        {"step": 0, "eval_loss": 3.0}, {"step": 1, "loss": 0.1}, {"step": 4, "eval_loss": 1.5},
        {"step": 8, "eval_loss": float("nan")}, {"step": 9, "eval_loss": 2.0})))
    assert best_so_far(run.metrics) == (4, 1.5, "loss")
    run.metrics.write_text('{"step": 1, "eval_loss": "x"}\n')
    assert best_so_far(run.metrics) is None


def test_what_is_large_is_not_read_for_its_time_stamp(cli, trained, monkeypatch):
    weights = trained / ADAPTER / "adapter_model.safetensors"
    os.utime(weights, (1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(status, "_LARGE", 10)
        patch.setattr(fingerprints, "sha256_file", lambda path: pytest.fail(f"{path} is read"))
        looked = cli("status", "--json")
    assert looked.code == 0, looked.err
    assert looked.json["unread"] == [ADAPTER] and looked.json["stages"]["train"]["state"] == "done"
    assert "`gemma-tune status --run runs/tiny-gemma --verify`" in " ".join(looked.err.split()), "status alone is of the newest run"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    monkeypatch.setattr(status, "_LARGE", 10)
    verified = cli("status", "--verify", "--json")
    assert verified.json["unread"] == []
    assert verified.json["stages"]["train"]["state"] == f"damaged: {ADAPTER} was changed"


def test_what_has_another_size_is_damaged_however_large(cli, trained, monkeypatch):
    monkeypatch.setattr(status, "_LARGE", 10)
    with (trained / ADAPTER / "adapter_model.safetensors").open("ab") as file:
        file.write(b"x")
    assert cli("status", "--json").json["stages"]["train"]["state"].startswith("damaged")


def test_status_and_runs_load_nothing_heavy(trained_once):
    for command in (["status", "--run", str(trained_once)], ["runs", str(trained_once.parent)]):
        loaded = imported("-m", "gemma_tune", *command, cwd=trained_once.parent)
        assert "gemma_tune.run.manifest" in loaded and not HEAVY & loaded, (command, HEAVY & loaded)


def test_a_run_that_is_up_to_date_loads_no_torch(trained_once):
    loaded = imported("-c", "import gemma_tune.cli.pipeline", cwd=trained_once)
    assert "gemma_tune.export.stage" in loaded
    assert not {"torch", "transformers", "trl", "peft", "datasets", "matplotlib"} & loaded


def test_runs_are_listed_the_newest_first(cli, trained, monkeypatch):
    monkeypatch.setattr(screen.err, "_width", 200)  # what was made first in this process may have been narrower
    other = Path(shutil.copytree(trained, "runs/other"))
    os.utime(other / "manifest.json", (1_700_000_000, 1_700_000_000))
    Path("runs/broken").mkdir()
    Path("runs/broken/manifest.json").write_text("{")
    os.utime("runs/broken/manifest.json", (1, 1))
    Path("runs/not-a-run").mkdir()
    result = cli("runs", "--json")
    assert result.code == 0, result.err
    newest, old, broken = result.json["runs"]
    summary = json.loads((trained / "manifest.json").read_text())["stages"]["train"]["summary"]
    assert [newest["run"], old["run"], broken["run"]] == ["runs/tiny-gemma", "runs/other", "runs/broken"]
    assert (newest["model"], newest["data"], newest["rows"]) == ("tiny-gemma", "rows.jsonl", 11)
    assert newest["loss_after"] == summary["eval_loss_after"] and newest["stage"] == "train"
    assert newest["bytes"] == disk_usage(trained) and newest["problem"] is None
    assert newest["seconds_ago"] < 3600 < old["seconds_ago"]
    assert "is damaged" in broken["problem"] and broken["model"] is None
    said = " ".join(result.err.split())
    for text in ("runs/tiny-gemma", "rows.jsonl (11)", f"{summary['eval_loss_after']:.3f}", "2023-11-14", "is damaged"):
        assert text in said


@pytest.mark.parametrize("name", ["runs/a", "/work/of/mine/demo", "/data/of/all/demo-2", "/" + 39 * "n", "/中文" * 9])
@pytest.mark.parametrize("width", [60, 79, 80, 81, 120])
def test_the_table_of_runs_is_as_wide_as_the_terminal_at_most(monkeypatch, capsys, name, width):
    monkeypatch.setattr(screen.err, "_width", width)
    row = SimpleNamespace(run=name, model="demo", data="the built-in example", rows=67, stage="train", problem=None,
                          loss="validation loss 4.225 to 2.940", in_use_by=None, bytes=2_130_000_000, age="9 min")
    with screen.err.capture() as captured:
        show_runs([row])
    lines = captured.get().splitlines()
    assert max(map(cell_len, lines)) <= width
    assert "2.13 GB" in captured.get() and ("9 min" in captured.get())
    assert name[:30] in captured.get() or cell_len(name) > 30


@pytest.mark.parametrize("width", [30, 40, 63])
def test_in_a_narrow_terminal_the_words_of_a_run_stay_whole(monkeypatch, capsys, width):
    monkeypatch.setattr(screen.err, "_width", width)
    row = SimpleNamespace(run="runs/lr 1e-3", model="SmolLM2-135M", data="chats.jsonl", rows=34, stage="train",
                          problem=None, loss="validation loss 2.950 to 0.117", in_use_by="train", bytes=105_000_000, age="now")
    with screen.err.capture() as captured:
        show_runs([row])
    assert max(map(cell_len, captured.get().splitlines())) <= width
    first, *rest = captured.get().splitlines()
    assert first == "runs/lr 1e-3"
    assert " ".join(" ".join(rest).split()) == ("SmolLM2-135M, chats.jsonl (34), validation 2.950 to 0.117; in use by train, "
                                                "105 MB, now")


def test_in_a_narrow_terminal_a_stage_without_a_result_is_one_line(cli, trained, monkeypatch):
    monkeypatch.setattr(screen.err, "_width", 60)
    lines = cli("status").err.splitlines()
    at = lines.index("eval  missing")
    assert lines[at:at + 3] == ["eval  missing", "merge  missing", "export-ollama  missing"]
    assert all(line.strip() for line in lines)


def test_the_column_of_short_names_has_room_for_its_heading(cli, trained):
    trained.rename("t")
    assert " run " in cli("runs", "t").err


def test_runs_where_there_are_none(cli):
    empty = cli("runs", "--json")
    assert (empty.code, empty.json) == (0, {"runs": []})
    assert "start one: gemma-tune prepare" in empty.err
    missing = cli("runs", "elsewhere")
    assert missing.code == 2 and "there is no directory elsewhere" in missing.err


def test_an_age_has_one_unit():
    assert [age(s) for s in (5, 70, 600, 7200, 86_400, 9 * 86_400)] == ["now", "1 min", "10 min", "2 h", "1 day", "9 days"]


def test_sizes_below_a_megabyte_are_told():
    assert [small_size(n) for n in (0, 1, 1499, 12_345, 2_000_000)] == ["0", "1 kB", "1 kB", "12 kB", "2 MB"]
    assert screen.figure("picture_bytes", 12_345) == "12 kB", "of a first trial with a few pictures"


def test_what_no_command_helps_with_is_a_note(cli, trained, monkeypatch):
    """Root may read everything, so the refusal is made up."""
    def refused(place: Path) -> None:
        if place.name == "tiny-gemma_lora_adapter":
            raise UserError("no right to read it", "give yourself the right: chmod")

    monkeypatch.setattr(status, "require_readable", refused)
    assert cli("status", "--json").json["note"] is None
    (trained / "tiny-gemma_lora_adapter/adapter_config.json").write_text("{}")
    found = cli("status", "--json")
    assert found.json["next"] is None and found.json["note"] == "give yourself the right: chmod"
    assert "next: give yourself the right" in found.err
