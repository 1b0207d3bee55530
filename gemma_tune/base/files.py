"""Files that are either whole or not there: atomic writes and directory swaps.

What is being made lies beside its place as ``.new-<name>``. Replacing a directory takes two renames. Between them the
old one lies beside its place as ``.old-<name>``; :func:`recover` puts it back after a crash, so that nothing finished
is lost.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import glob
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.base.refusals import FORBIDDEN, FULL, NotWritten, may_read, refusal, unreadable

NEW, OLD = ".new-", ".old-"
PACKAGE = Path(__file__).parents[1]  # the directory of gemma_tune
_CHUNK = 1 << 20
_IN_USE, _DENIED = (32, 33), 5  # Windows' errors of a file that is open in, or locked by, another program
_SCANNED = 2.0  # seconds that a virus scanner or an indexer has a new file open, at most
_line_of = json.JSONEncoder(ensure_ascii=False).encode  # made once: json.dumps makes a new one for each call


UNTOUCHED = "what was finished before is untouched"


@contextmanager
def os_errors(path: Path, kept: str = UNTOUCHED) -> Iterator[None]:
    """Turn a refusal while writing below ``path``, by whatever library, into an error that says what to do.

    Args:
        kept: what is so, should the disk be full.
    """
    try:
        yield
    except Exception as e:
        refused = refusal(e, path)
        if refused is None:
            raise
        place = refused.filename or path
        if refused.errno in FULL:
            raise WorkFailed(f"the disk is full: {place}", f"free some space and run the same command again; {kept}"
                             ) from e
        if isinstance(refused, NotWritten):
            raise WorkFailed(f"{place} cannot be written: {refused.strerror}",
                             "see whether its disk is full, or a quota or `ulimit -f` is in the way, and run the same "
                             f"command again; {kept}") from e
        if refused.errno == errno.EFBIG:
            raise WorkFailed(f"the file would be larger than its file system, or `ulimit -f`, allows: {place}",
                             "work on another disk with --run DIR; `merge --max-shard-size 2GB` writes smaller files"
                             ) from e
        if _in_use(refused):
            place = refused.filename2 if refused.filename2 and os.path.exists(refused.filename2) else place
            raise WorkFailed(f"{place} is open in another program", "close what has it open, such as a chat, an editor "
                             f"or a virus scanner, and run the same command again; {kept}") from e
        if refused.errno in FORBIDDEN:
            if refused.filename and os.path.exists(place) and not may_read(Path(place)):
                raise unreadable(place) from e
            if refused.errno == errno.EROFS:
                raise UserError(f"no permission to write {place}: it lies on a read-only file system",
                                _elsewhere(path)) from e
            raise UserError(f"no permission to write {place}", f"{_elsewhere(path)}, or change the directory's "
                                                               "permissions") from e
        if refused.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.EBUSY):
            raise UserError(f"{place} is in the way: {refused.strerror}", "choose another place with --run DIR") from e
        raise


def _in_use(refused: OSError) -> bool:
    """Whether Windows refused it because another program has a file open, or locked.

    It calls that denied access where the file was to be replaced, or lies in a directory that was to be renamed.
    """
    code, onto = getattr(refused, "winerror", None), refused.filename2
    if code == _DENIED and onto:
        return not os.path.exists(onto) or os.path.isfile(onto) and os.access(onto, os.W_OK)
    return code in _IN_USE


def _elsewhere(root: Path) -> str:
    """What to do where the directory of a run cannot be written: in another one there is nothing to go on from."""
    if (root / "manifest.json").is_file():
        return f"copy the run, the whole directory {root}, to where you can write, and name that with --run DIR"
    return "choose another place with --run DIR"


def sync(path: Path) -> None:
    """Make a file's content, or the renames in a directory, durable."""
    windows = os.name == "nt"
    if windows and path.is_dir():  # it has no such call and needs none
        return
    # Opened for reading where that is enough: a copied file can be read-only. Windows syncs only what it may write.
    fd = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """Lend the path of a file that is being written; if that fails, what is there is removed.

    What a killed run left there is removed first.
    """
    path.unlink(missing_ok=True)
    try:
        yield path
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def put_in_place(fresh: Path, target: Path) -> None:
    """Make a finished file or directory the one at ``target``, durably: after a crash, the old or the new one is there.

    A directory's files are in sync already, see :func:`new_directory`.
    """
    if fresh.is_dir():
        _swap(place_of(target), fresh)
        return
    sync(fresh)
    _move(os.replace, fresh, target)
    sync(target.parent)


def place_of(target: Path) -> Path:
    """Where an artifact lies: a directory that is a link stays one, and what it points to is replaced."""
    return Path(os.path.realpath(target)) if target.is_symlink() and not target.is_file() else target


def seen_from(start: Path | str, path: Path | str) -> str:
    """A path as one names it from a directory: relative, but where there is no way, as to another drive of Windows."""
    try:
        return os.path.relpath(path, start)
    except ValueError:
        return os.path.abspath(path)


def fresh_path(target: Path) -> Path:
    """Where the successor of ``target`` is made."""
    place = place_of(target)
    return place.with_name(NEW + place.name)


