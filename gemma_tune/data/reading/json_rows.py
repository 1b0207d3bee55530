"""Rows of JSONL and JSON files. The content decides which one it is, whatever the file's name.

One JSON document is an array, or an object that does not fit the first line: of the array its elements are the rows,
and so they are of an object that only wraps one array of objects; any other object is one row. An array of turns is one
row as well, and there may be one on each line.
"""

from __future__ import annotations

import enum
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gemma_tune.base import strict_json
from gemma_tune.base.errors import UserError
from gemma_tune.data.reading.json_window import REPAIR, Window
from gemma_tune.data.reading.names import AS_TEXT, kind_of
from gemma_tune.data.reading.rows import BLOCK, MAX_ROW, PIPED, TEXT, Block, Row, Source
from gemma_tune.data.reading.text import TextFile

_LONG = 1 << 20  # a longer first line is looked at piece by piece
EXAMPLE = 'put one conversation on each line, such as {"messages": [{"role": "user", "content": "…"}, …]}'
# An object with one of these is a row, not the wrapping of a list of rows.
_ROW_KEYS = frozenset((
    "messages", "conversations", "conversation", "system", "system_prompt", "system_message", "tools", "functions",
    "history", "chat_history", "chat", "contents", "systemInstruction", "system_instruction", "instruction", "input",
    "output", "prompt", "completion", "response", "question", "answer", "context", "passage", "text", "chosen",
    "rejected", "preferred_output", "non_preferred_output"))


@dataclass(frozen=True)
class LinesBlock(Block):
    """Whole lines of a JSONL file, the first of which has the number ``first``."""

    first: int
    text: str

    def rows(self) -> Iterator[Row]:
        # Only line feeds end a JSONL line: str.splitlines would also split at U+2028, which JSON strings may contain.
        for number, line in enumerate(self.text.split("\n"), start=self.first):
            if line.strip():
                # Files that were put one behind another keep their byte order marks.
                yield _row(self.file, number, line.removeprefix("\ufeff"), line)

    def count(self) -> int:
        return sum(1 for line in self.text.split("\n") if line.strip())


@dataclass(frozen=True)
class ElementsBlock(Block):
    """Elements of a JSON document's array: the line where each begins, or its number in an array that is written on one
    line, and its text."""

    elements: tuple[tuple[int, str], ...]

    def rows(self) -> Iterator[Row]:
        for line, text in self.elements:
            yield _row(self.file, line, text, text)

    def count(self) -> int:
        return len(self.elements)


def _row(file: str, line: int, text: str, raw: str) -> Row:
    try:
        return Row(file, line, strict_json.row(text))
    except ValueError as e:
        return Row(file, line, raw.rstrip("\r"), f"not valid JSON: {strict_json.reason(e)}")


def blocks(source: Source, size: int = BLOCK) -> Iterator[Block]:
    """All rows of one JSONL or JSON file; memory is bounded by ``size`` and the longest row.

    A broken line of a JSONL file is a row with an error; a broken JSON document has no rows to save.

    Raises:
        UserError: empty, binary or undecodable file, or a JSON document that is not a list of rows.
    """
    layout, wrapped = _layout(source, size)
    if layout is _Layout.LINES:
        _refuse_plain_text(source, size)
        yield from _lines(source, size)
    elif layout is _Layout.SINGLE:
        yield _single(source, size)
    else:
        yield from _document(source, size, wrapped)


def _refuse_plain_text(source: Source, size: int) -> None:
    """A file whose name promises no rows, and in which no line begins like one: to repair each of them helps nobody."""
    if source.name != PIPED and kind_of(source.path) not in (None, TEXT):
        return
    window = Window(TextFile(source, size), source.name)
    if not window.skip_blank() or window.text[window.at] in "{[":
        return
    first = window.ahead(_LONG)
    if (first is None or not strict_json.is_json(first)) and not window.find("\n{"):
        raise UserError(f"{source.name} is plain text, and has no rows", AS_TEXT)


def _lines(source: Source, size: int) -> Iterator[Block]:
    file, line, rest, waiting, empty = TextFile(source, size), 1, [], 0, True
    for piece in file:
        empty = empty and not piece.strip()
        cut = piece.rfind("\n") + 1
        if not cut:
            rest.append(piece)
            waiting += len(piece)
            if waiting > MAX_ROW:
                raise UserError(f"{source.name}:{line}: what begins here is too long for a row "
                                f"({MAX_ROW >> 20} million characters)", REPAIR)
            continue
        text = "".join((*rest, piece[:cut]))
        rest, waiting = [piece[cut:]], len(piece) - cut
        yield LinesBlock(source.name, file.done, line, text)
        line += text.count("\n")
    if empty:
        raise UserError(f"{source.name} is empty", EXAMPLE)
    if last := "".join(rest):
        yield LinesBlock(source.name, 1.0, line, last)


def _document(source: Source, size: int, wrapped: int | None) -> Iterator[Block]:
    """Elements of the document's array: of the ``wrapped``-th member of its object, else of the document itself."""
    file = TextFile(source, size)
    window = Window(file, source.name)
    window.skip_blank()
    if wrapped is not None:
        for number, _ in enumerate(window.members()):
            if number == wrapped:
                break
            window.skip()
    waiting: list[tuple[int, str]] = []
    length, count = 0, 0
    for element in _placed(window.elements()):
        waiting.append(element)
        length += len(element[1])
        count += 1
        if length >= size:
            yield ElementsBlock(source.name, file.done, tuple(waiting))
            waiting, length = [], 0
    if not count:
        raise UserError(f"{source.name} is an empty list", "put at least one conversation into it")
    if wrapped is None and window.skip_blank():
        raise UserError(f"{source.name}:{window.line}: there is more after the end of the list",
                        window.one_list())
    if waiting:
        yield ElementsBlock(source.name, 1.0, tuple(waiting))


