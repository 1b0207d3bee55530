"""Where people read, and how figures are called and written.

Names of files, models and columns, and whatever else others wrote, can hold escape sequences, and messages can quote an
access token. The first are made visible here, and the second are not shown: :class:`Text` and the console see to it.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import rich.text
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table

from gemma_tune.base.errors import UserError
from gemma_tune.base.secrets import redact, redacted
from gemma_tune.base.words import (
    is_text,
    json_visible,
    shortened,
    size_text,
    small_size,
    visible,
    without_commands,
)
from gemma_tune.cli.hints import in_run
from gemma_tune.train import processes

_LONGEST = 1000  # characters of a message of an error, and of each finding in it: a name in it can be a whole text


class Text(rich.text.Text):
    """Text for people. Rich's own drops some control characters without a word, and lets the others pass."""

    def __init__(self, text: str = "", style: Any = "", **more: Any):
        super().__init__(_readable(text), style, **more)

    def append(self, text: rich.text.Text | str, style: Any = None) -> rich.text.Text:
        return super().append(_readable(text) if isinstance(text, str) else text, style)


class _Screen(Console):
    """Treats texts that Rich makes itself in the same way: titles, names of tasks, plain strings."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Any:
        if isinstance(renderable, str):
            using = options or self.options
            renderable = self.render_str(renderable, highlight=using.highlight, markup=using.markup)
        if isinstance(renderable, rich.text.Text) and (text := _readable(renderable.plain)) != renderable.plain:
            renderable = renderable.blank_copy(text)
        return super().render(renderable, options)

    def print(self, *objects: Any, **how: Any) -> None:
        """As Rich's; a line that finds no room, in a log on a full disk, is no reason to lose the work."""
        try:
            super().print(*objects, **how)
        except OSError as e:
            if isinstance(e, BrokenPipeError):
                raise
            with contextlib.suppress(OSError), self.capture():
                pass  # which clears what Rich would keep for the next attempt, and with it every later line


def _readable(text: str) -> str:
    return visible(redact(text))


err = _Screen(stderr=True, highlight=False, soft_wrap=True)
# How figures of a stage are called, and the unit that they are shown in.
LABELS = {
    "duplicate_rows": "duplicates, left out", "near_duplicate_rows": "of them near-duplicates",
    "sequences": "sequences",
    "rows": "rows", "train_rows": "for training", "valid_rows": "for validation", "rejected_rows": "rejected",
    "picture_rows": "rows with pictures", "pictures": "pictures that differ", "picture_bytes": "their size",
    "picture_tokens": "tokens of pictures",
    "turns": "turns", "tokens": "tokens", "trained_tokens": "tokens that are learned", "shortest": "shortest (tokens)",
    "longest": "longest (tokens)", "p50": "half are at most (tokens)", "p90": "90 % are at most (tokens)",
    "p99": "99 % are at most (tokens)", "max_length": "limit (tokens)", "steps": "steps",
    "train_loss_first": "training loss, first step", "train_loss_last": "training loss, last step",
    "eval_loss_before": "validation loss before", "eval_loss_after": "validation loss after",
    "eval_accuracy_after": "validation pairs that the chosen answer wins",
    "eval_reward_before": "validation reward before", "eval_reward_after": "validation reward after",
    "train_reward_first": "reward, first step", "train_reward_last": "reward, last step",
    "eval_margin_after": "margin between chosen and rejected (reward)",
    "kept_step": "the weights are those of step", "adapter_norm": "change of the weights (norm)",
    "divergence_from_base": "divergence from the base model (nats per token)",
    "learning_rate": "learning rate", "rank": "rank",
    "tuned_steps": "found best after steps", "candidates": "candidates tried", "candidates_asked": "of so many",
    "rungs": "rungs",
    "tokens_per_second": "tokens/s", "training_seconds": "seconds in training steps", "device": "device",
    "dtype": "compute type", "effective_batch": "effective batch", "trainable_parameters": "trained parameters",
    "rows_there": "held-out rows", "questions": "held-out prompts",
    "base_ended": "base: answers that end by themselves",
    "tuned_ended": "tuned: answers that end by themselves", "base_in_form": "base: answers in the example's form",
    "tuned_in_form": "tuned: answers in the example's form", "merged_tensors": "tensors merged",
    "check_same_answer": "same greedy answer as base + adapter", "check_divergence": "divergence (nats per token)",
    "check_prompts": "prompts of the check", "check_adapter_effect": "what the adapter changes (nats per token)",
    "check_same_tokens": "same likeliest tokens",
    "check_skipped": "not checked",
    "bytes": "size", "gguf_bytes": "size", "quant": "number format",
    "check_largest_error": "largest rounding error of a matrix",
    "ollama_name": "name in Ollama", "loses": "what it costs",
}


def figure(name: str, value: Any) -> str:
    """A figure as people read it."""
    if name.endswith("bytes"):
        return small_size(value) if name == "picture_bytes" else size_text(value)
    if name == "check_same_tokens":
        return f"{100 * value:.4g} %"
    if name.startswith("eval_accuracy"):
        return f"{value:.0%}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2%}" if name.endswith("error") else f"{value:,.4g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


