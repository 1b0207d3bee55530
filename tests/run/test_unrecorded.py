"""Killed between a result's making and its record: the result is found, whole, and recorded by the next command."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import json
import os
import shutil
from pathlib import Path

import jsonschema
import pytest
from filelock import FileLock

from gemma_tune.base import files
from gemma_tune.base.files import new_directory, recover, replacing_directory
from gemma_tune.base.listener import Listener
from gemma_tune.run import stage
from gemma_tune.run.directory import MADE, RunDir, describe
from gemma_tune.run.lock import Lock, finish_killed
from gemma_tune.run.manifest import Manifest, read_manifest
from gemma_tune.run.state import require_output
from gemma_tune.run.unrecorded import current_manifest
from support.command import MANIFEST_SCHEMA, QUICK, SETTINGS, rows, write_rows

RUN = Path("runs/tiny-gemma")


class Killed(BaseException):
    """Nothing that happens after it counts, as after a kill."""


def killed(*_args, **_kwargs):
    raise Killed


def leftovers(run: Path) -> list[str]:
    return sorted(p.name for p in run.rglob(".*") if p.name.startswith((".new-", ".old-", ".next-")))


MOMENTS = {"before anything took its place": (stage, "put_in_place"), "before the record": (Manifest, "settle")}


@pytest.fixture(params=MOMENTS)
def moment(request, monkeypatch):
    """Run a command that is killed at this moment."""
    def run(cli, *args):
        with monkeypatch.context() as patch:
            patch.setattr(*MOMENTS[request.param], staticmethod(killed))
            with pytest.raises(Killed):
                cli(*args)
    return run


@pytest.mark.parametrize("first", [True, False])
def test_prepared_data_is_taken_up(cli, tiny, data, tmp_path, moment, first):
    if not first:
        assert cli("prepare", data, "--model", tiny).code == 0
    more = write_rows(tmp_path / "more.jsonl", rows(20))
    moment(cli, "prepare", more, "--model", tiny, "--run", RUN)
    assert ".next-manifest.json" in leftovers(RUN)
    result = cli("prepare", more, "--model", tiny, "--run", RUN, "--json")
    assert result.code == 0, result.err
    assert "killed before it could record the result of `prepare`: it is whole, and recorded now" in result.err
    assert (result.json["status"], result.json["summary"]["rows"]) == ("up-to-date", 20)
    jsonschema.validate(json.loads((RUN / "manifest.json").read_text()), MANIFEST_SCHEMA)
    assert not leftovers(RUN)


@pytest.mark.parametrize("moment", ["before the record"], indirect=True)
def test_a_finished_adapter_is_not_thrown_away(cli, trained, moment, monkeypatch):
    """What only reads records it too; nothing asks for another training."""
    before = read_manifest(trained).finished_trainings
    moment(cli, "train", *QUICK, "--seed", 7, "--force", "--run", trained)
    require_output(RunDir(trained, "tiny-gemma"), current_manifest(trained), "chat", "train", "adapter")
    monkeypatch.setattr("gemma_tune.run.lock._PUTTING", 0.1)
    with FileLock(trained / ".lock"):  # as long as another command works there, it is left to that one
        finish_killed(trained, Listener())
        assert leftovers(trained)
    result = cli("status", "--verify", "--run", trained, "--json")
    assert "the result of `train`: it is whole, and recorded now" in result.err
    assert result.json["stages"]["train"]["state"] == "done" and not leftovers(trained)
    assert cli("merge", "--no-check", "--run", trained).code == 0
    assert read_manifest(trained).finished_trainings != before
    assert {cli("status", "--run", trained, "--json").json["stages"][name]["state"] for name in ("train", "merge")} == {
        "done"}
    assert not leftovers(trained)


@pytest.mark.parametrize(("command", "moment"), [("merge", "before anything took its place"),
                                                 ("export-ollama", "before the record")], indirect=["moment"])
def test_merged_models_and_exports_are_taken_up(cli, merged, export, moment, command):
    args = {"merge": ("--no-check",), "export-ollama": ("--no-verify", "--no-measure", "--quant", "q8_0")}[command]
    moment(cli, command, *args, "--force", "--run", merged)
    result = cli(command, *args, "--run", merged, "--json")
    assert result.code == 0, result.err
    assert f"the result of `{command}`: it is whole" in result.err and result.json["status"] == "up-to-date"
    assert not leftovers(merged)


class Heard(Listener):
    """A listener that keeps the warnings."""

    def __init__(self):
        self.warnings = []

    def warn(self, text):
        self.warnings.append(text)


def state(root: Path) -> str:
    """Of the stage that :func:`made` records, as `status --verify` finds it."""
    return stage.state_of(RunDir(root, "tiny-gemma"), current_manifest(root), "train",
                          lambda run, path, _: describe(run, path)).status


def made(root: Path, generation: int) -> None:
    """Two artifacts with their record, as a stage makes them."""
    run = RunDir(root, "tiny-gemma")
    targets = {"tokens": run.data, "adapter": run.adapter}
    with Lock(root, "train"):
        fresh = {}
        for target in targets.values():
            with new_directory(target) as folder:
                (folder / "text").write_text(f"{generation}")
            fresh[target] = folder
        manifest = Manifest({"id": "a/tiny-gemma", "name": "tiny-gemma", "source": "hub", "revision": None, "path": None,
                             "fingerprint": "f", "files": {}})
        manifest.stages["train"] = {
            "status": "done", "started": "s", "ended": "e", "base": "f", "config": SETTINGS["train"], "inputs": {},
            "outputs": {name: describe(run, path, lies_at=fresh[path]) for name, path in targets.items()},
            "summary": {"generation": generation}}
        manifest.announce(run)
        stage.put_results(run, manifest, fresh)


@pytest.mark.parametrize("reads", [True, False])
def test_after_a_kill_at_any_step_the_record_is_that_of_what_is_there(tmp_path, monkeypatch, reads):
    """From one call that changes the disk on, every further one fails as well: nothing tidies up after a kill."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr("gemma_tune.run.manifest.library_versions", dict)  # takes longer than all the rest
    made(tmp_path / "0", 1)
    found = []
    for step in itertools.count(1):
        root = tmp_path / str(step)
        shutil.copytree(tmp_path / "0", root)
        calls = itertools.count(1)

        def counted(call, calls=calls, step=step):
            return lambda *args, **kwargs: killed() if next(calls) >= step else call(*args, **kwargs)

        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync"):
                patch.setattr(os, name, counted(getattr(os, name)))
            made(root, 2)
        gc.collect(0)  # a lock that its owner could not give back
        if reads:
            finish_killed(root, heard := Heard())
            assert state(root) == "done", step
        with Lock(root, "merge") as lock:
            assert not (reads and lock.taken_up), step
            recorded = read_manifest(root).stages["train"]["summary"]["generation"]
            texts = {(root / name / "text").read_text() for name in ("data", "tiny-gemma_lora_adapter")}
        assert texts == {str(recorded)} and not leftovers(root), step
        found.append((recorded, bool(lock.taken_up or reads and heard.warnings)))
        if next(calls) <= step:  # it came to its end
            break
    assert [*dict.fromkeys(found)] == [(1, False), (2, True), (2, False)]


