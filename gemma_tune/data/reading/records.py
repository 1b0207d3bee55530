"""Records of a table that is text: physical lines, and cells by the signs that part and enclose them."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gemma_tune.base.errors import UserError

_LONGEST_CELL = 1 << 24  # characters; behind a quote that is not closed, the rest of the file is one cell
_LONGEST_LINE = 1 << 26
_LINE_END = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True)
class Dialect:
    """How a table is written.

    Args:
        delimiter: the sign between two cells.
        quoted: a cell in quotes is meant without them, and may hold delimiters and line breaks; else a quote is text.
        padded: a space behind each delimiter does not count.
        skipped: lines above the header.
    """

    delimiter: str
    quoted: bool = True
    padded: bool = False
    skipped: int = 0


class Records:
    """Line, cells, raw text and error of each record, the header first; blank lines are left out.

    Raises (while iterating):
        UserError: a cell without end.
    """

    def __init__(self, name: str, lines: Iterator[str], dialect: Dialect):
        self.name, self._lines, self._number, self._dialect = name, lines, 0, dialect
        self._taken: list[str] = []
        for _ in range(dialect.skipped):
            self._number += next(lines, None) is not None
        csv.field_size_limit(_LONGEST_CELL)
        self._reader = csv.reader(self._numbered(), delimiter=dialect.delimiter, strict=True,
                                  quoting=csv.QUOTE_MINIMAL if dialect.quoted else csv.QUOTE_NONE,
                                  skipinitialspace=dialect.padded)

    def _numbered(self) -> Iterator[str]:
        for line in self._lines:
            self._number += 1
            self._taken.append(line)
            yield line

    def __iter__(self) -> Records:
        return self

    def __next__(self) -> tuple[int, list[str], str, str | None]:
        while True:
            self._taken.clear()
            line, cells, error = self._number + 1, [], None
            try:
                cells = next(self._reader)
            except csv.Error as e:
                error = self._explained(line, e)
            if cells or error:
                return line, cells, "".join(self._taken), error

    def _explained(self, line: int, e: csv.Error) -> str:
        if not self._dialect.quoted and "field limit" in f"{e}":
            raise UserError(f"{self.name}:{line}: a cell has more than {_LONGEST_CELL >> 20} million characters",
                            "check that it is a table, with one row on each line") from e
        if "unexpected end" in f"{e}" or "field limit" in f"{e}":
            raise UserError(f"{self.name}:{line}: a quote that opens in this row is never closed",
                            "repair the row (a quote inside a quoted cell is written twice); nothing was written"
                            ) from e
        return f"not valid CSV: {e}{self.to_line(line)}"

    def to_line(self, first: int) -> str:
        """Where the record that was read last ends, if not in the line where it begins."""
        return f" (lines {first} to {self._number})" if self._number > first else ""


def swallows_rows(raw: str, delimiter: str, columns: int) -> bool:
    """Whether a record of several lines looks like as many rows, which a quote that was meant as text has joined.

    A comma or semicolon that white space follows is taken for one of a sentence.
    """
    lines = _LINE_END.split(raw.rstrip("\r\n"))
    if columns < 2 or len(lines) < 2:
        return False
    if delimiter not in ",;":
        return all(line.count(delimiter) == columns - 1 for line in lines)
    first, others = (re.compile(f"{delimiter}(?=[^\\s{more}])") for more in ("", '"'))
    return (len(first.findall(lines[0])) == columns - 1
            and all(len(others.findall(line)) == columns - 1 for line in lines[1:]))


def physical_lines(pieces: Iterable[str], name: str) -> Iterator[str]:
    """Lines with their ends: line feed, carriage return or both."""
    rest, waiting = [], 0
    for piece in pieces:
        rest.append(piece)
        waiting += len(piece)
        if waiting > _LONGEST_LINE and not any("\n" in part or "\r" in part for part in rest):
            raise UserError(f"{name} has a line of more than {_LONGEST_LINE >> 20} million characters",
                            "check that it is a table, with one row on each line")
        if "\n" not in piece and "\r" not in piece and not rest[0].endswith("\r"):
            continue
        text = "".join(rest)
        # What may go on waits: a line without its end, or with the first half of it.
        end = max(text.rfind("\n"), text.rfind("\r", 0, len(text) - 1)) + 1
        rest = [text[end:]]
        waiting = len(text) - end
        yield from io.StringIO(text[:end], newline="")
    yield from io.StringIO("".join(rest), newline="")
