"""Whether a base model in a cache still is what was put there, and what to do where it is not.

A checkpoint made of a GGUF has the digests of its files in ``complete.json``. In Hugging Face's cache a file is a link
to its content, which is called by its own digest.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gemma_tune.base.errors import UserError
from gemma_tune.base.files import sha256_file
from gemma_tune.base.fingerprints import CHECKPOINT_FILES, fingerprint
from gemma_tune.base.strict_json import object_in

COMPLETE = "complete.json"  # written last into a cached checkpoint: its existence means that the conversion completed
_WEIGHTS = ".safetensors"
_BY_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def seal(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Size (``bytes``) and ``sha256`` of each file of a new checkpoint, by name, for its ``complete.json``."""
    return {path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in sorted(checkpoint.iterdir()) if path.is_file() and path.name != COMPLETE}


def refuse_damaged_copy(checkpoint: Path, *, weights: bool) -> None:
    """Compare a checkpoint in a cache with the digests that the cache has of its files.

    A checkpoint that lies elsewhere, or that came without digests, passes.

    Args:
        weights: False looks at the weights' sizes alone, where they are known: gigabytes are not read for each command.

    Raises:
        UserError: the files that differ or are gone; the hint names the folder to delete.
    """
    problems = list(_of_conversion(checkpoint, weights))
    if checkpoint.parent.name == "snapshots":
        problems += _of_download(checkpoint, weights)
    if problems:
        raise UserError(f"the base model in {checkpoint} is damaged: {problems[0]}", remedy(checkpoint), problems[1:])


def refuse_rotten(checkpoint: Path, recorded: Mapping[str, Any]) -> None:
    """Read a base model whole, before something is made of it that would be wrong without a word.

    Args:
        recorded: the fingerprint of a checkpoint that is the user's own; empty, or a GGUF's, for one in a cache.

    Raises:
        UserError: its content is another than it was, while sizes and time stamps are the same.
    """
    refuse_damaged_copy(checkpoint, weights=True)
    if not remedy(checkpoint) and recorded and (
            fingerprint(checkpoint, patterns=CHECKPOINT_FILES)["sha256"] != recorded["sha256"]):
        raise UserError(f"the base model in {checkpoint} is damaged: its content is another than when this run took "
                        "it, and sizes and time stamps are the same", "copy it there again from where it came from")


def remedy(checkpoint: Path) -> str | None:
    """What to do where a checkpoint in a cache is damaged; None of one that is not in a cache."""
    if made_of := conversion(checkpoint):
        return f"delete the folder {checkpoint}: it is made again from {made_of['source']}"
    folder = checkpoint.parent.parent
    if checkpoint.parent.name == "snapshots" and folder.name.startswith("models--"):
        return f"delete its folder in Hugging Face's cache, {folder}: it is downloaded again"
    return None


def conversion(checkpoint: Path) -> dict[str, Any] | None:
    """``complete.json`` of a checkpoint that was made of a GGUF file: its name (``source``) and ``sha256``, and the
    ``files`` of the checkpoint. None for other checkpoints."""
    try:
        kept = object_in(checkpoint / COMPLETE)
    except (OSError, ValueError):
        return None
    files = kept.get("files")
    sound = isinstance(kept.get("source"), str) and isinstance(files, dict) and all(
        isinstance(item, dict) and isinstance(item.get("bytes"), int) and isinstance(item.get("sha256"), str)
        for item in files.values())
    return kept if sound else None


def _of_conversion(checkpoint: Path, weights: bool) -> Iterator[str]:
    for name, item in (conversion(checkpoint) or {"files": {}})["files"].items():
        path = checkpoint / Path(name).name
        if not path.is_file():
            yield f"{name} is gone"
        elif path.stat().st_size != item["bytes"]:
            yield f"{name} has {path.stat().st_size:,} bytes, and had {item['bytes']:,}"
        elif (weights or path.suffix != _WEIGHTS) and sha256_file(path) != item["sha256"]:
            yield f"{name} was changed"


def _of_download(snapshot: Path, weights: bool) -> Iterator[str]:
    for path in sorted(snapshot.iterdir()):
        digest = Path(os.readlink(path)).name if path.is_symlink() else ""
        if _BY_DIGEST.fullmatch(digest) and path.is_file() and (weights or path.suffix != _WEIGHTS):
            found = sha256_file(path) if len(digest) == 64 else _git_blob(path.read_bytes())
            if found != digest:
                yield f"{path.name} was changed"


def _git_blob(content: bytes) -> str:
    """git's name of a file's content, as the Hub gives it for what is not in its large storage."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
