"""Pictures that are shown in a chat.

In a turn each is ``{"at": …, "file": …, "path": …, "lies_at": …}``: the first two as in prepared rows, the path as it
was named, and where the file lies as it was when it was shown.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import tempfile
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from gemma_tune.base.errors import UserError
from gemma_tune.base.words import first_line
from gemma_tune.data.conversations.picture_files import Unusable, decoded, is_file
from gemma_tune.data.conversations.pictures import Picture, pictures_in
from gemma_tune.encoding.eye import PICTURES, opened, png_of, with_parts

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_HINT = "name a PNG, JPEG, WebP, GIF, BMP or TIFF file"
_KEPT = 8  # pictures that stay as they are sent to servers: each turn shows those before it again, and a photo takes a
# second to write


class Shown:
    """Pictures as they were when they were shown.

    Args:
        copied: into a folder of its own, so that it is no matter what becomes of the files while a conversation lasts.
    """

    def __init__(self, copied: bool = False):
        self._copied = copied
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._held: Counter[str] = Counter()  # copies of what rows hold, with how many rows there are that want them
        self._lock = threading.Lock()  # rows are read in a thread of their own

    def picture(self, named: Path) -> Picture:
        """A picture for a turn, to stand at its beginning.

        Raises:
            UserError: no such file, or it is no picture.
        """
        content = _bytes_of(named)
        name = f"{hashlib.sha256(content).hexdigest()}{named.suffix.lower()}"
        lies_at = self._kept(name, content) if self._copied else named.absolute()
        _refuse_other(lies_at, str(named))
        return {"at": 0, "file": name, "path": str(named.absolute()), "lies_at": str(lies_at)}

    def resolved(self, turn: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """A turn as rows have it, whose pictures are paths from ``folder`` on, or are in the row itself.

        Raises:
            UserError: one is not there, or is no picture.
        """
        if not turn.get(PICTURES):
            return dict(turn)
        found = [self._of_row(picture, folder) | {"at": picture["at"]} for picture in turn[PICTURES]]
        return {**turn, PICTURES: found}

    def _of_row(self, picture: Mapping[str, Any], folder: Path) -> Picture:
        if "path" in picture:
            return self.picture(folder / os.path.expanduser(picture["path"]))
        try:
            content = decoded(picture["base64"])
        except Unusable as e:
            raise UserError(f"a picture {e.reason}", e.fix) from e
        name = hashlib.sha256(content).hexdigest()
        with self._lock:
            lies_at = str(self._kept(name, content))
            self._held[lies_at] += 1
        found = {"file": name, "path": lies_at, "lies_at": lies_at}
        try:
            _refuse_other(Path(lies_at), "a picture in base64")
        except UserError:
            self.forget([{PICTURES: [found]}])
            raise
        return found

    def forget(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Remove the copies of what an answered row held, but for those that others wait for: of a large file's rows
        they would fill the disk."""
        with self._lock:
            for path in (picture["lies_at"] for picture in pictures_in(messages)):
                if path not in self._held:  # a file of somebody's own
                    continue
                self._held[path] -= 1
                if not self._held[path]:
                    del self._held[path]
                    Path(path).unlink()

    def close(self) -> None:
        """Remove the copies."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _kept(self, name: str, content: bytes) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="gemma-tune-")
        path = Path(self._folder.name) / name
        if not path.exists():
            path.write_bytes(content)
        return path


def _bytes_of(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise UserError(f"{path} is a directory", _HINT)
        if not path.is_file() and path.exists():
            raise UserError(f"{path} is not a file", _HINT)
        return path.read_bytes()
    except FileNotFoundError as e:
        raise UserError(f"there is no picture {path}", "check the path; those of rows begin at their file") from e
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read: {getattr(e, 'strerror', None) or e}", "check the path") from e


def _refuse_other(path: Path, named: str) -> None:
    """Refuse what is no picture, or not whole.

    Raises:
        UserError: it is none.
    """
    try:
        opened(path)
    except Exception as e:  # noqa: BLE001 - whatever Pillow's readers make of other files and of broken ones
        why = first_line(e.__cause__ or e).replace(str(path), named)
        raise UserError(f"{named} is no picture that can be read: {why}", _HINT) from e


def require_picture(named: str) -> Path:
    """A file that an option names, before a model is loaded for it.

    Raises:
        UserError: no such file, or it is no picture.
    """
    path = Path(_from_uri(os.path.expanduser(named)))
    _bytes_of(path)
    _refuse_other(path, str(path))
    return path


def paths_in(text: str) -> list[Path]:
    """Paths as they are typed or dragged into a terminal: one with its spaces as they are, or several, with quotes or
    backslashes where they need them; ``~`` and ``file://`` are understood."""
    text = text.strip()
    whole = Path(_from_uri(os.path.expanduser(text)))
    if is_file(whole):
        return [whole]
    try:
        words = shlex.split(text, posix=os.name == "posix")  # in Windows a backslash is a part of the path
    except ValueError:  # an apostrophe
        return [whole]
    paths = [Path(_from_uri(os.path.expanduser(word.strip("\"'") if os.name == "nt" else word))) for word in words]
    return paths if any(map(is_file, paths)) or len(paths) == 1 else [whole]


def are_pictures(text: str) -> bool:
    """Whether a line is nothing but paths of pictures, as when they are dragged into the terminal."""
    if "\n" in text or not any(suffix in text.lower() for suffix in SUFFIXES):
        return False
    paths = paths_in(text)
    return all(path.suffix.lower() in SUFFIXES and path.is_absolute() and is_file(path) for path in paths)


def _from_uri(text: str) -> str:
    return unquote(re.sub(r"^file://(localhost)?", "", text)) if text.startswith("file://") else text


def as_row(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn as ``prepare`` reads it: with the paths of its pictures, as they were named."""
    return dict(with_parts(turn, "path"))


def as_png(picture: Picture) -> bytes:
    """A picture as every server reads it, with the pixels that models are shown."""
    return _as_png(picture["file"], picture["lies_at"])


@lru_cache(_KEPT)
def _as_png(name: str, lies_at: str) -> bytes:
    return png_of(Path(lies_at))
