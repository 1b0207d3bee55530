"""Checkpoints of a training that was stopped, as far as others than `train` need to know of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from gemma_tune.base.files import sha256_file
from gemma_tune.base.strict_json import object_in
from gemma_tune.run.directory import RunDir, describe
from gemma_tune.run.manifest import Manifest
from gemma_tune.run.state import Look

MARKER = "complete.json"
SEQUENCES = "train_sequences_sha256"  # in the summary of `prepare`: see rows_of


def whole(folder: Path) -> list[Path]:
    """Sealed checkpoints by step, oldest first; contents are not read."""
    return [p for p in checkpoints_in(folder) if (p / MARKER).is_file()]


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoints by step, oldest first, sealed or not."""
    return sorted((p for p in folder.glob("checkpoint-*") if p.name.split("-")[-1].isdigit()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved, from its name ``checkpoint-<step>``."""
    return int(checkpoint.name.split("-")[-1])


def unfinished(folder: Path, finished: Collection[str]) -> dict[str, Any] | None:
    """Marker of the newest checkpoint that has one, if its training is none of those that finished."""
    marker = next(filter(None, map(read_marker, reversed(whole(folder)))), None)
    return marker if marker and marker["id"] not in finished else None


def read_marker(checkpoint: Path) -> dict[str, Any] | None:
    """What ``checkpoints.seal`` wrote: a ``checkpoints.Training`` and ``files``; None where it cannot be used."""
    try:
        marker = object_in(checkpoint / MARKER)
        texts = all(isinstance(marker[name], str) for name in ("id", "key", "compute", "rows"))
        start = marker["settings"].get("from_adapter")
        texts = texts and len(marker["compute"].split()) == 2 and (start is None or isinstance(start, str))
        counts = all(type(number) is int for number in (marker["micro_batch"], marker["steps_before"],
                                                        marker["settings"].get("num_processes", 1)))
        counts = counts and all(v is None or type(v) in (int, float) for v in dict(marker["before"]).values())
        named = all(isinstance(name, str) for name in [*marker["earlier"], *marker["asked"]])
        return marker if (texts and counts and named and dict(marker["files"]) and dict(marker["settings"])) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def has_other_rows(run: RunDir, manifest: Manifest, marker: Mapping[str, Any], look: Look = describe) -> bool:
    """Whether the training that was stopped learned from other rows than are prepared now, so that it cannot go on.

    Args:
        look: see ``run.state.state_of``: what it finds unchanged is not read for this.
    """
    try:
        return marker["rows"] != (_recorded(run, manifest, look) or rows_of(run.tokens))
    except OSError:
        return False


def rows_of(tokens: Path) -> str:
    """Fingerprint of the sequences that are trained on; all of them are read."""
    return sha256_file(tokens / "train.arrow")


def _recorded(run: RunDir, manifest: Manifest, look: Look) -> str | None:
    """The same from the manifest, where what was prepared lies there as it was."""
    prepared = manifest.stages.get("prepare", {"summary": {}, "outputs": {}})
    tokens = prepared["outputs"].get("tokens")
    unchanged = tokens and look(run, run.tokens, tokens)["sha256"] == tokens["sha256"]
    return prepared["summary"].get(SEQUENCES) if unchanged else None