def lend(path: Path, place: Path) -> None:
    """Have a file at another place as well, without a copy of its content where the system lets that be.

    Windows gives not everybody the right to make symbolic links; hard links stay on one disk.
    """
    for link in (os.symlink, os.link):
        with contextlib.suppress(OSError):
            return link(path.resolve(), place)
    shutil.copyfile(path, place)


def remove(path: Path) -> None:
    """Remove a file, a link or a directory, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def write_atomic(path: Path, content: bytes) -> None:
    """Write through a temporary file that is synced and renamed: readers see the old content or the new one."""
    with unfinished(path.with_name(NEW + path.name)) as fresh:
        with open(fresh, "wb") as f:
            f.write(content)
        put_in_place(fresh, path)


def json_bytes(content: Any, indent: int | None = None) -> bytes:
    """JSON with its final line feed, as UTF-8. Half a surrogate pair has no UTF-8 form and stays a JSON escape."""
    text = _line_of(content) if indent is None else json.dumps(content, ensure_ascii=False, indent=indent)
    return (text + "\n").encode(errors="backslashreplace")


def write_json(path: Path, content: Any) -> None:
    """Write readable JSON atomically."""
    write_atomic(path, json_bytes(content, indent=2))


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Give a new directory to fill, which :func:`put_in_place` makes the one at ``target``; on failure it goes."""
    fresh = fresh_path(target)
    fresh.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
    remove(fresh)
    fresh.mkdir()
    try:
        yield fresh
        follow_umask(fresh)
        for path in (*fresh.rglob("*"), fresh):
            sync(path)
    except BaseException:
        remove(fresh)
        raise


@contextmanager
def replacing_directory(target: Path) -> Iterator[Path]:
    """Give a new directory to fill; on success it takes the place of ``target``, on failure nothing changes."""
    with new_directory(target) as fresh:
        yield fresh
    try:
        put_in_place(fresh, target)
    except BaseException:
        remove(fresh)
        raise


def follow_umask(folder: Path) -> None:
    """Give the files directly in ``folder`` the rights that any new file would have.

    Libraries that write through temporary files leave those that only the owner may read. What the umask allows, a
    directory that was just made tells: it cannot be asked without changing it for all threads.
    """
    allowed = folder.stat().st_mode & 0o666
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink() and (mode := path.stat().st_mode) | allowed != mode:
            path.chmod(mode | allowed)


def _swap(target: Path, fresh: Path) -> None:
    old = target.with_name(OLD + target.name)
    remove(old)
    try:
        if target.exists():
            _move(os.rename, target, old)
        _move(os.rename, fresh, target)
    except BaseException:
        if old.exists() and not target.exists():
            _move(os.rename, old, target)
        raise
    sync(target.parent)
    remove(old)


def _move(rename: Callable[[Path, Path], None], source: Path, target: Path) -> None:
    """Rename; Windows refuses that while another program has the file open, or one in the directory, if for moments."""
    until = time.monotonic() + _SCANNED
    while True:
        try:
            return rename(source, target)
        except PermissionError:
            if os.name != "nt" or time.monotonic() > until:
                raise
        time.sleep(0.05)


def recover(folder: Path, names: Sequence[str]) -> list[str]:
    """Undo directory swaps that a crash interrupted, and remove what they left; returns the names put back.

    Only called by the owner of the run's lock.

    Args:
        folder: looked at is what lies directly in it, where swaps happen, and never deeper: a run directory may hold
            other runs, or be somebody's home. Where an artifact is a link, its own place is looked at.
        names: patterns of what is made there; whatever has another name is somebody else's.
    """
    links = {place_of(path) for path in folder.glob("*") if path.is_symlink() and _named(path.name, names)}
    places = [(folder, names), *((place.parent, [glob.escape(place.name)]) for place in links)]
    restored = []
    for leftover, target in _leftovers(places, OLD):
        if target.exists():
            remove(leftover)
        elif leftover.is_dir():
            _move(os.rename, leftover, target)
            restored.append(target.name)
    for leftover, _ in _leftovers(places, NEW):
        remove(leftover)
    return restored


def _leftovers(places: Sequence[tuple[Path, Sequence[str]]], prefix: str) -> list[tuple[Path, Path]]:
    """What lies beside its place under another name, and that place."""
    found = [(path, path.with_name(path.name.removeprefix(prefix)), names) for folder, names in places
             for path in folder.glob(f"{prefix}*")]
    return [(path, target) for path, target, names in found if _named(target.name, names)]


def _named(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def sha256_file(path: Path) -> str:
    """Hex digest of one file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Lend a path beside `out`; what was written there becomes `out` when all went well, and is removed when not.

    Raises:
        WorkFailed: for any OSError within.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # The same path each time, so that a killed run leaves one at most.
        with unfinished(out.with_name(out.name + ".partial")) as partial:
            yield partial
            put_in_place(partial, out)
    except OSError as error:
        hint = "Check free space and permissions there, then run the command again."
        raise WorkFailed(f"Writing {out} failed: {error.strerror or error}.", hint) from error
