"""Rows of tables: CSV, TSV and Parquet. A row is an object with the columns' names as keys."""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from gemma_tune.base.errors import UserError
from gemma_tune.data.reading.arrow_rows import ArrowBlock, arrow_blocks
from gemma_tune.data.reading.rows import BLOCK, TSV, Block, Row, Source
from gemma_tune.data.reading.text import TextFile, compression

_LONGEST_CELL = 1 << 24  # characters; behind a quote that is not closed, the rest of the file is one cell
_LONGEST_LINE = 1 << 26
_LONGEST_NAME = 200
_HEADER = "the first row must name the columns, such as question,answer"


@dataclass(frozen=True)
class TableBlock(Block):
    """Records of a CSV or TSV file: line, and cells by the header's order, or raw text and what is wrong with it."""

    header: tuple[str, ...]
    records: tuple[tuple[int, list[str] | str, str | None], ...]

    def rows(self) -> Iterator[Row]:
        for line, cells, error in self.records:
            if error is not None:
                yield Row(self.file, line, cells, error)
                continue
            # Columns without a name (a data frame's index, trailing commas) cannot be meant. Cells stay text: whether
            # one holds turns or tools as JSON is for the format to tell.
            yield Row(self.file, line, {name: cell for name, cell in zip(self.header, cells) if name})


def csv_blocks(source: Source, size: int = BLOCK) -> Iterator[TableBlock]:
    """All rows of a CSV or TSV file, by the first row's column names; memory is bounded.

    A row with another number of cells than the header is a row with an error.

    Raises:
        UserError: empty, binary or undecodable file, no usable header, or a quote that is never closed.
    """
    file = TextFile(source, size)
    table = _Records(source.name, _physical_lines(file, source.name), "\t" if source.kind == TSV else ",")
    header = _header(source.name, table)
    waiting: list[tuple[int, list[str] | str, str | None]] = []
    length, empty = 0, True
    for line, cells, raw, error in table:
        if error is None and len(header) > 1 and not raw.strip(" \r\n"):
            continue
        if error is None and len(cells) != len(header):
            error = f"not a row of this table: {len(cells)} cells where the header has {len(header)}"
        waiting.append((line, cells if error is None else raw.rstrip("\r\n"), error))
        length += len(raw)
        if length >= size:
            yield TableBlock(source.name, file.done, header, tuple(waiting))
            waiting, length, empty = [], 0, False
    if waiting:
        yield TableBlock(source.name, 1.0, header, tuple(waiting))
    elif empty:
        raise UserError(f"{source.name} has a header and no rows", "put at least one row below the header")


def _header(name: str, table: _Records) -> tuple[str, ...]:
    line, cells, _, error = next(table, (0, [], "", None))
    if not line:
        raise UserError(f"{name} is empty", _HEADER)
    names = tuple(cell.strip() for cell in cells)
    named = [n for n in names if n]
    if error:
        raise UserError(f"{name}:{line}: {error}", _HEADER)
    if twice := next((n for n in named if named.count(n) > 1), None):
        raise UserError(f"{name}:{line}: two columns are named {twice!r}", "give each column a name of its own; "
                        + _HEADER)
    if not named or any(len(n) > _LONGEST_NAME or "\n" in n for n in named):
        raise UserError(f"{name}:{line}: this is no header row", _HEADER)
    return names


class _Records:
    """Line, cells, raw text and error of each record; blank lines are left out."""

    def __init__(self, name: str, lines: Iterator[str], delimiter: str):
        self.name, self._lines, self._number = name, lines, 0
        self._taken: list[str] = []
        first = self._first()
        if delimiter == "," and "," not in first:  # as Excel writes where the comma is the decimal sign
            delimiter = next((d for d in ";\t" if d in first), ",")
        csv.field_size_limit(_LONGEST_CELL)
        self._reader = csv.reader(self._numbered(first), delimiter=delimiter, strict=True,
                                  skipinitialspace=f"{delimiter} " in first)

    def _first(self) -> str:
        """The first line that is not blank."""
        for line in self._lines:
            self._number += 1
            if line.strip():
                self._number -= 1  # counted again when it is read
                return line
        return ""

    def _numbered(self, first: str) -> Iterator[str]:
        for lines in ([first] if first else [], self._lines):
            for line in lines:
                self._number += 1
                self._taken.append(line)
                yield line

    def __iter__(self) -> _Records:
        return self

    def __next__(self) -> tuple[int, list[str], str, str | None]:
        while True:
            self._taken.clear()
            line, cells, error = self._number + 1, [], None
            try:
                cells = next(self._reader)
            except csv.Error as e:
                error = f"not valid CSV: {e}"
                if "unexpected end" in error or "field limit" in error:
                    raise UserError(f"{self.name}:{line}: a quote that opens in this row is never closed",
                                    "repair the row (a quote inside a quoted cell is written twice); nothing was "
                                    "written") from e
            if cells or error:
                return line, cells, "".join(self._taken), error


def _physical_lines(pieces: Iterable[str], name: str) -> Iterator[str]:
    """Lines with their ends: line feed, carriage return or both."""
    rest = ""
    for piece in pieces:
        text = rest + piece
        # What may go on waits: a line without its end, or with the first half of it.
        end = max(text.rfind("\n"), text.rfind("\r", 0, len(text) - 1)) + 1
        rest = text[end:]
        if len(rest) > _LONGEST_LINE:
            raise UserError(f"{name} has a line of more than {_LONGEST_LINE >> 20} million characters",
                            "check that it is a table, with one row on each line")
        yield from io.StringIO(text[:end], newline="")
    yield from io.StringIO(rest, newline="")


def parquet_blocks(source: Source, size: int = BLOCK) -> Iterator[ArrowBlock]:
    """All rows of a Parquet file, also a compressed one (which is unpacked into a temporary file first).

    Raises:
        UserError: damaged file, no rows, or two columns of one name.
    """
    import pyarrow as pa
    from pyarrow import parquet

    with tempfile.TemporaryFile() as unpacked:
        file: Any = source.path
        if compression(source.path):
            for piece in TextFile(source, size).bytes():
                unpacked.write(piece)
            unpacked.seek(0)
            file = unpacked
        try:
            with parquet.ParquetFile(file, buffer_size=size, pre_buffer=False) as table:
                meta = table.metadata
                stored = sum(meta.row_group(n).total_byte_size for n in range(meta.num_row_groups))
                count = max(1, min(10_000, size * max(1, meta.num_rows) // max(1, stored)))
                yield from arrow_blocks(source.name, meta.num_rows, table.iter_batches(batch_size=count))
        except (pa.ArrowException, OSError) as e:
            raise UserError(f"{source.name} is not a Parquet file, or damaged: {' '.join(str(e).split())[:200]}",
                            "copy or download it again, or check that its name fits its content; nothing was written"
                            ) from e
