"""Checkpoints that are damaged, or that the disk has no room for: passed over, said, and in nobody's way."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gemma_tune.base.errors import UserError
from gemma_tune.run.stopped import MARKER, unfinished
from gemma_tune.train.checkpoints import Training, clear, find_resumable, last_of, rotate, seal
from support.command import QUICK
from support.listener import Said

TRAINING = Training("this", "key", {"rank": 4}, "cpu fp32")
FOREIGN = {"compute": {"compute": "cpu"}, "start": {"settings": {"rank": 4, "from_adapter": 7}}, "settings": {"settings": [["rank", 4]]},
           "processes": {"settings": {"rank": 4, "num_processes": "2"}}}


def checkpoints(folder: Path, *steps: int, training: Training = TRAINING) -> list[Path]:
    made = [folder / f"checkpoint-{step}" for step in steps]
    for path in made:
        path.mkdir(parents=True)
        for name in ("README.md", "optimizer.pt"):
            (path / name).write_text(f"{name} of {path.name}")
        seal(path, training)
    return made


def damage(path: Path, how: str) -> str:
    """Damage a checkpoint; what is said of it."""
    if how == "card":
        (path / "README.md").write_bytes(b"\xff\xfe")
        return f"{path.name}: README.md was changed"
    if how == "lost":
        (path / "optimizer.pt").unlink()
        return f"{path.name}: optimizer.pt is gone"
    if how == "marker":
        (path / MARKER).write_bytes(b"\xff")
        return f"{path.name}: {MARKER} cannot be read"
    if how in FOREIGN:
        (path / MARKER).write_text(json.dumps(json.loads((path / MARKER).read_text()) | FOREIGN[how]))
        return f"{path.name}: {MARKER} cannot be read"
    (path / MARKER).unlink()
    return f"{path.name}: it was not saved to its end"


@pytest.mark.parametrize("how", ["card", "lost", "marker", "unsealed", *FOREIGN])
def test_a_damaged_checkpoint_is_passed_over_and_that_is_said(tmp_path, how):
    said, (old, new) = Said(), checkpoints(tmp_path, 9, 10)
    words = damage(new, how)
    assert unfinished(tmp_path, ())["id"] == "this"
    assert find_resumable(tmp_path, "key", (), {"rank": 4}, said) == old
    assert said.warnings == [f"damaged checkpoints are passed over ({words}): the training goes on from checkpoint-9"]
    said, both = Said(), f"{words}; {damage(old, how)}"
    assert find_resumable(tmp_path, "key", (), {"rank": 4}, said) is None
    assert said.warnings == [f"damaged checkpoints are passed over ({both}): the training starts anew"]


@pytest.mark.parametrize("how", ["card", "lost"])
def test_the_last_whole_checkpoint_of_a_training_is_gone_on_from(tmp_path, how):
    said, (old, new) = Said(), checkpoints(tmp_path, 9, 10)
    damage(checkpoints(tmp_path, 11, training=replace(TRAINING, id="another"))[0], how)
    assert last_of(tmp_path, {"this"}, said) == new and not said.warnings
    words = damage(new, how)
    assert last_of(tmp_path, {"this"}, said) == old
    assert said.warnings == [f"a damaged checkpoint is passed over ({words})"]
    assert last_of(tmp_path, {"a third"}, said) is None


def test_nothing_is_said_of_whole_ones_and_of_those_of_a_finished_training(tmp_path):
    said, (_, new) = Said(), checkpoints(tmp_path, 9, 10)
    assert find_resumable(tmp_path, "key", (), {"rank": 4}, said) == new
    damage(new, "card")
    assert find_resumable(tmp_path, "key", ("this",), {"rank": 4}, said) is None
    with pytest.raises(UserError, match="other settings"):
        find_resumable(tmp_path, "another", (), {"rank": 8}, said)
    assert not said.warnings


def test_damaged_ones_are_not_kept_in_place_of_whole_ones(tmp_path):
    kept, *damaged = checkpoints(tmp_path, 3, 4, 5)
    (tmp_path / "checkpoint-mine").mkdir()
    for path in damaged:
        damage(path, "card")
    clear(tmp_path, after=kept)
    new, = checkpoints(tmp_path, 6)
    rotate(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [kept.name, new.name, "checkpoint-mine"]


@pytest.mark.parametrize(("keep", "best", "kept"), [
    (2, None, [4, 5]), (1, None, [5]), (3, 4, [3, 4, 5]), (2, 1, [1, 5]), (3, 2, [2, 4, 5]), (1, 1, [5]), (2, 9, [4, 5]),
    (9, 1, [1, 2, 3, 4, 5])])
def test_so_many_checkpoints_stay_the_latest_and_the_best_among_them(tmp_path, keep, best, kept):
    checkpoints(tmp_path, 1, 2, 3, 4, 5)
    rotate(tmp_path, keep, best)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"checkpoint-{step}" for step in kept]


def test_a_training_keeps_as_many_as_it_is_told(cli, tiny, data):
    assert cli("prepare", data, "--model", tiny).code == 0
    flags = (*QUICK, "--epochs", 2, "--save-steps", 1, "--json")
    assert cli("train", *flags, "--keep-checkpoints", 4).code == 0
    found = {p.name for p in Path("runs/tiny-gemma/training_checkpoints").glob("checkpoint-*")}
    assert found == {f"checkpoint-{step}" for step in (3, 4, 5, 6)}
    assert cli("train", *flags).json["status"] == "up-to-date", "it changes nothing of the result"
    refused = cli("train", *flags, "--keep-checkpoints", 0)
    assert refused.code == 2 and "keep_checkpoints: 0 is below the least possible 1" in refused.err


def test_a_damaged_log_is_no_obstacle(tmp_path):
    from gemma_tune.train.callbacks import earlier_records

    (tmp_path / "log").write_bytes(b'{"step": 1}\n\xff\xfe\n[]\n{"loss": 1}\n3\n{"step": "a"}\n{"step": 2}\n{"step": 9}\n{"st')
    assert earlier_records(tmp_path / "log", 4) == [{"step": 1}, {"step": 2}]


def test_a_log_that_is_begun_again_keeps_its_earlier_records_until_all_are_written(tmp_path, monkeypatch):
    from gemma_tune.base.listener import Listener
    from gemma_tune.train.callbacks import MetricsLog, earlier_records

    def killed(*args):
        raise KeyboardInterrupt

    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 3.5}\n{"step": 3}\n')
    log = MetricsLog(path, Listener(), 2, before := earlier_records(path, 2))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", killed)
        patch.setattr(json, "dumps", killed)
        log._add({"step": 3, "loss": 2.0})
    assert len(earlier_records(path, 2)) == len(before) == 2
    resumed = MetricsLog(path, Listener(), 2, earlier_records(path, 2))
    for step in (3, 4):
        resumed._add({"step": step, "loss": 1.0})
    assert [record["step"] for record in earlier_records(path, 9)] == [1, 2, 3, 4]
    assert path.read_text().startswith('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 3.5}\n')


def test_a_disk_that_fills_while_training_saves_and_a_card_that_is_no_text(cli, tiny, data, monkeypatch):
    """Torch says nothing of a full disk; and PEFT reads the card of a checkpoint that it saves again."""
    assert cli("prepare", data, "--model", tiny).code == 0
    run, settings = Path("runs/tiny-gemma"), (*QUICK, "--epochs", 2, "--save-steps", 2)
    plain = torch.save

    def full(content, path, *args, **kwargs):
        if "checkpoint-4" in str(path):
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
        return plain(content, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        failed = cli("train", *settings)
    assert failed.code == 1 and "training_checkpoints/checkpoint-4 cannot be written" in failed.err
    assert "see whether its disk is full" in failed.err and "run the same command again" in failed.err
    folder = run / "training_checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["best.safetensors", "checkpoint-2"], "half would keep the disk full"
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-4")
    (folder / "checkpoint-4" / "README.md").write_bytes(b"\xff\xfe\x80")
    result = cli("train", *settings, "--json")
    assert result.code == 0, result.err
    assert "(checkpoint-4: README.md was changed): the training goes on from checkpoint-2" in result.err
    assert result.json["summary"]["resumed_from_step"] == 2
    modes = {p.stat().st_mode & 0o777 for place in (run / "tiny-gemma_lora_adapter", folder / "checkpoint-6")
             for p in place.iterdir()}
    assert modes == {(run / "manifest.json").stat().st_mode & 0o777}
