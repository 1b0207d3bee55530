"""Files of the user's that lie where a run's results go stay, and are told of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from support.command import QUICK, rows, write_rows


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*")
            if p.is_file() and not p.name.startswith(".lock")}


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A directory of the user's own, with data in a directory that is called so."""
    (tmp_path / "proj/data").mkdir(parents=True)
    write_rows(tmp_path / "proj/data/chats.jsonl", rows())
    (tmp_path / "proj/data/notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path / "proj")
    return tmp_path / "proj"


@pytest.mark.parametrize("command", [("prepare", "data/chats.jsonl"), ("run", "data"), ("train", "data/chats.jsonl", *QUICK)])
def test_a_directory_that_is_no_run_and_has_data_is_not_made_one(cli, tiny, project, command):
    before = contents(project)
    result = cli(*command, "--model", tiny, "--run", ".")
    assert result.code == 2
    assert "is no run yet, and data lies where results of one would take the place of it" in result.err
    assert "--run run" in result.err and contents(project) == before
    assert cli("prepare", "data/chats.jsonl", "--model", tiny, "--run", "run").code == 0, "as the hint says"


@pytest.mark.parametrize("occupied", ["report.md", "tiny-gemma_lora_adapter/adapter_config.json", "ollama/Modelfile", "train.yaml",
                                      "tiny-gemma_lora_merged/config.json", "logs/metrics.jsonl", "rejected.jsonl", "tune.json",
                                      "tiny-gemma_sft_adapter/notes.txt", "tiny-gemma_start_adapter_0a/notes.txt",
                                      "data/.hidden.jsonl", "data/.git/HEAD"])
def test_other_results_have_their_places_too(cli, tiny, data, tmp_path, occupied):
    place = tmp_path / "proj" / occupied
    place.parent.mkdir(parents=True)
    place.write_text("mine")
    for _ in range(2):  # the first refusal makes it no run
        result = cli("prepare", data, "--model", tiny, "--run", "proj")
        assert result.code == 2 and str(Path("proj") / Path(occupied).parts[0]) in result.err
    assert place.read_text() == "mine"


def test_what_a_run_does_not_write_may_lie_beside_it(cli, tiny, data, tmp_path):
    for name in ("logs/app.log", "notes.md", "data.txt", "data/.DS_Store", "data/._a"):
        (tmp_path / "proj" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "proj" / name).write_text("mine")
    assert cli("prepare", data, "--model", tiny, "--run", "proj").code == 0
    assert (tmp_path / "proj/logs/app.log").read_text() == (tmp_path / "proj/notes.md").read_text() == "mine"


def test_a_preparation_that_failed_is_tried_again(cli, tiny, data, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{}\n" * 3)
    assert cli("prepare", "bad.jsonl", "--model", tiny, "--run", "proj").code == 2
    assert (tmp_path / "proj/rejected.jsonl").is_file()
    assert cli("prepare", data, "--model", tiny, "--run", "proj").code == 0


def test_files_that_were_put_into_the_data_of_a_run_are_not_removed(cli, tiny, data, tmp_path):
    assert cli("prepare", data, "--model", tiny).code == 0
    folder = tmp_path / "runs/tiny-gemma/data"
    write_rows(folder / "more.jsonl", rows(3))
    (folder / ".DS_Store").write_text("")
    before = contents(folder)
    for command in (("prepare", data, "--force"), ("prepare", data, "--valid", 0.5)):
        result = cli(*command)
        assert result.code == 2
        assert "runs/tiny-gemma/data holds what `prepare` has not made and would remove: more.jsonl" in result.err
    assert cli("prepare", data, "--json").json["status"] == "up-to-date", "which removes nothing"
    inside = cli("prepare", folder / "more.jsonl")
    assert inside.code == 2 and "which `prepare` makes anew: the result would take the place of it" in inside.err
    assert contents(folder) == before
    shutil.move(folder / "more.jsonl", tmp_path / "more.jsonl")
    assert cli("prepare", data, "more.jsonl").code == 0


def test_files_that_were_put_beside_evaluated_pictures_are_not_removed(cli, trained, tmp_path):
    folder, quick = trained / "evaluated", ("--questions", 1, "--max-new-tokens", 2)
    held = write_rows(tmp_path / "held.jsonl", rows(2))
    for name in ("notes.md", "pictures/mine.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    refused = cli("eval", "--data", held, *quick)
    assert refused.code == 2
    assert "runs/tiny-gemma/evaluated holds what `eval` has not made and would remove: notes.md, pictures/mine.png" in refused.err
    assert cli("eval", *quick).code == 0 and sorted(contents(folder)) == ["notes.md", "pictures/mine.png"]
    (folder / "notes.md").unlink()
    (folder / "pictures/mine.png").rename(folder / f"pictures/{'0' * 64}.png")
    assert cli("eval", "--json", *quick).json["status"] == "up-to-date" and not folder.exists(), "left by a command that was killed"


def test_a_runs_own_rows_are_no_data_to_prepare(cli, tiny, data, tmp_path):
    """Each time a part of them would be kept aside, and fewer be left."""
    assert cli("prepare", data, "--model", tiny).code == 0
    own = tmp_path / "runs/tiny-gemma/data/train.jsonl"
    before = own.read_bytes()
    assert "`gemma-tune prepare --run runs/tiny-gemma` alone takes the same data as before" in cli("prepare", own).err
    assert own.read_bytes() == before
    assert cli("prepare", own, "--model", tiny, "--run", "runs/other").code == 0, "of another run they are"


def test_data_behind_a_link(cli, tiny, project, tmp_path):
    (project / "data").rename(tmp_path / "shared")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/data").symlink_to(tmp_path / "shared")
    before = contents(tmp_path / "shared")
    assert cli("prepare", tmp_path / "shared/chats.jsonl", "--model", tiny, "--run", tmp_path / "run").code == 2
    assert contents(tmp_path / "shared") == before


def test_a_run_whose_manifest_is_lost_begins_anew(cli, tiny, data, tmp_path):
    assert cli("prepare", data, "--model", tiny).code == 0
    assert cli("train", *QUICK).code == 0
    run = tmp_path / "runs/tiny-gemma"
    (run / "manifest.json").unlink()
    assert cli("prepare", data, "--model", tiny).code == 0
    assert json.loads((run / "manifest.json").read_text())["stages"].keys() == {"prepare"}
