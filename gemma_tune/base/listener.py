"""How a stage reports while it works: it calls a listener and never prints; ``cli.console`` has one for people."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any


class Listener:
    """Receives what a stage has to say. The base class ignores everything, which suits calls from Python."""

    def note(self, text: str) -> None:
        """A fact worth a line: a default and its reason, a path, a figure."""

    def detail(self, about: str, text: str) -> None:
        """A note on what :meth:`overview` tells in one place; ``about`` is how the line of it is called."""
        self.note(text)

    def overview(self, lines: Mapping[str, str]) -> None:
        """What begins, as lines with their names; the details before it belong to it."""

    def warn(self, text: str) -> None:
        """Something that the user should look at; the work goes on."""

    def confirm(self, question: str) -> bool:
        """Whether to do what cannot be undone; no, where nobody can be asked."""
        return False

    def progress(self, task: str, done: int, total: int) -> None:
        """``done`` of ``total`` units of ``task`` are finished; the task ends when they are equal."""

    def training(self, earlier: Sequence[Mapping[str, Any]]) -> None:
        """A training begins; ``earlier`` are records of its log from before an interruption."""

    def metrics(self, values: Mapping[str, Any]) -> None:
        """One record of the training log: step, total, loss, eval_loss, tokens_per_second, seconds_left, …"""

    def data_report(self, report: Mapping[str, Any]) -> None:
        """What ``prepare`` found out about the data, as in data/report.json."""

    def preview(self, rows: Sequence[Sequence[tuple[str, bool]]], names: Sequence[str] = ()) -> None:
        """Sequences as pieces of text, each with whether it is learned; ``names`` says what the answer of each is."""

    def grid(self, title: str, rows: Sequence[Sequence[str]]) -> None:
        """A table of several columns, the first row being its heading."""


class Held(Listener):
    """Keeps notes and warnings of another thread until there is room for them on the screen.

    Args:
        listener: who is told in the end.
    """

    def __init__(self, listener: Listener):
        self._listener = listener
        self._lock = threading.RLock()
        self._said: list[tuple[str, str]] | None = []

    def note(self, text: str) -> None:
        self._say("note", text)

    def warn(self, text: str) -> None:
        self._say("warn", text)

    def _say(self, how: str, text: str) -> None:
        with self._lock:
            if self._said is None:
                getattr(self._listener, how)(text)
            else:
                self._said.append((how, text))

    @property
    def waits(self) -> bool:
        """Whether there is something to tell."""
        return bool(self._said)

    def tell(self) -> None:
        """Pass on what was kept."""
        with self._lock:
            while self._said:
                how, text = self._said.pop(0)
                getattr(self._listener, how)(text)

    def let_go(self) -> None:
        """Pass on what was kept, and from now on everything at once."""
        with self._lock:
            self.tell()
            self._said = None
