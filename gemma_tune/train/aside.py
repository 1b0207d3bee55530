"""What a finished training left, set aside until the one that begins now is whole.

Steps write checkpoints and logs in the places where those of the finished training lie, and may end in an error, on a
full disk, or never. So its last checkpoint, its best adapter and its logs are renamed when the first step begins. They
come back where nothing is left of the new training that could go on, and go when its adapter is recorded.
"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from gemma_tune.base.files import fresh_path, os_errors, remove
from gemma_tune.base.listener import Listener
from gemma_tune.run.directory import RunDir, set_aside_in
from gemma_tune.run.manifest import Manifest
from gemma_tune.run.stopped import unfinished
from gemma_tune.train.checkpoints import BEST, clear, last_of

_WHOLE = "complete"  # in the directory where all that was to be moved there is


def set_aside(run: RunDir, manifest: Manifest) -> None:
    """Make room for a training that starts anew: what the finished one left is kept, and that of any other goes."""
    aside = run.finished(manifest.finished_training)
    if aside and not (aside / _WHOLE).exists():  # else what lies in their places is another training's
        checkpoint = last_of(run.checkpoints, manifest.finished_trainings, Listener())
        with os_errors(aside):
            _move([path for path in (checkpoint, run.checkpoints / BEST, *_logs(run)) if path], aside)
            (aside / _WHOLE).touch()
    for other in set_aside_in(run.checkpoints):
        if other != aside:
            remove(other)
    remove(run.samples)
    remove(run.rollouts)
    clear(run.checkpoints)


def put_back(run: RunDir, manifest: Manifest, listener: Listener) -> None:
    """Where the training that took its place has left nothing to go on from, give the finished one its place back."""
    aside = run.finished(manifest.finished_training)
    if aside is None or not aside.is_dir() or unfinished(run.checkpoints, manifest.finished_trainings):
        return
    with os_errors(aside):
        if (aside / _WHOLE).exists():
            _clear_failed(run, listener)
            (aside / _WHOLE).unlink()  # from now on what lies in the places is what came back
        logs = {path.name: path for path in _logs(run)}
        for path in sorted(aside.iterdir()):
            place = logs.get(path.name, run.checkpoints / path.name)
            remove(place)
            place.parent.mkdir(parents=True, exist_ok=True)
            _rename(path, place)
        aside.rmdir()


def _clear_failed(run: RunDir, listener: Listener) -> None:
    """Remove what the training that failed left, but for its log."""
    clear(run.checkpoints)
    if run.metrics.exists():
        run.metrics.replace(run.failed_log)
        listener.note(f"the log of the training that failed is kept as {run.failed_log}")


def is_aside(run: RunDir) -> bool:
    """Whether something is set aside, as after a training that was killed."""
    return bool(set_aside_in(run.checkpoints))


def forget(run: RunDir, training: str) -> None:
    """Remove what trainings left whose place the recorded one, ``training``, has taken."""
    for aside in set_aside_in(run.checkpoints):
        if aside != run.finished(training):
            remove(aside)


def _logs(run: RunDir) -> list[Path]:
    return [run.samples, run.rollouts, run.plot, run.metrics]


def _move(paths: list[Path], aside: Path) -> None:
    """Without what is there already, or is not there."""
    aside.mkdir(parents=True, exist_ok=True)
    for path in paths:
        if path.exists() and not (aside / path.name).exists():
            _rename(path, aside / path.name)


def _rename(path: Path, place: Path) -> None:
    """Move it in one step; logs may lie on another disk than checkpoints, and are copied first then."""
    try:
        path.replace(place)
    except OSError as e:
        if e.errno != errno.EXDEV:
            raise
        fresh = fresh_path(place)
        remove(fresh)
        (shutil.copytree if path.is_dir() else shutil.copy2)(path, fresh)
        fresh.replace(place)
        remove(path)
