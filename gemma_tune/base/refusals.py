"""What the operating system refuses: told from a library's own exception, and before files are read."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gemma_tune.base.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_OF_RUST = re.compile(r"([^:]*) \(os error (\d+)\)")  # as safetensors and tokenizers end what they say
_OF_TORCH = ("unexpected pos", "PytorchStreamWriter", "iostream error")  # of torch.save, which does not say why
_PROBE = 1 << 16  # bytes


class NotWritten(OSError):
    """A library could not write a file, and nobody knows why."""


def refusal(error: Exception, folder: Path) -> OSError | None:
    """What the operating system refused, if that is what an exception of any library means; None if it is not.

    Args:
        folder: where was written; where the library does not say why it could not, a few bytes more are tried there.
    """
    if isinstance(error, OSError):
        return error
    if isinstance(error, UserError):  # which can quote another one
        return None
    if found := _OF_RUST.search(str(error)):
        number = int(found[2])
        # The last is a number of Windows', of which Python makes that of C there; elsewhere it is passed over.
        return OSError(number, found[1].strip(), str(folder), number)
    if isinstance(error, RuntimeError) and any(text in str(error) for text in _OF_TORCH):
        return _tried(folder) or NotWritten(errno.EIO, str(error), str(folder))
    return None


def _tried(folder: Path) -> OSError | None:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE))
    except OSError as e:
        return OSError(e.errno, e.strerror, str(folder))
    return None


def require_readable(place: Path) -> None:
    """Refuse a file, or a directory with files, that this user has no right to read; what is not there is passed over.

    Libraries read files of their own choice, and say of one that they may not read that it does not exist, or does not
    fit.

    Raises:
        UserError: all those files.
    """
    if not os.path.exists(place):
        above = next((parent for parent in place.absolute().parents if os.path.isdir(parent)), None)
        closed = [above] if above and not _may(above, os.X_OK) else []
    elif not may_read(place):
        closed = [place]
    else:
        inside = sorted(place.iterdir()) if place.is_dir() else []
        closed = [path for path in inside if path.is_file() and not may_read(path)]
    if closed:
        raise unreadable(closed[0], closed[1:])


def may_read(path: Path) -> bool:
    """Whether this user may read a file, or look into a directory."""
    return _may(path, os.R_OK | os.X_OK if path.is_dir() else os.R_OK)


def _may(path: Path, mode: int) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def unreadable(path: Path | str, others: Sequence[Path] = ()) -> UserError:
    """The error for what is there and may not be read."""
    return UserError(f"no permission to read {path}", "ask its owner for the right to read it (chmod -R a+rX DIR), or "
                                                      "work on a run of your own: --run DIR",
                     [f"no permission to read {other}" for other in others])
