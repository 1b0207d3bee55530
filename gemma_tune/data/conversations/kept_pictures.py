"""The pictures of rows, looked at and kept in a directory: each once, under the sha256 of its bytes."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gemma_tune.base import shell
from gemma_tune.base.errors import UserError
from gemma_tune.base.files import NEW, unfinished
from gemma_tune.base.words import first_line
from gemma_tune.data.conversations.picture_files import (
    MISSING,
    Place,
    Tried,
    Unusable,
    decoded,
    examined,
    is_file,
    located,
    read,
)
from gemma_tune.data.conversations.pictures import is_held
from gemma_tune.data.conversations.problems import Problem, RowError, quoted
from gemma_tune.data.conversations.unread import Unread
from gemma_tune.data.reading.rows import Row
from gemma_tune.encoding.eye import Eye, size_of

Turn = dict[str, Any]
_REMEMBERED = 100_000  # files of which a process knows what they are
_SHOWN = 200  # characters of a path
_ABOVE = 3  # folders above the data in which pictures are looked for, to be named


class _Kept(NamedTuple):
    name: str  # in data/pictures
    several: bool  # whether it has frames or pages behind the first


@dataclass
class NoticedPictures:
    """What is said about pictures beside what is wrong with some.

    Args:
        found, missing: how many of those that rows name are there, and are not.
        first_missing: the path of the first that is not, and where it was looked for.
        tried: where they were looked for, see :func:`located`.
        moving: rows with an animated picture, or one of several pages; ``first_moving`` is where the first of them is.
        unseen: parts of divided rows that are learned without pictures that stand before them.
        unread: rows that hold one where nobody reads any; ``first_unread`` is the column, or key, of the first of them.
    """

    found: int = 0
    missing: int = 0
    first_missing: tuple[str, Place] | None = None
    tried: Tried = field(default_factory=dict)
    moving: int = 0
    first_moving: str = ""
    unseen: int = 0
    unread: int = 0
    first_unread: str = ""

    def pass_over(self, unread: Sequence[Unread]) -> None:
        """Look for pictures in what is not read of a row."""
        if held := next((one.name for one in unread if is_held(one.value)), None):
            self.unread += 1
            self.first_unread = self.first_unread or held

    def add(self, later: NoticedPictures) -> None:
        """Put together with what was noticed about later rows."""
        self.found += later.found
        self.missing += later.missing
        self.first_missing = self.first_missing or later.first_missing
        self.tried |= later.tried
        self.moving += later.moving
        self.first_moving = self.first_moving or later.first_moving
        self.unseen += later.unseen
        self.unread += later.unread
        self.first_unread = self.first_unread or later.first_unread

    def elsewhere(self) -> tuple[str, str] | None:
        """What to say, and to do, where no file is there that the rows name as a picture: their folder is another
        one."""
        path, place = self.first_missing or ("", None)
        if self.found or place is None or os.path.isabs(path):
            return None
        likely = likely_folder(path, place)
        folder = shell.quote(str(likely)) if likely else "DIR"
        named = "the only picture that a row names is not" if self.missing == 1 else (
            f"none of the {self.missing:,} pictures that rows name is")
        return f"{named} below {place}", f"name the folder in which their paths begin: --pictures {folder}"


class Pictures:
    """Takes the pictures of rows over into a directory; several processes may do it at once.

    Args:
        folder: the directory, which is made when there is a picture.
        places: where the pictures of each source's rows lie, by its name.
        eye: of the model that is to learn from them.
    """

    def __init__(self, folder: Path, places: Mapping[str, Place], eye: Eye):
        self.folder, self._places, self._eye = folder, places, eye
        self._known: dict[Hashable, _Kept | Unusable] = {}

    def taken(self, row: Row, messages: Sequence[Turn], noticed: NoticedPictures) -> list[Turn]:
        """The turns with the files of their pictures in place of what the row says of them.

        Raises:
            RowError: some cannot be used.
            OSError: one cannot be written.
        """
        problems: list[Problem] = []
        moving, turns = False, []
        for number, turn in enumerate(messages, start=1):
            if "pictures" in turn:
                refs = []
                for ref in turn["pictures"]:
                    try:
                        kept = self._taken(ref, self._places[row.file], noticed)
                    except Unusable as e:
                        problems.append(e.problem(_called(ref, number)))
                        continue
                    refs.append({"at": ref["at"], "file": f"{self.folder.name}/{kept.name}"})
                    moving = moving or kept.several
                turn = {**turn, "pictures": refs}
            turns.append(turn)
        if problems:
            raise RowError(problems)
        if moving:
            noticed.moving += 1
            noticed.first_moving = noticed.first_moving or f"{row.file}:{row.line}"
        return turns

    def _taken(self, ref: Mapping[str, Any], place: Place, noticed: NoticedPictures) -> _Kept:
        if "base64" in ref:
            return self._kept(decoded(ref["base64"]))
        try:
            file, found = located(ref["path"], place, noticed.tried)
        except Unusable as e:
            if e.code == MISSING:
                noticed.missing += 1
                noticed.first_missing = noticed.first_missing or (ref["path"], place)
            raise
        noticed.found += 1
        return self._remembered((os.path.realpath(file), found.st_size, found.st_mtime_ns),
                                lambda: self._kept(read(file)))

    def _kept(self, content: bytes) -> _Kept:
        digest = hashlib.sha256(content).hexdigest()
        return self._remembered(digest, lambda: self._written(digest, content))

    def _written(self, digest: str, content: bytes) -> _Kept:
        ending, several = examined(content)
        path = self.folder / f"{digest}{ending}"
        if not path.exists():
            self.folder.mkdir(exist_ok=True)
            with unfinished(path.with_name(f"{NEW}{os.getpid()}-{path.name}")) as fresh:
                fresh.write_bytes(content)
                os.replace(fresh, path)
        try:
            self._eye.written(size_of(path))
        except (UserError, MemoryError):  # about the model, or the machine
            raise
        except Exception as e:  # of a shape, say, that the family's processor does not take
            raise Unusable(f"is none that the model is shown: {first_line(e)}", "make another picture of it, or leave "
                                                                               "the row out") from None
        return _Kept(path.name, several)

    def _remembered(self, key: Hashable, find: Callable[[], _Kept]) -> _Kept:
        """What was found before under a key, be it that the picture cannot be used."""
        if key not in self._known:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            try:
                self._known[key] = find()
            except Unusable as e:
                self._known[key] = e
        if isinstance(found := self._known[key], Unusable):
            raise found.with_traceback(None)  # or it would grow each time
        return found


def keep_alone(folder: Path, names: Collection[str]) -> int:
    """Remove the other pictures of a folder, and the folder itself where no name is given.

    Returns:
        The size in bytes of those that stay.
    """
    size = 0
    for entry in os.scandir(folder) if folder.is_dir() else ():
        if entry.name in names:
            size += entry.stat().st_size
        else:
            os.unlink(entry)
    if not names:
        with contextlib.suppress(FileNotFoundError):
            folder.rmdir()
    return size


def not_looked_at(why: str) -> RowError:
    """What is said of a row with pictures where nobody looks at them.

    Args:
        why: the end of a sentence that names the model.
    """
    return RowError([Problem("pictures", f"the row has a picture, and {why}",
                             "use a model that sees, such as google/gemma-3-4b-it, or leave the row out")])


def _called(ref: Mapping[str, Any], number: int) -> str:
    """What a picture is called in messages: by its path, as the row has it."""
    path = f" {quoted(ref['path'], _SHOWN)}" if "path" in ref else ""
    return f"the picture{path} of turn {number}"


def likely_folder(path: str, place: Place) -> Path | None:
    """Where a relative path leads to a file that leads nowhere from the folder of the data: above it, or here."""
    if os.path.isabs(path) or not place.own:
        return None
    tried = [Path(), *(folder / os.path.join(*[os.pardir] * up) for folder in place.folders
                       for up in range(1, _ABOVE + 1))]
    return next((Path(os.path.normpath(folder)) for folder in tried if is_file(folder / path)), None)
