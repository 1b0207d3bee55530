"""Files that are either whole or not there: atomic writes, directory swaps, fingerprints.

Replacing a directory takes two renames. Between them the old one lies beside its place as ``.old-<name>``;
:func:`recover` puts it back after a crash, so that a finished artifact is never lost.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import select
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemma_tune.base.errors import UserError, WorkFailed

NEW, OLD = ".new-", ".old-"
PACKAGE = Path(__file__).parents[1]  # the directory of gemma_tune
_CHUNK = 1 << 20
PIPE_SECONDS = 10.0  # that a pipe is waited for
_line_of = json.JSONEncoder(ensure_ascii=False).encode  # made once: json.dumps makes a new one for each call


@contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal while writing below ``path`` into an error that says what to do."""
    try:
        yield
    except OSError as e:
        place = e.filename or path
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise WorkFailed(f"the disk is full: {place}", "free some space and run the same command again; "
                                                           "what was finished before is untouched") from e
        if e.errno == errno.EFBIG:
            raise WorkFailed(f"the file would be larger than its file system, or `ulimit -f`, allows: {place}",
                             "work on another disk with --run DIR; `merge --max-shard-size 2GB` writes smaller files"
                             ) from e
        if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"no permission to write {place}", "choose another place with --run DIR, or change the "
                                                               "directory's permissions") from e
        if e.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            raise UserError(f"{place} is in the way: {e.strerror}", "choose another place with --run DIR") from e
        raise


def read_bounded(path: Path, most: int) -> bytes:
    """The content of a small file, also of a device or of a pipe that something writes into, as a shell's ``<(…)``.

    Raises:
        UserError: it has more than ``most`` bytes, or is a pipe that nobody writes into.
        OSError: it cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # by itself, opening a pipe waits for its writer
    try:
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            content = _from_pipe(path, fd, most)
        else:
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
    """Make a finished file the one at ``target``, durably: after a crash, the old one or the new one is there."""
    sync(fresh)
    os.replace(fresh, target)
    sync(target.parent)


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
def replacing_directory(target: Path) -> Iterator[Path]:
    """Give a new directory to fill; on success it takes the place of ``target``, on failure nothing changes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
    fresh = target.with_name(NEW + target.name)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
        for path in (*fresh.rglob("*"), fresh):
            sync(path)
        _swap(target, fresh)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _swap(target: Path, fresh: Path) -> None:
    old = target.with_name(OLD + target.name)
    shutil.rmtree(old, ignore_errors=True)
    try:
        if target.exists():
            os.rename(target, old)
        os.rename(fresh, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(*folders: Path) -> list[str]:
    """Undo directory swaps that a crash interrupted, and remove what they left; returns the names put back.

    Looks at what lies directly in ``folders``, where swaps happen, and never deeper: a run directory may hold other
    runs, or be somebody's home. Only called by the owner of the run's lock.
    """
    restored = []
    for leftover in [p for folder in folders for p in folder.glob(f"{OLD}*")]:
        target = leftover.with_name(leftover.name.removeprefix(OLD))
        if target.exists():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            os.rename(leftover, target)
            restored.append(target.name)
    for leftover in [p for folder in folders for p in folder.glob(f"{NEW}*")]:
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    return restored


def sha256_file(path: Path) -> str:
    """Hex digest of one file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


# What decides what a Hugging Face checkpoint computes; runs and other things may lie in the same directory.
CHECKPOINT_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*",
                    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
                    "additional_chat_templates/*.jinja")


def _members(path: Path, patterns: Sequence[str]) -> list[tuple[str, Path]]:
    if path.is_file():
        return [(path.name, path)]
    if patterns:
        return sorted((p.name, p) for p in {p for pattern in patterns for p in path.glob(pattern)} if p.is_file())
    return sorted((p.relative_to(path).as_posix(), p) for p in path.rglob("*")
                  if p.is_file() and not p.name.startswith("."))


def fingerprint(path: Path, known: dict[str, Any] | None = None, patterns: Sequence[str] = ()) -> dict[str, Any]:
    """sha256, size in bytes and a stamp (names, sizes, modification times) of a file or a directory's files.

    Hidden files do not count; ``patterns`` restricts a directory to such files directly in it. With ``known``, an
    earlier result of this function, the content is read again only if the stamp differs: a fingerprint of several
    gigabytes is otherwise too slow to check before every stage.

    Raises:
        FileNotFoundError: if ``path`` does not exist.
    """
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    members = [(name, p, p.stat()) for name, p in _members(path, patterns)]
    stamp = hashlib.sha256(repr([(n, s.st_size, s.st_mtime_ns) for n, _, s in members]).encode()).hexdigest()
    size = sum(s.st_size for _, _, s in members)
    if known and known.get("stamp") == stamp:
        return {"sha256": known["sha256"], "bytes": size, "stamp": stamp}
    single = path.is_file()
    digest = hashlib.sha256()
    for name, member, _ in members:
        digest.update(b"" if single else f"{name}\0{sha256_file(member)}\n".encode())
    sha = sha256_file(path) if single else digest.hexdigest()
    return {"sha256": sha, "bytes": size, "stamp": stamp}


CACHE = "GEMMA_TUNE_CACHE"
_OTHER_CACHE = f"name a directory for it: export {CACHE}=/a/directory"


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
    except OSError as e:
        place = e.filename or cache_dir()
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise WorkFailed(f"there is no room in the cache: {place}: {e.strerror}",
                             f"free some space, or {_OTHER_CACHE}") from e
        raise UserError(f"the cache cannot be used: {place}: {e.strerror or e}", _OTHER_CACHE) from e


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