warnings: list[str] = []  # that were shown in this command, for programs
hides: list[Callable[[], None]] = []  # what takes a line away that moves, see `spinner`


def clear_the_way() -> None:
    """Before something is written that the console does not know of, or moves by itself: a result, a bar, a question.
    """
    for hide in list(hides):
        hide()


def prose(text: Text) -> None:
    """Text for people: wrapped at words on a terminal, one line per message in a file."""
    err.print(text, soft_wrap=not err.is_terminal)


def is_live() -> bool:
    """Whether what is shown can be drawn again: not on a dumb terminal, nor in a log that is only to have colours."""
    coloured_file = bool(os.environ.get("FORCE_COLOR")) and not err.file.isatty()
    return err.is_terminal and not err.is_dumb_terminal and not coloured_file


def has_blocks() -> bool:
    """Whether bars and curves can be drawn with more than ASCII."""
    return err.encoding.lower().startswith("utf")


def duration(seconds: float) -> str:
    """A time to the second: ``1m05s``, ``2h03m``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"


def stdin_is_terminal() -> bool:
    """Whether a person can be asked."""
    return sys.stdin is not None and sys.stdin.isatty()


def mute() -> None:
    """Show nothing, whoever prints: another process of the same command does."""
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - it lasts as long as the process


def unmute() -> None:
    """Show again."""
    if not processes.is_main():
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


def figures_table(title: str, rows: Mapping[str, Any]) -> Table:
    """Figures with their names; unknown and empty ones are left out."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    for name, value in rows.items():
        if name in LABELS and value is not None:
            table.add_row(LABELS[name], Text(figure(name, value)))
    return table


def error(problem: UserError) -> None:
    """One message, its single findings, and one hint."""
    prose(Text.assemble(("Error: ", "bold red"), shortened(problem.message, _LONGEST)))
    for line in problem.problems:
        prose(Text(f"  - {shortened(line, _LONGEST)}"))
    if problem.hint:
        prose(Text.assemble(("Hint: ", "bold cyan"), in_run(problem.hint)))


def error_json(problem: UserError) -> dict[str, Any]:
    """The same for programs; ``kind`` is ``bad_input``, ``in_use``, ``work_failed`` or ``interrupted``."""
    return {"message": problem.message, "hint": problem.hint and in_run(problem.hint),
            "problems": list(problem.problems), "kind": problem.kind, "exit_code": problem.exit_code}


class OutputLost(Exception):
    """Standard output takes nothing more, for another reason than that its reader has seen enough."""


def require_output() -> None:
    """Find out before the work that its result can go nowhere.

    Raises:
        OutputLost: standard output is closed.
    """
    if sys.stdout is None:
        raise OutputLost("it is closed")


def drop_output() -> None:
    """Send what is still to come nowhere: also what Python holds back and writes when it ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # not a file of the system's, or none
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - it lasts as long as the process


def reader_has_gone(e: Exception) -> bool:
    """Whether what read standard output has seen enough, as `| head` does. Windows calls that an invalid argument."""
    return isinstance(e, BrokenPipeError) or os.name == "nt" and getattr(e, "errno", None) == errno.EINVAL


@contextlib.contextmanager
def losing_output() -> Iterator[None]:
    """Write to standard output.

    Raises:
        BrokenPipeError: its reader has gone.
        OutputLost: it cannot be written.
    """
    try:
        yield
    except OSError as e:
        if reader_has_gone(e):
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) from e
        drop_output()
        raise OutputLost(e.strerror or str(e)) from e


def piece(text: str) -> None:
    """A part of a result, on stdout at once. What stdout's encoding lacks becomes a question mark, not an error.

    Raises:
        BrokenPipeError: its reader has gone.
        OutputLost: it cannot be written.
    """
    require_output()
    clear_the_way()
    with losing_output():
        try:
            sys.stdout.write(text)
        except UnicodeEncodeError:
            sys.stdout.write(text.encode(sys.stdout.encoding, "replace").decode(sys.stdout.encoding))
        sys.stdout.flush()


def result(text: str) -> None:
    """Something that was asked for, on stdout."""
    piece(text + "\n")


def answer(text: str) -> None:
    """A part of a model's answer. It can hold escape sequences, as what it learned from can, and a terminal would obey
    them; a file or another program gets the answer as it is.
    """
    piece(without_commands(text) if sys.stdout is not None and sys.stdout.isatty() else text)


def result_json(value: Any, verbatim: Mapping[str, Any] | None = None) -> None:
    """One JSON object on one line of stdout; in ASCII where that is not UTF-8, which JSON is by its standard, or has no
    place for half a pair.

    Args:
        verbatim: further fields, whose texts are the result itself: in them nothing is taken for a secret.
    """
    value = redacted(value) | dict(verbatim or {})
    text = json.dumps(value, ensure_ascii=False)
    utf8 = codecs.lookup(getattr(sys.stdout, "encoding", None) or "utf-8").name == "utf-8"
    result(json_visible(text if utf8 and is_text(text) else json.dumps(value)))
