"""What lies where a run's results go, and is nobody's but the user's: nothing takes the place of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from gemma_tune.base import shell
from gemma_tune.base.errors import UserError
from gemma_tune.base.files import remove
from gemma_tune.run.directory import PICTURES, RunDir

# What `prepare` puts into data/.
PREPARED = ("train.jsonl", "valid.jsonl", "rejected.jsonl", "duplicates.jsonl", "report.json", "tokens", "origins.npy",
            "chat_template.jinja", "pictures", "picture_files.json")
_EVALUATED = ("pictures", "picture_files.json")  # what `eval` puts into evaluated/
_PICTURE = re.compile(r"[0-9a-f]{64}\.[a-z]+")  # names in the directories of pictures
_OF_SYSTEMS = (".DS_Store", ".directory", "Thumbs.db", "desktop.ini")
_SHOWN = 5
_ELSEWHERE = "move {} elsewhere, or work in another directory: --run DIR"


def refuse_inside_data(run: RunDir, paths: Iterable[Path]) -> None:
    """Files that are to be prepared and lie in data/, which is made anew.

    Raises:
        UserError: there are some; all of them.
    """
    data = run.data.resolve()
    if inside := [str(path) for path in paths if path.resolve().is_relative_to(data)]:
        raise UserError(f"{_list(inside)} {'lies' if len(inside) == 1 else 'lie'} in {run.data}, which `prepare` makes "
                        "anew: the result would take the place of it",
                        f"{_ELSEWHERE.format('it' if len(inside) == 1 else 'them')}; where it is of this run itself, "
                        "`gemma-tune prepare` alone takes the same data as before")


def refuse_foreign_in_data(run: RunDir) -> None:
    """Files in data/ that ``prepare`` did not make.

    Raises:
        UserError: there are some; all of them.
    """
    _refuse_foreign(run.data, PREPARED, "prepare")


def refuse_foreign_in_evaluated(run: RunDir) -> None:
    """Files in evaluated/ that ``eval`` did not make.

    Raises:
        UserError: there are some; all of them.
    """
    _refuse_foreign(run.evaluated, _EVALUATED, "eval")


def remove_evaluated(run: RunDir) -> None:
    """Remove evaluated/, unless there is something in it that ``eval`` did not make."""
    if run.evaluated.is_dir() and not _foreign(run.evaluated, _EVALUATED):
        remove(run.evaluated)


def _refuse_foreign(folder: Path, made: Sequence[str], stage: str) -> None:
    if foreign := _foreign(folder, made):
        raise UserError(f"{folder} holds what `{stage}` has not made and would remove: {_list(foreign)}",
                        _ELSEWHERE.format("it" if len(foreign) == 1 else "them"))


def _foreign(folder: Path, made: Sequence[str]) -> list[str]:
    foreign = [name for name in _visible(folder) if name not in made]
    return foreign + [f"{PICTURES}/{name}" for name in _visible(folder / PICTURES) if not _PICTURE.fullmatch(name)]


def refuse_occupied(run: RunDir, stage: str) -> None:
    """Files and directories of a directory that is no run yet, in the places of a run's results.

    Args:
        stage: that begins the run: after ``prepare`` come all others.

    Raises:
        UserError: there are some; all of them.
    """
    if _was_a_run(run):
        return
    places = [run.merged, run.ollama, run.report, run.html_report, run.answers, run.evaluated]
    if stage == "prepare":
        places += [run.data, run.checkpoints, run.adapter, run.sft_adapter, *run.start_adapters(), run.worse_adapter,
                   run.train_settings, run.tune_settings, run.tuning, run.metrics, run.samples, run.rollouts,
                   run.reference, run.plot, run.tune_plot]
        if not (run.root / ".lock").exists():  # else they can be of a preparation that failed
            places.append(run.refused_rows)
    if occupied := [str(path) for path in places if path.is_file() or _visible(path)]:
        raise UserError(f"{run.root} is no run yet, and {_list(occupied)} {'lies' if len(occupied) == 1 else 'lie'} "
                        "where results of one would take the place of it",
                        f"work in a directory of its own, such as --run {shell.quote(str(run.root / 'run'))}, or move "
                        f"{'it' if len(occupied) == 1 else 'them'} elsewhere")


def _was_a_run(run: RunDir) -> bool:
    """Whether there has been a run whose manifest is lost, or was moved away because it was damaged."""
    ours = (run.next_manifest, *run.root.glob("manifest.json*"))
    return run.data_report.is_file() and run.tokens.is_dir() or any(path.is_file() for path in ours)


def _visible(folder: Path) -> list[str]:
    """Names in a directory, without those that systems put there by themselves."""
    try:
        return sorted(name for name in os.listdir(folder)
                      if name not in _OF_SYSTEMS and not name.startswith(("._", ".nfs")))
    except OSError:
        return []


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
