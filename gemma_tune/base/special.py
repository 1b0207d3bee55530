"""Files that may be something else: a pipe is waited for, and what may never end is refused."""

from __future__ import annotations

import os
import select
import stat
from pathlib import Path

from gemma_tune.base.errors import UserError

_CHUNK = 1 << 20
PIPE_SECONDS = 10.0  # that a pipe is waited for


def read_bounded(path: Path, most: int) -> bytes:
    """The content of a small file, also of a device or of a pipe that something writes into, as a shell's ``<(…)``.

    Raises:
        UserError: it has more than ``most`` bytes, or is a pipe that nobody writes into.
        OSError: it cannot be read.
    """
    at_once = getattr(os, "O_NONBLOCK", 0)  # by itself, opening a pipe waits for its writer; Windows has no such files
    fd = os.open(path, os.O_RDONLY | at_once)
    try:
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            content = _from_pipe(path, fd, most)
        else:
            if at_once:
                os.set_blocking(fd, True)
            with open(fd, "rb", closefd=False) as file:
                content = file.read(most + 1)
    finally:
        os.close(fd)
    if len(content) > most:
        raise UserError(f"{path} has more than {most >> 10:,} KiB, which is no such file", "check the path")
    return content


def _from_pipe(path: Path, fd: int, most: int) -> bytes:
    # What a shell opened for this command has a writer, or had one; a pipe with a name of its own may never have.
    patience = None if "pipe:[" in os.path.realpath(path) or str(path).startswith("/dev/") else PIPE_SECONDS
    parts: list[bytes] = []
    while sum(map(len, parts)) <= most:
        if not select.select([fd], [], [], patience)[0]:
            raise UserError(f"{path} is a pipe into which nothing is written", "name a file, or write into the pipe")
        try:
            part = os.read(fd, _CHUNK)
        except BlockingIOError:
            continue
        if not part:
            break
        parts.append(part)
    return b"".join(parts)


def refuse_special(folder: Path) -> None:
    """Refuse a model's or an adapter's directory in which pipes, sockets or devices lie: to read them may never end.

    Raises:
        UserError: all of them.
    """
    found = sorted(str(path) for place in (folder, folder / "additional_chat_templates") if place.is_dir()
                   for path in place.iterdir() if path.exists() and not (path.is_file() or path.is_dir()))
    if found:
        raise UserError(f"{folder} holds what is no file: {', '.join(found)}",
                        "copy or download it again; pipes, sockets and devices are not read")
