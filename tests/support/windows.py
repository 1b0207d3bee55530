"""Windows' rules on another system, so far as they can be had there: ``python -m support.windows '[["prepare", …], …]'``
runs commands one after the other in this process, up to the first that fails; ``["cd", …]`` goes elsewhere in between.

- What this process, or one that it started, holds open or has mapped can be neither removed, renamed nor replaced, nor
  can a directory that it lies in. That is stricter than Windows, which lets go of what was opened for sharing. As there,
  it is called denied access where a file is replaced or a directory renamed.
- Nothing is renamed onto what is there; no directory can be opened; names follow Windows' rules; nobody may link.
- Text is in the code page of Chinese Windows unless an encoding is named, for libraries too.
- Ctrl-C does not interrupt waiting for a queue.
- gemma_tune's own modules see ``os.name``, ``sys.platform`` and what Windows' Python lacks in ``os``, ``signal``,
  ``select``, ``subprocess`` and others. Libraries see the system that they were installed for.

Paths keep their slashes, and a drive is a directory: no path leads into or out of it.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import multiprocessing
import os
import queue
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CODE_PAGE = "cp936"
OTHER_DRIVE = "OTHER_DRIVE"  # variable that names a directory to be a drive of its own
IN_USE = "The process cannot access the file because it is being used by another process"
_GONE = " (deleted)"
_NOT_THERE = {"fcntl", "termios", "tty", "pty", "pwd", "grp", "resource", "readline", "syslog"}
_OF_OS = {"O_NONBLOCK", "O_DIRECTORY", "O_CLOEXEC", "fork", "forkpty", "getuid", "geteuid", "getgid", "getegid", "getpgid",
          "setsid", "killpg", "mkfifo", "mknod", "uname", "statvfs", "fchmod", "chown", "sched_getaffinity", "sysconf",
          "set_blocking", "register_at_fork", "wait", "pread", "pwrite", "nice", "getloadavg", "EX_OK", "fdatasync"}
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV}
_OF_SIGNAL = {"SIGHUP", "SIGKILL", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGPIPE", "SIGQUIT", "SIGTSTP", "SIGCONT",
              "pthread_sigmask", "pthread_kill", "setitimer", "getitimer", "alarm", "ITIMER_REAL", "SIG_BLOCK",
              "SIG_UNBLOCK", "SIG_SETMASK", "sigwait", "siginterrupt", "pause"}
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_BAD_SIGN = re.compile(r'[<>:"|?*\x00-\x1f\\]')
_OURS = ("gemma_tune.", "gemma_tune")


def _error(number: int, text: str, path: Any, code: int, onto: Any = None) -> OSError:
    error = OSError(number, text, os.fspath(path), None, onto)
    error.winerror = code
    return error


# --- files ----------------------------------------------------------------------------------------------------------


def _family() -> Iterator[Path]:
    """What the system tells of this process and of those that it started."""
    waiting = [Path("/proc/self")]
    while waiting:
        place = waiting.pop()
        yield place
        try:
            for task in (place / "task").iterdir():
                waiting += [Path("/proc") / child for child in _read(task / "children").split()]
        except OSError:
            continue


def _read(path: Path) -> str:
    fd = _os_open(path, os.O_RDONLY)
    try:
        parts = []
        while part := os.read(fd, 1 << 20):
            parts.append(part)
        return b"".join(parts).decode(errors="surrogateescape")
    finally:
        os.close(fd)


def held(path: Any) -> str | None:
    """How a file, or one below a directory, is held; None if it is not."""
    place = os.path.join(os.path.realpath(os.path.dirname(os.path.abspath(path))), os.path.basename(os.path.abspath(path)))

    def concerns(other: str) -> bool:
        return not other.endswith(_GONE) and (other == place or other.startswith(f"{place}/"))

    for one in _family():
        try:
            mapped = [line.split(maxsplit=5)[5] for line in _read(one / "maps").splitlines() if "/" in line]
            numbers = os.listdir(one / "fd")
        except OSError:  # it has ended
            continue
        if found := next(filter(concerns, mapped), None):
            return f"{found} is mapped by {one.name}"
        for number in numbers:
            try:
                if concerns(target := os.readlink(one / "fd" / number)):
                    return f"{target} is open in {one.name} as {number}"
            except OSError:
                continue
    return None


def _refuse_held(path: Any, *renamed: Any) -> None:
    if isinstance(path, int) or not os.path.lexists(path):
        return
    if how := held(path):
        print(f"held: {how}", file=sys.__stderr__)
        if renamed and (path != renamed[0] or os.path.isdir(path)):
            raise _error(errno.EACCES, "Access is denied", renamed[0], 5, renamed[1])
        raise _error(errno.EACCES, IN_USE, *(renamed[:1] or [path]), 32, *renamed[1:])


def _refuse_name(path: Any) -> None:
    parts = [part for part in os.fspath(path).split(os.sep if isinstance(path, str | Path) else b"/") if part]
    for part in (os.fsdecode(part) for part in parts):
        if part not in (".", "..") and (_RESERVED.fullmatch(part) or _BAD_SIGN.search(part) or part[-1] in ". "):
            raise _error(errno.EINVAL, "The filename, directory name, or volume label syntax is incorrect", path, 123)


_SYSTEM = ("/proc", "/sys", "/dev", sys.prefix, sys.base_prefix, "/usr", "/etc")
_os_open = os.open


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if event == "open":
        path, _, flags = args
        if isinstance(path, int) or os.fspath(path).startswith(_SYSTEM if not isinstance(path, bytes) else b"/proc"):
            return
        writes = isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))
        if writes:
            _refuse_name(path)
        if os.path.isdir(path) and not writes:
            raise _error(errno.EACCES, "Permission denied", path, 5)
    elif event in ("os.remove", "os.rmdir"):
        _refuse_held(args[0])
    elif event == "os.mkdir":
        _refuse_name(args[0])
    elif event == "os.rename":
        _refuse_name(args[1])
        _refuse_held(args[0], *args[:2])
        _refuse_held(args[1], *args[:2])
    elif event == "os.symlink":
        raise _error(errno.EINVAL, "A required privilege is not held by the client", args[1], 1314)


def _rename(source: Any, target: Any, **more: Any) -> None:
    if os.path.lexists(target):
        raise _error(errno.EEXIST, "Cannot create a file when that file already exists", target, 183)
    _os_rename(source, target, **more)


_os_rename, _io_open = os.rename, io.open


def _open(file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, *rest: Any, **more: Any) -> Any:
    if "b" not in mode and not str(file).startswith("/proc/"):
        encoding = io.text_encoding(encoding)  # which warns of the caller, where it named none
        encoding = CODE_PAGE if encoding == "locale" else encoding
    return _io_open(file, mode, buffering, encoding, *rest, **more)


# --- what gemma_tune sees ----------------------------------------------------------------------------------------------


class _Seen(types.ModuleType):
    """A module with some of its names missing and others instead; what is set is set in the module itself."""

    def __init__(self, module: types.ModuleType, missing: set[str], **instead: Any):
        super().__init__(module.__name__)
        self.__dict__.update({"_module": module, "_missing": missing, **instead})

    def __getattr__(self, name: str) -> Any:
        if name in self._missing:
            raise AttributeError(f"module {self._module.__name__!r} has no attribute {name!r}")
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)


def _fsync(number: int) -> None:
    import fcntl  # the file is read by other systems' tests, too

    if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    os.fsync(number)


def _signal(number: int, handler: Any) -> Any:
    if number not in _SIGNALS:
        raise ValueError("invalid signal value")
    return signal.signal(number, handler)


def _select(*lists: Any) -> Any:
    for one in (one for some in lists[:3] for one in some):
        if not stat.S_ISSOCK(os.fstat(one if isinstance(one, int) else one.fileno()).st_mode):
            raise OSError(10038, "An operation was attempted on something that is not a socket")
    return select.select(*lists)


class _Popen(subprocess.Popen):
    def __init__(self, *args: Any, creationflags: int = 0, start_new_session: bool = False,
                 process_group: int | None = None, **more: Any):
        # Windows passes over the first one; the other two are not for it.
        assert process_group is None and not more.get("preexec_fn")
        super().__init__(*args, start_new_session=bool(creationflags & 0x200), **more)

    def send_signal(self, number: int) -> None:
        if number != signal.SIGTERM:
            raise ValueError(f"Unsupported signal: {number}")
        super().send_signal(number)


def _deaf(wait: Callable[..., Any]) -> Callable[..., Any]:
    """A wait that Ctrl-C does not interrupt: it is heard of afterwards."""
    def waits(*args: Any, **more: Any) -> Any:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            return wait(*args, **more)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return waits


class _Queue(queue.Queue):
    get = _deaf(queue.Queue.get)


class _SimpleQueue(queue.SimpleQueue):
    get = _deaf(queue.SimpleQueue.get)


def _context(method: str | None = None) -> Any:
    if method not in (None, "spawn"):
        raise ValueError(f"cannot find context for {method!r}")
    return multiprocessing.get_context("spawn")


def _relpath(path: Any, start: Any = os.curdir) -> str:
    drive = os.environ.get(OTHER_DRIVE, "\0")
    if os.path.abspath(path).startswith(drive) != os.path.abspath(start).startswith(drive):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")
    return os.path.relpath(path, start)


_SEEN = {
    "os": _Seen(os, _OF_OS, path=_Seen(os.path, set(), relpath=_relpath), name="nt", fsync=_fsync,
                supports_effective_ids=set(), linesep="\r\n"),
    "sys": _Seen(sys, set(), platform="win32"),
    "signal": _Seen(signal, _OF_SIGNAL, signal=_signal),
    "select": _Seen(select, {"poll", "epoll"}, select=_select),
    "subprocess": _Seen(subprocess, set(), Popen=_Popen, CREATE_NEW_PROCESS_GROUP=0x200),
    "queue": _Seen(queue, set(), Queue=_Queue, SimpleQueue=_SimpleQueue),
    "multiprocessing": _Seen(multiprocessing, set(), get_context=_context),
}
_import = builtins.__import__


def _imported(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
    if globals and str(globals.get("__name__")).startswith(_OURS):
        if name in _NOT_THERE:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name in _SEEN:
            return _SEEN[name]
    return _import(name, globals, locals, fromlist, level)


def install() -> None:
    """From now on, for as long as the process lasts."""
    builtins.__import__ = _imported
    builtins.open = io.open = _open
    os.rename = _rename
    shutil._use_fd_functions = False  # it removes a directory's files through the open directory
    warnings.filterwarnings("error", category=EncodingWarning, module=r"gemma_tune\b")
    sys.addaudithook(_audit)


if __name__ in ("__main__", "__mp_main__"):  # the second is in processes that are spawned
    assert not {"gemma_tune", "torch"} & sys.modules.keys(), "what is imported before sees the other system"
    install()

if __name__ == "__main__":
    from gemma_tune.cli.commands import app

    for command in json.loads(sys.argv[1]):
        if command[0] == "cd":
            os.chdir(command[1])
            continue
        sys.argv[1:] = command
        try:
            app(prog_name="gemma-tune")
        except SystemExit as e:
            if e.code:
                raise
