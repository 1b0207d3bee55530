"""Every command through the real command line, on a tiny random Gemma 3."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest

from gemma_tune.api import IN_ORDER, tune
from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.run.session import open_session
from support.command import MANIFEST_SCHEMA as SCHEMA
from support.command import QUICK, ROOT, rows, write_rows


def manifest_of(run: Path) -> dict:
    manifest = json.loads((run / "manifest.json").read_text())
    jsonschema.validate(manifest, SCHEMA)
    return manifest


def test_all_stages_in_order(cli, tiny, data):
    run = Path("runs/tiny-gemma")
    steps = {
        "prepare": ["prepare", data, "--model", tiny, "--json"],
        "train": ["train", *QUICK, "--json"],
        "eval": ["eval", "--questions", 1, "--max-new-tokens", 8, "--json"],
        "merge": ["merge", "--json"],
        "export-ollama": ["export-ollama", "--quant", "f16", "--no-verify", "--json"],
    }
    for stage, args in steps.items():
        result = cli(*args)
        assert result.code == 0, result.err
        assert result.json["stage"] == stage
        assert result.json["status"] == "done"
        assert all(Path(path).exists() for path in result.json["artifacts"].values())
        assert "run: runs/tiny-gemma" in result.err
        recorded = manifest_of(run)["stages"][stage]
        summary = result.json["summary"]
        if stage == "eval":  # the manifest holds figures; prompts and answers lie in a file
            assert summary.pop("answers") == json.loads((run / "answers.json").read_text())
        assert recorded["summary"] == summary
    manifest = manifest_of(run)
    assert list(manifest["stages"]) == list(steps)
    assert str(Path.cwd()) not in (run / "manifest.json").read_text(), "absolute path in the manifest"
    assert {p.name for p in run.iterdir() if not p.name.startswith(".")} == {
        "manifest.json", "answers.json", "data", "training_checkpoints", "tiny-gemma_lora_adapter", "tiny-gemma_lora_merged", "ollama",
        "logs", "report.md", "report.html", "train.yaml"}
    assert manifest["stages"]["train"]["config"]["epochs"] == {"value": 1.0, "from": "flag"}
    assert manifest["stages"]["train"]["config"]["alpha"]["from"] == "default"


def test_stages_that_are_up_to_date_do_nothing(cli, trained):
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.is_file() and not p.name.startswith(".")}
    for args in (["prepare"], ["train", *QUICK]):
        result = cli(*args, "--run", trained, "--json")
        assert result.code == 0, result.err
        assert result.json["status"] == "up-to-date"
        assert "up to date; --force runs it again" in result.err
    after = {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.is_file() and not p.name.startswith(".")}
    assert after == before


def test_force_runs_again_with_the_same_result(cli, trained):
    adapter = trained / "tiny-gemma_lora_adapter" / "adapter_model.safetensors"
    before, inode = adapter.read_bytes(), adapter.stat().st_ino
    result = cli("train", *QUICK, "--force", "--json")
    assert result.json["status"] == "done"
    assert adapter.stat().st_ino != inode
    assert adapter.read_bytes() == before, "same seed, data and machine must give the same adapter, bit for bit"


def test_another_seed_gives_another_adapter(cli, trained):
    adapter = trained / "tiny-gemma_lora_adapter" / "adapter_model.safetensors"
    before = adapter.read_bytes()
    result = cli("train", *QUICK, "--seed", 7, "--json")
    assert result.json["status"] == "done"
    assert "seed: 42 -> 7" in result.err
    assert adapter.read_bytes() != before


def test_changed_data_makes_later_stages_stale(cli, trained, tmp_path):
    assert cli("prepare", write_rows(tmp_path / "more.jsonl", rows(20)), "--run", trained).code == 0
    status = cli("status", "--run", trained, "--json").json
    assert status["stages"]["prepare"]["state"] == "done"
    assert status["stages"]["train"]["state"].startswith("stale: `prepare` has run again")
    assert status["next"] == f"gemma-tune train --run {trained}"
    merged = cli("merge", "--run", trained)
    assert merged.code == 0
    assert "the result of `train` is stale" in merged.err


def test_what_was_merged_from_elsewhere_is_stale_once_the_run_has_trained(cli, trained, tmp_path):
    away = shutil.copytree(trained / "tiny-gemma_lora_adapter", tmp_path / "away")
    assert cli("merge", "--run", trained, "--adapter", away, "--no-check").code == 0
    assert cli("status", "--run", trained, "--json").json["stages"]["merge"]["state"] == "done", "newer than the training"
    time.sleep(1.1)  # the manifest's times are in seconds
    result = cli("train", *QUICK, "--seed", 7, "--run", trained, "--json")
    assert result.json["next"][-1] == f"gemma-tune merge --run {trained}"
    state = cli("status", "--run", trained, "--json").json["stages"]["merge"]["state"]
    assert state == "stale: it is of an adapter from elsewhere, and the run has trained one of its own since"
    chat = cli("chat", "--run", trained, "--merged", "--prompt", "Say 3.", "--max-new-tokens", 2)
    assert f"the result of `merge` is {state}" in chat.err
    own = cli("merge", "--run", trained, "--no-check")
    assert f"this run's own adapter is merged, in place of {os.path.relpath(away)}" in own.err, own.err
    assert cli("status", "--run", trained, "--json").json["stages"]["merge"]["state"] == "done"


def test_prepare_without_data_reuses_what_the_run_was_prepared_from(cli, trained):
    train_rows = (trained / "data" / "train.jsonl").read_bytes()
    result = cli("prepare", "--run", trained, "--force", "--json")
    assert result.code == 0, result.err
    assert (trained / "data" / "train.jsonl").read_bytes() == train_rows


def test_a_run_can_be_moved(cli, trained, tiny, tmp_path):
    moved = tmp_path / "elsewhere" / "deep" / "run"
    moved.parent.mkdir(parents=True)
    shutil.move(trained, moved)
    lost = cli("chat", "--run", moved, "--prompt", "hi")
    assert lost.code == 2
    assert "--model" in lost.err
    found = cli("train", *QUICK, "--run", moved, "--model", tiny, "--json")
    assert found.code == 0, found.err
    assert found.json["status"] == "up-to-date"


def test_a_file_whose_data_were_not_prepared_says_so(cli, tiny, data):
    Path("both.yaml").write_text("prepare:\n  data: other.jsonl\n  max_length: 64\n  train_on: all\ntrain:\n  epochs: 1\n")
    assert cli("prepare", data, "--model", tiny).code == 0
    result = cli("train", "--config", "both.yaml", "--dry-run")
    said = " ".join(result.err.split())
    assert result.code == 0 and "`prepare:` of the settings file is not what was prepared (data, max_length)" in said
    shutil.copy(data, "other.jsonl")
    assert cli("prepare", "--config", "both.yaml").code == 0
    assert "is not what was prepared" not in cli("train", "--config", "both.yaml", "--dry-run").err


def test_a_learning_rate_is_said_where_it_is_the_one(cli, tiny, data):
    assert cli("prepare", data, "--model", tiny).code == 0
    assert "learning rate 0.0002: " in cli("train", "--epochs", 1, "--dry-run").err
    assert cli("train", "--epochs", 1, "--lr", 1e-4, "--rank", 4).code == 0
    again = cli("train", "--epochs", 2, "--dry-run")
    assert "learning_rate 0.0001" in again.err and "learning rate 0.0002: " not in again.err


def test_the_config_file_is_below_flags_and_above_defaults(cli, tiny, data):
    Path("settings.yaml").write_text(f"model: {tiny}\nprepare:\n  valid: 3\n  seed: 3\n")
    result = cli("prepare", data, "--config", "settings.yaml", "--seed", 5, "--json")
    assert result.code == 0, result.err
    assert result.json["summary"]["valid_rows"] == 3
    config = manifest_of(Path("runs/tiny-gemma"))["stages"]["prepare"]["config"]
    assert config["valid"] == {"value": 3, "from": "file"}
    assert config["seed"] == {"value": 5, "from": "flag"}
    assert config["max_length"]["from"] == "default"


def test_run_does_everything_and_sums_up(cli, tiny, data):
    Path("quick.yaml").write_text("train: {rank: 4, dtype: fp32}\neval: {questions: 1, max_new_tokens: 4}\n"
                                  "export-ollama: {verify: false}\n")
    result = cli("run", data, "--model", tiny, "--epochs", 1, "--quant", "q8_0", "--config", "quick.yaml", "--json")
    assert result.code == 0, result.err
    assert list(result.json["stages"]) == ["prepare", "train", "eval", "merge", "export-ollama"]
    assert result.json["created"] is False
    for expected in ("validation loss", "base", "tuned", "GGUF", "next: gemma-tune chat", "ollama create tiny-gemma-tuned"):
        assert expected in result.err
    assert result.err.count("report.html") == 1, "written and named once, at the end"
    assert Path(result.json["stages"]["eval"]["artifacts"]["html_report"]).is_file()
    again = cli("run", data, "--model", tiny, "--epochs", 1, "--quant", "q8_0", "--config", "quick.yaml", "--json")
    assert {stage["status"] for stage in again.json["stages"].values()} == {"up-to-date"} == {again.json["status"]}
    assert (result.json["stage"], result.json["status"]) == ("run", "done") and isinstance(result.json["warnings"], list)
    quiet = cli("run", data, "--model", tiny, "--epochs", 1, "--quant", "q8_0", "--config", "quick.yaml", "--quiet")
    assert "up to date" in quiet.err and "next:" not in quiet.err and "ollama create" not in quiet.err


def test_run_writes_the_page_also_where_a_stage_after_the_evaluation_fails(cli, trained, monkeypatch):
    written = []
    monkeypatch.setattr("gemma_tune.cli.pipeline.write_report", lambda run: written.append(run.html_report) or written[-1])

    def fails(session):
        raise WorkFailed("it failed")

    monkeypatch.setitem(IN_ORDER, "merge", fails)
    Path("quick.yaml").write_text("eval: {questions: 1, max_new_tokens: 4}\n")
    result = cli("run", "--run", trained, "--config", "quick.yaml")
    assert result.code == 1 and "Error: it failed" in result.err, result.err
    assert [path.name for path in written] == ["report.html"]


@pytest.mark.parametrize(("flags", "code", "text"), [
    (("--name", "no spaces please"), 2, "no spaces please"), (("--create",), 1, "no Ollama server answers"),
    (("--quant", "q9"), 2, "'q9' is not one of")])
def test_run_refuses_at_once_what_a_later_stage_would_refuse(cli, tiny, data, flags, code, text):
    result = cli("run", data, "--model", tiny, *flags)
    assert result.code == code
    assert text in result.err
    assert not Path("runs").exists()


@pytest.mark.parametrize(("there", "text"), [
    (True, "--pictures is for rows of a file"), (False, "the folder of the pictures, photos, is not")])
def test_run_refuses_at_once_pictures_that_its_evaluation_would_refuse(cli, tiny, data, there, text):
    if there:
        Path("photos").mkdir()
    Path("settings.yaml").write_text("eval: {pictures: photos%s}\n" % ("" if there else f", data: '{data}'"))
    result = cli("run", data, "--model", tiny, "--config", "settings.yaml")
    assert result.code == 2 and text in " ".join(result.err.split()), result.err
    assert not Path("runs").exists()


def test_commands_to_type_next_are_quoted_for_a_shell(cli, tiny, data):
    import shlex

    result = cli("prepare", data, "--model", tiny, "--run", "my runs/运行 1", "--json")
    assert result.code == 0, result.err
    [step] = result.json["next"]
    assert shlex.split(step) == ["gemma-tune", "train", "--run", "my runs/运行 1"]
    assert step in result.err


def test_the_newest_run_is_taken_when_none_is_named(cli, trained, tiny):
    other = trained.with_name("older")
    shutil.copytree(trained, other)
    os.utime(other / "manifest.json", (1, 1))
    assert "run: runs/tiny-gemma" in cli("train", *QUICK).err
    os.utime(trained / "manifest.json", (0, 0))
    assert cli("status", "--json").json["run"] == "runs/older"


def test_quiet_says_nothing_but_the_outcome(cli, tiny, data):
    result = cli("prepare", data, "--model", tiny, "--quiet")
    assert result.code == 0
    assert result.out == ""
    assert result.err.strip().startswith("prepare: done")
    assert len(result.err.strip().splitlines()) == 1


def test_the_stages_can_be_called_from_python(tiny, data):
    """README's own lines, with another model and another file."""
    [script] = re.findall(r"```python\n(from gemma_tune.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(script.splitlines()) <= 10
    for there, here in (('"demo"', f'"{tiny}"'), ('"chats.jsonl"', f'"{data}"')):
        assert script.count(there) == 1
        script = script.replace(there, here)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    loss, gguf = done.stdout.splitlines()
    assert float(loss) > 0
    assert Path(gguf).read_bytes().startswith(b"GGUF")
    assert done.stderr == ""


def test_the_stages_need_no_command_line():
    script = "import sys, gemma_tune.api; print([name for name in ('typer', 'gemma_tune.cli') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_python_is_told_of_settings_that_there_are_not(tiny):
    with pytest.raises(UserError) as caught:
        open_session("train", model=str(tiny), epochs_=3, lora_r=8, cutoff_len=512, rank=4)
    assert caught.value.problems == (
        "epochs_: there is no such setting; did you mean `epochs`?", "lora_r: there is no such setting; here it is `rank`",
        "cutoff_len: there is no such setting; here it is `max_length` below `prepare:`")


@pytest.mark.parametrize("data", [Path("my, rows.jsonl"), [Path("my, rows.jsonl")]])
def test_python_may_name_paths_as_paths(tiny, data):
    write_rows(Path("my, rows.jsonl"), rows(4))
    session = open_session("prepare", Path("runs/paths"), model=tiny, data=data, valid=Path("held.jsonl"))
    assert (session.config.data, session.config.valid) == (("my, rows.jsonl",), "held.jsonl")
    for model in (tiny, Path("models/gone")):
        with pytest.raises(UserError, match="is not a run yet"):
            open_session("train", model=model)


@pytest.mark.parametrize("stage, meant", [("export", "export-ollama"), ("export_ollama", "export-ollama"), ("evaluate", "eval")])
def test_a_stage_that_there_is_not_is_a_user_error(stage, meant):
    """Such as the name of its function, or of its module."""
    with pytest.raises(UserError) as caught:
        open_session(stage, "runs/none")
    assert f"there is no stage '{stage}'" in caught.value.message and meant in caught.value.hint


def test_a_stage_refuses_a_session_of_another(trained):
    wrong = {"merge": open_session("merge", trained), "train": open_session("train", trained)}
    for stage, run_it in {**IN_ORDER, "tune": tune}.items():
        expected = "train" if stage == "tune" else stage
        with pytest.raises(UserError) as caught:
            run_it(wrong["train" if expected == "merge" else "merge"])
        assert f"and this is `{expected}`" in caught.value.message
        assert caught.value.hint == f'open another one: open_session("{expected}", "{trained}")'


def test_a_settings_file_is_read_once(cli, tiny, data, monkeypatch):
    from gemma_tune.cli import request

    Path("s.yaml").write_text(f"model: {tiny}\nrun: runs/once\ntrain:\n  rank: 4\n  epochs: 1\n  dtype: fp32\n")
    read, real = [], request.load_yaml
    monkeypatch.setattr(request, "load_yaml", lambda path: read.append(path) or real(path))
    assert cli("train", data, "--config", "s.yaml").code == 0
    assert cli("run", data, "--config", "s.yaml", "--quant", "f16").code == 0
    assert read == [Path("s.yaml")] * 2


@pytest.mark.parametrize("command", [["gemma-tune"], [sys.executable, "-m", "gemma_tune"]])
def test_help_loads_nothing_heavy(command):
    program = shutil.which(command[0]) or str(Path(sys.executable).parent / command[0])
    trace = subprocess.run([program, *command[1:], "--help"], capture_output=True, text=True, timeout=60,
                           env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"})
    assert trace.returncode == 0
    loaded = {line.rsplit("|", 1)[-1].strip() for line in trace.stderr.splitlines() if line.startswith("import time:")}
    assert {"typer", "rich", "gemma_tune.cli.commands"} <= loaded, "the trace shows what was imported"
    heavy = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "numpy", "gguf", "httpx",
             "huggingface_hub", "matplotlib"}
    assert not heavy & loaded
    for name in ("prepare", "train", "chat", "merge", "export-ollama", "run", "status", "runs", "doctor"):
        assert name in trace.stdout


@pytest.mark.parametrize("name", ["prepare", "train", "chat", "eval", "merge", "export-ollama", "run", "status", "runs",
                                  "doctor"])
def test_every_help_says_what_is_read_and_written_and_shows_an_example(cli, name):
    result = cli(name, "--help")
    assert result.code == 0
    text = " ".join(result.out.split())
    assert "Reads" in text
    assert f"Example: gemma-tune {name}" in text


def test_version(cli):
    from gemma_tune import __version__

    assert cli("--version").out.strip() == f"gemma-tune {__version__}"


def test_run_without_validation_rows_leaves_the_comparison_out(cli, tiny, data):
    Path("quick.yaml").write_text("train: {rank: 4, dtype: fp32}\nexport-ollama: {verify: false, measure: false}\n")
    result = cli("run", data, "--model", tiny, "--epochs", 1, "--valid", 0, "--config", "quick.yaml", "--json")
    assert result.code == 0, result.err
    assert list(result.json["stages"]) == ["prepare", "train", "merge", "export-ollama"]
    assert "skipped: the run has no validation rows to compare on" in result.err
    assert "Number formats" in Path("runs/tiny-gemma/report.html").read_text(), "a page there is all the same"
    status = cli("status", "--json").json
    assert status["stages"]["eval"]["state"].startswith("missing: the run has no validation rows to compare on; ")
    assert status["next"] == "gemma-tune chat --run runs/tiny-gemma", "eval would have nothing to do"


def test_run_on_plain_text_compares_losses_alone(cli, tiny, tmp_path):
    Path("quick.yaml").write_text("train: {rank: 4, dtype: fp32}\nexport-ollama: {verify: false, measure: false}\n")
    texts = [{"text": f"Box {n}: the quick brown fox jumps over the lazy dog."} for n in range(8)]
    result = cli("run", write_rows(tmp_path / "texts.jsonl", texts), "--model", tiny, "--epochs", 1, "--valid", 0.5,
                 "--config", "quick.yaml", "--json")
    assert result.code == 0, result.err
    assert "rows of plain text have no question to ask: their loss alone is measured" in result.err
    compared, trained = (result.json["stages"][name]["summary"] for name in ("eval", "train"))
    assert compared["questions"] == 0 and "ended" not in compared["measures"]
    assert compared["measures"]["loss"]["base"][0] == pytest.approx(trained["eval_loss_before"], rel=0.02), "in bf16 or fp32"
    report = Path("runs/tiny-gemma/report.md").read_text()
    assert "| loss per learned token, nats |" in report and "answered greedily" not in report


# --- train DATA ---------------------------------------------------------------------------------------------------


def test_train_with_data_prepares_it_first(cli, tiny, data):
    Path("s.yaml").write_text("prepare: {valid: 0.25, seed: 3}\ntrain: {dtype: fp32}\n")
    args = ("train", data, "--model", tiny, "--rank", 4, "--max-steps", 1, "--seed", 9, "--config", "s.yaml", "--json")
    result = cli(*args)
    assert result.code == 0, result.err
    assert (result.json["stage"], result.json["status"]) == ("train", "done")
    prepared = result.json["prepare"]
    assert (prepared["stage"], prepared["status"], prepared["run"]) == ("prepare", "done", "runs/tiny-gemma")
    assert "prepare: done" in result.err and "train: done" in result.err
    stages = manifest_of(Path("runs/tiny-gemma"))["stages"]
    assert stages["prepare"]["summary"] == prepared["summary"]
    assert stages["prepare"]["config"]["valid"] == {"value": 0.25, "from": "file"}
    assert stages["prepare"]["config"]["seed"] == {"value": 3, "from": "file"}, "--seed is the training's"
    assert stages["train"]["config"]["seed"] == {"value": 9, "from": "flag"}
    again = cli(*args)
    assert (again.json["status"], again.json["prepare"]["status"]) == ("up-to-date", "up-to-date")


def test_train_without_data_says_nothing_of_prepare(cli, trained):
    result = cli("train", *QUICK, "--run", trained, "--json")
    assert result.json["status"] == "up-to-date"
    assert "prepare" not in result.json


def test_train_with_other_data_trains_on_that(cli, trained, tmp_path):
    more = write_rows(tmp_path / "more.jsonl", rows(20))
    result = cli("train", tmp_path / "rows.jsonl", more, *QUICK, "--run", trained, "--json")
    assert result.code == 0, result.err
    assert result.json["status"] == "done"
    assert result.json["prepare"]["summary"]["train_rows"] + result.json["prepare"]["summary"]["valid_rows"] == 20
    recorded = manifest_of(trained)["stages"]["prepare"]["config"]["data"]["value"]
    assert recorded == ["../../rows.jsonl", "../../more.jsonl"]
    status = cli("status", "--run", trained, "--json").json
    assert {status["stages"][s]["state"] for s in ("prepare", "train")} == {"done"}


@pytest.mark.parametrize(("flags", "settings"), [(("--rank", 0), ""), ((), "train: {rank: 0}"), ((), "prepare: {max_length: 1}"),
                                                 ((), "prepare: {valid: 0.95}")])
def test_settings_of_either_stage_are_checked_before_anything_is_prepared(cli, tiny, data, flags, settings):
    Path("s.yaml").write_text(settings)
    result = cli("train", data, "--model", tiny, *flags, "--config", "s.yaml", "--json")
    assert result.code == 2
    assert "cannot be used" in result.json["error"]["message"]
    assert not Path("runs").exists()


def test_data_that_cannot_be_prepared_stops_the_training(cli, trained, tmp_path):
    adapter = (trained / "tiny-gemma_lora_adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    for name, content in (("none.jsonl", None), ("broken.jsonl", "no JSON\n")):
        if content:
            (tmp_path / name).write_text(content)
        result = cli("train", name, *QUICK, "--run", trained, "--force", "--json")
        assert result.code == 2
        assert name in str(result.json["error"])
    assert (trained / "tiny-gemma_lora_adapter" / "adapter_model.safetensors").stat().st_mtime_ns == adapter
    assert cli("train", *QUICK, "--run", trained, "--json").json["status"] == "up-to-date"


def test_the_model_may_lie_in_the_directory_that_holds_the_runs(cli, tiny, data, monkeypatch, tmp_path):
    place = tmp_path / "my-model"
    shutil.copytree(tiny, place)
    monkeypatch.chdir(place)
    for args in (["prepare", data, "--model", "."], ["train", *QUICK], ["merge"]):
        result = cli(*args)
        assert result.code == 0, result.err
    assert Path("runs/my-model/manifest.json").exists()


def test_runs_behind_a_symbolic_link(cli, tiny, data, tmp_path):
    disk = tmp_path / "big" / "disk" / "deep"
    disk.mkdir(parents=True)
    Path("runs").symlink_to(disk)
    for args in (["prepare", data, "--model", tiny], ["train", *QUICK], ["prepare"], ["merge"]):
        result = cli(*args)
        assert result.code == 0, result.err


def test_status_notices_a_changed_base_model(cli, tiny, data, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    for args in (["prepare", data, "--model", base], ["train", *QUICK]):
        assert cli(*args).code == 0
    assert cli("status", "--json").json["stages"]["train"]["state"] == "done"
    with open(base / "chat_template.jinja", "w") as f:
        f.write((ROOT / "gemma_tune" / "encoding" / "templates" / "gemma.jinja").read_text())
    assert cli("status", "--json").json["stages"]["train"]["state"] == "stale: the base model changed"


def test_a_reader_that_has_seen_enough_is_no_fault_of_ours(trained):
    done = subprocess.run(["bash", "-c", f"printf 'a\\nb\\nc\\n' | {sys.executable} -m gemma_tune chat --run {trained} "
                                         "-n 200 -q | head -c 1"], capture_output=True, text=True, timeout=120)
    assert "unexpected" not in done.stderr and "Traceback" not in done.stderr


def test_status_reads_the_files_when_it_is_asked_to(cli, trained):
    """Bits that changed on the disk leave size and time stamp as they were."""
    weights = trained / "tiny-gemma_lora_adapter" / "adapter_model.safetensors"
    before, data = weights.stat(), bytearray(weights.read_bytes())
    assert cli("status", "--verify", "--json").json["stages"]["train"]["state"] == "done"
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert cli("status", "--json").json["stages"]["train"]["state"] == "done"
    damaged = cli("status", "--verify", "--json")
    assert "was changed" in damaged.json["stages"]["train"]["state"] and damaged.code == 1


def test_status_reads_each_file_once(cli, trained, monkeypatch):
    """A stage is looked at again for each of those that follow it."""
    from gemma_tune.base import fingerprints

    assert cli("merge", "--no-check", "--run", trained).code == 0
    read, plain = [], fingerprints.sha256_file
    monkeypatch.setattr(fingerprints, "sha256_file", lambda path: read.append(path) or plain(path))
    assert cli("status", "--verify", "--json").json["stages"]["merge"]["state"] == "done"
    weights = [path for path in read if path.name == "adapter_model.safetensors"]
    assert len(weights) == len(set(weights)) == 1
