"""A program of the user's that scores answers: it reads an answer on each line, and writes a number for each.

It is started once, without a shell, and ends when its standard input does. All answers of a step are written to it
before the first number has to be there, so that it can work on several at once.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import shlex
import shutil
import subprocess
import threading
from collections import deque
from collections.abc import Sequence
from typing import IO, Any

from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.base.words import shown
from gemma_tune.config.rewards import Reward

PATIENCE = 300.0  # seconds without a further number
_TO_END = 5.0  # seconds that it has once nothing more comes
_SHOWN = 300  # characters of what it was given
_LAST_LINES = 5  # of what it wrote to standard error


def words_of(command: str) -> list[str]:
    """Program and arguments of a command.

    Raises:
        UserError: quotes that do not end.
    """
    try:
        words = shlex.split(command, posix=os.name == "posix")
    except ValueError as e:
        raise UserError(f"--reward command:{command} cannot be read: {e}", "close its quotes") from e
    return [word.strip('"') for word in words] if os.name != "posix" else words


def refuse_missing(rewards: Sequence[Reward]) -> None:
    """Whether the programs of all rewards are there, before any work.

    Raises:
        UserError: one is not.
    """
    for reward in rewards:
        if reward.kind == "command" and shutil.which(name := words_of(reward.argument)[0]) is None:
            raise UserError(f"there is no program {name}, which --reward command:{reward.argument} asks for",
                            "name one that is there, with its arguments, such as command:'python score.py'")


class RewardProgram:
    """A running program.

    Args:
        command: program and arguments, as a POSIX shell would divide them.

    Raises:
        UserError: it cannot be started.
    """

    def __init__(self, command: str):
        self.command, words = command, words_of(command)
        try:
            self._process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
                errors="replace",
                # A process group of its own: Ctrl-C lets the training end its step, for which answers are scored.
                **({"process_group": 0} if os.name == "posix" else {
                    "creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}))
        except (OSError, ValueError) as e:
            reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
            raise UserError(f"the program of --reward command:{command} cannot be started: {reason} ({words[0]})",
                            "name a program that is there, such as command:'python score.py'") from e
        self._said: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._complaints: deque[str] = deque(maxlen=_LAST_LINES)
        self._reading = [threading.Thread(target=_read, args=(stream, into), daemon=True) for stream, into in (
            (self._process.stdout, self._said.put), (self._process.stderr, self._complain))]
        for thread in self._reading:
            thread.start()

    def _complain(self, line: str | None) -> None:
        if line is not None and line.strip():
            self._complaints.append(line.strip())

    def scores(self, lines: Sequence[str]) -> list[float]:
        """The number that it writes for each line.

        Raises:
            WorkFailed: it ended, wrote something else than a finite number, or nothing for too long.
        """
        writing = threading.Thread(target=self._write, args=(lines,), daemon=True)
        writing.start()
        return [self._score(line) for line in lines]

    def _write(self, lines: Sequence[str]) -> None:
        with contextlib.suppress(OSError, ValueError):  # that it has ended is noticed where its numbers are read
            for line in lines:
                self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()

    def _score(self, given: str) -> float:
        try:
            said = self._said.get(timeout=PATIENCE)
        except queue.Empty:
            raise self._failed(f"wrote nothing for {PATIENCE:.0f} seconds", given,
                               "let it write a number and flush it for each line that it reads: "
                               "print(score, flush=True)") from None
        if said is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_TO_END)
            self._reading[1].join(_TO_END)
            raise self._failed(f"ended with exit code {self._process.poll()}", given,
                               "let it go on until its standard input ends")
        with contextlib.suppress(ValueError):
            if math.isfinite(score := float(said)):
                return score
        raise self._failed(f"wrote {shown(said.strip())}, which is no finite number", given,
                           "let it write one number for each line, and everything else to standard error")

    def _failed(self, what: str, given: str, hint: str) -> WorkFailed:
        words = f"; its last words: {' / '.join(self._complaints)}" if self._complaints else ""
        was_given = given if len(given) <= _SHOWN else f"{given[:_SHOWN]} …"
        return WorkFailed(f"the program of --reward command:{self.command} {what}; it was given {was_given}{words}",
                          f"{hint}; then the same command goes on from the last checkpoint")

    def close(self) -> None:
        """Let it end, or end it."""
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.close()
        try:
            self._process.wait(_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for thread in self._reading:
            thread.join(_TO_END)
        for stream in (self._process.stdout, self._process.stderr):
            stream.close()


def _read(stream: IO[str], into: Any) -> None:
    """Hand on each line, and None at the end."""
    with contextlib.suppress(OSError, ValueError):
        for line in stream:
            into(line)
    into(None)
