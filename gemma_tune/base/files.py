"""Files that are either whole or not there: atomic writes, directory swaps, fingerprints.

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
import select
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemma_tune.base.checkpoint import VOCABULARY
from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.base.refusals import FORBIDDEN, FULL, NotWritten, may_read, refusal, unreadable

NEW, OLD = ".new-", ".old-"
PACKAGE = Path(__file__).parents[1]  # the directory of gemma_tune
_CHUNK = 1 << 20
PIPE_SECONDS = 10.0  # that a pipe is waited for
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


# What decides what a Hugging Face checkpoint computes; runs and other things may lie in the same directory.
CHECKPOINT_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*",
                    "special_tokens_map.json", "added_tokens.json", *VOCABULARY, "merges.txt", "chat_template*",
                    "additional_chat_templates/*.jinja")


def _members(path: Path, patterns: Sequence[str]) -> list[tuple[str, Path]]:
    if path.is_file():
        return [(path.name, path)]
    if patterns:
        return sorted((p.name, p) for p in {p for pattern in patterns for p in path.glob(pattern)} if p.is_file())
    return sorted((p.relative_to(path).as_posix(), p) for p in path.rglob("*")
                  if p.is_file() and not p.name.startswith("."))


def fingerprint(path: Path, known: dict[str, Any] | None = None, patterns: Sequence[str] = (),
                name: str | None = None) -> dict[str, Any]:
    """sha256, size in bytes and a stamp (names, sizes, modification times) of a file or a directory's files.

    Hidden files do not count; ``patterns`` restricts a directory to such files directly in it. With ``known``, an
    earlier result of this function, the content is read again only if the stamp differs: a fingerprint of several
    gigabytes is otherwise too slow to check before every stage.

    Args:
        name: what a file will be called, if it has another name now.

    Raises:
        FileNotFoundError: if ``path`` does not exist.
    """
    single, members, stamp, size = _looked_at(path, patterns, name)
    if known and known.get("stamp") == stamp:
        return {"sha256": known["sha256"], "bytes": size, "stamp": stamp}
    digest = hashlib.sha256()
    for own, member, _ in members:
        digest.update(b"" if single else f"{own}\0{sha256_file(member)}\n".encode())
    sha = sha256_file(path) if single else digest.hexdigest()
    return {"sha256": sha, "bytes": size, "stamp": stamp}


def size_and_stamp(path: Path, patterns: Sequence[str], name: str | None) -> tuple[int, str]:
    """Size in bytes and stamp of a :func:`fingerprint`, for which nothing is read.

    Raises:
        FileNotFoundError: if ``path`` does not exist.
    """
    _, _, stamp, size = _looked_at(path, patterns, name)
    return size, stamp


def _looked_at(path: Path, patterns: Sequence[str], name: str | None) -> tuple[bool, list[Any], str, int]:
    """Whether it is a file, its members with their names and what the system says of them, its stamp and its size."""
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    single = path.is_file()
    members = [(name if single and name else own, p, p.stat()) for own, p in _members(path, patterns)]
    stamp = hashlib.sha256(repr([(n, s.st_size, s.st_mtime_ns) for n, _, s in members]).encode()).hexdigest()
    return single, members, stamp, sum(s.st_size for _, _, s in members)


CACHE = "GEMMA_TUNE_CACHE"
_OTHER_CACHE = f"set {CACHE} to a directory for it"


def cache_dir() -> Path:
    """Where checkpoints made from GGUF files are kept: ``GEMMA_TUNE_CACHE``, else the user's cache directory.

    Raises:
        UserError: it would lie in a home directory that is not known.
    """
    configured = os.environ.get(CACHE)
    named = configured or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "gemma-tune")
    path = os.path.expanduser(named)
    if path.startswith("~"):  # no HOME, and a user without an entry in the system's list, as in a container
        raise UserError(f"there is no place for the cache: the home directory in {named} is not known", _OTHER_CACHE)
    return Path(path)


@contextmanager
def cache_errors() -> Iterator[None]:
    """Turn an operating system's refusal while working in the cache into an error that names its variable."""
    try:
        yield
    except Exception as e:
        refused = refusal(e, cache_dir())
        if refused is None:
            raise
        place = refused.filename or cache_dir()
        if refused.errno in (*FULL, errno.EFBIG):
            raise WorkFailed(f"there is no room in the cache: {place}: {refused.strerror}",
                             f"free some space, or {_OTHER_CACHE}") from e
        raise UserError(f"the cache cannot be used: {place}: {refused.strerror or refused}", _OTHER_CACHE) from e


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
