"""What ``/save``, ``/fix`` and ``/better`` of ``chat`` write: rows of JSON Lines files, which ``prepare`` reads.

Conversations and pairs of answers lie in files of their own, because a run learns from one kind of data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_tune import samples
from gemma_tune.base.errors import UserError
from gemma_tune.base.files import json_bytes, write_atomic
from gemma_tune.config.settings import as_flags
from gemma_tune.config.stages import PrepareConfig
from gemma_tune.data.reading.sources import EXAMPLE, as_typed
from gemma_tune.run.directory import RunDir, command
from gemma_tune.run.manifest import CONVERSATIONS, PAIRS

DEFAULT_NAME, PAIRS_NAME = "saved.jsonl", "saved-pairs.jsonl"
# Settings of `prepare` that say how certain files are read; they mean nothing for rows of another kind.
_OF_FILES = ("format", "columns", "roles", "turn_keys", "delimiter", "encoding", "take")


@dataclass(frozen=True)
class Pairs:
    """The file of a run where pairs of answers are kept, the better and the worse one to the same prompt."""

    path: Path

    def put(self, before: Sequence[bytes], pairs: Sequence[Mapping[str, Any]]) -> list[bytes]:
        """Append pairs as lines, each that is not there already.

        Args:
            before: what an earlier call returned and these are to take the place of, as long as nothing follows it.

        Returns:
            The lines that were written.

        Raises:
            UserError: the file cannot be written, or holds something else than JSON Lines.
        """
        rows = [json_bytes(pair) for pair in pairs]
        if not rows and not before:
            return []
        try:
            return self._put(b"".join(before), rows)
        except OSError as e:
            raise UserError(f"{self.path} cannot be written, so its pairs stay as they are: {e.strerror}",
                            "/save FILE keeps the conversation in a file of another place") from e

    def _put(self, before: bytes, rows: list[bytes]) -> list[bytes]:
        if self.path.exists() and not self.path.is_file():
            raise UserError(f"{self.path} is not a file, so the pair is not kept", "move it away")
        content = self.path.read_bytes() if self.path.exists() else b""
        _refuse_other_content(self.path, next((line for line in reversed(content.split(b"\n")) if line.strip()), b""),
                              "move it away")
        if before and content.endswith(before):
            content = content[:-len(before)]
        there = content.split(b"\n")
        rows = [row for row in rows if row.rstrip(b"\n") not in there]
        write_atomic(self.path, content + (b"\n" if rows and there[-1] else b"") + b"".join(rows))
        return rows

    def number(self) -> int:
        """How many pairs there are."""
        try:
            with open(self.path, "rb") as f:
                return sum(bool(line.strip()) for line in f)
        except OSError:
            return 0


@dataclass
class Saves:
    """Where conversations of one chat are saved.

    Args:
        run: the run whose data they are to join.
        prepared: recorded settings of ``prepare`` in it.
        kind: what it learns from: ``conversations``, ``pairs`` or ``judged`` answers.
    """

    run: RunDir
    prepared: Mapping[str, Any]
    kind: str = CONVERSATIONS
    _last: tuple[Path, int, bytes] | None = field(default=None, init=False)  # file, offset and row of this conversation

    @property
    def pairs(self) -> Pairs:
        """Where pairs of answers are kept: in the run, whatever file conversations are saved in."""
        return Pairs(self.run.root / PAIRS_NAME)

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
            last = line = b""  # the last one that is not blank, and the last one
            for line in f:
                if line.rstrip(b"\n") == row.rstrip(b"\n"):
                    return False
                last = line if line.strip() else last
            _refuse_other_content(path, last)
            end = f.seek(0, os.SEEK_END)
        start = self._start_of_earlier_state(path, last, end)
        missing = b"" if start < end or line.endswith(b"\n") or not end else b"\n"
        _put_at_end(path, start, last if start < end else b"", missing + row)
        self._last = path.resolve(), start + len(missing), row
        return True

    def _start_of_earlier_state(self, path: Path, last: bytes, end: int) -> int:
        """Offset of this conversation's row, if it is still the last one; else the end of the file."""
        if self._last and self._last == (path.resolve(), end - len(last), last):
            return self._last[1]
        return end

    def command_to_prepare(self, path: Path) -> str:
        """The command that prepares the run's own data together with ``path``, with the settings as they were."""
        # Saved rows have a format of their own, so it is detected row by row again.
        settings = {k: v for k, v in self.prepared.items() if k not in ("data", "format")}
        if self.kind != CONVERSATIONS:  # of pairs the better answers, beside conversations
            settings["take"] = "chosen"
        return self._prepare(self._own(), path, settings)

    def command_to_prepare_pairs(self) -> str:
        """The command that prepares the kept pairs: with the run's own data where that is pairs, else alone."""
        if self.kind == PAIRS:
            return self._prepare(self._own(), self.pairs.path,
                                 {k: v for k, v in self.prepared.items() if k not in ("data", "format")})
        settings = {k: v for k, v in self.prepared.items() if k not in ("data", *_OF_FILES)}
        if isinstance(settings.get("valid"), str):  # a file of the other kind
            del settings["valid"]
        return self._prepare([], self.pairs.path, settings)

    def _own(self) -> list[str]:
        own = [as_typed(self.run.found(name)) for name in self.prepared.get("data") or ()]
        return own or [f"{EXAMPLE}{samples.SAMPLE}"]

    def _prepare(self, names: list[str], path: Path, settings: dict[str, Any]) -> str:
        if path.resolve() not in {Path(name).resolve() for name in names if not name.startswith(EXAMPLE)}:
            names.append(str(path))
        if isinstance(settings.get("valid"), str):
            settings["valid"] = self.run.found(settings["valid"])
        return command("prepare", self.run.root, *names, *as_flags(PrepareConfig, settings))


def _put_at_end(path: Path, start: int, before: bytes, content: bytes) -> None:
    """Let a file go on with ``content`` from ``start`` on, where ``before`` stands, which comes back on a full disk;
    with nothing there, from the file's end, which another chat may have moved by now."""
    with open(path, "ab", buffering=0) as f:
        if before:
            f.truncate(start)
        start, left = f.seek(0, os.SEEK_END), content
        try:
            while left:
                left = left[f.write(left):]
        except OSError:
            f.truncate(start)
            f.write(before)
            raise


def _refuse_other_content(path: Path, last: bytes, hint: str = "name another file: /save FILE") -> None:
    """A line more would spoil a file that is no list of lines: a JSON array, a table, a compressed file."""
    if not last:
        return
    try:
        is_row = isinstance(json.loads(last.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        is_row = False
    if not is_row:
        raise UserError(f"{path} is not a JSON Lines file: its last line is no object", hint)
