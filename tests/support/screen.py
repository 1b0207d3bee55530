"""What people see: a console in place of the real one, and the screen of a terminal after what was written to it."""

from __future__ import annotations

import io
import re

from gemma_tune.cli import screen as module

_CONSOLE = type(module.err)


class Screen:
    """Replaces the console for people."""

    def __init__(self, monkeypatch):
        self._monkeypatch = monkeypatch

    def __call__(self, terminal: bool = False, width: int = 80, encoding: str = "utf-8", **more) -> io.TextIOWrapper:
        file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace", newline="\n")
        environment = {"TERM": "xterm-256color", **more.pop("environment", {})}
        self._monkeypatch.setattr(module, "err", _CONSOLE(
            file=file, force_terminal=terminal, width=width, highlight=False, soft_wrap=True, _environ=environment,
            **more))
        return file


def written(file: io.TextIOWrapper) -> str:
    file.flush()
    return file.buffer.getvalue().decode(file.encoding)


def on_screen(text: str) -> list[str]:
    """The lines of a terminal after ``text``, whose cursor movements are followed."""
    lines: list[list[str]] = [[]]
    row = column = 0
    for found in re.finditer(r"\x1b\[([?\d;]*)([A-Za-z])|.|\n", text):
        number, command = found[1], found[2]
        if command == "A":
            row -= int(number or 1)
            assert row >= 0, "above the first line"
        elif command == "K":
            assert number == "2"
            lines[row] = []
        elif command:
            assert command in "mhl", found[0]
        elif found[0] == "\r":
            column = 0
        elif found[0] == "\n":
            row, column = row + 1, 0
            lines += [[] for _ in range(row + 1 - len(lines))]
        else:
            lines[row] += " " * (column + 1 - len(lines[row]))
            lines[row][column] = found[0]
            column += 1
    return ["".join(line).rstrip() for line in lines]