def _placed(elements: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Elements with their lines; with their numbers, from 1, where the first two stand on the same line, which would
    tell none from the other."""
    first = list(itertools.islice(elements, 2))
    on_one_line = len(first) == 2 and first[0][0] == first[1][0]
    for number, (line, text) in enumerate(itertools.chain(first, elements), start=1):
        yield number if on_one_line else line, text


def _single(source: Source, size: int) -> Block:
    """An object or a list of turns over several lines as one row. Nothing else is in the file, so what is wrong with it
    is an error."""
    window = Window(TextFile(source, size), source.name)
    window.skip_blank()
    line, text = window.line, window.value()
    try:
        strict_json.row(text)
    except ValueError as e:
        raise UserError(f"{source.name}:{line}: not valid JSON: {strict_json.reason(e)}", REPAIR) from e
    return ElementsBlock(source.name, 1.0, ((line, text),))


_OPENS_TURNS = re.compile(r'\[\s*\{\s*"(?:role|from|content|value)"')


class _Layout(enum.Enum):
    LINES = "one row on each line"
    SINGLE = "one object or list of turns, which is a row"
    ARRAY = "an array of rows"


def _layout(source: Source, size: int) -> tuple[_Layout, int | None]:
    """What the file is and, for an array inside an object, which member of the object it is.

    Raises:
        UserError: the file is one document, and broken.
    """
    window = Window(TextFile(source, size), source.name)
    start = window.text[window.at] if window.skip_blank() else ""
    if start == "[":
        return _layout_of_list(window, source, size), None
    if start != "{":
        return _Layout.LINES, None
    first = window.ahead(_LONG)
    whole_line = first is not None and strict_json.is_json(first)
    if whole_line and _goes_on(window, len(first)):
        return _Layout.LINES, None
    line = window.line
    try:
        wrapped = _wrapped(window)
        if wrapped is None and window.line == line:
            return _Layout.LINES, None
        if window.skip_blank():
            window.broken("Extra data", hint=window.one_list())
    except UserError:
        # A broken first row has others below it; the lines of one object do not begin like rows.
        if whole_line or (first or "").strip() != "{" and _another_row(source, size, "{"):
            return _Layout.LINES, None
        raise
    return (_Layout.SINGLE, None) if wrapped is None else (_Layout.ARRAY, wrapped)


def _layout_of_list(window: Window, source: Source, size: int) -> _Layout:
    """The layout of a file that begins with a list: of rows, or of turns, which may be the first line's alone."""
    first = window.ahead(_LONG)
    if first is not None and _is_turns(first):
        return _Layout.LINES if _goes_on(window, len(first)) else _Layout.SINGLE
    # A broken first row has others below it; the lines of one list of turns do not begin like another.
    if first is not None and _OPENS_TURNS.match(first) and _another_row(source, size, "["):
        return _Layout.LINES
    for _, text in window.elements():
        return _Layout.SINGLE if _is_turn(strict_json.lenient(text)) else _Layout.ARRAY
    return _Layout.ARRAY


def _is_turns(line: str) -> bool:
    """Whether a line is a list of turns, and a row of its own."""
    try:
        end = strict_json.end_of(line, 0)
    except ValueError:
        return False
    turns = strict_json.lenient(line[:end]) if not line[end:].strip() else None
    return isinstance(turns, list) and bool(turns) and _is_turn(turns[0])


# Who speaks and what is said, in turns with keys of their own (--turn-keys).
_SPEAKER, _SAID = frozenset(("speaker", "sender")), frozenset(("utterance", "text", "message", "content"))


def _is_turn(value: Any, *, own_keys: bool = False) -> bool:
    if not isinstance(value, dict):
        return False
    known = bool(value.keys() & {"role", "from"} and value.keys() & {"content", "value"})
    return known or own_keys and bool(value.keys() & _SPEAKER and value.keys() & _SAID)


def _goes_on(window: Window, length: int) -> bool:
    """Whether there is more than white space behind the next ``length`` characters; the cursor stays."""
    while not window.text[window.at + length:].strip():
        if not window.more():
            return False
    return True


def _another_row(source: Source, size: int, start: str) -> bool:
    window = Window(TextFile(source, size), source.name)
    window.skip_blank()
    return window.find(f"\n{start}")


def _wrapped(window: Window) -> int | None:
    """The number of the only member that is an array of objects, in an object that is no row; None if it is one.

    The cursor moves from the object's brace to its end. Other members may stand on either side of the array, so the
    whole object is looked at, element by element, before the first row is read.
    """
    lists, row = [], False
    for number, key in enumerate(window.members()):
        row = row or key in _ROW_KEYS
        if window.peek() != "[":
            window.skip()
            continue
        count, objects = 0, True
        for _, text in window.elements():
            objects = objects and text[0] == "{"
            if not count and objects:
                row = row or _is_turn(strict_json.lenient(text), own_keys=True)
            count += 1
        if count and objects:
            lists.append(number)
    return lists[0] if len(lists) == 1 and not row else None
