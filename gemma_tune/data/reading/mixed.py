"""Files that were put together from several encodings: which lines are UTF-8, and which are not.

To read such a file in one encoding, whichever, makes other characters of some of its lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gemma_tune.base import shell
from gemma_tune.base.words import counted

_LONGEST = 1 << 26  # bytes of a line; what has longer ones is no table and no JSONL
_SURE = 4  # characters of two bytes each that are hardly ever UTF-8 by chance
_LEAST = 0.05  # for each line that is no UTF-8: lines that are, where chance made them there are fewer
_NAMED = 10  # lines
_SAMPLE = 8192  # bytes of these
_CONVERT = ("python -c 'import sys; sys.stdout.buffer.writelines(l if l.decode(\"utf-8\", \"ignore\").encode() == l "
            "else l.decode(\"{}\", \"replace\").encode() for l in sys.stdin.buffer)' < {} > {}")


@dataclass(frozen=True)
class Mixed:
    """Numbers of the lines that are not UTF-8, in a file of which others are, and the encoding that they seem to be
    in."""

    lines: tuple[int, ...]
    encoding: str

    def hint(self, name: str, new: str | None) -> str:
        """What to do about it.

        Args:
            name: the file's.
            new: what the converted one is to be called; None where the shell cannot read the file's text.
        """
        some = ", ".join(f"{line:,}" for line in self.lines[:_NAMED])
        more = f" and {len(self.lines) - _NAMED:,} more" if len(self.lines) > _NAMED else ""
        said = (f"{counted(len(self.lines), 'line is', 'lines are')} not UTF-8 ({some}{more}), and others are, so no "
                "--encoding serves: correct them")
        if not new:
            return said
        convert = _CONVERT.format(self.encoding, shell.quote(name), shell.quote(new))
        return f"{said}, or convert them alone from {self.encoding}, as they seem to be: {shell.of_posix(convert)}"


def mixed(pieces: Iterable[bytes], east_asian: Callable[[bytes], str | None]) -> Mixed | None:
    """Which lines of a file are not UTF-8, if others are; None for a file that is in one encoding, as far as one knows.

    Args:
        pieces: its content.
        east_asian: tells the encoding of a sample, where it is one of East Asia. Of others, with one byte for a
            character, chance makes no UTF-8.
    """
    others, sample, good, sure = [], b"", 0, 0
    for number, line in enumerate(_lines(pieces), 1):
        if line.isascii():
            continue
        try:
            text = line.decode()
        except UnicodeDecodeError:
            others.append(number)
            sample += (line + b"\n")[:_SAMPLE - len(sample)]
        else:
            good += 1
            sure += sum(char > "\x7f" for char in text) >= _SURE
    if not others:
        return None
    encoding = east_asian(sample)
    if (sure if encoding else good) <= _LEAST * len(others):
        return None
    return Mixed(tuple(others), encoding.lower() if encoding else "windows-1252")


def _lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
        if len(rest) > _LONGEST:
            return
    yield rest


def converted_name(path: Path) -> Path:
    """What a converted file is called."""
    return path.with_name(f"{path.stem}-utf8{path.suffix}")
