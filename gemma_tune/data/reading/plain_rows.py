"""Files of plain text, such as a book or notes: each of them is one row."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma_tune.base import strict_json
from gemma_tune.base.errors import UserError
from gemma_tune.data.reading.rows import BLOCK, MAX_ROW, TEXT, Block, Row, Source
from gemma_tune.data.reading.text import TextFile

_OPENING = 1 << 16  # characters of a file that show what it is
_SIGNS = "\t;|,"  # between the columns of a table
_LEAST_LINES, _LOOKED_AT = 3, 20  # lines that have them; fewer may be alike by chance


def opening(path: Path, encoding: str | None) -> list[str]:
    """The first lines of a file that has the name of a text, without empty ones; the last of them may be cut off."""
    try:
        head = next(iter(TextFile(Source(f"{path}", path, TEXT, encoding=encoding), _OPENING)), "")
    except UserError:  # which is told where it is read
        return []
    return [line.strip() for line in head.removeprefix("\ufeff").splitlines() if line.strip()]


def has_rows(lines: Sequence[str]) -> bool:
    """Whether a file that begins like this holds rows, whatever its name: the first line is JSON, or begins some, or
    half of the lines are JSON."""
    first, looked_at = lines[0] if lines else "", lines[:_LOOKED_AT]
    cut_off = len(first) >= _OPENING // 2 and first.startswith(('{"', "[{"))
    if first in ("{", "[", "[{") or cut_off or _is_json(first):
        return True
    return 0 < len(looked_at) <= 2 * sum(map(_is_json, looked_at))


def _is_json(line: str) -> bool:
    try:
        return isinstance(strict_json.loads(line), (dict, list))
    except ValueError:
        return False


def as_in_a_table(lines: Sequence[str]) -> str | None:
    """The sign that all of a file's first lines have equally often, as those of a table have; None if there is none.

    Sentences may share a sign by chance, so one but the tab counts only where the first line could be names of columns.
    """
    signs = _SIGNS if lines and " " not in lines[0] else "\t"
    numbers = {sign: {line.count(sign) for line in lines[:_LOOKED_AT]} for sign in signs if len(lines) >= _LEAST_LINES}
    return next((sign for sign, found in numbers.items() if len(found) == 1 and 0 not in found), None)


# A date, a time, and who says something then: on the same line (WhatsApp), or on those below (WeChat, QQ).
_SAID_AT = re.compile(r"\[?(?:\d{4}[-/.年]\d{1,2}[-/.月]\d{1,2}日?|\d{1,2}[/.]\d{1,2}[/.]\d{2,4}),? +"
                      r"\d{1,2}:\d{2}(?::\d{2})?(?:\s?[AaPp]\.?[Mm]\.?)?\]?(?: -)? +"
                      r"(?! *(?i:trace|debug|info|notice|warn(?:ing)?|error|critical|fatal)\b)"  # as in a log
                      r"(?P<name>[^:：\[\]]{1,30})(?P<said>[:：].*)?")


def as_in_a_chat(lines: Sequence[str]) -> bool:
    """Whether several of a file's first lines say when somebody says something, and two or more do so in turn. Where it
    is not said there, another line has it, else these are entries of a table or a log."""
    found = [_SAID_AT.fullmatch(line) for line in lines[:2 * _LOOKED_AT]]
    names = [line["name"].strip() for line, below in zip(found, [*found[1:], None])
             if line and (line["said"] or below is None)]
    return len(names) >= _LEAST_LINES and 2 <= len({*names}) <= (len(names) + 1) // 2


@dataclass(frozen=True)
class TextBlock(Block):
    """All of a file."""

    text: str

    def rows(self) -> Iterator[Row]:
        if self.text.strip():
            yield Row(self.file, 1, {"text": self.text})

    def count(self) -> int:
        return 1 if self.text.strip() else 0


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