def test_what_was_changed_since_is_not_taken_up(cli, tiny, data, moment):
    moment(cli, "prepare", data, "--model", tiny)
    for path in RUN.glob("*data/train.jsonl"):
        path.write_text("{}")
    result = cli("prepare", data, "--model", tiny, "--json")
    assert result.code == 0 and "recorded now" not in result.err and result.json["status"] == "done"
    assert not leftovers(RUN)


@pytest.mark.parametrize("content", ["{", '{"schema": 99}'])
def test_a_damaged_manifest_loses_nothing_that_was_announced(cli, trained, moment, content):
    """It is refused before anything is swept up; moved away, as the hint says, it leaves its place to the announced one."""
    moment(cli, "train", *QUICK, "--seed", 7, "--force", "--run", trained)
    before, there = (trained / "manifest.json").read_bytes(), leftovers(trained)
    (trained / "manifest.json").write_text(content)
    for command in (("train", *QUICK, "--seed", 8, "--force"), ("merge",), ("status",)):
        refused = cli(*command, "--run", trained)
        assert refused.code == 2 and "manifest.json" in refused.err
        assert leftovers(trained) == there
    (trained / "manifest.json").rename(trained / "manifest.json.damaged")
    result = cli("status", "--verify", "--run", trained, "--json")
    assert "the result of `train`: it is whole, and recorded now" in result.err
    assert {result.json["stages"][name]["state"] for name in ("prepare", "train")} == {"done"}
    assert (trained / "manifest.json").read_bytes() != before and not leftovers(trained)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 99}'])
def test_a_damaged_announcement_does_no_harm(cli, tiny, data, content):
    assert cli("prepare", data, "--model", tiny).code == 0
    (RUN / ".next-manifest.json").write_text(content)
    assert cli("status").code == 0
    assert cli("prepare", data).code == 0
    assert not leftovers(RUN)


