"""A program of the user's that scores answers: it reads an answer on each line, and writes a number for each.

Each process of a training, and `eval`, starts one, once and without a shell; it ends when its standard input does. All
answers of a step are written to it before the first number has to be there, so that it can work on several at once.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import shlex
import shutil
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Sequence
from typing import IO, Any

import psutil

from gemma_tune.base import shell
from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.base.words import shown, visible
from gemma_tune.config.rewards import Reward

GO_ON = "then the same command goes on from the last checkpoint"  # of a training
PATIENCE = 300.0  # seconds without a further number
_TO_END = 5.0  # seconds that it has once nothing more comes
_SHOWN = 300  # characters of what it was given
_LAST_LINES = 5  # of what it wrote to standard error
_ONE_EACH = "let it write one number for each line, and everything else to standard error"


def words_of(command: str) -> list[str]:
    """Program and arguments of a command.

    Raises:
        UserError: quotes that do not end.
    """
    reader = shlex.shlex(command, posix=True, punctuation_chars=False)
    reader.whitespace_split, reader.commenters = True, ""
    if os.name != "posix":  # there a backslash divides paths, and a single quote is a character as any other
        reader.escape, reader.quotes = "", '"'
    try:
        return list(reader)
    except ValueError as e:
        raise UserError(f"--reward command:{command} cannot be read: {e}", "close its quotes") from e


def refuse_missing(rewards: Sequence[Reward], otherwise: str = "") -> None:
    """Whether the programs of all rewards are there, before any work.

    Args:
        otherwise: what else can be done, for hints.

    Raises:
        UserError: one is not.
    """
    otherwise = f"; {otherwise}" if otherwise else ""
    for reward in rewards:
        if reward.kind != "command" or shutil.which(name := words_of(reward.argument)[0]) is not None:
            continue
        asked = f"which --reward command:{reward.argument} asks for"
        if os.path.isfile(name):
            raise UserError(f"{name}, {asked}, is there, and is no program that can be started",
                            f"name what runs it before it{_such_as()}"
                            + (f", or make it one: chmod +x {shell.quote(name)}" if os.name == "posix" else "")
                            + otherwise)
        raise UserError(f"there is no program {name}, {asked}",
                        f"name one that is there, with its arguments{_such_as()}{otherwise}")


def _such_as() -> str:
    return f", such as --reward {shell.quote('command:python score.py')}"


class RewardProgram:
    """A running program.

    Args:
        command: program and arguments, as a POSIX shell would divide them.
        then: what to do once it is mended, for hints.

    Raises:
        UserError: it cannot be started.
    """

    def __init__(self, command: str, then: str = GO_ON):
        self.command, self.then, words = command, then, words_of(command)
        try:
            self._process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
                errors="replace", env={**os.environ, "PYTHONUNBUFFERED": "1"},  # of one in Python that does not flush
                # A process group of its own: Ctrl-C lets the training end its step, for which answers are scored.
                **({"process_group": 0} if os.name == "posix" else {
                    "creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}))
        except (OSError, ValueError) as e:
            reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
            raise UserError(f"the program of --reward command:{command} cannot be started: {reason} ({words[0]})",
                            f"name a program that is there{_such_as()}") from e
        self._given = "nothing yet"
        self._said: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._complaints: deque[str] = deque(maxlen=_LAST_LINES)
        self._threads = {stream: threading.Thread(target=_read, args=(stream, into), daemon=True) for stream, into in (
            (self._process.stdout, self._said.put), (self._process.stderr, self._complain))}
        for thread in self._threads.values():
            thread.start()

    def _complain(self, line: str | None) -> None:
        if line is not None and line.strip():
            self._complaints.append(line.strip())

    def scores(self, lines: Sequence[str]) -> list[float]:
        """The number that it writes for each line.

        Raises:
            WorkFailed: it ended, wrote something else than a finite number, or nothing for too long.
        """
        self._refuse_surplus()
        self._threads[self._process.stdin] = threading.Thread(target=self._write, args=(lines,), daemon=True)
        self._threads[self._process.stdin].start()
        return [self._score(line) for line in lines]

    def _refuse_surplus(self) -> None:
        """Whether all that it wrote was asked for: a number too many would count for the next answer."""
        with contextlib.suppress(queue.Empty):
            if (said := self._said.get_nowait()) is None:
                self._said.put(None)  # that it has ended is told with what it is given now
                return
            self._number(said)
            raise self._failed(f"wrote more numbers than it read lines, the first of them {shown(said.strip())}",
                               _ONE_EACH)

    def _write(self, lines: Sequence[str]) -> None:
        with contextlib.suppress(OSError, ValueError):  # that it has ended is noticed where its numbers are read
            for line in lines:
                self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()

    def _score(self, given: str) -> float:
        self._given = given
        try:
            said = self._said.get(timeout=PATIENCE)
        except queue.Empty:
            raise self._failed(f"wrote nothing for {PATIENCE:.0f} seconds",
                               "let it write a number and flush it for each line that it reads: "
                               "print(score, flush=True)") from None
        if said is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_TO_END)
            self._threads[self._process.stderr].join(_TO_END)
            raise self._failed(f"ended with exit code {self._process.poll()}",
                               "let it go on until its standard input ends")
        return self._number(said)

    def _number(self, said: str) -> float:
        with contextlib.suppress(ValueError):
            if math.isfinite(score := float(said)):
                return score
        raise self._failed(f"wrote {shown(said.strip())}, which is no finite number", _ONE_EACH)

    def _failed(self, what: str, hint: str) -> WorkFailed:
        words = f"; its last words: {' / '.join(self._complaints)}" if self._complaints else ""
        return WorkFailed(f"the program of --reward command:{self.command} {what}; it was given "
                          f"{_readable(self._given)}{words}",
                          f"{hint}; {self.then}")

    def close(self) -> None:
        """Let it end, or end it with all that it started."""
        try:
            self._let_end()
        finally:  # also where somebody presses Ctrl-C meanwhile
            if self._process.poll() is None or any(thread.is_alive() for thread in self._threads.values()):
                self._kill()
        for stream, thread in self._threads.items():
            thread.join(_TO_END)
            if not thread.is_alive():  # else something beyond reach has the other end, and closing would wait for it
                with contextlib.suppress(OSError, ValueError):
                    stream.close()

    def _let_end(self) -> None:
        writing = self._threads.get(self._process.stdin)
        if writing is not None and writing.is_alive():  # it does not read, and closing would wait until it does
            return
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_TO_END)
            for thread in self._threads.values():
                thread.join(_TO_END)

    def _kill(self) -> None:
        """End it and all that it started, which may hold its output open."""
        with contextlib.suppress(OSError, psutil.Error):
            if os.name == "posix":
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                for one in psutil.Process(self._process.pid).children(recursive=True):
                    one.kill()
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait(_TO_END)


def _readable(given: str) -> str:
    """What it was given, as people read it, and not all of a long text."""
    with contextlib.suppress(ValueError):
        given = visible(json.dumps(json.loads(given), ensure_ascii=False))
    return given if len(given) <= _SHOWN else f"{given[:_SHOWN]} …"


def _read(stream: IO[str], into: Any) -> None:
    """Hand on each line, and None at the end."""
    with contextlib.suppress(OSError, ValueError):
        for line in stream:
            into(line)
    into(None)
