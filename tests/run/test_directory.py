"""The run directory: a manifest that is whole or the old one, locks, swaps that survive a crash, fingerprints, states."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest

from gemma_tune.base import files, fingerprints
from gemma_tune.base.errors import BAD_INPUT, WORK_FAILED, UserError, WorkFailed
from gemma_tune.base.files import os_errors, recover, replacing_directory, write_atomic, write_json
from gemma_tune.base.fingerprints import fingerprint
from gemma_tune.base.words import model_name
from gemma_tune.run.directory import RunDir, describe, find_run
from gemma_tune.run.lock import Lock
from gemma_tune.run.manifest import Manifest, read_manifest
from gemma_tune.run.state import FOR_PEOPLE, NEEDS, keep_stamps, state_of
from support.command import MANIFEST_SCHEMA as SCHEMA
from support.command import SETTINGS, rows, write_rows

posix = pytest.mark.skipif(os.name == "nt", reason="kills and forks as POSIX does")
MODEL = {"id": "google/tiny-gemma", "name": "tiny-gemma", "source": "hub", "revision": "a" * 40, "path": None,
         "fingerprint": "google/tiny-gemma@" + "a" * 40, "files": {}}
OUTPUTS = {
    "prepare": {"train_rows": "data/train.jsonl", "valid_rows": "data/valid.jsonl", "tokens": "data/tokens",
                "rejected_rows": "data/rejected.jsonl", "duplicate_rows": "data/duplicates.jsonl",
                "data_report": "data/report.json"},
    "train": {"adapter": "tiny-gemma_lora_adapter"},
    "eval": {"report": "report.md", "answers": "answers.json"},
    "merge": {"merged": "tiny-gemma_lora_merged"},
    "export-ollama": {"gguf": "ollama/tiny-gemma-q8_0.gguf", "modelfile": "ollama/Modelfile",
                      "export_report": "ollama/report.md"},
}


def record(run: RunDir, stage: str, manifest: Manifest) -> None:
    """Describe a stage in the manifest as the stages themselves do."""
    inputs = {name: run.root / OUTPUTS[maker][output] for name, (maker, output) in NEEDS[stage].items()}
    if stage == "prepare":
        inputs["data_0"] = run.root.parent.parent / "rows.jsonl"
    manifest.stages[stage] = {
        "status": "done", "started": "2026-01-02T03:04:05+00:00", "ended": "2026-01-02T03:04:06+00:00",
        "base": manifest.model["fingerprint"],
        "config": SETTINGS.get(stage, {}) | {"seed": {"value": 42, "from": "default"}},
        "inputs": {name: describe(run, path) for name, path in inputs.items()},
        "outputs": {name: describe(run, run.root / path) for name, path in OUTPUTS[stage].items()}, "summary": {}}


def fill(path: Path, text: str) -> None:
    """Small files in place of an artifact, one of them below a folder."""
    if path.suffix or path.name == "Modelfile":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    else:
        for name in ("config.json", "weights.safetensors", "deep/er.txt"):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(f"{text} {name}")


@pytest.fixture
def run(tmp_path) -> RunDir:
    """A run that has been through every stage, with small files in place of models."""
    run = RunDir(tmp_path / "runs" / "tiny-gemma", "tiny-gemma")
    write_rows(tmp_path / "rows.jsonl", rows(3))
    manifest = Manifest(dict(MODEL))
    for stage, outputs in OUTPUTS.items():
        for path in outputs.values():
            fill(run.root / path, f"made by {stage}")
        record(run, stage, manifest)
    manifest.save(run)
    return run


def tree(root: Path) -> dict[str, bytes]:
    """Every file below ``root`` with its content."""
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def leftovers(root: Path) -> list[Path]:
    return [p for p in root.rglob("*") if p.name.startswith((".new-", ".old-"))]


def states(run: RunDir) -> dict[str, str]:
    manifest = read_manifest(run.root)
    return {stage: state_of(run, manifest, stage).status for stage in OUTPUTS}


def touch(path: Path, text: str | None = None, seconds: int = 10) -> None:
    """Write ``text``, or the same content, and move the modification time on."""
    before = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes() if text is None else text.encode())
    os.utime(path, ns=(before, before + seconds * 10**9))


# --- manifest.json

def test_a_manifest_comes_back_as_it_was_saved_and_fits_the_schema(run):
    content = json.loads(run.manifest.read_text(encoding="utf-8"))
    jsonschema.validate(content, SCHEMA)
    manifest = read_manifest(run.root)
    assert (manifest.model, manifest.stages) == (content["model"], content["stages"])
    before = run.manifest.read_bytes()
    manifest.save(run)
    assert run.manifest.read_bytes() == before
    assert read_manifest(run.root.parent) is None


def test_a_manifest_names_no_absolute_path_and_the_run_can_be_moved(run, tmp_path):
    assert str(tmp_path) not in run.manifest.read_text(encoding="utf-8")
    paths = {key: item["path"] for key, item in read_manifest(run.root).stages["prepare"]["inputs"].items()}
    assert paths == {"data_0": "../../rows.jsonl"}
    moved = tmp_path / "far" / "away" / "run"
    moved.parent.mkdir(parents=True)
    shutil.move(run.root, moved)
    assert set(states(RunDir(moved, "tiny-gemma")).values()) == {"done"}


@pytest.mark.parametrize("command", [("status",), ("prepare",)])
def test_a_run_that_was_copied_is_read_whole_once(cli, tiny, data, tmp_path, monkeypatch, command):
    """New time stamps are kept when the content is found to be the same."""
    assert cli("prepare", data, "--model", tiny).code == 0
    copied = tmp_path / "runs" / "copied"
    shutil.copytree(tmp_path / "runs" / "tiny-gemma", copied)
    for path in copied.rglob("*"):
        os.utime(path, (1, 1))
    read, whole = [], fingerprints.sha256_file
    monkeypatch.setattr(fingerprints, "sha256_file", lambda path: read.append(path.name) or whole(path))
    first = cli(*command, "--run", copied)
    assert first.code == 0 and "train.jsonl" in read and "train.arrow" in read, first.err
    read.clear()
    again = cli(*command, "--run", copied)
    assert again.code == 0 and not read, read
    assert states(RunDir(copied, "tiny-gemma"))["prepare"] == "done"
    jsonschema.validate(json.loads((copied / "manifest.json").read_text()), SCHEMA)


def test_a_run_that_is_in_use_or_cannot_be_written_is_looked_at_all_the_same(cli, run, monkeypatch):
    for path in run.root.rglob("*"):
        os.utime(path, (1, 1))
    before = run.manifest.read_bytes()
    with Lock(run.root, "train"):
        manifest = read_manifest(run.root)
        assert state_of(run, manifest, "train").status == "done"
        keep_stamps(run, manifest)
    assert run.manifest.read_bytes() == before
    keep_stamps(run, manifest)
    assert run.manifest.read_bytes() != before


def test_paths_are_relative_to_the_run_from_any_directory(run, tmp_path, monkeypatch):
    from gemma_tune.samples import training_path

    monkeypatch.chdir(tmp_path)
    short = RunDir(Path("runs/tiny-gemma"), "tiny-gemma")
    assert short.relative(Path("rows.jsonl")) == "../../rows.jsonl"
    assert short.relative(tmp_path / "rows.jsonl") == "../../rows.jsonl"
    assert short.relative(short.adapter) == run.relative(run.adapter) == "tiny-gemma_lora_adapter"
    assert short.relative(training_path()) == "gemma_tune:samples/finance.jsonl"


def test_a_name_that_is_not_unicode_can_be_recorded(run):
    manifest = read_manifest(run.root)
    manifest.stages["prepare"]["config"]["data"] = {"value": ["../\udcff.jsonl", "é\u2028"], "from": "flag"}
    manifest.save(run)
    run.manifest.read_bytes().decode("utf-8")
    assert read_manifest(run.root).stages == manifest.stages


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
@pytest.mark.parametrize("problem", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_while_saving_leaves_the_old_manifest(run, monkeypatch, step, problem):
    def fail(*_args, **_kwargs):
        raise problem

    before = tree(run.root)
    manifest = read_manifest(run.root)
    manifest.stages["train"]["summary"] = {"loss": 1.0}
    if step == "open":
        monkeypatch.setattr(files, "open", fail, raising=False)
    else:
        monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(WorkFailed if isinstance(problem, OSError) else KeyboardInterrupt) as raised:
        manifest.save(run)
    monkeypatch.undo()
    assert tree(run.root) == before
    if isinstance(problem, OSError):
        assert raised.value.exit_code == WORK_FAILED
        assert "disk is full" in raised.value.message


def damaged_manifests() -> dict[str, tuple[bytes, str]]:
    """Contents that a manifest must not have, and what the error has to say."""
    def changed(**parts) -> bytes:
        return json.dumps({"schema": 1, "gemma_tune": "0.1", "model": MODEL, "stages": {}, "libraries": {}}
                          | parts).encode()

    made = {"status": "done", "started": "s", "ended": "e", "base": "b", "config": SETTINGS["train"], "inputs": {},
            "outputs": {}, "summary": {}}

    def stage(**parts) -> bytes:
        return changed(stages={"train": made | parts})

    def output(path: object, **parts) -> bytes:
        return stage(outputs={"adapter": {"path": path, "sha256": "0" * 64, "bytes": 1, "stamp": "0" * 64} | parts})

    whole = changed()
    return {
        "empty": (b"", ":1 is damaged"),
        "cut off": (whole[:-20], ":1 is damaged"),
        "cut off on a later line": (b'{\n  "schema": 1,\n  "model": {', ":3 is damaged"),
        "not JSON": (b"schema = 1", ":1 is damaged"),
        "not text": (b"\x80\x81\xff", "is damaged"),
        "a list": (b"[]", "is damaged: it has no schema number"),
        "nested without end": (b"[" * 100_000, "is damaged"),
        "a number without end": (b'{"schema": ' + b"1" * 5000 + b"}", "is damaged"),
        "without schema": (b"{}", "is damaged: it has no schema number"),
        "schema as text": (changed(schema="1"), "is damaged: it has no schema number"),
        "schema as true": (changed(schema=True), "is damaged: it has no schema number"),
        "schema 0": (changed(schema=0), "is damaged: it has no schema number"),
        "newer schema": (changed(schema=2), "has schema 2"),
        "model as list": (changed(model=[]), "model: id, name, source or fingerprint is missing"),
        "model without fingerprint": (changed(model={k: v for k, v in MODEL.items() if k != "fingerprint"}),
                                      "model: id, name, source or fingerprint is missing"),
        "model with a number as id": (changed(model=MODEL | {"id": 1}), "model: id, name, source or finger"),
        "model name that leaves": (changed(model=MODEL | {"name": "../../etc"}), "model: name '../../etc'"),
        "model name of dots": (changed(model=MODEL | {"name": ".."}), "model: name '..'"),
        "empty model name": (changed(model=MODEL | {"name": ""}), "model: name ''"),
        "model files as text": (changed(model=MODEL | {"files": "x"}), "model: files"),
        "model files without sha256": (changed(model=MODEL | {"files": {"stamp": "x"}}), "model: files"),
        "revision as number": (changed(model=MODEL | {"revision": 7}), "model: revision or path"),
        "without revision": (changed(model={k: v for k, v in MODEL.items() if k != "revision"}),
                             "model: revision or path"),
        "stages as list": (changed(stages=[]), "stages: missing"),
        "stage as text": (changed(stages={"train": "done"}), "stages.train: config, inputs, outputs"),
        "unknown stage": (changed(stages={"bake": {}}), "stages.bake: there is no such stage"),
        "stage without base": (stage(base=None), "stages.train: base, started or ended"),
        "config without value": (stage(config=SETTINGS["train"] | {"seed": 42}), "stages.train.config.seed: value is missing"),
        "without the names of its data": (changed(stages={"prepare": made | {"config": {"valid": SETTINGS["prepare"]["valid"]}}}),
                                          "stages.prepare.config.data: value is missing"),
        "without a setting that each has": (stage(config={"learning_rate": SETTINGS["train"]["learning_rate"]}),
                                            "stages.train.config.rank: value is missing"),
        "null in place of a learning rate": (stage(config=SETTINGS["train"] | {"learning_rate": {"value": None, "from": "flag"}}),
                                             "stages.train.config.learning_rate: value is missing"),
        "text in place of a figure": (stage(summary={"effective_batch": "x"}), "stages.train.summary.effective_batch: "),
        "drawn without rows": (stage(summary={"drawn": [{"data": "a.jsonl", "of": 3}]}), "stages.train.summary.drawn: "),
        "unknown kind of rows": (stage(summary={"kind": "text"}), "stages.train.summary.kind: 'text' is none of conversations, "),
        "sight without a size": (stage(summary={"projector": {"file": "a", "senses": []}}), "stages.train.summary.projector: "),
        "unknown sense": (stage(summary={"projector": {"file": "a", "bytes": 1, "senses": ["smell"]}}), "is nothing to see with"),
        "null in place of a count": (stage(summary={"steps": None}), "stages.train.summary.steps: "),
        "null in place of a name": (stage(summary={"quants": {"q8_0": {"bytes": 3, "ollama_name": None}}}),
                                    "stages.train.summary.quants.q8_0.ollama_name: "),
        "null in place of a measure": (stage(summary={"quants": {"q8_0": {"bytes": 3, "ollama_name": "a", "perplexity": None}}}),
                                       "stages.train.summary.quants.q8_0.perplexity: "),
        "drawn as number": (stage(summary={"drawn": 3}), "stages.train.summary.drawn: "),
        "output as text": (stage(outputs={"adapter": "here"}), "stages.train.outputs.adapter: path, sha256"),
        "path as number": (output(3), "stages.train.outputs.adapter: path, sha256"),
        "output without stamp": (output("a", stamp=None), "stages.train.outputs.adapter: path, sha256"),
        "path outside": (output("../../etc/passwd"), "../../etc/passwd leaves the run directory"),
        "path outside after a detour": (output("data/../../x"), "leaves the run directory"),
        "absolute path": (output("/etc/passwd"), "/etc/passwd leaves the run directory"),
        "absolute path of Windows": (output("C:\\x"), "leaves the run directory"),
        "path outside, as Windows writes it": (output("..\\x"), "leaves the run directory"),
        "the run itself": (output("."), "leaves the run directory"),
        "input without sha256": (stage(inputs={"train_rows": {"path": "data/train.jsonl"}}),
                                 "stages.train.inputs.train_rows: path, sha256"),
    }


@pytest.mark.parametrize("kind", damaged_manifests())
def test_a_damaged_manifest_is_an_error_with_a_hint_and_nothing_is_touched(run, cli, kind):
    content, expected = damaged_manifests()[kind]
    run.manifest.write_bytes(content)
    before = tree(run.root)
    for args in (["status"], ["prepare", "rows.jsonl"], ["train"], ["chat", "--prompt", "hi"]):
        result = cli(*args, "--run", run.root, "--json")
        assert result.code == BAD_INPUT, args
        assert expected in result.err
        assert "manifest.json" in result.err
        assert result.err.count("Error:") == result.err.count("Hint:") == 1
        assert "Traceback" not in result.err
        error = result.json["error"]
        assert error["exit_code"] == BAD_INPUT
        assert ("upgrade" if kind == "newer schema" else "gemma-tune prepare") in error["hint"]
    assert tree(run.root) == before


def test_all_damages_of_a_manifest_are_named_together(run, cli):
    content = json.loads(run.manifest.read_text())
    del content["model"]["source"]
    del content["stages"]["merge"]["inputs"]
    content["stages"]["train"]["outputs"]["adapter"]["path"] = "/"
    run.manifest.write_text(json.dumps(content))
    result = cli("status", "--run", run.root, "--json")
    assert len(result.json["error"]["problems"]) == 3


def test_a_record_without_the_output_that_others_read_is_damage(run, cli):
    content = json.loads(run.manifest.read_text())
    del content["stages"]["train"]["outputs"]["adapter"]
    run.manifest.write_text(json.dumps(content))
    state = state_of(run, read_manifest(run.root), "train")
    assert (state.status, state.reason) == ("damaged", "the manifest does not name its adapter")


@pytest.mark.parametrize("make", [
    lambda path: path.mkdir(),
    lambda path: path.symlink_to(path.name),
], ids=["a directory", "a link to itself"])
def test_a_manifest_that_is_no_file_is_bad_input(tmp_path, cli, make):
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / "manifest.json")
    result = cli("status", "--run", "run")
    assert result.code == BAD_INPUT
    assert "run/manifest.json cannot be read" in result.err


def test_a_run_name_too_long_for_the_disk_is_bad_input(cli):
    assert cli("status", "--run", "x" * 300).code == BAD_INPUT


# --- which run

def saved(root: Path, age: int = 0) -> Path:
    """A manifest without stages, ``age`` seconds old."""
    root.mkdir(parents=True)
    Manifest(dict(MODEL)).save(RunDir(root, "tiny-gemma"))
    at = time.time() - age
    os.utime(root / "manifest.json", (at, at))
    return root


def test_the_run_is_the_named_one_else_the_models_else_the_newest(cli, monkeypatch):
    saved(Path("runs/old"), 100)
    saved(Path("runs/new"), 10)
    saved(Path("runs/tiny-gemma"), 50)
    saved(Path("elsewhere"), 0)
    saved(Path("mine"), 200)

    def used(*args: str) -> str:
        result = cli("status", "--json", *args)
        assert result.code == 0, result.err
        return result.json["run"]

    assert used() == "runs/new"
    assert used("--model", "google/tiny-gemma") == "runs/tiny-gemma"
    assert used("--run", "elsewhere", "--model", "google/tiny-gemma") == "elsewhere"
    monkeypatch.setenv("GEMMA_TUNE_RUN", "mine")
    assert used() == used("--model", "google/tiny-gemma") == "mine"
    assert used("--run", "runs/old") == "runs/old"
    monkeypatch.setenv("GEMMA_TUNE_RUN", "")
    assert used() == "runs/new"


def test_without_any_run_the_hint_is_how_to_start_one(cli):
    Path("runs/half").mkdir(parents=True)
    for args in (["status"], ["train"], ["chat", "--prompt", "hi"]):
        result = cli(*args)
        assert result.code == BAD_INPUT
        assert "there is no run under runs/ yet" in result.err
        assert "gemma-tune prepare" in result.err


def test_a_named_run_that_does_not_exist_yet_is_an_error_except_for_prepare(cli):
    result = cli("train", "--run", "nowhere", "--model", "google/tiny-gemma")
    assert result.code == BAD_INPUT
    assert "nowhere is not a run yet" in result.err
    assert "gemma-tune prepare YOUR.jsonl --run nowhere --model google/tiny-gemma" in result.err
    assert not Path("nowhere").exists()


def test_a_tilde_means_home_also_where_no_shell_expands_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    assert find_run("~/run", None) == tmp_path / "home" / "run"


@pytest.mark.parametrize("model_id, name", [
    ("google/gemma-3-270m-it", "gemma-3-270m-it"),
    ("gemma", "gemma"),
    ("demo", "demo"),
    ("models/my model (v2)!/", "my-model-v2"),
    ("/data/Gemma_2.5.gguf", "Gemma_2.5"),
    ("C:\\models\\tiny\\", "tiny"),
    ("a/..b", "b"),
    ("a/.hidden", "hidden"),
    ("a/-x-", "x"),
    ("x/né", "n"),
])
def test_names_follow_the_last_part_of_the_models_id(model_id, name):
    assert model_name(model_id) == name
    assert model_name(name) == name


@pytest.mark.parametrize("model_id", ["", "/", "..", "a/..", ".gguf", "模型", "///"])
def test_a_model_without_a_name_for_paths_is_refused(model_id):
    with pytest.raises(UserError) as raised:
        model_name(model_id)
    assert repr(model_id) in raised.value.message
    assert raised.value.hint


def test_a_directory_is_called_by_its_own_name(tmp_path, monkeypatch):
    (tmp_path / "tiny-gemma" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "tiny-gemma")
    assert find_run(None, ".") == find_run(None, "sub/..") == Path("runs/tiny-gemma")


# --- swaps and crashes

FILES = {"prepare": ("train.jsonl", "valid.jsonl", "rejected.jsonl", "duplicates.jsonl", "report.json",
                     "tokens/train.arrow", "tokens/valid.arrow"),
         "train": ("config.json", "weights.safetensors")}
WRITER = f"FILES, OUTPUTS, SETTINGS = {FILES!r}, {OUTPUTS!r}, {SETTINGS!r}" + """
import json, os, signal, sys
from pathlib import Path
from gemma_tune.base.files import replacing_directory
from gemma_tune.run.directory import RunDir, describe
from gemma_tune.run.lock import Lock
from gemma_tune.run.manifest import Manifest

