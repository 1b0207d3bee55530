"""What ``/save`` of ``chat`` does: conversations become rows of a JSON Lines file, which ``prepare`` reads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_tune import samples
from gemma_tune.base.errors import UserError
from gemma_tune.base.files import json_bytes
from gemma_tune.config.settings import as_flags
from gemma_tune.config.stages import PrepareConfig
from gemma_tune.run.directory import RunDir, command

DEFAULT_NAME = "saved.jsonl"


@dataclass
class Saves:
    """Where conversations of one chat are saved.

    Args:
        run: the run whose data they are to join.
        prepared: recorded settings of ``prepare`` in it.
    """

    run: RunDir
    prepared: Mapping[str, Any]
    _last: tuple[Path, int, bytes] | None = field(default=None, init=False)  # file, offset and row of this conversation

    def forget(self) -> None:
        """What is saved next is another conversation, not a later state of the last one."""
        self._last = None

    def save(self, messages: Sequence[Mapping[str, Any]], name: str = "") -> tuple[Path, bool]:
        """Append a conversation as one line, or put it in place of its own earlier state at the end of the file.

        Returns:
            The file, and whether it has changed: the same conversation is never there twice.

        Raises:
            UserError: a file that cannot be written, or holds something else than JSON Lines.
        """
        path = Path(os.path.expanduser(name)) if name else self.run.root / DEFAULT_NAME
        row = json_bytes({"messages": list(messages)})
        try:
            changed = self._write(path, row)
        except OSError as e:
            raise UserError(f"{path} cannot be written: {e.strerror}", "name another file: /save FILE") from e
        return path, changed

    def _write(self, path: Path, row: bytes) -> bool:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a file", "name a file: /save FILE")
        with open(path, "a+b") as f:
            f.seek(0)
            last = b""
            for last in f:
                if last.rstrip(b"\n") == row.rstrip(b"\n"):
                    return False
            _refuse_other_content(path, last)
            end = f.seek(0, os.SEEK_END)
            start = self._start_of_earlier_state(path, last, end)
            if start < end:
                f.truncate(start)
            missing = b"" if start < end or last.endswith(b"\n") or not end else b"\n"
            f.write(missing + row)
        self._last = path.resolve(), start + len(missing), row
        return True

    def _start_of_earlier_state(self, path: Path, last: bytes, end: int) -> int:
        """Offset of this conversation's row, if it is still the last one; else the end of the file."""
        if self._last and self._last == (path.resolve(), end - len(last), last):
            return self._last[1]
        return end

    def command_to_prepare(self, path: Path) -> str:
        """The command that prepares the run's own data together with ``path``, with the settings as they were."""
        names = [self.run.found(name) for name in self.prepared.get("data") or ()] or [_built_in_example()]
        if path.resolve() not in {Path(name).resolve() for name in names}:
            names.append(str(path))
        # Saved rows have a format of their own, so it is detected row by row again.
        settings = {k: v for k, v in self.prepared.items() if k not in ("data", "format")}
        if isinstance(settings.get("valid"), str):
            settings["valid"] = self.run.found(settings["valid"])
        return command("prepare", self.run.root, *names, *as_flags(PrepareConfig, settings))


def _built_in_example() -> str:
    return os.path.relpath(samples.training_path())


def _refuse_other_content(path: Path, last: bytes) -> None:
    """A line more would spoil a file that is no list of lines: a JSON array, a table, a compressed file."""
    if not last.strip():
        return
    try:
        is_row = isinstance(json.loads(last.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        is_row = False
    if not is_row:
        raise UserError(f"{path} is not a JSON Lines file: its last line is no object", "name another file: /save FILE")
