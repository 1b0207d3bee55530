"""What a finished training left, set aside until the one that begins now is whole.

Steps write checkpoints and logs in the places where those of the finished training lie, and may end in an error, on a
full disk, or never. So its last checkpoint, its best adapter and its logs are renamed when the first step begins. They
come back where nothing is left of the new training that could go on, and go when its adapter is recorded.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from gemma_tune.base.files import os_errors, remove
from gemma_tune.base.listener import Listener
from gemma_tune.run.directory import FINISHED, RunDir
from gemma_tune.run.manifest import Manifest
from gemma_tune.run.stopped import unfinished
from gemma_tune.train.checkpoints import BEST, clear, last_of


def set_aside(run: RunDir, manifest: Manifest) -> None:
    """Make room for a training that starts anew: what the finished one left is kept, and that of any other goes."""
    aside = run.finished(manifest.finished_training)
    if aside and not (aside / run.metrics.name).exists():  # which is the last one: else it was interrupted amid this
        checkpoint = last_of(run.checkpoints, manifest.finished_trainings, Listener())
        with os_errors(aside):
            _move([path for path in (checkpoint, *_beside(run), *_logs(run)) if path], aside)
    for other in run.checkpoints.glob(f"{FINISHED}*"):
        if other != aside:
            remove(other)
    remove(run.samples)
    clear(run.checkpoints)


def put_back(run: RunDir, manifest: Manifest, listener: Listener) -> None:
    """Where the training that took its place has left nothing to go on from, give the finished one its place back."""
    aside = run.finished(manifest.finished_training)
    if aside is None or not aside.is_dir() or unfinished(run.checkpoints, manifest.finished_trainings):
        return
    with os_errors(aside):
        if (aside / run.metrics.name).exists():
            clear(run.checkpoints)
            if run.metrics.exists():
                run.metrics.replace(run.failed_log)
                listener.note(f"the log of the training that failed is kept as {run.failed_log}")
        logs = {path.name: path for path in _logs(run)}
        for path in sorted(aside.iterdir()):
            place = logs.get(path.name, run.checkpoints / path.name)
            remove(place)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, place)
        aside.rmdir()


def forget(run: RunDir, training: str) -> None:
    """Remove what trainings left whose place the recorded one, ``training``, has taken."""
    for aside in run.checkpoints.glob(f"{FINISHED}*"):
        if aside != run.finished(training):
            remove(aside)


def _beside(run: RunDir) -> list[Path]:
    return [run.checkpoints / BEST]


def _logs(run: RunDir) -> list[Path]:
    return [run.samples, run.plot, run.metrics]


def _move(paths: list[Path], aside: Path) -> None:
    """Without what is there already, or is not there."""
    aside.mkdir(parents=True, exist_ok=True)
    for path in paths:
        if path.exists() and not (aside / path.name).exists():
            shutil.move(path, aside / path.name)  # logs may lie on another disk than checkpoints