MODEL = json.loads(sys.argv[2])

def write(root, generation):
    run = RunDir(Path(root), "tiny-gemma")
    with Lock(run.root, "train"):
        manifest = Manifest(MODEL)
        for stage, target, names in (("prepare", run.data, FILES["prepare"]), ("train", run.adapter, FILES["train"])):
            with replacing_directory(target) as folder:
                for name in names:
                    (folder / name).parent.mkdir(exist_ok=True)
                    (folder / name).write_text(f"{generation}\\n" * 500)
            outputs = {name: run.root / path for name, path in OUTPUTS[stage].items()}
            manifest.stages[stage] = {
                "status": "done", "started": "2026-01-02T03:04:05+00:00", "ended": "2026-01-02T03:04:06+00:00",
                "base": MODEL["fingerprint"], "config": SETTINGS[stage], "inputs": {},
                "outputs": {name: describe(run, path) for name, path in outputs.items()},
                "summary": {"generation": generation}}
        manifest.save(run)
"""
# Kills itself before the n-th call that changes the disk, for every n until the writing ends by itself.
AT_EVERY_STEP = WRITER + """
import shutil
CALLS = ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir")

def dies_at(step):
    count = 0
    def counted(call):
        def wrapper(*args, **kwargs):
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return wrapper
    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))

