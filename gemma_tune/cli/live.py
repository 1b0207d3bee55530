"""What moves on a terminal while a stage works: the bars of its tasks, and the course of a training.

It is drawn a few times per second by a thread, from figures that were told; nothing is computed or asked for it.
"""

from __future__ import annotations

import math
import time
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gemma_tune.base.words import size_text
from gemma_tune.cli import screen
from gemma_tune.cli.screen import Text

PER_SECOND = 3  # drawings, besides those for lines above
_WIDEST = 120
_KEPT = 1024  # losses that the curve is drawn from
_LABEL = 10
_LEVELS = {True: "▁▂▃▄▅▆▇█", False: "_.-=+*#"}  # with more than ASCII, without it
_UP, _DOWN = {True: "▲", False: "^"}, {True: "▼", False: "v"}


class Course:
    """How a training goes, as far as its log was told.

    Attributes:
        last: the last record of a step.
        what: its ``loss``, or its ``reward``, of which the highest is the best.
        losses: of the steps; ``evals`` of the validation by step.
    """

    def __init__(self, earlier: Iterable[Mapping[str, Any]] = ()):
        self.losses: deque[float] = deque(maxlen=_KEPT)
        self.evals: dict[int, float] = {}
        self.last: Mapping[str, Any] = {}
        self.what = "loss"
        self.step = self.steps = 0
        self.heard = time.monotonic()
        for record in earlier:
            self.add(record)

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in a record of the log."""
        self.heard = time.monotonic()
        self.step, self.steps = record["step"], record.get("steps", self.steps)
        if "reward" in record or "eval_reward" in record:
            self.what = "reward"
        if "loss" in record:
            self.losses.append(record[self.what])
            self.last = record
        if f"eval_{self.what}" in record:
            self.evals[record["step"]] = record[f"eval_{self.what}"]

    @property
    def is_over(self) -> bool:
        return self.step >= self.steps

    @property
    def seconds_left(self) -> float | None:
        """Time until the last step, counted down since the last record, as evaluations are no part of it; None before
        the first step."""
        if "seconds_left" not in self.last:
            return None
        return max(0.0, self.last["seconds_left"] - (time.monotonic() - self.heard))

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and value of the lowest validation loss, or of the highest reward, the latest one of equals."""
        sign = -1 if self.what == "reward" else 1
        finite = [(sign * value, sign * step) for step, value in list(self.evals.items()) if math.isfinite(value)]
        return (sign * min(finite)[1], sign * min(finite)[0]) if finite else None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, _WIDEST)
        blocks = not options.ascii_only
        yield from (_fitted(line, width, blocks) for line in self._lines(width, blocks))

    def _lines(self, width: int, blocks: bool) -> list[Text]:
        lines = [self._bar(width, blocks)]
        losses, evals = list(self.losses), list(self.evals.values())
        if losses:
            lines.append(_figure(self.what, losses, width, blocks, self.what == "reward"))
        if evals and (best := self.best):
            when = f"after step {best[0]}" if best[0] else "before the first step"
            lowest = f"{'highest' if self.what == 'reward' else 'lowest'} {best[1]:.3f} {when}"
            lines.append(_figure("validation", evals, min(width, 48), blocks, self.what == "reward"))
            if lines[-1].cell_len + 2 + len(lowest) <= width:
                lines[-1].append(f"  {lowest}")
        if self.last:
            lines.append(_joined("speed", self._facts(), width, blocks))
        return lines

    def _bar(self, width: int, blocks: bool) -> Text:
        left = self.seconds_left
        parts = [f"{self.step}/{self.steps}", f"{self.step / max(1, self.steps):.0%}",
                 *([f"{screen.duration(left)} left"] if left is not None else [])]
        room = width - _LABEL - 3 - len("  ".join(parts))
        while len(parts) > 1 and room < 5:
            room += 2 + len(parts.pop())
        done = min(max(room, 0), round(max(room, 0) * self.step / max(1, self.steps)))
        full, empty = ("━", "─") if blocks else ("#", "-")  # told apart without colours, too
        return Text.assemble(f"{'training':>{_LABEL}} ", (full * done, "cyan"), (empty * (max(room, 0) - done), "dim"),
                             f"  {'  '.join(parts)}")

    def _facts(self) -> list[str]:
        last = self.last
        peak = f", {size_text(last['peak_memory_bytes'])} at most" if "peak_memory_bytes" in last else ""
        memory = [f"{size_text(last['memory_bytes'])} memory{peak}"] if "memory_bytes" in last else []
        return [*preferences(last), *rewards(last), f"{last['tokens_per_second']:,.0f} tok/s", *memory,
                f"learning rate {last['learning_rate']:.2e}", f"epoch {last['epoch']:.2f}"]


