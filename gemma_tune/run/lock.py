"""One writer at a time."""

from __future__ import annotations

import os
from pathlib import Path

from gemma_tune.base.errors import UserError
from gemma_tune.base.files import os_errors, recover, write_json
from gemma_tune.base.strict_json import object_in
from gemma_tune.run.directory import RunDir, now


class Lock:
    """One writer at a time. The operating system drops the lock with its owner, so a dead owner's is taken over."""

    def __init__(self, root: Path, stage: str):
        self.root, self.stage = root, stage
        self.owner = root / ".lock-owner.json"

    def __enter__(self) -> Lock:
        from filelock import FileLock, Timeout

        with os_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.root / ".lock", timeout=0)
            try:
                self._lock.acquire()
            except Timeout as e:
                raise UserError(f"{self.root} is in use by {self._describe_owner()}",
                                "wait until it has finished, or work on another run with --run DIR") from e
            try:
                write_json(self.owner, {"pid": os.getpid(), "stage": self.stage, "since": now()})
                self.restored = recover(self.root, RunDir(self.root, "").ollama)
            except BaseException:
                self._lock.release()
                raise
        return self

    @classmethod
    def owner_of(cls, root: Path) -> str | None:
        """Who works on the run at ``root`` now, or None."""
        try:
            pid = object_in(root / ".lock-owner.json")["pid"]
            if os.name == "posix":  # elsewhere there is no harmless signal to ask with
                os.kill(pid, 0)
        except PermissionError:
            pass  # alive, and somebody else's
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            return None
        return cls(root, "")._describe_owner()

    def _describe_owner(self) -> str:
        try:
            owner = object_in(self.owner)
            return f"process {owner['pid']} ({owner['stage']}, since {owner['since']})"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"

    def __exit__(self, *_: object) -> None:
        self.owner.unlink(missing_ok=True)
        self._lock.release()
