"""A window over JSON text that comes in pieces: what was consumed is forgotten, what is needed is fetched."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import NoReturn

from gemma_tune.base import strict_json
from gemma_tune.base.errors import UserError
from gemma_tune.base.shell import of_posix
from gemma_tune.data.reading.rows import MAX_ROW

REPAIR = "repair the file there; nothing was written"
_ONE_LIST = "put all rows into one list, or one row on each line (JSONL): "
# The longest thing whose beginning can look broken where a piece ends, such as -Infinity or \uD83D\uDE00.
_LOOKAHEAD = 16


class Window:
    """Text from a cursor on, with the cursor's place in the file.

    Args:
        pieces: the text.
        name: the file's name in errors.
    """

    def __init__(self, pieces: Iterable[str], name: str):
        self.name, self.text, self.at = name, "", 0
        self._pieces = iter(pieces)
        self._line, self._counted = 1, 0  # the line at text[_counted]
        self._column = 0  # characters before text[0] in its line
        self._ended = False

    @property
    def line(self) -> int:
        """The line of the cursor."""
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def more(self) -> bool:
        """Fetch at least as much as there is behind the cursor; False at the end of the file."""
        if self._ended:
            return False
        line = self.line  # now, while what lies before the cursor is here
        last = self.text.rfind("\n", 0, self.at)
        self._column = self.at - last - 1 if last >= 0 else self._column + self.at
        if len(self.text) - self.at > MAX_ROW:
            raise UserError(f"{self.name}:{line}: what begins here is too long for a row "
                            f"({MAX_ROW >> 20} million characters)", REPAIR)
        parts, wanted = [self.text[self.at:]], len(self.text) - self.at
        self.at = self._counted = 0
        for piece in self._pieces:
            parts.append(piece)
            wanted -= len(piece)
            if wanted < 0:
                break
        else:
            self._ended = True
        self.text = "".join(parts)
        return len(parts) > 1

    def skip_blank(self) -> bool:
        """Move to the next character that is no white space of any kind; False if there is none."""
        while True:
            rest = len(self.text) - self.at
            self.at += rest - len(self.text[self.at:].lstrip())
            if self.at < len(self.text):
                return True
            if not self.more():
                return False

    def peek(self) -> str:
        """The next character that JSON does not take for white space; the cursor moves there. Empty at the end."""
        while True:
            self.at = strict_json.skip_space(self.text, self.at)
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def find(self, what: str) -> bool:
        """Whether the text from the cursor on contains ``what``; the cursor moves."""
        while what not in self.text[self.at:]:
            self.at = max(self.at, len(self.text) - len(what) + 1)
            if not self.more():
                return False
        return True

    def ahead(self, limit: int) -> str | None:
        """The rest of the cursor's line; None if it is longer than ``limit``. The cursor stays."""
        while (end := self.text.find("\n", self.at)) < 0 and len(self.text) - self.at <= limit and self.more():
            pass
        line = self.text[self.at:end if end >= 0 else len(self.text)]
        return line if len(line) <= limit else None

    def value(self) -> str:
        """The text of the JSON value at the cursor, which moves behind it.

        Raises:
            UserError: there is none, or it is broken.
        """
        while True:
            try:
                end = strict_json.end_of(self.text, self.at)
            except json.JSONDecodeError as e:
                # An error counts only where what comes next cannot mend it.
                inside = e.pos < len(self.text) - _LOOKAHEAD and not e.msg.startswith("Unterminated string")
                if inside or self._ended:
                    self.broken(strict_json.problem(e), e.pos)
            except ValueError as e:
                raise UserError(f"{self.name}:{self.line}: not valid JSON: {e}", REPAIR) from e
            else:
                # A number at the very end may go on in the next piece.
                if end < len(self.text) - 2 or self._ended:
                    text, self.at = self.text[self.at:end], end
                    return text
            self.more()

    def one_list(self) -> str:
        """What to do about more than one value, of which the second or the comma before it is at the cursor."""
        if self.peek() == ",":
            return _ONE_LIST + of_posix("sed '1s/^/[/; $s/,*[[:space:]]*$/]/' FILE.json | jq -c '.[] | arrays[], "
                                        "objects' > rows.jsonl")
        return _ONE_LIST + of_posix("jq -c 'arrays[], objects' FILE.json > rows.jsonl")

    def skip(self) -> None:
        """Move behind the JSON value at the cursor; an array may be longer than memory."""
        if self.peek() == "[":
            for _ in self.elements():
                pass
        else:
            self.value()

    def broken(self, problem: str, at: int | None = None, hint: str = REPAIR) -> NoReturn:
        """Raise the error for the position ``at`` in the window, by default the cursor's."""
        at = self.at if at is None else at
        last = self.text.rfind("\n", 0, at)
        column = at - last if last >= 0 else self._column + at + 1
        line = self.line + self.text.count("\n", self.at, at)
        raise UserError(f"{self.name}:{line}: not valid JSON: {problem} at column {column}", hint)

    def elements(self) -> Iterator[tuple[int, str]]:
        """Line and text of each element of the array whose opening bracket is at the cursor, which moves behind it.

        Raises:
            UserError: the array is broken.
        """
        self.at += 1
        while self.peek() != "]":
            yield self.line, self.value()
            if self.peek() == ",":
                self.at += 1
            elif self.peek() != "]":
                raise UserError(f"{self.name}:{self.line}: not valid JSON: expected ',' or ']'", REPAIR)
        self.at += 1

    def members(self) -> Iterator[str]:
        """The keys of the object whose opening brace is at the cursor. After each, the cursor is at its value, and
        whoever iterates moves it behind that.

        Raises:
            UserError: the object is broken.
        """
        self.at += 1
        if self.peek() != "}":
            while True:
                if (begins := self.peek()) != '"':
                    single = strict_json.SINGLE if begins == "'" else ""
                    self.broken(f"Expecting property name enclosed in double quotes{single}")
                key = json.loads(self.value())
                if self.peek() != ":":
                    self.broken("Expecting ':' delimiter")
                self.at += 1
                self.peek()
                yield key
                if self.peek() == "}":
                    break
                if self.peek() != ",":
                    self.broken("Expecting ',' delimiter")
                self.at += 1
        self.at += 1