@pytest.mark.parametrize("renamed", ["data", "manifest.json"])
def test_a_disk_that_is_full_at_the_end_says_what_is_so(cli, tiny, data, tmp_path, monkeypatch, renamed):
    """Renaming can need room as well, if only for a name."""
    assert cli("prepare", data, "--model", tiny).code == 0
    plain = {name: getattr(os, name) for name in ("rename", "replace")}

    def full(name):
        def rename(source, target):
            if Path(target) == RUN / renamed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
            plain[name](source, target)
        return rename

    more = write_rows(tmp_path / "more.jsonl", rows(20))
    before = read_manifest(RUN)
    with monkeypatch.context() as patch:
        for name in plain:
            patch.setattr(files.os, name, full(name))
        if renamed == "data":  # an old one put back is a rename as well
            patch.setattr(files, "_swap", lambda target, fresh: full("rename")(fresh, target))
        failed = cli("prepare", more)
    assert failed.code == 1 and "the disk is full" in failed.err
    if renamed == "data":
        assert "what was finished before is untouched" in failed.err
        assert current_manifest(RUN) == before and not leftovers(RUN)
    else:
        assert "untouched" not in failed.err and "the new result is whole, and the next command" in failed.err
        assert current_manifest(RUN).stages["prepare"]["summary"]["rows"] == 20
    assert cli("prepare", more, "--json").json["status"] == ("done" if renamed == "data" else "up-to-date")


# --- several at once, and what they leave

def test_of_two_first_preparations_with_other_models_one_is_refused(cli, tiny, talkative, data, monkeypatch):
    from gemma_tune.prepare import stage as prepare

    plain, others = prepare.run_stage, []

    def meanwhile(session, *args, **kwargs):
        if not others:  # the other command does all of it between this one's look at the run and its lock
            others.append(None)
            others.append(cli("prepare", data, "--model", talkative, "--run", RUN))
        return plain(session, *args, **kwargs)

    monkeypatch.setattr(prepare, "run_stage", meanwhile)
    result = cli("prepare", data, "--model", tiny, "--run", RUN)
    assert others[1].code == 0
    assert result.code == 2 and f"{RUN} is a run of talkative, not of tiny-gemma" in result.err
    assert read_manifest(RUN).model["name"] == "talkative"


def test_what_others_named_alike_stays(tmp_path):
    for name in (".old-notes", ".new-notes", ".new-mine.txt", ".old-training"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text").write_text("mine")
    before = sorted(p.name for p in tmp_path.iterdir())
    with Lock(tmp_path, "train") as lock:
        assert not lock.restored
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != ".lock") == before


def test_half_of_what_was_piped_is_swept_up(cli, tiny, data):
    assert cli("prepare", data, "--model", tiny).code == 0
    inputs = RUN / "inputs"
    inputs.mkdir(exist_ok=True)
    for name in (".new-stdin", ".new-stdin-4711", ".new-mine"):
        (inputs / name).write_text("half")
    with Lock(RUN, "train"):
        (inputs / ".new-stdin").write_text("being piped in at this moment")
        refused = cli("prepare", "-", "--run", RUN, stdin='{"text": "a"}\n')
        assert refused.code == 2 and f"{RUN} is in use by process {os.getpid()} (train" in refused.err
        assert (inputs / ".new-stdin").exists()
    assert cli("prepare", data).code == 0
    assert leftovers(inputs) == [".new-mine"]
    piped = cli("prepare", "-", "--run", RUN, stdin=data.read_bytes())
    assert piped.code == 0 and [p.name for p in inputs.glob("stdin-*.jsonl")], piped.err


@pytest.mark.parametrize("crash", [False, True])
def test_an_artifact_that_is_a_link_stays_one(tmp_path, monkeypatch, crash):
    run, disk = tmp_path / "run", tmp_path / "disk"
    (disk / "big").mkdir(parents=True)
    (disk / "big" / "old").write_text("old")
    (disk / ".old-other").mkdir()
    run.mkdir()
    (run / "data").symlink_to("../disk/big")
    with monkeypatch.context() as patch:
        if crash:  # between the two renames
            plain, calls = os.rename, []
            patch.setattr(files.os, "rename", lambda *args: calls.append(args) or (
                plain(*args) if len(calls) == 1 else killed()))
        with contextlib.suppress(Killed), replacing_directory(run / "data") as folder:
            (folder / "new").write_text("new")
    assert (run / "data").is_symlink()
    assert recover(run, MADE) == (["big"] if crash else [])
    assert [p.name for p in (run / "data").iterdir()] == (["old"] if crash else ["new"])
    assert sorted(p.name for p in disk.iterdir()) == [".old-other", "big"]


def test_a_number_that_another_process_has_now_is_nobody_at_work(tmp_path):
    with Lock(tmp_path, "train"):
        owner = json.loads((tmp_path / ".lock-owner.json").read_text())
        assert Lock.owner_of(tmp_path).startswith(f"process {os.getpid()} (train")
    note = tmp_path / ".lock-owner.json"  # as a killed process leaves it
    for changed, found in (({}, True), ({"began": owner["began"] - 60}, False), ({"pid": 2**30}, False),
                           ({"began": "x"}, False)):
        note.write_text(json.dumps(owner | changed))
        assert bool(Lock.owner_of(tmp_path)) == found, changed
    note.write_text(json.dumps(owner | {"began": None}))  # where that may not be known
    assert Lock.owner_of(tmp_path)
