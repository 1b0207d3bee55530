"""A picture that a turn names or holds: its bytes, looked at before anything is learned from them.

What is cut off, or is no picture at all, is found here and not in the middle of a training.
"""

from __future__ import annotations

import base64
import io
import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from gemma_tune.base.content import HEAD, described
from gemma_tune.base.errors import UserError
from gemma_tune.base.words import first_line
from gemma_tune.data.conversations.problems import Problem
from gemma_tune.data.reading.rows import HUB, Source
from gemma_tune.encoding.eye import READ, NoColours, in_colours

# What Pillow finds a file to be, and the end of its name. MPO is what many telephones write: a JPEG with others behind,
# which the reader of JPEG finds by itself.
ENDINGS = {"PNG": ".png", "JPEG": ".jpg", "MPO": ".jpg", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif"}
BROKEN, MISSING = "picture", "no_picture"  # codes of problems
_LARGEST = 1 << 30  # bytes; what Pillow takes is smaller
_HEIC = (b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"avif", b"avis")
_BEGINNINGS = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")  # of files in these formats
_AGAIN = "save or download it again, or leave the row out"
_CONVERT = "save it as PNG or JPEG, or leave the row out"
_MEND = "mend that, or leave the row out"


@dataclass(frozen=True)
class Place:
    """Where the pictures of a source's rows lie.

    Args:
        folders: in which relative paths begin; the first that has the file counts.
        own: whether the rows may name any file of this machine. Those of the Hub are somebody else's: they may name
            what lies in these folders, and nothing else.
    """

    folders: tuple[Path, ...]
    own: bool = True

    def __str__(self) -> str:
        return " or ".join("the working directory" if folder == Path() else f"{folder}" for folder in self.folders)


def place_of(source: Source, named: str | None, piped: Path) -> Place:
    """Where the pictures of a source's rows lie: in the folder that was named, else in that of the file, or of the
    description that it is read by, as LLaMA-Factory has it.

    Args:
        named: by ``--pictures``.
        piped: where copies of standard input lie; paths in these begin where the command runs.
    """
    first = () if named is None else (Path(os.path.expanduser(named)),)
    if source.kind == HUB:
        return Place(first, own=False)
    file = source.described.file if source.described else source.path
    last = Path() if source.path.is_relative_to(piped) else file.parent
    return Place(tuple(dict.fromkeys((*first, last))))


def require_folder(named: str | None) -> None:
    """Whether the folder that ``--pictures`` names is there.

    Raises:
        UserError: it is not.
    """
    if named is not None and not os.path.isdir(os.path.expanduser(named)):
        what = "is a file" if os.path.exists(os.path.expanduser(named)) else "is not there"
        raise UserError(f"the folder of the pictures, {named}, {what}",
                        "name the folder in which the paths of the rows begin: --pictures DIR")


class Unusable(Exception):
    """A picture that cannot be used.

    Args:
        reason: what is so of it, as the end of a sentence that begins with what it is called.
        fix: a suggestion.
        code: of the problem that it makes.
    """

    def __init__(self, reason: str, fix: str, code: str = BROKEN):
        self.reason, self.fix, self.code = reason, fix, code
        super().__init__(reason)

    def problem(self, what: str) -> Problem:
        """The problem of a row.

        Args:
            what: what the picture is called there.
        """
        return Problem(self.code, f"{what} {self.reason}", self.fix)


Tried = dict[tuple[Path, str], tuple[int, int] | None]


def located(path: str, place: Place, tried: Tried) -> tuple[Path, os.stat_result]:
    """The file that a path of a row means, and what the system says of it.

    Args:
        tried: takes where it was looked for, as folder and path: size and time stamp of what was there, or None.

    Raises:
        Unusable: it is not there, or not for these rows to name.
    """
    if not place.own:
        if not place.folders:
            raise Unusable("is no part of the data: rows of the Hub name no files of this machine",
                           "name the folder that the pictures lie in, where you have them: --pictures DIR; or leave "
                           "the row out")
        # On Windows one with a drive alone (C:a.png) is not absolute, and leads out of any folder.
        if os.path.isabs(path) or not all(Path(os.path.abspath(folder / path)).is_relative_to(os.path.abspath(folder))
                                          for folder in place.folders):
            raise Unusable(f"is not below {place}, and rows of the Hub name nothing else of this machine",
                           "write a path that begins in that folder, or leave the row out")
    for folder in place.folders:
        try:
            found = (folder / path).stat()
        except (FileNotFoundError, NotADirectoryError):
            tried[folder, path] = None
            continue
        except (OSError, ValueError) as e:  # no right to look there; too long a name, or one with a zero in it
            raise Unusable(f"cannot be read: {getattr(e, 'strerror', None) or e}", _MEND) from None
        if not stat.S_ISREG(found.st_mode):
            raise Unusable(f"is {'a folder' if stat.S_ISDIR(found.st_mode) else 'no file'}",
                           "name a file, or leave the row out")
        tried[folder, path] = found.st_size, found.st_mtime_ns
        return folder / path, found
    if os.path.isabs(path):
        raise Unusable("is not there", "write a path that begins in the folder of the data, or in that of --pictures "
                                       "DIR; or leave the row out", MISSING)
    raise Unusable(f"is not below {place}", "put it there, or name the folder that its path begins in: --pictures DIR",
                   MISSING)


def is_file(path: Path) -> bool:
    """Whether a file is there, whatever a row or a line says that is taken for its path."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, a NUL
        return False


def read(file: Path) -> bytes:
    """All bytes of a picture's file.

    Raises:
        Unusable: it cannot be read.
    """
    try:
        if file.stat().st_size > _LARGEST:
            raise Unusable(f"has more than {_LARGEST >> 20:,} MiB", _CONVERT)
        return file.read_bytes()
    except OSError as e:
        raise Unusable(f"cannot be read: {e.strerror or e}", _MEND) from None


def decoded(text: str) -> bytes:
    """The bytes of a picture that a row holds as Base64.

    Raises:
        Unusable: it is none.
    """
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as e:
        raise Unusable(f"is not Base64: {first_line(e)}", "write it anew, or leave the row out") from None


def examined(content: bytes) -> tuple[str, bool]:
    """Decode a picture as it will be: upright and in colours.

    Returns:
        The end of its file's name, and whether it has further frames or pages behind the first.

    Raises:
        Unusable: it cannot be decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures, and of faults beside what is seen
            with Image.open(io.BytesIO(content), formats=READ) as image:
                ending, several = ENDINGS[image.format], getattr(image, "is_animated", False)
                # Of a JPEG all is read, and an eighth of the pixels made of it: six times as fast.
                image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
                in_colours(image)
                return ending, several and image.format != "MPO"
    except MemoryError:
        raise
    except UnidentifiedImageError:
        if content.startswith(_BEGINNINGS):
            raise Unusable("is damaged, cut off, or without any pixel", _AGAIN) from None
        raise Unusable(f"is {_kind(content)}, and no PNG, JPEG, WebP, GIF, BMP or TIFF", _CONVERT) from None
    except NoColours as e:
        raise Unusable(f"is none that can be shown: {e}", "save it as PNG or JPEG with the colours that it is to have, "
                                                          "or leave the row out") from None
    except Image.DecompressionBombError:
        raise Unusable(f"is too large to be decoded: it has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels",
                       "make it smaller, or leave the row out") from None
    except Exception as e:  # Pillow's readers raise whatever broken data lead them to
        raise Unusable(f"is damaged, or cut off: {first_line(e)}", _AGAIN) from None


def _kind(content: bytes) -> str:
    if content[4:8] == b"ftyp" and content[8:12] in _HEIC:
        return "a HEIC or AVIF picture"
    return described(content[:HEAD])

