"""``status`` and ``runs`` as people see them: within the width of the terminal, and no value cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from gemma_tune.base.words import small_size
from gemma_tune.cli import screen
from gemma_tune.cli.screen import Text
from gemma_tune.run.directory import command

_NARROW = 92  # columns of a terminal in which a stage's results stand below its name
_NARROW_LIST = 64  # columns in which the same goes for the list of runs
_NAME = 30  # columns of a run's name that are not folded
_STYLES = {"done": "green", "missing": "dim", "stale": "yellow", "interrupted": "yellow", "damaged": "red"}


def show_status(found: Any) -> None:
    """A run's stages with their figures, files and sizes, and what to type next.

    Args:
        found: a :class:`gemma_tune.cli.status.RunStatus`.
    """
    title, narrow = f"{found.root} · {found.model} · {small_size(found.size)} on the disk", screen.err.width < _NARROW
    table = _table(title)
    for column in ("stage", "state", "ended (UTC)", "result"):
        table.add_column(column, overflow="fold", no_wrap=column in ("stage", "ended (UTC)"))
    if narrow:  # a column of results would be a quarter of the terminal
        screen.err.print(Text(title, style="bold"))
    for stage, state, ended, where in found.rows:
        figures = found.figures[stage]
        result = Text("\n".join(figures.lines), overflow="fold", no_wrap=False)
        files = _with_sizes(where, figures.sizes)
        if files:
            result.append(("\n" if figures.lines else "") + files, "dim")
        shown = Text(state, style=_STYLES.get(state.split(":")[0], ""))
        if narrow:
            screen.err.print(Text("  ").join(filter(None, (Text(stage, "bold"), shown, Text(ended)))))
            _below(result)
        else:
            table.add_row(stage, shown, Text(ended), result)
    if not narrow:
        screen.err.print(table)
    if found.unread:
        screen.prose(Text(f"not read, though time stamps changed, as in a copy: {', '.join(found.unread)}; "
                          f"`{command('status', found.root, '--verify')}` compares their content", style="dim"))
    for name, size in found.unused.items():
        screen.prose(Text(f"{name} ({small_size(size)}) is an adapter that a training started from, and nothing refers "
                          "to it any more: it can be deleted, or named with --from-adapter", style="dim"))
    for name, size in found.unused_sight.items():
        screen.prose(Text(f"{name} ({small_size(size)}) is what an earlier export saw with, and nothing refers to it "
                          "any more: it can be deleted", style="dim"))
    if found.seen:
        screen.prose(Text(f"seen/ ({small_size(found.seen)}) is what the model saw in pictures: it can be deleted at "
                          "any time, and a training looks at them again", style="dim"))
    for quant, again in found.gone.items():
        screen.prose(Text(f"! {quant} was recommended, and its file is gone; to make it again: {again}",
                          style="yellow"))
    if found.base_damage:
        screen.error(found.base_damage)
    screen.err.print(f"next: {found.next_step or found.note}", markup=False)


def _below(text: Text) -> None:
    """What belongs to the line before; nothing where there is nothing."""
    if text:
        screen.err.print(Padding(text, (0, 0, 0, 2)))


def _with_sizes(where: str, sizes: Any) -> str:
    """The artifacts of a stage, each with its size where that is known."""
    names, separator, rest = where.partition(";")
    shown = [f"{name} ({small_size(sizes[name])})" if name in sizes else name for name in names.split(", ") if name]
    return ", ".join(shown) + separator + rest


def show_runs(runs: Sequence[Any]) -> None:
    """Runs, one to a row. The first is what commands work on that name none.

    Args:
        runs: each a :class:`gemma_tune.cli.runs.RunLine`.
    """
    rows = [[Text(run.run), Text(run.model or ""),
             Text(run.data + (f" ({run.rows:,})" if run.rows is not None else "")),
             _loss_of(run), Text(small_size(run.bytes)), Text(run.age)] for run in runs]
    if screen.err.width < _NARROW_LIST:
        for name, *values in rows:
            screen.err.print(name)
            about = Text(", ", overflow="fold", no_wrap=False).join(value for value in values if value)
            _below(about)
        return
    table = _table("")
    for column, end in (("run", "left"), ("model", "left"), ("data", "left"), ("loss", "left"), ("size", "right"),
                        ("age", "right")):
        # The name is what people type; the other columns give way to it. (With a least width Rich's table can be wider
        # than the terminal by a column or two.)
        room = max(_NAME, screen.err.width // 3)
        longest = max(len(column), *(cell_len(run.run) for run in runs))
        width = min(room, longest) if column == "run" else None
        table.add_column(column, overflow="fold", justify=end, no_wrap=column in ("size", "age"), width=width)
    for row in rows:
        table.add_row(*row)
    screen.err.print(table)


def _loss_of(run: Any) -> Text:
    """What a run has come to, or what is wrong with it."""
    loss = run.problem or run.loss.replace(" loss ", " ") or (f"`{run.stage}` is done" if run.stage else "begun")
    return Text(loss + (f"; in use by {run.in_use_by}" if run.in_use_by else ""), style="red" if run.problem else "")


def _table(title: str) -> Table:
    simple = box.SIMPLE_HEAD if screen.has_blocks() else box.ASCII2
    return Table(title=escape(title) or None, title_justify="left", title_style="bold", box=simple, pad_edge=False,
                 collapse_padding=True)