base = Path(sys.argv[1])
write(base / "0", 1)
for step in range(1, 200):
    root = base / str(step)
    shutil.copytree(base / "0", root)
    child = os.fork()
    if child == 0:
        dies_at(step)
        write(root, 2)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
print(step)
"""
FOREVER = WRITER + """
generation = int(sys.argv[3])
print("ready", flush=True)
while True:
    generation += 1
    write(sys.argv[1], generation)
"""


def check_after_crash(root: Path, generations: range) -> tuple[int, set[int]]:
    """What every crash must leave: the manifest and each artifact is whole, and none is older than its record."""
    run = RunDir(root, "tiny-gemma")
    with Lock(root, "train"):
        jsonschema.validate(json.loads(run.manifest.read_text(encoding="utf-8")), SCHEMA)
        manifest = read_manifest(root)
        recorded = {stage["summary"]["generation"] for stage in manifest.stages.values()}
        assert len(recorded) == 1 and recorded <= set(generations)
        found = set()
        for stage, folder in (("prepare", run.data), ("train", run.adapter)):
            for item in manifest.stages[stage]["outputs"].values():
                assert (root / item["path"]).exists()
            contents = {path: content.decode() for path, content in tree(folder).items()}
            assert set(contents) == set(FILES[stage])
            [text] = set(contents.values())
            number = int(text.split()[0])
            assert text == f"{number}\n" * 500
            state = state_of(run, manifest, stage)
            assert state.status == ("done" if {number} == recorded else "damaged"), state
            found.add(number)
        assert min(found) >= max(recorded)
        assert not leftovers(root)
    return recorded.pop(), found


@posix
def test_a_crash_at_any_step_leaves_whole_artifacts_and_a_whole_manifest(tmp_path):
    done = subprocess.run([sys.executable, "-c", AT_EVERY_STEP, tmp_path / "runs", json.dumps(MODEL)],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    steps = int(done.stdout)
    assert steps > 25, "every call was counted"
    seen = [check_after_crash(tmp_path / "runs" / str(step), range(1, 3)) for step in range(1, steps)]
    assert {recorded for recorded, _ in seen} == {1, 2}, "crashes before and after the manifest"
    assert {1, 2} in [found for _, found in seen], "a crash between two swaps"


@posix
def test_kills_at_random_moments_leave_whole_artifacts_and_a_whole_manifest(tmp_path):
    root = tmp_path / "runs" / "tiny-gemma"
    dice = random.Random(7)
    last = generation = kills = 0
    while kills < 10 or last < 3:  # a slow machine gets more rounds
        kills += 1
        with subprocess.Popen([sys.executable, "-c", FOREVER, root, json.dumps(MODEL), str(generation)],
                              stdout=subprocess.PIPE) as writer:
            assert writer.stdout.readline() == b"ready\n"
            while not (root / "manifest.json").exists():
                time.sleep(0.01)
            time.sleep(dice.uniform(0, 0.25))
            writer.send_signal(signal.SIGKILL)
        recorded, found = check_after_crash(root, range(1, 10_000))
        assert recorded >= last, "a manifest never goes back"
        last, generation = recorded, max(found)


def test_a_directory_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "deep" / "artifact"
    for text in ("one", "two"):
        with replacing_directory(target) as folder:
            fill(folder, text)
            if text == "two":
                assert (target / "config.json").read_text() == "one config.json"
                (folder / "extra").write_text("only in the second")
    assert (target / "deep" / "er.txt").read_text() == "two deep/er.txt"
    assert (target / "extra").exists()
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("problem", [RuntimeError("no"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_a_failure_while_filling_a_directory_keeps_the_old_one(tmp_path, problem):
    target = tmp_path / "artifact"
    fill(target, "old")
    before = tree(tmp_path)
    with pytest.raises(type(problem)), replacing_directory(target) as folder:
        fill(folder, "new")
        raise problem
    assert tree(tmp_path) == before


@pytest.mark.parametrize("which", [1, 2])
def test_a_failed_rename_keeps_the_old_directory(tmp_path, monkeypatch, which):
    target = tmp_path / "artifact"
    fill(target, "old")
    before = tree(tmp_path)
    calls, rename = [], os.rename

    def fails(*args):
        calls.append(args)
        if len(calls) == which:
            raise OSError(errno.EIO, "Input/output error")
        rename(*args)

    monkeypatch.setattr(files.os, "rename", fails)
    with pytest.raises(OSError, match="Input/output"), replacing_directory(target) as folder:
        fill(folder, "new")
    assert tree(tmp_path) == before


def test_a_file_in_the_way_of_a_directory_is_not_swept_away(tmp_path):
    (tmp_path / "artifact").write_text("mine")
    with pytest.raises(UserError) as raised, os_errors(tmp_path), replacing_directory(tmp_path / "artifact") as folder:
        fill(folder, "new")
    assert raised.value.exit_code == BAD_INPUT
    assert "artifact is in the way" in raised.value.message
    assert tree(tmp_path) == {"artifact": b"mine"}


def test_read_only_files_can_be_part_of_an_artifact(tmp_path, monkeypatch):
    """Files copied from a hub's cache keep their mode; the superuser may write them all the same."""
    modes, really = [], os.open
    monkeypatch.setattr(files.os, "open", lambda path, flags, *a, **k: modes.append(flags) or really(path, flags, *a, **k))
    with replacing_directory(tmp_path / "artifact") as folder:
        (folder / "tokenizer.json").write_text("{}")
        (folder / "tokenizer.json").chmod(0o444)
    assert (tmp_path / "artifact" / "tokenizer.json").read_text() == "{}"
    if os.name != "nt":
        assert not [flags for flags in modes if flags & (os.O_RDWR | os.O_WRONLY)]


