"""A listener that remembers what it was told."""

from __future__ import annotations

from gemma_tune.base.listener import Listener


class Said(Listener):
    """Everything that was reported: notes, warnings, and steps as (task, done, total)."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.steps: list[tuple[str, int, int]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def progress(self, task: str, done: int, total: int) -> None:
        self.steps.append((task, done, total))
