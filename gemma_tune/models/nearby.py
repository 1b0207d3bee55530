"""A ``--model`` that leads nowhere: whether it was meant as a path, and which model on this machine it nearly names."""

from __future__ import annotations

import os
import re
from pathlib import Path

from gemma_tune.base import shell
from gemma_tune.base.words import nearest

SUFFIX = ".gguf"
_MOST = 2  # names that a message proposes
_LINK = re.compile(r"\w+://|(www\.)?(hf\.co|huggingface\.co)/")
_OF_HUB = re.compile(r"(\w[\w.-]*/\w[\w.-]*)/(\S+\.gguf)", re.IGNORECASE | re.ASCII)
_OF_WINDOWS = re.compile(r"[A-Za-z]:/|.*\\")


def is_path(model_id: str) -> bool:
    """Whether a ``--model`` is a file or directory by its looks, whether there is one or not."""
    looks_local = os.path.isabs(os.path.expanduser(model_id)) or model_id.startswith((".", "~"))
    return (looks_local or model_id.endswith(("/", os.sep)) or Path(model_id).suffix.lower() == SUFFIX
            or bool(_OF_WINDOWS.match(model_id)) or model_id.count("/") > 1 and not _LINK.match(model_id))


def written_otherwise(model_id: str) -> str:
    """The end of a hint about what looks like a file at the Hub, or, on a system with other paths, Windows' own."""
    if found := _OF_HUB.fullmatch(model_id):
        return f"; a file at the Hub is downloaded first: hf download {found[1]} {shell.quote(found[2])} --local-dir ."
    return ("; this system writes paths with / and without drives, such as /mnt/c/models/gemma"
            if os.name != "nt" and _OF_WINDOWS.match(model_id) else "")


def is_model(folder: Path) -> bool:
    """Whether a directory holds what it is called after, and not only something else of that name."""
    return os.path.isdir(folder) and (os.path.exists(folder / "config.json") or any(folder.glob(f"*{SUFFIX}")))


def meant(path: Path) -> str:
    """``did you mean …?`` with the models that lie where a path nearly leads; empty where there are none."""
    path = Path(str(path).replace("\\", "/"))
    places = [Path(path.anchor)]
    for part in path.parts[bool(path.anchor):]:
        places = [place / name for place in places for name in _alike(place, part)]
    found = [shell.quote(str(place)) for place in places if is_model(place) or place.suffix.lower() == SUFFIX]
    return f"did you mean {' or '.join(found[:_MOST])}?" if found else ""


def _alike(folder: Path, part: str) -> list[str]:
    """What a part of a path is called in its directory: the same where there is such a thing, else nearly so."""
    if os.path.exists(folder / part):
        return [part]
    try:
        names = {name.lower(): name for name in sorted(os.listdir(folder))}
    except OSError:
        return []
    return [names[name] for name in nearest(part.lower(), names, _MOST)]
