"""Rows of a file that somebody names beside the data: read, checked and laid out as ``prepare`` does it.

``prepare`` itself works in two passes, and finds duplicates as well; of a file to measure on, or to round by, each row
stands for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from gemma_tune.base.listener import Listener
from gemma_tune.config.stages import PrepareConfig
from gemma_tune.data.conversations.checks import TextChecks
from gemma_tune.data.conversations.formats import Formats
from gemma_tune.data.conversations.problems import RowError, in_words
from gemma_tune.data.conversations.unread import Unread
from gemma_tune.data.reading.rows import TEXT
from gemma_tune.data.reading.sources import Row, Source, read_blocks
from gemma_tune.data.reading.text import TextFile
from gemma_tune.encoding.chat_format import FormatError
from gemma_tune.encoding.sequences import Encoder, Outcome, PreparedRow

_PASSAGE = 8192  # characters of plain text that are taken as one row
T = TypeVar("T")
Turns = list[dict[str, Any]]
Showing = Callable[[Row, Turns], Turns]  # what becomes of a row's turns with pictures; it may raise RowError


@dataclass(frozen=True)
class Usable:
    """A row that nothing is wrong with, but perhaps its length: the conversation, its token sequences, and what nobody
    reads of it."""

    row: Row
    example: PreparedRow
    outcome: Outcome
    unread: Sequence[Unread]


def rows_of(source: Source, listener: Listener) -> Iterator[Row]:
    """The rows of a file, unchecked; of a plain text (.txt, .md) its passages.

    Raises:
        UserError: it cannot be read.
    """
    if source.kind == TEXT:
        line = 1
        for piece in TextFile(source, _PASSAGE):
            if piece.strip():
                yield Row(source.name, line, {"text": piece})
            line += piece.count("\n")
        return
    for block in read_blocks(source, listener=listener):
        yield from block.rows()


def sampled(items: Iterable[T], most: int, seed: int = 0) -> list[T]:
    """At most so many of them, each with the same chance (Vitter 1985, algorithm R); all, in their order, if they are
    no more."""
    kept: list[T] = []
    random = np.random.default_rng(seed)
    for n, item in enumerate(items):
        if n < most:
            kept.append(item)
        elif (at := int(random.integers(n + 1))) < most:
            kept[at] = item
    return kept


def usable(rows: Sequence[Row], encoder: Encoder, config: PrepareConfig, showing: Showing,
           ) -> tuple[list[Usable], list[str]]:
    """Check rows and turn them into tokens.

    Args:
        encoder: with the run's chat format.
        config: says how rows are read and what is checked.
        showing: is asked for the turns of rows with pictures.

    Returns:
        The rows that can be used, and what is wrong with each of the others, a line for each.
    """
    formats = Formats(None, config.column_names, config.take, config.role_names, config.key_names,
                      config.on_uneven == "mend")
    checks = TextChecks(encoder.chat.markers, config.allow, config.new_tokens)
    faults: list[str] = []
    good: list[tuple[Row, PreparedRow, Sequence[Unread]]] = []
    for row in rows:
        try:
            example = formats.example_of(row)
            if problems := checks.problems(example):
                raise RowError(problems)
            if any("pictures" in turn for turn in example.messages or ()):
                example = replace(example, messages=showing(row, example.messages))
        except RowError as e:
            faults.append(f"{row.file}:{row.line}: {in_words(e.problems, with_fixes=True)}")
        else:
            good.append((row, example.as_row(), example.unread))
    found = []
    for (row, example, unread), outcome in zip(good, encoder.encode([example for _, example, _ in good]), strict=True):
        if isinstance(outcome, FormatError):
            faults.append(f"{row.file}:{row.line}: {outcome}")
        else:
            found.append(Usable(row, example, outcome, unread))
    return found, faults
