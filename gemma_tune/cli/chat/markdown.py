"""An answer as it comes, on a terminal: rendered as Markdown, or wrapped at words."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from typing import Any

from markdown_it import MarkdownIt
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.markdown import Heading, Markdown
from rich.segment import Segment, Segments
from rich.text import Text

from gemma_tune.base.words import without_commands
from gemma_tune.cli import screen

_EVERY = 0.06  # seconds between two drawings of what is not finished
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
# What would leave out a part of the answer: HTML, where links lead and what is behind a backslash stay as they are.
_LOSING = ("html_block", "html_inline", "reference", "escape", "image")


class _Heading(Heading):
    """Where the text begins, and not in the middle of the screen."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        self.text.justify = "left"
        yield self.text


class Answer(Markdown):
    """Markdown of a model: its lines stay lines, and nothing of it is left out."""

    elements = Markdown.elements | {"heading_open": _Heading}
    _parser = MarkdownIt().enable("strikethrough").enable("table").disable(list(_LOSING))

    def __init__(self, text: str):
        super().__init__("", code_theme="ansi_dark", hyperlinks=False)
        self.markup, self.parsed = text, self._parser.parse(text)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"


class Tail:
    """The last lines of something, without what fills them up with space.

    Args:
        room: so many of them: what is above the screen cannot be drawn again. None for all.
    """

    def __init__(self, shown: Any, room: int | None = None):
        self._shown, self._room = shown, room

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        lines = console.render_lines(self._shown, options.update(height=None), pad=False)
        for line in lines[-self._room:] if self._room else lines:
            yield Segments(_trimmed(line))
            yield Segment.line()


def _trimmed(line: list[Segment]) -> list[Segment]:
    """A line without white space at its end, unless that has a background."""
    kept = list(line)
    while kept and not (kept[-1].style and kept[-1].style.bgcolor):
        text = kept[-1].text.rstrip(" ")
        last = kept.pop()
        if text:
            kept.append(Segment(text, last.style))
            break
    return kept


class Clock:
    """Says when it is time to draw again."""

    def __init__(self) -> None:
        self._drawn = 0.0

    def due(self) -> bool:
        """Whether the last drawing is long enough ago; if so, the next one is now."""
        now = time.monotonic()
        if now - self._drawn < _EVERY:
            return False
        self._drawn = now
        return True


def out() -> Console:
    """Standard output as a console."""
    return Console(file=sys.stdout, highlight=False, soft_wrap=False)


def drawn_by_hand(console: Console) -> Live:
    """A place on the terminal that is drawn when it is told to, and goes away at the end."""
    return Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False,
                vertical_overflow="visible")


class Rendered:
    """Markdown as it comes: finished blocks are printed once, the one in the making is drawn again and again."""

    def __init__(self) -> None:
        self._out = out()
        self._pending = ""
        self._live = drawn_by_hand(self._out)
        self._clock = Clock()
        self._first = True

    def __enter__(self) -> Rendered:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.update("", refresh=False)
        self._live.stop()
        self._print(self._pending)

    def piece(self, text: str) -> None:
        """A part of the answer.

        Raises:
            BrokenPipeError, screen.OutputLost: it cannot be written.
        """
        self._pending += without_commands(text)
        if end := finished(self._pending):
            done, self._pending = self._pending[:end], self._pending[end:]
            self._live.update(self._shown(), refresh=False)  # what is drawn again below the block that is printed
            self._print(done)
        if self._clock.due() or end:
            with screen.losing_output():
                self._live.update(self._shown(), refresh=True)

    def _shown(self) -> Tail:
        return Tail(Answer(self._pending), max(1, self._out.height - 2))

    def _print(self, block: str) -> None:
        if not block.strip():
            return
        with screen.losing_output():
            if not self._first:
                self._out.print()
            self._out.print(Tail(Answer(block.strip("\n"))), end="")
        self._first = False


def finished(text: str) -> int:
    """Length of the part of a text whose blocks nothing that follows can change; 0 if there is none.

    That is up to the last blank line before a line that begins at the left edge, outside of a code block.
    """
    place = end = 0
    fence, blank = "", False
    for line in text.splitlines(keepends=True):
        if not line.endswith("\n"):  # it may go on
            if blank and not fence and line[0] not in " \t":
                end = place
            break
        mark = _FENCE.match(line)
        if not line.strip():
            blank = True
        else:
            if blank and not fence and line[0] not in " \t":
                end = place
            blank = False
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1][0] == fence[0] and len(mark[1]) >= len(fence) and not line.strip().strip(fence[0]):
            fence = ""
        place += len(line)
    return end


class Wrapped:
    """The answer as it is, without words that the edge of the terminal cuts: a word is written when it is whole."""

    def __init__(self, width: int | None = None):
        self._width = width or screen.err.width
        self._column, self._word, self._space = 0, "", ""

    def __enter__(self) -> Wrapped:
        return self

    def __exit__(self, *_: object) -> None:
        self._give()
        screen.result("")

    def piece(self, text: str) -> None:
        """A part of the answer."""
        for part in re.split(r"(\s+)", text):
            if not part:
                continue
            if not part.isspace():
                self._take(part)
                continue
            self._give()
            lines = part.split("\n")
            if len(lines) > 1:
                screen.answer(self._space + "\n" * (len(lines) - 1))
                self._column, self._space = 0, lines[-1]
            else:
                self._space += part

    def _take(self, text: str) -> None:
        """Letters of a word; one with wide characters (Chinese, Japanese) may be broken anywhere, and so is."""
        for letter in text:
            self._word += letter
            if cell_len(letter) > 1 or cell_len(self._word) >= self._width - 1:
                self._give()

    def _give(self) -> None:
        if not self._word:
            return
        size = cell_len(self._space.expandtabs(8)) + cell_len(self._word)
        if self._column and self._column + size >= self._width:
            screen.answer("\n" + self._word)
            self._column = cell_len(self._word)
        else:
            screen.answer(self._space + self._word)
            self._column += size
        self._space = self._word = ""


class Plainly:
    """The answer as it is: for files and other programs."""

    def __enter__(self) -> Plainly:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is None:
            screen.result("")

    def piece(self, text: str) -> None:
        """A part of the answer."""
        screen.answer(text)


def writer(markdown: bool) -> Rendered | Wrapped | Plainly:
    """How an answer is written to standard output."""
    if not sys.stdout.isatty():
        return Plainly()
    return Rendered() if markdown and screen.is_live() else Wrapped()


def plain(text: str) -> Text:
    """A text as it is, without what a terminal would obey."""
    return Text(without_commands(text))
