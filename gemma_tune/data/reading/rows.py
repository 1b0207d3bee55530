"""What reading gives: rows, the sources they come from, and the blocks in which they travel to worker processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

JSON, CSV, TSV, PARQUET, ARROW, HUB, TEXT = "jsonl-or-json", "csv", "tsv", "parquet", "arrow", "hf", "text"
PIPED = "<stdin>"  # the name of the source that standard input is
BLOCK = 1 << 20  # bytes or characters that are read, and travel, together
# What is longer is no conversation: most likely a file whose quotes or brackets do not close.
MAX_ROW = 1 << 26


@dataclass(frozen=True)
class Description:
    """How the rows of a data set are read, by an entry of LLaMA-Factory's ``dataset_info.json``.

    Args:
        name: of the entry.
        file: where it stands.
        formatting: ``alpaca`` or ``sharegpt``.
        columns: LLaMA-Factory's name of each column that is read, and the row's own.
        tags: their names of the keys and roles of turns, and the row's own.
        samples: most rows that are taken; None for all.
    """

    name: str
    file: Path
    formatting: str
    columns: tuple[tuple[str, str], ...]
    tags: tuple[tuple[str, str], ...]
    samples: int | None = None

    def __str__(self) -> str:
        columns = ", ".join(f"{key}={column}" for key, column in self.columns)
        return f"as the entry `{self.name}` of {self.file} says: {self.formatting} with {columns}"


@dataclass(frozen=True)
class Row:
    """One row as it stands in a file. ``error`` says why it could not be read; ``value`` is then its raw text.

    Args:
        file: the source's name, as people gave it.
        line: where the row begins, from 1 on: a line of a text file, the number of the row in Parquet, in Arrow, on the
            Hub and in a JSON list that is written on one line.
        value: what JSON can hold.
        described: what is said about the rows of its source.
    """

    file: str
    line: int
    value: Any
    error: str | None = None
    described: Description | None = None


@dataclass(frozen=True)
class Source:
    """One thing to read rows from.

    Args:
        name: for messages and ``Row.file``: the path as typed or found, ``<stdin>`` or ``hf:org/name:train``.
        path: a regular file whose content identifies the rows: the file, the copy of standard input, or the lock file
            that names a dataset's commit.
        kind: ``jsonl-or-json``, ``csv``, ``tsv``, ``parquet``, ``arrow``, ``hf`` or ``text``.
        size: of the file in bytes; None on the Hub.
        delimiter: the sign between the columns of a table, where it was named.
        encoding: of a text, where it was named; else it is UTF-8, or UTF-16 with a byte order mark.
        argument: the name that it was found by, as people gave it: that of a directory is one of all files below it.
        described: what an entry of a ``dataset_info.json`` says about its rows.
    """

    name: str
    path: Path
    kind: str
    size: int | None = None
    delimiter: str | None = None
    encoding: str | None = None
    argument: str = ""
    described: Description | None = None


@dataclass(frozen=True)
class Block:
    """Some consecutive rows, not parsed yet; it can be pickled, so that a worker process does the parsing.

    Args:
        file: the source's name.
        done: share of the source (of a file's bytes, else of its rows) that was read for this block and those before
            it, from 0 to 1.
    """

    file: str
    done: float

    def rows(self) -> Iterator[Row]:
        """The rows in order. A row that cannot be read has an ``error``; nothing is raised."""
        raise NotImplementedError

    def count(self) -> int:
        """How many rows there are; none of them is parsed for it."""
        raise NotImplementedError


@dataclass(frozen=True)
class PickedBlock(Block):
    """Some rows of a block: those at these positions, which count from 0 and rise."""

    block: Block
    at: tuple[int, ...]

    def rows(self) -> Iterator[Row]:
        picked = set(self.at)
        return (row for n, row in enumerate(self.block.rows()) if n in picked)

    def count(self) -> int:
        return len(self.at)


@dataclass(frozen=True)
class DescribedBlock(Block):
    """A block whose rows are read as a description says."""

    block: Block
    described: Description

    def rows(self) -> Iterator[Row]:
        return (replace(row, described=self.described) for row in self.block.rows())

    def count(self) -> int:
        return self.block.count()


def repeated(names: Sequence[str]) -> str | None:
    """The first column's name that another column has as well."""
    return next((name for name, times in Counter(names).items() if times > 1), None)