def test_recovery_puts_the_old_artifact_back_and_sweeps_up(tmp_path):
    fill(tmp_path / ".old-lost", "finished")
    fill(tmp_path / ".new-lost", "half")
    fill(tmp_path / "there", "new")
    fill(tmp_path / ".old-there", "old")
    (tmp_path / ".new-manifest.json").write_text("{")
    assert recover(tmp_path, ["lost", "there", "*.json"]) == ["lost"]
    assert (tmp_path / "lost" / "config.json").read_text() == "finished config.json"
    assert (tmp_path / "there" / "config.json").read_text() == "new config.json"
    assert not leftovers(tmp_path)
    assert recover(tmp_path / "missing", ["*"]) == []


def test_recovery_keeps_away_from_what_lies_deeper(tmp_path):
    """A run directory can be somebody's home, or hold other runs that are being written."""
    for path in ("other/.new-data/x", "other/.old-data/x", "a/b/.new-note.txt"):
        fill(tmp_path / path, "not ours")
    before = tree(tmp_path)
    with Lock(tmp_path, "train") as lock:
        assert lock.restored == []
    assert {path: text for path, text in tree(tmp_path).items() if path != ".lock"} == before


def test_a_stage_tells_that_it_put_an_artifact_back(cli, tiny, data):
    run = Path("runs/tiny-gemma")
    assert cli("prepare", data, "--model", tiny).code == 0
    before = tree(run / "data")
    os.rename(run / "data", run / ".old-data")
    fill(run / ".new-data" / "train.jsonl", "half")
    result = cli("prepare", data, "--json")
    assert result.code == 0, result.err
    assert "killed while replacing data: the old one is back" in result.err
    assert result.json["status"] == "up-to-date"
    assert tree(run / "data") == before
    assert not leftovers(run)


