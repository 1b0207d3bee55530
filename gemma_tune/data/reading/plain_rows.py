"""Files of plain text, such as a book or notes: each of them is one row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gemma_tune.base import strict_json
from gemma_tune.base.errors import UserError
from gemma_tune.data.reading.rows import BLOCK, MAX_ROW, TEXT, Block, Row, Source
from gemma_tune.data.reading.text import TextFile

_OPENING = 1 << 16  # characters of a file that show what it is


def has_rows(path: Path, encoding: str | None) -> bool:
    """Whether a file of this name holds rows nevertheless: its first line is JSON, or only begins some."""
    try:
        head = next(iter(TextFile(Source(f"{path}", path, TEXT, encoding=encoding), _OPENING)), "")
    except UserError:  # which is told where it is read
        return False
    first = next((line.strip() for line in head.removeprefix("\ufeff").splitlines() if line.strip()), "")
    cut_off = len(first) >= _OPENING // 2 and first.startswith(('{"', "[{"))
    if first in ("{", "[", "[{") or cut_off:
        return True
    try:
        return isinstance(strict_json.loads(first), (dict, list))
    except ValueError:
        return False


@dataclass(frozen=True)
class TextBlock(Block):
    """All of a file."""

    text: str

    def rows(self) -> Iterator[Row]:
        if self.text.strip():
            yield Row(self.file, 1, {"text": self.text})


def blocks(source: Source, size: int = BLOCK) -> Iterator[Block]:
    """The file's one row.

    Raises:
        UserError: no text in an encoding that can be told, or more of it than a row may be.
    """
    pieces, length = [], 0
    for piece in TextFile(source, size):
        pieces.append(piece)
        length += len(piece)
        if length > MAX_ROW:
            raise UserError(f"{source.name} is a text of more than {MAX_ROW >> 20} million characters",
                            "divide it into files of less, such as one for each chapter")
    yield TextBlock(source.name, 1.0, "".join(pieces).replace("\r\n", "\n"))
