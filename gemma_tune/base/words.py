"""Words and sizes as people write and read them: no heavy import."""

from __future__ import annotations

import codecs
import difflib
import re
import reprlib
import sys
from collections.abc import Iterable
from typing import Any

from gemma_tune.base.errors import UserError

_UNSAFE = r"[^A-Za-z0-9._-]+"  # what a name in paths must not contain
_ENDING = r"\.gguf$|(?<=^sha256-[0-9a-f]{12})[0-9a-f]{52}$"  # Ollama calls its GGUF files by their whole hash

_LONGEST_NAME = 180  # the longest names of files are that and some sixty characters, and 255 are possible


def model_name(model_id: str) -> str:
    """The name that paths follow: the last part of a hub id, a directory or a .gguf file.

    >>> model_name("google/gemma-3-270m-it")
    'gemma-3-270m-it'
    """
    last = re.split(r"[/\\]", model_id.rstrip("/\\"))[-1]
    last = re.sub(_ENDING, "", last, flags=re.IGNORECASE)
    name = re.sub(_UNSAFE, "-", last).strip("-.")
    if not name:
        raise UserError(f"{model_id!r} has no name to call the run after: it needs letters or digits of ASCII",
                        "rename it, or name a model such as google/gemma-3-270m-it with --model")
    if len(name) > _LONGEST_NAME:
        raise UserError(f"{name[:20]}… is too long a name to call files after: it has {len(name)} characters",
                        f"give it one of at most {_LONGEST_NAME}; a link of such a name will do")
    return name


def last_name(data: str) -> str:
    """What data are called where it is no matter in which directory they lie: of a path its last part.

    >>> last_name("../chats/"), last_name("hf:org/name:train")
    ('chats', 'hf:org/name:train')
    """
    return data if data.startswith("hf:") else re.split(r"[/\\]", data.rstrip("/\\"))[-1] or data


# Control characters and marks that turn the direction of writing: they would change the terminal, not be read on it.
_CONTROL = "\x00-\x08\x0b-\x1f\x7f-\x9f"
_UNSEEN = re.compile(f"[{_CONTROL}\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_MOVING = re.compile(f"[{_CONTROL}]")


def visible(text: str) -> str:
    """A name, or anything else that others wrote, with nothing in it but line ends and tabs that moves the cursor.

    >>> visible("red \x1b[31m")
    'red \\\\x1b[31m'
    """
    return _UNSEEN.sub(_escaped, text)


def json_visible(text: str) -> str:
    """JSON in which such characters are written as its own escapes: the same content, and nothing moves the cursor."""
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def without_commands(text: str) -> str:
    """The same for prose, in which marks that turn the direction of writing have their place."""
    return _MOVING.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]


def is_text(value: str) -> bool:
    """Whether a text holds no half characters, as which Python keeps bytes of the system that are no text."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_text(value: str, where: str, encoding: str | None = None) -> str:
    """What somebody typed or piped, as text: bytes that Python kept because its locale has no such characters are read
    as UTF-8.

    Args:
        where: what is named in the error.
        encoding: from which Python made ``value``; by default that of arguments and names of files.

    Raises:
        UserError: they are not UTF-8 either.
    """
    if is_text(value):
        return value
    raw = value.encode(encoding or sys.getfilesystemencoding(), "surrogateescape")
    try:
        return raw.decode()
    except UnicodeDecodeError as e:
        raise UserError(f"{where}: not UTF-8 text (byte {raw[e.start]:#04x}) at offset {e.start}",
                        "use a terminal in UTF-8; convert text with `iconv -f latin1 -t utf-8`, and rename files"
                        ) from e


def nearest(word: str, known: Iterable[str], most: int = 1, least: float = 0.6) -> list[str]:
    """The known words that one may have meant, the nearest first; ``least`` is how alike they are, up to 1. Else those
    that begin with it."""
    known = list(known)
    begun = [other for other in known if len(word) > 1 and other.startswith(word)]
    return difflib.get_close_matches(word, known, most, least) or begun[:most]


_FULL_WIDTH = dict(zip("，：＝％；－\u3000", ",:=%;- "))  # signs that Chinese input methods type


def full_width(text: str) -> str:
    """The end of a message about a text with signs that look like those which were meant.

    >>> full_width("user=问题，assistant=回答"), full_width("a,b")
    ('; `，` is not `,`', '')
    """
    return "".join(f"; `{sign}` is not `{meant}`" for sign, meant in _FULL_WIDTH.items() if sign in text)


def near(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: what it may have been meant to be."""
    return "".join(f"; did you mean `{match}`?" for match in nearest(word, known))


def size_in_bytes(text: str) -> int | None:
    """A size as people write it, such as 5GB or 500 MiB; None if it is none.

    >>> size_in_bytes("1.5GB"), size_in_bytes("2KiB")
    (1500000000, 2048)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", text.strip(), re.IGNORECASE)
    if not found:
        return None
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " ")) or None


def shown(value: Any) -> str:
    """A value as an error quotes it: on one line and not without end."""
    return reprlib.repr(value)


def opening(text: str, most: int = 80) -> str:
    """The first characters of a text, on one line.

    >>> opening("  What is\\n\\na bond?", 7)
    'What is'
    """
    return " ".join(text[: 2 * most].split())[:most]


def shortened(text: str, most: int) -> str:
    """A text of so many characters at most: of a longer one the beginning and the end, which say where it is and what
    is wrong.

    >>> shortened("row 3 says abcdefgh, which is no role", 24)
    'row 3 says a… is no role'
    """
    return text if len(text) <= most else f"{text[:most // 2]}…{text[len(text) + 1 - (most + 1) // 2:]}"


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; its name where it says nothing."""
    said = str(error).strip().splitlines()
    return said[0] if said else type(error).__name__


def size_text(size: float) -> str:
    """A number of bytes as people read it.

    >>> size_text(543_210_000), size_text(1_234_000_000)
    ('543 MB', '1.23 GB')
    """
    return f"{size / 1e6:,.0f} MB" if size < 1e9 else gigabytes(size)


def small_size(size: int) -> str:
    """As :func:`size_text`, with kB for what is less than a megabyte."""
    return f"{max(1, round(size / 1000))} kB" if 0 < size < 1_000_000 else "0" if not size else size_text(size)


def gigabytes(size: float) -> str:
    """The same for sizes that are to be compared with others in their sentence, and so stand in the same unit."""
    return f"{size / 1e9:,.2f} GB"


def span(seconds: float) -> str:
    """A time as people say it.

    >>> span(42), span(600), span(9000)
    ('42 s', '10 min', '2.5 h')
    """
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number with its noun.

    >>> counted(1, "row"), counted(2000, "row"), counted(2, "batch", "batches")
    ('1 row', '2,000 rows', '2 batches')
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def is_text_encoding(name: str) -> bool:
    """Whether Python knows an encoding of text by this name, which it can read piece by piece."""
    try:
        codecs.getincrementaldecoder(name)
        "a".encode(name)
    except (LookupError, ValueError):
        return False
    return name.isascii()
