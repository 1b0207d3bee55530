"""How a table is written is found out from the file itself: the sign between its columns, and what its quotes mean.

In CSV, a cell in quotes is meant without them. Tables with tabs or bars are mostly written without any quoting, but
spreadsheets and data frames do quote there what holds a tab, a line break or a quote; so the whole file is looked at.
"""

from __future__ import annotations

import csv
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from gemma_tune.base.errors import UserError
from gemma_tune.base.listener import Listener
from gemma_tune.base.words import shown
from gemma_tune.data.reading.records import Dialect, Records, physical_lines, swallows_rows
from gemma_tune.data.reading.rows import TSV, Source
from gemma_tune.data.reading.text import TextFile

_DELIMITERS = ",;\t|"
_QUOTING = ",;"  # the delimiters of tables in which quotes always enclose cells
_SAMPLE = 20  # lines from which the delimiter is told
_EXCEL = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)  # a first line that Excel understands
_IN_QUOTES = re.compile(r'"(?:[^"]|"")*"')
_NUMBER = re.compile(r"\s*[-+]?[\d.,]+\s*")


def dialect_of(source: Source, size: int, listener: Listener) -> Dialect:
    """The dialect of a CSV or TSV file, whose delimiter may have been named. What can matter is told the listener.

    Raises:
        UserError: the file cannot be read as text.
    """
    lines = _lines(source, size)
    skipped, first = _first(lines)
    excel = _EXCEL.fullmatch(first)
    if excel:
        more, first = _first(lines)
        skipped += 1 + more
    _refuse_other_sign(source, skipped + 1, first)
    sample = [first, *itertools.islice(lines, _SAMPLE)]
    delimiter = source.delimiter or (excel and excel[1]) or _delimiter(sample, source)
    # A single column can have no padding, and in quotes it is text.
    dialect = Dialect(delimiter, True, delimiter != "\t" and f"{delimiter} " in _IN_QUOTES.sub('""', first), skipped)
    return dialect if delimiter in _QUOTING else _with_quotes_as_meant(source, size, dialect, listener)


def _lines(source: Source, size: int) -> Iterator[str]:
    return physical_lines(TextFile(source, size), source.name)


def _first(lines: Iterator[str]) -> tuple[int, str]:
    """The number of blank lines that come next, and the line after them; empty at the end."""
    number = 0
    for line in lines:
        if line.strip():
            return number, line
        number += 1
    return number, ""


# --- the delimiter

def _refuse_other_sign(source: Source, line: int, header: str) -> None:
    if source.delimiter and source.delimiter not in header and any(d in header for d in _DELIMITERS):
        raise UserError(f"{source.name}:{line}: the header has no {shown(source.delimiter)} between its columns: "
                        f"{shown(header.strip())}", "leave --delimiter out to have it found in each file")


def _delimiter(sample: Sequence[str], source: Source) -> str:
    """The sign in the header by which most of the first rows have as many cells as it has."""
    usual = "\t" if source.kind == TSV else ","
    header = _IN_QUOTES.sub("", sample[0])
    found = [d for d in _DELIMITERS if d in header]
    if usual == "\t" and usual not in header:  # one column of text, unless every line speaks for more
        found = [d for d in found if _fitting(sample, d) == len(sample) > 1]
    if not found or usual == "\t" in header:
        return usual
    # As Excel writes where the comma is the decimal sign, a comma in a name can be nothing but text.
    return max(found, key=lambda d: (_fitting(sample, d), f"{d} " not in header, -_DELIMITERS.index(d)))


def _fitting(sample: Sequence[str], delimiter: str) -> int:
    """How many of the first records have as many cells as the header; a sample may end within a record."""
    columns, *counts = [len(cells) for cells in csv.reader(sample, delimiter=delimiter) if cells]
    return 1 + counts.count(columns)


# --- the quotes

@dataclass
class _Cells:
    """What speaks for or against quoting in the form of the cells."""

    quoted: int = 0
    plain: int = 0  # with text in it
    stray: int = 0  # with a quote in it, and not in quotes, which no program that quotes would write
    needless: int = 0  # in quotes without a reason
    for_commas: int = 0  # in quotes for nothing but a comma, as Excel does
    with_commas: int = 0  # with a comma and not in quotes
    header_is_quoted: bool | None = None

    def add(self, raw: str, delimiter: str) -> None:
        for match in re.finditer(f'(?:^|{re.escape(delimiter)})("(?:[^"]|"")*"|[^{re.escape(delimiter)}]*)',
                                 raw.rstrip("\r\n")):
            cell = match[1]
            if len(cell) > 1 and cell[0] == '"' == cell[-1]:
                inside = cell[1:-1]
                self.quoted += 1
                if '"' not in inside and delimiter not in inside and not re.search("[\r\n]", inside):
                    self.for_commas += "," in inside
                    self.needless += "," not in inside
            elif cell:
                self.plain += _NUMBER.fullmatch(cell) is None
                self.stray += '"' in cell
                self.with_commas += "," in cell
        if self.header_is_quoted is None:
            self.header_is_quoted = self.quoted > 0 and not self.plain

    @property
    def speak_for_quoting(self) -> bool:
        """A program that quotes has a rule for it: everything, all text, or what needs it."""
        by_need = not self.needless and not (self.for_commas and self.with_commas)
        return self.quoted > 0 and not self.stray and (not self.plain or by_need)


def _with_quotes_as_meant(source: Source, size: int, dialect: Dialect, listener: Listener) -> Dialect:
    """Both ways of reading are tried on the whole file; the one that gives fewer broken rows is meant."""
    literal = replace(dialect, quoted=False)
    faults, first = _faults_as_text(source, size, literal)
    if first is None:
        return literal
    broken, cells = _faults_as_quoted(source, size, dialect)
    # Nobody writes the columns' names in quotes that are text.
    if cells.header_is_quoted or broken < faults or broken == faults and cells.speak_for_quoting:
        listener.note(f"{source.name}: cells in quotes are taken without them, first in line {first[0]}")
        return dialect
    listener.note(f"{source.name}: quotes are taken as text, first in line {first[0]}: {shown(first[1])}")
    return literal


def _faults_as_text(source: Source, size: int, literal: Dialect) -> tuple[int, tuple[int, str] | None]:
    """How many lines are no rows where quotes are text, and line and content of the first cell that begins with one."""
    columns, faults, first = None, 0, None
    for line, cells, raw, _ in Records(source.name, _lines(source, size), literal):
        columns = columns or len(cells)
        faults += len(cells) != columns
        if first is None and '"' in raw:
            first = next(((line, cell) for cell in cells if cell.startswith('"')), None)
    return faults, first


def _faults_as_quoted(source: Source, size: int, dialect: Dialect) -> tuple[float, _Cells]:
    """How many records are no rows where quotes enclose cells."""
    columns, faults, form = None, 0, _Cells()
    try:
        for _, cells, raw, error in Records(source.name, _lines(source, size), dialect):
            columns = columns or len(cells)
            form.add(raw, dialect.delimiter)
            faults += bool(error) or len(cells) != columns or swallows_rows(raw, dialect.delimiter, columns)
    except UserError:  # a quote that is never closed
        return math.inf, form
    return faults, form
