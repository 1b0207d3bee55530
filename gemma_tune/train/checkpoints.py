"""Training checkpoints that can be trusted: a marker with hashes is written last; resuming takes the newest whole one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma_tune.base.errors import UserError
from gemma_tune.base.files import sha256_file, write_json
from gemma_tune.base.strict_json import object_in
from gemma_tune.config.settings import as_flags, same_result
from gemma_tune.config.stages import TrainConfig
from gemma_tune.run.directory import command

MARKER = "complete.json"
KEEP = 2
# Settings that change how a training is computed, not what is learned; dtype's is kept with the training.
_WAYS = ("dtype", *same_result(TrainConfig))


@dataclass(frozen=True)
class Training:
    """One training, however often it is interrupted.

    Args:
        id: a random name; the manifest keeps that of the training that finished last.
        key: hex digest of what its result depends on, see :func:`training_key`.
        settings: of ``train``, for the command that finishes it.
        compute: device and type, such as ``cpu bf16``.
        micro_batch: conversations that go through the model at once; 0 where nobody has chosen yet. Sums in another
            order are rounded differently, so a resumed training keeps it.
    """

    id: str
    key: str
    settings: Mapping[str, Any]
    compute: str
    micro_batch: int = 0


def training_key(base: str, rows: str, template: str, settings: Mapping[str, Any]) -> str:
    """What a checkpoint depends on: base model, training rows, chat template and settings, as one hex digest.

    Not on ``dtype``: with ``auto`` a probe decides, and a resumed training stays with what was chosen first. Not on how
    a batch is worked on either, so that a training that ran out of memory can go on in smaller pieces.
    """
    kept = {name: value for name, value in settings.items() if name not in _WAYS}
    content = json.dumps({"base": base, "rows": rows, "template": template, "settings": kept}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def seal(checkpoint: Path, training: Training) -> None:
    """Declare a checkpoint whole. The pickled trainer arguments go: nothing reads them, and pickles can run code."""
    (checkpoint / "training_args.bin").unlink(missing_ok=True)
    hashes = {p.name: sha256_file(p) for p in sorted(checkpoint.iterdir()) if p.is_file() and p.name != MARKER}
    write_json(checkpoint / MARKER, {**asdict(training), "files": hashes})


def rotate(folder: Path) -> None:
    """Delete all but the newest whole checkpoints; called after a new one has been sealed."""
    for old in whole(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)


def whole(folder: Path) -> list[Path]:
    """Sealed checkpoints by step, oldest first; contents are not read."""
    found = [p for p in folder.glob("checkpoint-*") if (p / MARKER).is_file() and p.name.split("-")[-1].isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved, from its name ``checkpoint-<step>``."""
    return int(checkpoint.name.split("-")[-1])


def find_resumable(folder: Path, key: str, finished: str | None, settings: Mapping[str, Any]) -> Path | None:
    """The checkpoint that an interrupted training goes on from, or None to start anew.

    Damaged checkpoints are passed over in favour of an older whole one.

    Args:
        finished: id of the training that the manifest records as done; its checkpoints are not resumed.

    Raises:
        UserError: an interrupted training with other settings or data is there.
    """
    others = []
    for checkpoint in reversed(whole(folder)):
        marker = read_marker(checkpoint)
        if marker is None or marker["id"] == finished:
            continue
        if marker["key"] != key:
            others.append(marker["settings"])
        elif all((checkpoint / name).is_file() and sha256_file(checkpoint / name) == sha
                 for name, sha in marker["files"].items()):
            return checkpoint
    if others:
        changed = _difference(others[0], settings)
        finish = (f"finish it: {command_to_finish(folder, others[0])}, or start anew with --force" if changed else
                  "prepare the data as it was before to finish it, or start anew with --force")
        raise UserError(f"{folder} holds an interrupted training with other settings or data "
                        f"({changed or 'the data, the base model or gemma-tune changed'})", finish)
    return None


def unfinished(folder: Path, finished: str | None) -> dict[str, Any] | None:
    """Marker of the newest whole checkpoint if its training is not the one that finished last."""
    checkpoints = whole(folder)
    marker = read_marker(checkpoints[-1]) if checkpoints else None
    return marker if marker and marker["id"] != finished else None


def read_marker(checkpoint: Path) -> dict[str, Any] | None:
    """What :func:`seal` wrote: a :class:`Training` and ``files``; None where it cannot be used."""
    try:
        marker = object_in(checkpoint / MARKER)
        texts = all(isinstance(marker[name], str) for name in ("id", "key", "compute"))
        return marker if texts and dict(marker["files"]) and dict(marker["settings"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def command_to_finish(folder: Path, settings: Mapping[str, Any]) -> str:
    """The command line of an interrupted training, whose checkpoints lie in ``folder``."""
    return command("train", folder.parent, *as_flags(TrainConfig, settings))


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    changed = [f"{name}: {old[name]} then, {new.get(name)} now" for name in old
               if name not in _WAYS and old[name] != new.get(name)]
    return "; ".join(changed)


def clear(folder: Path) -> None:
    """Remove all checkpoints, whole or not."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