# --- the lock

HOLDER = """
import sys
from pathlib import Path
from gemma_tune.run.lock import Lock
with Lock(Path(sys.argv[1]), "train"):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(root: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, root], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_second_writer_learns_who_is_at_work_and_a_dead_owners_lock_is_taken_over(cli, tiny, data):
    root = Path("runs/tiny-gemma")
    assert cli("prepare", data, "--model", tiny).code == 0
    with holder(root) as owner:
        before = tree(root)
        result = cli("prepare", data, "--force", "--json")
        assert result.code == BAD_INPUT
        assert result.json["error"]["message"].startswith(f"{root} is in use by process {owner.pid} (train, since 20")
        assert "--run" in result.json["error"]["hint"]
        assert cli("status").code == 0, "reading is always possible"
        assert tree(root) == before
        owner.kill()
    assert (root / ".lock-owner.json").exists(), "the dead owner's"
    result = cli("prepare", data, "--force", "--json")
    assert result.code == 0, result.err
    assert not (root / ".lock-owner.json").exists()


def test_the_lock_is_free_again_after_its_owner_ends_well_or_badly(tmp_path):
    with holder(tmp_path) as owner:
        with pytest.raises(UserError, match=f"process {owner.pid} "), Lock(tmp_path, "merge"):
            pass
        owner.communicate(b"")
    assert owner.returncode == 0
    with pytest.raises(ZeroDivisionError), Lock(tmp_path, "merge"):
        assert json.loads((tmp_path / ".lock-owner.json").read_text())["pid"] == os.getpid()
        raise ZeroDivisionError
    with Lock(tmp_path, "merge"):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', "\udc80"])
def test_an_owners_note_that_cannot_be_read_does_not_matter(tmp_path, text):
    with Lock(tmp_path, "train"):
        (tmp_path / ".lock-owner.json").write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(UserError, match="in use by another process"), Lock(tmp_path, "merge"):
            pass


def test_a_lock_that_cannot_be_noted_is_not_kept(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(WorkFailed), Lock(tmp_path, "train"):
            pass
    with Lock(tmp_path, "train"):
        pass


# --- full and forbidden disks

def full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "data/train.jsonl")


@pytest.mark.parametrize("where", ["prepare.spool.Spool.add", "encoding.tokens.TokenWriter.add", "prepare.files.write_json"])
def test_a_full_disk_fails_the_work_and_leaves_what_was_there(cli, tiny, data, tmp_path, monkeypatch, where):
    """In either pass, or at the very end."""
    run = Path("runs/tiny-gemma")
    assert cli("prepare", data, "--model", tiny).code == 0
    before = tree(run)
    more = write_rows(tmp_path / "more.jsonl", rows(20))
    with monkeypatch.context() as patch:
        patch.setattr(f"gemma_tune.{where}", full)
        result = cli("prepare", more, "--json")
    assert result.code == WORK_FAILED
    assert result.json["error"]["message"] == "the disk is full: data/train.jsonl"
    assert "free some space" in result.err
    assert tree(run) == before
    assert cli("status", "--json").json["stages"]["prepare"]["state"] == "done"
    assert cli("prepare", more, "--json").json["summary"]["rows"] == 20


@pytest.mark.parametrize("number, words, code", [
    (errno.ENOSPC, "the disk is full", WORK_FAILED), (errno.EDQUOT, "the disk is full", WORK_FAILED),
    (errno.EACCES, "no permission to write", BAD_INPUT), (errno.EPERM, "no permission to write", BAD_INPUT),
    (errno.EROFS, "it lies on a read-only file system", BAD_INPUT), (errno.ENOTDIR, "is in the way", BAD_INPUT),
    (errno.EISDIR, "is in the way", BAD_INPUT), (errno.EEXIST, "is in the way", BAD_INPUT),
])
def test_refusals_of_the_operating_system_are_explained(number, words, code):
    with pytest.raises(UserError) as raised, os_errors(Path("run")):
        raise OSError(number, os.strerror(number), "run/data")
    assert words in raised.value.message and "run/data" in raised.value.message
    assert raised.value.exit_code == code
    assert raised.value.hint


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_of_a_run_that_cannot_be_written_a_copy_is_worked_on(number, tmp_path):
    """In another directory the next stages would find nothing."""
    for known in (False, True):
        if known:
            (tmp_path / "manifest.json").touch()
        with pytest.raises(UserError) as raised, os_errors(tmp_path):
            raise OSError(number, os.strerror(number), str(tmp_path / ".lock"))
        assert (f"the whole directory {tmp_path}, to" in raised.value.hint) is known
        assert "--run DIR" in raised.value.hint


def test_a_model_s_name_leaves_room_for_what_files_are_called_after_it():
    """Else a training would fail when its adapter gets its name, at the very end."""
    longest = RunDir(Path("run"), model_name(f"models/{180 * 'm'}.gguf"))
    made = [longest.start_adapter(64 * "0"), longest.worse_adapter, longest.merged,
            longest.ollama / f".new-{longest.model_name}-q4_k_m.gguf"]
    assert all(len(path.name) + len(".incomplete-") + 10 < 255 for path in made)
    with pytest.raises(UserError, match="has 181 characters") as raised:
        model_name(181 * "m")
    assert "at most 180" in raised.value.hint


def test_other_failures_of_the_operating_system_are_not_disguised():
    with pytest.raises(OSError) as raised, os_errors(Path("run")):
        raise OSError(errno.EIO, "Input/output error")
    assert not isinstance(raised.value, UserError)


def test_a_read_only_place_is_bad_input(cli, tiny, data, monkeypatch):
    """The superuser may write everywhere, so the refusal is simulated."""
    def refuse(path, *_args, **_kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(files.os, "mkdir", refuse)
    result = cli("prepare", data, "--model", tiny, "--run", "locked/run")
    assert result.code == BAD_INPUT
    assert "no permission to write locked" in result.err
    assert "--run DIR" in result.err


def test_a_file_where_the_run_should_be_is_bad_input(cli, tiny, data):
    Path("taken").write_text("mine")
    for place in ("taken", "taken/run"):
        result = cli("prepare", data, "--model", tiny, "--run", place)
        assert result.code == BAD_INPUT, result.err
        assert "taken" in result.err and "--run DIR" in result.err
    Path("half").mkdir()
    Path("half/data").write_text("mine")
    result = cli("prepare", data, "--model", tiny, "--run", "half")
    assert result.code == BAD_INPUT
    assert "half is no run yet, and half/data lies where results of one would take the place of it" in result.err
    assert (Path("taken").read_text(), Path("half/data").read_text()) == ("mine", "mine")


def test_a_write_that_fails_half_way_leaves_no_temporary_file(tmp_path, monkeypatch):
    write_atomic(tmp_path / "file", b"old")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="space"):
        write_json(tmp_path / "file", {"much": "text"})
    assert tree(tmp_path) == {"file": b"old"}


# --- fingerprints

@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Names of the files whose content is read for a fingerprint."""
    names, really = [], fingerprints.sha256_file
    monkeypatch.setattr(fingerprints, "sha256_file", lambda path: names.append(path.name) or really(path))
    return names


