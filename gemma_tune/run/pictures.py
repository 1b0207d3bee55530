"""The pictures that rows of a run name or hold: who takes them, and whether those files are still as they were.

The files are inputs that only the rows know: one that was put where it had been missing, or changed, makes other data
of the same rows. One that is gone does not: the run has it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from gemma_tune.base.errors import UserError
from gemma_tune.base.files import json_bytes
from gemma_tune.base.strict_json import object_in
from gemma_tune.base.words import counted, first_line
from gemma_tune.data.conversations.kept_pictures import Pictures
from gemma_tune.data.conversations.picture_files import Tried, place_of
from gemma_tune.data.reading.rows import Source
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.encoding.eye import blindness
from gemma_tune.run.directory import RunDir, command
from gemma_tune.run.session import Session


def kept_in(folder: Path, session: Session, chat: ChatFormat, sources: Sequence[Source], named: str | None,
            ) -> Pictures | None:
    """What takes the pictures of these files' rows into a folder, in which the model's eye then finds them; None where
    it has none.

    Args:
        named: what ``--pictures`` names, as the manifest has it.
    """
    if chat.eye is None:
        return None
    chat.eye.folder = folder
    named = named and session.run.found(named)
    return Pictures(folder, {source.name: place_of(source, named, session.run.inputs) for source in sources}, chat.eye)


def blind(session: Session, chat: ChatFormat) -> str:
    """Why nothing can be learned from a picture, as the end of a sentence that names it; empty if something can."""
    why, model = blindness(session.model.path, chat.tokenizer), session.model.id
    if not why or why.startswith("the model "):
        return why.replace("the model", model, 1)
    return f"nothing can be learned from it with {model}: {why}"


def unreadable(run: RunDir, error: OSError) -> UserError:
    """What is said of a picture of prepared rows that is gone, or damaged."""
    what = (f"{error.filename} is gone" if isinstance(error, FileNotFoundError) else
            f"a picture cannot be read: {first_line(error)}")
    return UserError(f"{what}, and prepared rows show it",
                     f"prepare them again, where their pictures are: {command('prepare', run.root, '--force')}")


# ---- where they were looked for --------------------------------------------------------------------------------------

def keep_tried(run: RunDir, path: Path, tried: Tried) -> None:
    """Write down where pictures were looked for; nothing where none was.

    Args:
        path: of the file.
    """
    folders = list(dict.fromkeys(folder for folder, _ in tried))
    if folders:
        path.write_bytes(json_bytes({"folders": [run.relative(folder) for folder in folders], "files": [
            [folders.index(folder), name, *(found or (None, None))] for (folder, name), found in tried.items()]}))


def others_now(run: RunDir, path: Path) -> str | None:
    """What is there now and is not what was seen then, as a sentence; None where all is the same.

    Args:
        path: of the file that :func:`keep_tried` wrote.
    """
    try:
        seen = object_in(path)
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
