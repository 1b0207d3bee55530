"""One writer at a time."""

from __future__ import annotations

import os
import time
from pathlib import Path

from gemma_tune.base.errors import InUse, UserError
from gemma_tune.base.files import OLD, os_errors, recover, write_json
from gemma_tune.base.listener import Listener
from gemma_tune.base.strict_json import object_in
from gemma_tune.run.directory import MADE, MADE_FOR_OLLAMA, PIPED, RunDir, now
from gemma_tune.run.unrecorded import take_up

_SAME = 5.0  # seconds by which one process's beginning can differ, when the clock was put right in between
_PUTTING = 2.0  # seconds in which a living command puts its results in place, at most


def _beginning(pid: int) -> float | None:
    """When a process began, in seconds since 1970; None where that may not be known.

    Raises:
        ProcessLookupError: there is none of this number.
    """
    import psutil

    try:
        return psutil.Process(pid).create_time()
    except psutil.AccessDenied:
        return None
    except psutil.Error as e:
        raise ProcessLookupError from e


class Lock:
    """One writer at a time. The operating system drops the lock with its owner, so a dead owner's is taken over.

    Attributes:
        restored: artifacts that were put back because an earlier owner was killed while it replaced them.
        taken_up: stages whose results an earlier owner was killed before it could record; they are recorded now.
    """

    def __init__(self, root: Path, stage: str):
        self.root, self.stage = root, stage
        self.owner = root / ".lock-owner.json"

    def __enter__(self) -> Lock:
        from filelock import FileLock, Timeout

        with os_errors(self.root):
            try:
                self.root.mkdir(parents=True, exist_ok=True)
            except FileNotFoundError as e:  # below /proc, say, where its parent is
                raise UserError(f"no directory can be made at {self.root}", "choose another place with --run DIR"
                                ) from e
            self._lock = FileLock(self.root / ".lock", timeout=0)
            try:
                self._lock.acquire()
            except Timeout as e:
                raise InUse(f"{self.root} is in use by {self._describe_owner()}",
                            "wait until it has finished, or work on another run with --run DIR") from e
            try:
                write_json(self.owner, {"pid": os.getpid(), "began": _beginning(os.getpid()), "stage": self.stage,
                                        "since": now()})
                self.taken_up = take_up(self.root)
                run = RunDir(self.root, "")
                self.restored = [name for folder, names in ((run.root, MADE), (run.ollama, MADE_FOR_OLLAMA),
                                                            (run.inputs, PIPED)) for name in recover(folder, names)]
            except BaseException:
                self.__exit__()
                raise
        return self

    def tell(self, listener: Listener) -> None:
        """Say what an earlier owner was killed at, and what came of it."""
        for name in self.restored:
            listener.warn(f"an earlier command was killed while replacing {name}: the old one is back")
        for name in self.taken_up:
            listener.warn(f"an earlier command was killed before it could record the result of `{name}`: it is whole, "
                          "and recorded now")

    @classmethod
    def owner_of(cls, root: Path) -> str | None:
        """Who works on the run at ``root`` now, or None."""
        try:
            owner = object_in(root / ".lock-owner.json")
            began, noted = _beginning(owner["pid"]), owner["began"]
            # The system gives a dead process's number to another one.
            if None not in (began, noted) and abs(began - noted) > _SAME:
                return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
            return None
        return cls(root, "")._describe_owner()

    def _describe_owner(self) -> str:
        try:
            owner = object_in(self.owner)
            return f"process {owner['pid']} ({owner['stage']}, since {owner['since']})"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"

    def __exit__(self, *_: object) -> None:
        try:
            self.owner.unlink(missing_ok=True)
        finally:
            self._lock.release()


def finish_killed(root: Path, listener: Listener) -> None:
    """Let what a command that was killed had made take its place, for commands that only read the run.

    A command that lives is waited for while it puts its results in place. Where the run cannot be written, or
    is in use, nothing happens.
    """
    until = time.monotonic() + _PUTTING
    while _is_between(root) and os.access(root, os.W_OK):
        try:
            with Lock(root, "status") as lock:
                lock.tell(listener)
            return
        except InUse:
            if time.monotonic() > until:
                return
            time.sleep(0.05)
        except (UserError, OSError):
            return


def _is_between(root: Path) -> bool:
    """Whether a result waits for its place or its record, or an old one was moved away for it."""
    run = RunDir(root, "")
    return run.next_manifest.exists() or any(next(folder.glob(f"{OLD}*"), None)
                                             for folder in (run.root, run.ollama, run.inputs))