def test_a_fingerprint_follows_the_content_alone(tmp_path):
    for name in ("a", "b"):
        fill(tmp_path / name, "same")
        (tmp_path / name / ".hidden").write_text(name)
    touch(tmp_path / "b" / "config.json")
    a, b = fingerprint(tmp_path / "a"), fingerprint(tmp_path / "b")
    assert (a["sha256"], a["bytes"]) == (b["sha256"], b["bytes"])
    assert a["stamp"] != b["stamp"]
    single = tmp_path / "a" / "config.json"
    assert fingerprint(single)["sha256"] == fingerprints.sha256_file(single)
    assert fingerprint(single)["bytes"] == len("same config.json")


@pytest.mark.parametrize("change", [
    lambda d: touch(d / "config.json", "SAME config.json"),
    lambda d: (d / "config.json").rename(d / "config2.json"),
    lambda d: (d / "deep" / "er.txt").unlink(),
    lambda d: (d / "new").write_text(""),
    lambda d: (d / "deep" / "er.txt").rename(d / "er.txt"),
], ids=["other content of the same size", "renamed", "removed", "added", "moved"])
def test_a_changed_directory_has_another_fingerprint(tmp_path, change):
    fill(tmp_path / "a", "same")
    before = fingerprint(tmp_path / "a")
    change(tmp_path / "a")
    assert fingerprint(tmp_path / "a", before)["sha256"] != before["sha256"]


