"""Rows of tables that are text: CSV and TSV. A row is an object with the columns' names as keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gemma_tune.base.errors import UserError
from gemma_tune.base.listener import Listener
from gemma_tune.base.words import counted
from gemma_tune.data.reading.dialects import dialect_of
from gemma_tune.data.reading.records import Records, physical_lines, swallows_rows
from gemma_tune.data.reading.rows import BLOCK, Block, Row, Source, repeated
from gemma_tune.data.reading.text import TextFile

_LONGEST_NAME = 200
_NAMED = 5  # places that a warning names
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

    def count(self) -> int:
        return len(self.records)


def csv_blocks(source: Source, size: int = BLOCK, listener: Listener | None = None) -> Iterator[TableBlock]:
    """All rows of a CSV or TSV file, by the first row's column names; memory is bounded.

    A row with another number of cells than the header is a row with an error, and so is the header once more.

    Args:
        listener: is told what quotes were taken for where that is no matter of course, and of cells that seem to have
            swallowed rows.

    Raises:
        UserError: empty, binary or undecodable file, no usable header, or a quote that is never closed.
    """
    listener = listener or Listener()
    dialect = dialect_of(source, size, listener)
    file = TextFile(source, size)
    table = Records(source.name, physical_lines(file, source.name), dialect)
    header = _header(source.name, table)
    waiting: list[tuple[int, list[str] | str, str | None]] = []
    swallowed: list[str] = []
    length, empty = 0, True
    for line, cells, raw, error in table:
        # A blank line, or as spreadsheets write one: delimiters without anything between them.
        if error is None and len(header) > 1 and not raw.strip(f" \r\n{dialect.delimiter}"):
            continue
        if error is None and len(cells) != len(header):
            error = (f"not a row of this table: {counted(len(cells), 'cell')} where the header has {len(header)}"
                     f"{table.to_line(line)}")
        elif error is None and _is_again(cells, header):
            error = "the header again, as in files that were put together"
        elif error is None and swallows_rows(raw, dialect.delimiter, len(header)):
            swallowed.append(table.to_line(line).strip(" ()"))
        waiting.append((line, cells if error is None else raw.rstrip("\r\n"), error))
        length += len(raw)
        if length >= size:
            yield TableBlock(source.name, file.done, header, tuple(waiting))
            waiting, length, empty = [], 0, False
    _warn_of_swallowed(source.name, swallowed, listener)
    if waiting:
        yield TableBlock(source.name, 1.0, header, tuple(waiting))
    elif empty:
        raise UserError(f"{source.name} has a header and no rows", "put at least one row below the header")


def _is_again(cells: Sequence[str], header: Sequence[str]) -> bool:
    """Whether a row says what the header does, in capitals or not; of one column alone that may be a text."""
    return len(header) > 1 and all(map(_is_called, map(_bare, cells), map(_bare, header)))


def _is_called(cell: str, name: str) -> bool:
    return len(cell) == len(name) and cell.lower() == name.lower()  # most cells are told by their length


def _bare(cell: str) -> str:
    """A name as it stands also behind another file's byte order mark, where quotes around it are taken for text."""
    return cell.strip().removeprefix("\ufeff").strip().strip('"')


def _warn_of_swallowed(name: str, places: Sequence[str], listener: Listener) -> None:
    if places:
        more = f" and {len(places) - _NAMED:,} more" if len(places) > _NAMED else ""
        listener.warn(f"{name}: {', '.join(places[:_NAMED])}{more}: one row with line breaks inside quotes, though "
                      "each line looks like a row of its own; if the quotes are text, write each of them as \"\" in a "
                      "cell in quotes")


def _header(name: str, table: Records) -> tuple[str, ...]:
    line, cells, _, error = next(table, (0, [], "", None))
    if not line:
        raise UserError(f"{name} is empty", _HEADER)
    names = tuple(cell.strip() for cell in cells)
    named = [n for n in names if n]
    if error:
        raise UserError(f"{name}:{line}: {error}", _HEADER)
    if twice := repeated(named):
        raise UserError(f"{name}:{line}: two columns are named {twice!r}", "give each column a name of its own; "
                        + _HEADER)
    if not named or any(len(n) > _LONGEST_NAME or "\n" in n for n in named):
        raise UserError(f"{name}:{line}: this is no header row", _HEADER)
    return names
