"""The files that the rows named as pictures, as they were when ``prepare`` looked at them.

They are inputs that only the rows know: one that was put where it had been missing, or changed, makes other data of the
same rows. One that is gone does not: the run has it.
"""

from __future__ import annotations

import os
from pathlib import Path

from gemma_tune.base.files import json_bytes
from gemma_tune.base.strict_json import object_in
from gemma_tune.base.words import counted
from gemma_tune.data.conversations.picture_files import Tried
from gemma_tune.run.directory import RunDir


def keep(run: RunDir, path: Path, tried: Tried) -> None:
    """Write down where pictures were looked for; nothing where none was.

    Args:
        path: of the file.
    """
    folders = list(dict.fromkeys(folder for folder, _ in tried))
    if folders:
        path.write_bytes(json_bytes({"folders": [run.relative(folder) for folder in folders], "files": [
            [folders.index(folder), name, *(found or (None, None))] for (folder, name), found in tried.items()]}))


def others_now(run: RunDir) -> str | None:
    """What is there now and is not what ``prepare`` saw, as a sentence; None where all is the same."""
    try:
        seen = object_in(run.picture_files)
        places = [run.found(folder) for folder in seen["folders"]]
        files = [(os.path.join(places[n], name), (size, stamp)) for n, name, size, stamp in seen["files"]]
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None
    others = [path for path, before in files if _found(path) not in (None, before)]
    if not others:
        return None
    such = f", such as {others[0]}" if others[1:] else f": {others[0]}"
    return f"{counted(len(others), 'picture was', 'pictures were')} put there, or changed, since{such}"


def _found(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_size, found.st_mtime_ns
