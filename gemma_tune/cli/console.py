"""What a stage reports while it works, what it made, and what to type next.

People read stderr; stdout carries results alone. Without a terminal there are plain lines and no live display.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from gemma_tune.answers.prompts import Prompt, headline, named_shortly
from gemma_tune.base.listener import Listener
from gemma_tune.base.words import counted
from gemma_tune.cli import screen
from gemma_tune.cli.data_report import data_report, preview
from gemma_tune.cli.formats import OF_THE_FIRST, format_lines
from gemma_tune.cli.hints import in_run
from gemma_tune.cli.live import Course, Display, preferences, rewards
from gemma_tune.cli.screen import Text
from gemma_tune.report.tables import MEASURES, reward_of

_STEP, _SMALL_STEP = 0.25, 0.05  # of a task, after which a line tells how far it is: where it is quick, and slow
_PATIENCE = 20.0  # seconds without such a line from which on it is slow

_SHOWN = 400  # characters of an answer beside another


class ConsoleListener(Listener):
    """Shows a stage's reports: live on a terminal, as plain lines elsewhere."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self._display: Display | None = None
        self._shown: dict[str, tuple[float, float]] = {}  # share of a task, and when; the same where it began
        self._begun: dict[str, tuple[float, float]] = {}
        self._course = Course()
        self._details: list[tuple[str, str]] | None = []  # for the overview, until it was shown

    def note(self, text: str) -> None:
        if not self.quiet:
            screen.prose(Text(f"· {in_run(text)}", style="dim"))

    def detail(self, about: str, text: str) -> None:
        if not screen.is_live():
            self.note(text)
        elif self._details is not None:
            self._details.append((about, text))

    def overview(self, lines: Mapping[str, str]) -> None:
        details, self._details = self._details or [], None
        if self.quiet or not screen.is_live():
            return
        rows: dict[str, list[str]] = {}
        for name, text in [*lines.items(), *details]:
            rows.setdefault(name, []).append(text.removeprefix(f"{name}: "))
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True, style="bold")
        table.add_column(overflow="fold")
        for name, texts in rows.items():
            table.add_row(name, Text("; ".join(texts)))
        screen.err.print(Panel(table, title="training", title_align="left", expand=False))

    def warn(self, text: str) -> None:
        text = in_run(text)
        screen.warnings.append(text)
        screen.prose(Text(f"! {text}", style="yellow"))

    def confirm(self, question: str) -> bool:
        if not (screen.err.is_terminal and screen.stdin_is_terminal()):
            return False
        self.close()
        screen.clear_the_way()
        screen.err.print(f"{question} [y/N] ", end="", markup=False)
        with contextlib.suppress(EOFError):
            return input().strip().lower() in ("y", "yes")
        return False

    def grid(self, title: str, rows: Sequence[Sequence[str]]) -> None:
        if not self.quiet:
            table = Table(title=escape(title), title_justify="left", box=None, pad_edge=False)
            for heading in rows[0]:
                table.add_column(escape(heading), overflow="fold")
            for row in rows[1:]:
                table.add_row(*(Text(cell) for cell in row))
            screen.err.print(table)

    def data_report(self, report: Mapping[str, Any]) -> None:
        if not self.quiet:
            data_report(report)

    def preview(self, rows: Sequence[Sequence[tuple[str, bool]]], names: Sequence[str] = ()) -> None:
        preview(rows, names)

    def progress(self, task: str, done: int, total: int) -> None:
        if self.quiet or total <= 0:
            return
        if screen.is_live():
            self._on_display().advance(task, done, total)
            return
        share, now = min(1.0, done / total), time.monotonic()
        shown, when = self._shown.get(task, (-1.0, now))
        if share < shown:  # the task begins anew
            shown = -1.0
        if shown < 0:
            self._begun[task] = share, now
        step = _STEP if now - when < _PATIENCE else _SMALL_STEP
        if share >= shown + step or (share == 1.0 and shown < 1.0):
            self._shown[task] = share, now
            screen.err.print(f"  {task}: {share:.0%}{self._time_left(task, share, now)}", markup=False)

    def _time_left(self, task: str, share: float, now: float) -> str:
        """At the speed until now; nothing where that says nothing yet, or less than a second is left."""
        first, began = self._begun[task]
        left = (now - began) / (share - first) * (1 - share) if share > first else 0.0
        return f"  {screen.duration(left)} left" if left >= 1 else ""

    def training(self, earlier: Sequence[Mapping[str, Any]]) -> None:
        self._course = Course(earlier)

    def metrics(self, values: Mapping[str, Any]) -> None:
        self._course.add(values)
        if self.quiet:
            return
        if what := next((name for name in ("loss", "reward") if f"eval_{name}" in values), None):
            more = [*preferences(values, "eval_"), *rewards(values, "eval_")]
            screen.err.print(f"  step {values['step']}: validation {what} {values[f'eval_{what}']:.4f}"
                             + "".join(f", {text}" for text in more), markup=False)
        if screen.is_live():
            if "loss" in values or not self._course.is_over:
                self._on_display().show(self._course)
        elif "loss" in values and (values["step"] in (1, values["steps"])
                                   or values["step"] % max(1, values["steps"] // 40) == 0):
            screen.err.print(f"  step {values['step']}/{values['steps']}  {_training_fields(values)}  "
                             f"{screen.duration(values['seconds_left'])} left", markup=False)

    def _on_display(self) -> Display:
        if self._display is None:
            self._display = Display()
        return self._display

    def close(self) -> None:
        """End the live display; what was to be shown in an overview that never came is shown as it is."""
        if self._display:
            self._display.close()
        details, self._details = self._details or [], []
        for _, text in details:
            self.note(text)


def _training_fields(values: Mapping[str, Any]) -> str:
    what = "reward" if "reward" in values else "loss"
    return "  ".join([f"{what} {values[what]:.3f}", *preferences(values), *rewards(values),
                      f"{values['tokens_per_second']:.0f} tok/s"])


def stage_result(report: Any, quiet: bool, next_steps: Sequence[str] = (), advice: str | None = None,
                 elsewhere: Any = None) -> None:
    """What a stage made, and what to type next."""
    state = "up to date" if report.status == "up-to-date" else f"done in {screen.duration(report.seconds)}"
    screen.err.print(Text.assemble((f"{report.stage}: {state}", "bold green")))
    if not quiet:
        if (report.stage, report.status) != ("prepare", "done"):  # the report on the data has just been shown
            screen.err.print(_figures(report))
        for path in report.artifacts.values():
            screen.err.print(Text(f"  {path}"))
        if "pushed" in report.summary:  # by itself, as a table cuts off what is longer than the screen is wide
            screen.err.print(Text.assemble(("published: ", "bold"), report.summary["pushed"]))
        what_next(next_steps, advice, elsewhere)


def _figures(report: Any) -> Table:
    """A stage's figures; of an export with several number formats, a line for each."""
    formats = list(format_lines(report.summary))
    if len(formats) < 2:
        return screen.figures_table("", report.summary)
    others = {name: value for name, value in report.summary.items() if name not in OF_THE_FIRST}
    table = screen.figures_table("", others)
    for quant, text in formats:
        table.add_row(quant, Text(text))
    return table


def what_next(commands: Sequence[str], advice: str | None = None, elsewhere: Any = None) -> None:
    """Commands to type next, after what has to be done before; and how other programs take an exported file."""
    if advice:
        screen.prose(Text(advice))
    for n, step in enumerate(commands):
        screen.err.print(Text.assemble(("next: " if n == 0 else "      ", "bold"), step))
    if elsewhere:
        beside = f", and for pictures {elsewhere.projector}" if elsewhere.projector else ""
        screen.err.print(Text.assemble(("for other programs: ", "bold"), elsewhere.file,
                                       f", its chat template in it{beside}"))
        for step in elsewhere.commands:
            screen.err.print(Text(f"      {step}"))
        what = "copies of both" if elsewhere.projector else "a copy of the file"
        screen.prose(Text(f"The first two are llama.cpp's; lms is LM Studio's, which without it finds {what} "
                          f"in {elsewhere.lm_studio_folder}. Jan opens it, too."))


def plan(planned: Any) -> None:
    """What a training would do, and what to think about before."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, text in planned.as_table().items():
        table.add_row(name, Text(text, overflow="fold"))
    screen.err.print(table)
    for note in planned.notes:
        screen.prose(Text(f"! {note}", style="yellow"))


def comparison(answers: Sequence[Mapping[str, Any]]) -> None:
    """Base and tuned answers to at most three of the same held-out prompts, side by side."""
    # Spread over the list, which may be ordered by language.
    for item in answers[:: max(1, -(-len(answers) // 3))]:
        table = Table(show_header=True, expand=True)
        table.add_column("base", ratio=1, overflow="fold")
        table.add_column("tuned", ratio=1, overflow="fold")
        table.add_row(*(Text(_shortened(item[which]) + ("" if item[f"{which}_ended"] else " …(cut off)")
                             + (f"\n({worth})" if (worth := reward_of(item, which)) else ""))
                        for which in ("base", "tuned")))
        pictures = named_shortly(Prompt(item["prompt"]).pictures)
        title = headline(item["prompt"])[:100] + (f" ({pictures})" if pictures else "")
        screen.err.print(Panel(table, title=escape(title), title_align="left"))


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + " …"


def run_summary(stages: Mapping[str, Any], next_steps: Sequence[str], advice: str | None = None,
                elsewhere: Any = None) -> None:
    """The end of `run`: answers, loss, sizes, paths and what to type next."""
    train = stages["train"].summary
    evaluated = stages["eval"].summary if "eval" in stages else {"answers": [], "questions": 0}
    measures = evaluated.get("measures", {})  # the loss of the training is one before it, which can be another's
    screen.err.rule("[bold]summary", align="left")
    comparison(evaluated["answers"])
    table = Table(box=None, pad_edge=False)
    for column in ("", "base", "tuned"):
        table.add_column(column)
    for name in ("loss", "reward"):
        if found := measures.get(name):
            table.add_row(MEASURES[name].name, *(f"{found[which][0]:.4f}" for which in ("base", "tuned")))
    total = evaluated.get("questions")
    for key, label in (("ended", "answers that end by themselves"), ("in_form", "answers in the example's form")):
        if {f"base_{key}", f"tuned_{key}"} <= evaluated.keys():
            table.add_row(label, *(f"{evaluated[f'{which}_{key}']} of {total}" for which in ("base", "tuned")))
    screen.err.print(table)
    sizes = [("merged model", screen.figure("bytes", size)) for size in (stages["merge"].summary.get("bytes"),) if size]
    sizes += [("GGUF", f"{quant}, {text}") for quant, text in format_lines(stages["export-ollama"].summary)]
    screen.err.print(Text("\n".join(f"{name}: {size}" for name, size in sizes)))
    if {"steps", "tokens_per_second", "dtype", "device"} <= train.keys():  # the manifest may be of any age
        screen.err.print(Text(f"training: {counted(train['steps'], 'step')}, {train['tokens_per_second']:.0f} "
                              f"tokens/s, {train['dtype']} on {train['device']}"))
    for report in stages.values():
        for path in report.artifacts.values():
            screen.err.print(Text(f"  {path}"))
    what_next(next_steps, advice, elsewhere)
