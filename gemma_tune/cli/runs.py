"""``runs``: the runs under a directory, the newest first, from their manifests alone."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma_tune.base import shell
from gemma_tune.base.errors import UserError
from gemma_tune.base.words import span
from gemma_tune.cli.run_figures import data_of, disk_usage, loss_of
from gemma_tune.run.directory import RUNS
from gemma_tune.run.lock import Lock
from gemma_tune.run.manifest import STAGES, Manifest
from gemma_tune.run.unrecorded import current_manifest

_DAY = 86_400


@dataclass(frozen=True)
class RunLine:
    """One run.

    Attributes:
        run: its directory.
        model: id of the base model; None of a run whose manifest cannot be read.
        data: names of what it was prepared from.
        rows: conversations for training.
        loss_before, loss_after: validation loss of the last training; None where there is none.
        loss: the same in words, or the training loss where there are no validation rows.
        stage: the last stage that has a result.
        bytes: of the files in the directory.
        seconds_ago: since its manifest changed.
        in_use_by: the command that works on it now.
        problem: why its manifest cannot be used.
    """

    run: str
    model: str | None
    data: str
    rows: int | None
    loss_before: float | None
    loss_after: float | None
    loss: str
    stage: str
    bytes: int
    seconds_ago: float
    in_use_by: str | None = None
    problem: str | None = None

    @property
    def age(self) -> str:
        return age(self.seconds_ago)

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def list_runs(folder: Path) -> list[RunLine]:
    """Every run directly in ``folder``, and ``folder`` itself if it is one; that which changed last is the first.

    Raises:
        UserError: ``folder`` is named, and is no directory that can be read.
    """
    if not folder.is_dir():
        if folder == RUNS:
            return []
        there = os.path.lexists(folder)
        raise UserError(f"{folder} is not a directory" if there else f"there is no directory {folder}",
                        "name a directory that holds runs; without one it is runs/")
    try:
        places = [folder, *(path for path in folder.iterdir() if path.is_dir())]
    except OSError as e:
        raise UserError(f"{folder} cannot be read: {e.strerror}", "check its permissions") from e
    found = []
    for place in places:
        with contextlib.suppress(OSError):  # no permission for this one, or gone in between
            found.append((place, (place / "manifest.json").stat().st_mtime))
    return [_line(place, changed) for place, changed in sorted(found, key=lambda one: (-one[1], str(one[0])))]


def _line(root: Path, changed: float) -> RunLine:
    ago, size = max(0.0, time.time() - changed), disk_usage(root)
    try:
        manifest = current_manifest(root)
    except UserError as e:
        return RunLine(str(root), None, "", None, None, None, "", "", size, ago, problem=e.message)
    if manifest is None:  # it went away in between
        return RunLine(str(root), None, "", None, None, None, "", "", size, ago, problem="its manifest.json is gone")
    return _described(root, manifest, size, ago)


def _described(root: Path, manifest: Manifest, size: int, ago: float) -> RunLine:
    prepared, trained = (manifest.stages.get(name, {}) for name in ("prepare", "train"))
    figures = trained.get("summary", {})
    done = [stage for stage in STAGES if stage in manifest.stages]
    return RunLine(str(root), manifest.model["id"],
                   data_of(prepared) if prepared else "",
                   prepared.get("summary", {}).get("train_rows"),
                   figures.get("eval_loss_before"), figures.get("eval_loss_after"), loss_of(figures),
                   done[-1] if done else "", size, ago, Lock.owner_of(root))


def age(seconds: float) -> str:
    """How long ago, in one unit.

    >>> age(20), age(7200), age(3 * 86400)
    ('now', '2 h', '3 days')
    """
    if seconds < 60:
        return "now"
    if seconds < _DAY:
        return f"{seconds / 3600:.0f} h" if seconds >= 5400 else span(seconds) if seconds >= 90 else "1 min"
    days = round(seconds / _DAY)
    return "1 day" if days == 1 else f"{days} days" if days < 365 else dt.date.fromtimestamp(
        time.time() - seconds).isoformat()


def to_start(folder: Path) -> str:
    """What to type where there is no run yet."""
    named = "" if folder == RUNS else f" --run {shell.quote(str(folder / 'NAME'))}"
    return f"gemma-tune prepare YOUR.jsonl --model google/gemma-3-270m-it{named}"
