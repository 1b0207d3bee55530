"""All rendering: notes, progress, tables, errors and the chat display. Nothing else in the package prints.

People read stderr; stdout carries results alone. Without a terminal there are plain lines and no live display.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from gemma_tune.answers.prompts import headline
from gemma_tune.base.errors import UserError
from gemma_tune.base.listener import Listener
from gemma_tune.train import processes

err = Console(stderr=True, highlight=False, soft_wrap=True)

# How figures of a stage are called, and the unit that they are shown in.
LABELS = {
    "duplicate_rows": "duplicates, left out", "near_duplicate_rows": "of them near-duplicates",
    "sequences": "sequences",
    "rows": "rows", "train_rows": "for training", "valid_rows": "for validation", "rejected_rows": "rejected",
    "turns": "turns", "tokens": "tokens", "trained_tokens": "tokens that are learned", "shortest": "shortest (tokens)",
    "longest": "longest (tokens)", "p50": "half are at most (tokens)", "p90": "90 % are at most (tokens)",
    "p99": "99 % are at most (tokens)", "max_length": "limit (tokens)", "steps": "steps",
    "train_loss_first": "training loss, first step", "train_loss_last": "training loss, last step",
    "eval_loss_before": "validation loss before", "eval_loss_after": "validation loss after",
    "tokens_per_second": "tokens/s", "training_seconds": "seconds in training steps", "device": "device",
    "dtype": "compute type", "effective_batch": "effective batch", "trainable_parameters": "trained parameters",
    "questions": "held-out prompts", "base_ended": "base: answers that end by themselves",
    "tuned_ended": "tuned: answers that end by themselves", "base_in_form": "base: answers in the example's form",
    "tuned_in_form": "tuned: answers in the example's form", "merged_tensors": "layers merged",
    "check_same_answer": "same greedy answer as base + adapter", "check_divergence": "divergence (nats per token)",
    "check_prompts": "prompts of the check", "check_adapter_effect": "what the adapter changes (nats per token)",
    "check_same_tokens": "same likeliest tokens",
    "check_skipped": "not checked", "pushed": "published",
    "bytes": "size", "gguf_bytes": "size", "quant": "number format",
    "check_largest_error": "largest rounding error of a matrix",
    "ollama_name": "name in Ollama",
}


def mute() -> None:
    """Show nothing, whoever prints: another process of the same command does."""
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - it lasts as long as the process


def unmute() -> None:
    """Show again."""
    if not processes.is_main():
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


def figure(name: str, value: Any) -> str:
    """A figure as people read it."""
    if name.endswith("bytes"):
        return f"{value / 1e6:,.0f} MB" if value < 1e9 else f"{value / 1e9:,.2f} GB"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2%}" if name.endswith("error") else f"{value:,.4g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def prose(text: Text) -> None:
    """Text for people: wrapped at words on a terminal, one line per message in a file."""
    err.print(text, soft_wrap=not err.is_terminal)


class ConsoleListener(Listener):
    """Shows a stage's reports: live on a terminal, as plain lines elsewhere."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self._bar: Progress | None = None
        self._tasks: dict[str, Any] = {}
        self._shown: dict[str, float] = {}
        self._eval_loss: float | None = None

    def note(self, text: str) -> None:
        if not self.quiet:
            prose(Text(f"· {text}", style="dim"))

    def warn(self, text: str) -> None:
        prose(Text(f"! {text}", style="yellow"))

    def table(self, title: str, rows: Mapping[str, Any]) -> None:
        if not self.quiet:
            err.print(figures_table(title, rows))

    def grid(self, title: str, rows: Sequence[Sequence[str]]) -> None:
        if not self.quiet:
            table = Table(title=escape(title), title_justify="left", box=None, pad_edge=False)
            for heading in rows[0]:
                table.add_column(escape(heading), overflow="fold")
            for row in rows[1:]:
                table.add_row(*(Text(cell) for cell in row))
            err.print(table)

    def data_report(self, report: Mapping[str, Any]) -> None:
        if not self.quiet:
            from gemma_tune.cli.data_report import data_report  # which draws on this module's console

            data_report(report)

    def preview(self, rows: Sequence[Sequence[tuple[str, bool]]]) -> None:
        from gemma_tune.cli.data_report import preview

        preview(rows)

    def progress(self, task: str, done: int, total: int) -> None:
        if self.quiet or total <= 0:
            return
        if err.is_terminal:
            self._advance(task, done, total)
            return
        share = min(1.0, done / total)
        shown = self._shown.get(task, -1.0)
        if share < shown:  # the task begins anew
            shown = -1.0
        if share >= shown + 0.25 or (share == 1.0 and shown < 1.0):
            self._shown[task] = share
            err.print(f"  {task}: {share:.0%}", markup=False)

    def metrics(self, values: Mapping[str, Any]) -> None:
        if "eval_loss" in values:
            self._eval_loss = values["eval_loss"]
            if not self.quiet:
                err.print(f"  step {values['step']}: validation loss {values['eval_loss']:.4f}", markup=False)
        if self.quiet or "loss" not in values:
            return
        if err.is_terminal:
            self._advance("training", values["step"], values["steps"], _training_fields(values, self._eval_loss))
        elif values["step"] in (1, values["steps"]) or values["step"] % max(1, values["steps"] // 40) == 0:
            err.print(f"  step {values['step']}/{values['steps']}  {_training_fields(values, None)}  "
                      f"{_duration(values['seconds_left'])} left", markup=False)

    def close(self) -> None:
        """End the live display."""
        if self._bar:
            self._bar.stop()
            self._bar, self._tasks = None, {}

    def _advance(self, task: str, done: int, total: int, fields: str = "") -> None:
        if self._bar is None:
            self._bar = Progress(TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
                                 TextColumn("{task.fields[figures]}"), TimeRemainingColumn(), console=err,
                                 transient=True)
            self._bar.start()
        if task not in self._tasks:
            self._tasks[task] = self._bar.add_task(task, total=total, figures=fields)
        self._bar.update(self._tasks[task], completed=done, total=total, figures=fields)
        if done >= total:
            self._bar.remove_task(self._tasks.pop(task))
            if not self._tasks:
                self.close()


def _training_fields(values: Mapping[str, Any], eval_loss: float | None) -> str:
    evaluated = f"  eval {eval_loss:.3f}" if eval_loss is not None else ""
    return f"loss {values['loss']:.3f}{evaluated}  {values['tokens_per_second']:.0f} tok/s"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"


def figures_table(title: str, rows: Mapping[str, Any]) -> Table:
    """Figures with their names; unknown and empty ones are left out."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    for name, value in rows.items():
        if name in LABELS and value is not None:
            table.add_row(LABELS[name], figure(name, value))
    return table


def error(problem: UserError) -> None:
    """One message, its single findings, and one hint."""
    prose(Text.assemble(("Error: ", "bold red"), problem.message))
    for line in problem.problems:
        prose(Text(f"  - {line}"))
    if problem.hint:
        prose(Text.assemble(("Hint: ", "bold cyan"), problem.hint))


def piece(text: str) -> None:
    """A part of a result, on stdout at once. What stdout's encoding lacks becomes a question mark, not an error."""
    try:
        sys.stdout.write(text)
    except UnicodeEncodeError:
        sys.stdout.write(text.encode(sys.stdout.encoding, "replace").decode(sys.stdout.encoding))
    sys.stdout.flush()


def result(text: str) -> None:
    """Something that was asked for, on stdout."""
    piece(text + "\n")


def result_json(value: Any) -> None:
    """One JSON object on one line of stdout; in ASCII where its encoding lacks a character, such as half a pair."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    result(text)


def stage_result(report: Any, quiet: bool, next_steps: Sequence[str] = (), advice: str | None = None,
                 elsewhere: Sequence[str] = ()) -> None:
    """What a stage made, and what to type next."""
    state = "up to date" if report.status == "up-to-date" else f"done in {_duration(report.seconds)}"
    err.print(Text.assemble((f"{report.stage}: {state}", "bold green")))
    if not quiet:
        if (report.stage, report.status) != ("prepare", "done"):  # the report on the data has just been shown
            err.print(figures_table("", report.summary))
        for path in report.artifacts.values():
            err.print(Text(f"  {path}"))
        what_next(next_steps, advice, elsewhere)


def what_next(commands: Sequence[str], advice: str | None = None, elsewhere: Sequence[str] = ()) -> None:
    """Commands to type next, after what has to be done before; and commands of other programs for the same file."""
    if advice:
        prose(Text(advice))
    for n, step in enumerate(commands):
        err.print(Text.assemble(("next: " if n == 0 else "      ", "bold"), step))
    for step in elsewhere:
        err.print(Text.assemble(("or with llama.cpp: ", "bold"), step))
    if elsewhere:
        prose(Text("LM Studio and Jan open the same GGUF file."))


def plan(planned: Any) -> None:
    """What a training would do, and what to think about before."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, text in planned.as_table().items():
        table.add_row(name, Text(text, overflow="fold"))
    err.print(table)
    for note in planned.notes:
        prose(Text(f"! {note}", style="yellow"))


def status_table(model: str, rows: Sequence[tuple[str, str, str, str]]) -> None:
    """Stages of a run: name, state, when it ended, what lies where."""
    table = Table(title=escape(model), title_justify="left")
    for column in ("stage", "state", "ended (UTC)", "result"):
        table.add_column(column, overflow="fold")
    styles = {"done": "green", "missing": "dim", "stale": "yellow", "interrupted": "yellow", "damaged": "red"}
    for stage, state, ended, where in rows:
        table.add_row(stage, Text(state, style=styles.get(state.split(":")[0], "")), ended, Text(where))
    err.print(table)


def comparison(answers: Sequence[Mapping[str, Any]], shown: int = 3) -> None:
    """Base and tuned answers to the same held-out prompts, side by side or one below the other."""
    # Spread over the list, which may be ordered by language.
    for item in answers[:: max(1, -(-len(answers) // shown))]:
        table = Table(show_header=True, expand=True)
        table.add_column("base", ratio=1, overflow="fold")
        table.add_column("tuned", ratio=1, overflow="fold")
        table.add_row(*(Text(_shortened(item[which]) + ("" if item[f"{which}_ended"] else " …(cut off)"))
                        for which in ("base", "tuned")))
        err.print(Panel(table, title=escape(headline(item["prompt"])[:100]), title_align="left"))


def _shortened(text: str, limit: int = 400) -> str:
    return text if len(text) <= limit else text[:limit] + " …"


def run_summary(stages: Mapping[str, Any], next_steps: Sequence[str], advice: str | None = None,
                elsewhere: Sequence[str] = ()) -> None:
    """The end of `run`: answers, loss, sizes, paths and what to type next."""
    train = stages["train"].summary
    evaluated = stages["eval"].summary if "eval" in stages else {"answers": [], "questions": 0}
    err.rule("[bold]summary", align="left")
    comparison(evaluated["answers"])
    table = Table(box=None, pad_edge=False)
    for column in ("", "base", "tuned"):
        table.add_column(column)
    if train.get("eval_loss_before") is not None:
        table.add_row("validation loss", f"{train['eval_loss_before']:.4f}", f"{train['eval_loss_after']:.4f}")
    total = evaluated["questions"]
    for key, label in (("ended", "answers that end by themselves"), ("in_form", "answers in the example's form")):
        if f"base_{key}" in evaluated:
            table.add_row(label, *(f"{evaluated[f'{which}_{key}']} of {total}" for which in ("base", "tuned")))
    err.print(table)
    sizes = {"merged model": figure("bytes", stages["merge"].summary["bytes"]),
             "GGUF": f"{figure('bytes', stages['export-ollama'].summary['gguf_bytes'])} "
                     f"({stages['export-ollama'].summary['quant']})"}
    err.print(Text("\n".join(f"{name}: {size}" for name, size in sizes.items())))
    err.print(Text(f"training: {train['steps']} steps, {train['tokens_per_second']:.0f} tokens/s, "
                   f"{train['dtype']} on {train['device']}"))
    for report in stages.values():
        for path in report.artifacts.values():
            err.print(Text(f"  {path}"))
    what_next(next_steps, advice, elsewhere)
