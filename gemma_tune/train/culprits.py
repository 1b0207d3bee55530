"""A step whose loss or gradient is not finite: which rows of its batch it comes from, and what to do."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from gemma_tune.answers.prompts import headline
from gemma_tune.base.errors import WorkFailed
from gemma_tune.base.finite import weights_not_finite
from gemma_tune.base.words import counted, opening
from gemma_tune.encoding.origins import origins_of
from gemma_tune.run.directory import RunDir
from gemma_tune.train import processes

MOST_NAMED = 8
RowNames = Callable[[Sequence[int]], list[str]]


def by_number(rows: Sequence[int]) -> list[str]:
    """Names of training sequences that nothing is known of but their number."""
    return [f"sequence {row} of the training tokens, counted from 0" for row in rows]


def names_of(run: RunDir, sequences: Any, of_each: int = 1) -> RowNames:
    """How training sequences are named for the people whose data they are: file and line, and how the row begins.

    Args:
        sequences: the training's, of :func:`gemma_tune.encoding.tokens.open_tokens`.
        of_each: sequences that make one row of the training; a pair has two.
    """
    def named(rows: Sequence[int]) -> list[str]:
        if "row" not in sequences.data.column_names:
            return by_number(rows)
        lines = [sequences.data.column("row")[of_each * row].as_py() for row in rows]
        lines = list(dict.fromkeys(lines))  # a long conversation can be several sequences
        texts = _beginnings(run, lines)
        here = [f"{run.train_rows}:{line + 1}" for line in lines]
        places = origins_of(run.data, lines)
        if places is not None:
            here = [f"{place} ({prepared})" for place, prepared in zip(places, here)]
        return [f"{place}: {text!r}" for place, text in zip(here, texts)]

    return named


def said_in(row: Mapping[str, Any]) -> str:
    """What a row of train.jsonl is about: the question before its last answer, or the plain text."""
    return row["text"] if "text" in row else headline(row["messages"])


def _beginnings(run: RunDir, lines: Sequence[int]) -> list[str]:
    """How some rows of train.jsonl begin; nothing of one that cannot be read."""
    wanted, found = set(lines), {}
    try:
        with open(run.train_rows, encoding="utf-8") as rows:
            for number, row in enumerate(itertools.islice(rows, max(wanted, default=-1) + 1)):
                if number in wanted:
                    found[number] = opening(said_in(json.loads(row)))
    except (OSError, ValueError, LookupError, TypeError):
        pass
    return [found.get(line, "") for line in lines]


def not_finite_step(trainer: Any, facts: dict[str, Any], loss: float, bad: Sequence[str]) -> WorkFailed:
    """The error of a step that is not finite, which all processes make together.

    Args:
        trainer: the :class:`gemma_tune.train.trainer.GemmaTrainer`.
        facts: ``step``, and ``rows``: the training sequences that it learned from.
        loss: in nats per trained token.
        bad: names of the weights whose gradient is not finite.
    """
    rows = facts["rows"]
    gradient = f"the gradient of {counted(len(bad), 'tensor')} ({bad[0]}{', …' if len(bad) > 1 else ''})" if bad else ""
    if math.isfinite(loss):
        what = f"{gradient} is not finite at step {facts['step']}, though the loss is ({loss:.4g})"
    else:
        what = f"the loss is not finite at step {facts['step']} ({loss})" + (f", nor is {gradient}" if bad else "")
    found = _rows_not_finite(trainer, rows)
    weights = None if trainer.sharded else weights_not_finite(trainer.model)  # else each process has a part of them
    message = f"{what}; {_because(found, rows)}" + (f"; {weights.message}" if weights else "")
    named = trainer.row_names((found or rows)[:MOST_NAMED])
    if len(found or rows) > MOST_NAMED:
        named.append(f"… and {len(found or rows) - MOST_NAMED:,} more")
    return WorkFailed(message, weights.hint if weights else _hint(trainer, found, rows), named)


def _because(found: Sequence[int] | None, rows: Sequence[int]) -> str:
    batch = counted(len(rows), "row")
    if found is None:
        return f"its batch has {batch}"
    if not found:
        return f"its batch has {batch}, and by itself each of them gives finite ones"
    if len(found) < len(rows):
        return f"that comes from {len(found):,} of the {batch} of its batch"
    return f"that is so with each of the {batch} of its batch" if len(rows) > 1 else "its batch has 1 row"


def _hint(trainer: Any, found: Sequence[int] | None, rows: Sequence[int]) -> str:
    wide = "" if trainer.causal_lm.dtype == torch.float32 else ", or with --dtype fp32"
    slower = (f"train again with --force and a lower --learning-rate than {trainer.args.learning_rate:g} or --clip 0.3"
              f"{wide}; checkpoints before it are kept")
    if found and len(found) < len(rows):
        return (f"look at what is in {'this row' if len(found) == 1 else 'these rows'}, or leave "
                f"{'it' if len(found) == 1 else 'them'} out and prepare again; else {slower}")
    return slower


def _rows_not_finite(trainer: Any, rows: Sequence[int]) -> list[int] | None:
    """Those of some training sequences whose own loss or gradient is not finite; None where that cannot be found out.

    Each process tries its share. The weights are those that the step began with; on a GPU, which is not waited for,
    perhaps those of a step later.
    """
    here = processes.place()
    mine = list(rows[here.rank::here.count])
    batches = [trainer.with_sight(trainer.collate([trainer.train_dataset[row]])) for row in mine]
    if trainer.sharded:  # in each pass the processes gather every layer from each other, so all make as many
        batches += [trainer.collate([])] * (processes.most(len(batches)) - len(batches))
    try:
        finite: list[bool] | None = [_is_finite(trainer, batch) for batch in batches]
    except (RuntimeError, MemoryError):  # memory, or whatever else a step can fail with: the step's error is the news
        finite = None
    shares = processes.gathered(None if finite is None else [row for row, fine in zip(mine, finite) if not fine])
    if None in shares:
        return None
    bad = set(itertools.chain.from_iterable(shares))
    return [row for row in rows if row in bad]


def _is_finite(trainer: Any, batch: dict[str, Any]) -> bool:
    trainer.gradients.clear()
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=trainer.learned_in(batch))
    trainer.accelerator.backward(loss)
    return bool(torch.isfinite(loss.detach() + torch.linalg.vector_norm(trainer.gradients.norms())))