def test_unchanged_files_are_not_read_again(tmp_path, reads):
    fill(tmp_path / "a", "same")
    known = fingerprint(tmp_path / "a")
    assert sorted(reads) == ["config.json", "er.txt", "weights.safetensors"]
    reads.clear()
    assert fingerprint(tmp_path / "a", known) == known
    assert fingerprint(tmp_path / "a", known | {"path": "elsewhere"}) == known
    assert reads == []
    touch(tmp_path / "a" / "config.json")
    assert fingerprint(tmp_path / "a", known)["sha256"] == known["sha256"]
    assert len(reads) == 3


def test_a_moved_input_is_described_at_its_new_place(run, tmp_path, reads):
    old = read_manifest(run.root).stages["prepare"]["inputs"]["data_0"]
    (tmp_path / "sub").mkdir()
    new = (tmp_path / "rows.jsonl").rename(tmp_path / "sub" / "rows.jsonl")
    reads.clear()
    assert describe(run, new, old) == old | {"path": "../../sub/rows.jsonl"}
    assert reads == []


def test_nothing_has_no_fingerprint(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        fingerprint(tmp_path / "nothing")


# --- states

def test_an_unchanged_run_is_done_and_is_not_read_again(run, reads):
    reads.clear()
    assert set(states(run).values()) == {"done"}
    assert reads == []
    for stage in OUTPUTS:
        assert state_of(run, Manifest(dict(MODEL)), stage).status == "missing"


def test_touched_files_are_the_same_files(run, reads):
    touch(run.train_rows)
    touch(run.adapter / "config.json")
    reads.clear()
    assert set(states(run).values()) == {"done"}
    assert reads


@pytest.mark.parametrize("stage", OUTPUTS)
def test_lost_and_changed_artifacts_are_damage(run, stage):
    for name, path in OUTPUTS[stage].items():
        if name in FOR_PEOPLE:
            continue
        artifact = run.root / path
        file = artifact / "weights.safetensors" if artifact.is_dir() else artifact
        before = file.read_text()
        touch(file, before.replace("made", "MADE"))
        state = state_of(run, read_manifest(run.root), stage)
        assert (state.status, state.reason) == ("damaged", f"{path} was changed")
        file.write_text(before)
        assert state_of(run, read_manifest(run.root), stage).status == "done"
        artifact.rename(run.root / "away")
        state = state_of(run, read_manifest(run.root), stage)
        assert (state.status, state.reason) == ("damaged", f"{path} is gone")
        (run.root / "away").rename(artifact)


def test_an_artifact_that_cannot_be_read_is_damage(run, cli, monkeypatch):
    touch(run.adapter / "config.json")

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(fingerprints, "sha256_file", refuse)
    result = cli("status", "--run", run.root, "--json")
    assert result.code == 0, result.err
    assert result.json["stages"]["train"]["state"] == "damaged: tiny-gemma_lora_adapter cannot be read: Permission denied"


def test_changed_source_data_make_every_stage_stale(run, tmp_path):
    touch(tmp_path / "rows.jsonl", "other rows")
    assert set(states(run).values()) == {"stale"}
    assert "rows.jsonl was changed" in state_of(run, read_manifest(run.root), "prepare").reason
    (tmp_path / "rows.jsonl").unlink()  # a run can be moved without its sources
    assert set(states(run).values()) == {"done"}


def test_another_base_model_makes_every_stage_stale(run):
    manifest = read_manifest(run.root)
    manifest.model["fingerprint"] = "another"
    for stage in OUTPUTS:
        state = state_of(run, manifest, stage)
        assert (state.status, state.reason) == ("stale", "the base model changed")


@pytest.mark.parametrize("again, stale", [
    ("prepare", {"train", "eval", "merge", "export-ollama"}),
    ("train", {"eval", "merge", "export-ollama"}),
    ("merge", {"export-ollama"}),
    ("eval", set()),
    ("export-ollama", set()),
])
def test_a_stage_that_ran_again_makes_all_that_follow_stale(run, again, stale):
    manifest = read_manifest(run.root)
    for path in OUTPUTS[again].values():
        fill(run.root / path, "made once more")
    record(run, again, manifest)
    manifest.save(run)
    assert {stage for stage, status in states(run).items() if status == "stale"} == stale
    assert {status for stage, status in states(run).items() if stage not in stale} == {"done"}
    if stale:
        direct = next(s for s in OUTPUTS if again in {maker for maker, _ in NEEDS[s].values()})
        assert f"`{again}` has run again with another result" in state_of(run, manifest, direct).reason


def test_the_same_result_again_makes_nothing_stale(run):
    manifest = read_manifest(run.root)
    for path in OUTPUTS["train"].values():
        fill(run.root / path, "made by train")
    record(run, "train", manifest)
    assert {state_of(run, manifest, stage).status for stage in OUTPUTS} == {"done"}


def test_damage_upstream_makes_what_follows_stale(run, cli):
    shutil.rmtree(run.adapter)
    result = cli("status", "--run", run.root, "--json").json
    assert result["stages"]["train"]["state"] == "damaged: tiny-gemma_lora_adapter is gone"
    assert result["stages"]["merge"]["state"].startswith("stale: `train` is damaged: tiny-gemma_lora_adapter is gone")
    assert result["stages"]["export-ollama"]["state"].startswith("stale: `merge` is stale: `train` is damaged")
    assert result["stages"]["prepare"]["state"] == "done"
    assert result["next"] == f"gemma-tune train --run {run.root}"


def test_status_reads_only(run, cli):
    before = {p: p.stat().st_mtime_ns for p in run.root.rglob("*")}
    assert cli("status", "--run", run.root).code == 0
    assert {p: p.stat().st_mtime_ns for p in run.root.rglob("*")} == before