def _figure(label: str, values: Sequence[float], width: int, blocks: bool, rising: bool = False) -> Text:
    """The last value, whether it is lower than the one before, and the curve of all."""
    text = Text(f"{label:>{_LABEL}} {values[-1]:.3f} ")
    change = values[-1] - values[-2] if len(values) > 1 else 0.0
    good, bad = ("yellow", "green") if rising else ("green", "yellow")
    text.append(*((_DOWN[blocks], good) if change < 0 else (_UP[blocks], bad) if change > 0 else (" ", "")))
    if len(values) > 1 and (room := min(width - text.cell_len - 2, 2 * width // 3)) > 0:
        text.append("  ").append(curve(values, room, blocks), "cyan")
    return text


def curve(values: Sequence[float], width: int, blocks: bool = True) -> str:
    """Numbers as columns of different heights, no more than ``width`` of them: neighbours are averaged.

    >>> curve([1.0, 2.0, 3.0, 8.0], 4), curve([4.0, 2.0, 1.0, 1.0], 2)
    ('▁▂▃█', '█▁')
    """
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    parts = min(width, len(values))
    bounds = [len(values) * n // parts for n in range(parts + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(bounds, bounds[1:])]
    levels, low, high = _LEVELS[blocks], min(means), max(means)
    scale = (len(levels) - 1) / (high - low) if high > low else 0.0
    return "".join(levels[round((mean - low) * scale)] for mean in means)


def _joined(label: str, parts: Sequence[str], width: int, blocks: bool) -> Text:
    """As many of the parts as have room, the first one anyway."""
    between = " · " if blocks else ", "
    line = f"{label:>{_LABEL}} {parts[0]}"
    for part in parts[1:]:
        if len(line) + len(between) + len(part) <= width:
            line += between + part
    return Text(line)


def _fitted(line: Text, width: int, blocks: bool) -> Text:
    if line.cell_len > width:
        ellipsis = "…" if blocks else "..."
        line.truncate(max(0, width - len(ellipsis)))
        line.append(ellipsis[:width])
    line.no_wrap = True
    return line


def preferences(values: Mapping[str, Any], before: str = "") -> list[str]:
    """What a record of a training of preferences says of answers; nothing of another training.

    Args:
        before: what the names begin with, ``eval_`` for the validation.
    """
    found = []
    if f"{before}rewards/accuracies" in values:
        found.append(f"{values[f'{before}rewards/accuracies']:.0%} prefer the chosen answer")
    if f"{before}rewards/margins" in values:
        found.append(f"margin {values[f'{before}rewards/margins']:+.3f}")
    return found


def rewards(values: Mapping[str, Any], before: str = "") -> list[str]:
    """What a record of a training from rewards says of answers beside their reward; nothing of another training.

    Args:
        before: what the names begin with, ``eval_`` for the validation.
    """
    length, cut, tied = (values.get(f"{before}{name}") for name in (
        "completions/mean_length", "completions/clipped_ratio", "frac_reward_zero_std"))
    found = [] if length is None else [f"{length:.0f} tokens an answer"]
    found += [f"{cut:.0%} cut off"] if cut else []
    found += [f"KL {values['kl']:.3g}"] if "kl" in values else []
    return found + ([f"{tied:.0%} of the groups had one reward"] if tied else [])


class Display:
    """Bars of tasks, and the course of a training, below what is printed; there while one of them goes on."""

    def __init__(self) -> None:
        self._bars = Progress(TextColumn("{task.description}", markup=False), BarColumn(bar_width=24),
                              MofNCompleteColumn(), TimeRemainingColumn(), console=screen.err, auto_refresh=False)
        self._tasks: dict[str, Any] = {}
        self._course: Course | None = None
        self._live: Live | None = None

    def advance(self, task: str, done: int, total: int) -> None:
        """``done`` of ``total`` units of ``task``; its bar goes when they are equal."""
        if task not in self._tasks:
            self._tasks[task] = self._bars.add_task(task, total=total)
        self._bars.update(self._tasks[task], completed=done, total=total)
        self._begin()
        if done >= total:
            self._bars.remove_task(self._tasks.pop(task))
            self._end_if_idle()

    def show(self, course: Course) -> None:
        """Show how a training goes, until its last step."""
        self._course = course
        self._begin()
        if course.is_over:
            self._end_if_idle(course)

    def _begin(self) -> None:
        if self._live is None:
            self._live = Live(self, console=screen.err, refresh_per_second=PER_SECOND, transient=True)
            _shown.add(self)
            screen.clear_the_way()
            self._live.start()

    def _end_if_idle(self, over: Course | None = None) -> None:
        if not self._tasks and self._course is over:
            self.close()
        elif over:
            self._course = None

    def close(self) -> None:
        """Take everything away, and give the terminal its cursor back."""
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()
        for task in self._tasks.values():
            self._bars.remove_task(task)
        self._tasks, self._course = {}, None
        _shown.discard(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._tasks:
            yield self._bars
        if (course := self._course) is not None:
            yield course


_shown: weakref.WeakSet[Display] = weakref.WeakSet()


def is_shown() -> bool:
    """Whether a display moves on the terminal now."""
    return bool(_shown)


def close_all() -> None:
    """Leave the terminal as it was, before the process ends in the middle of its work."""
    for display in list(_shown):
        display.close()
