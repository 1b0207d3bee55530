"""Read rows from files: JSONL line by line, JSON arrays element by element, each with its file and line."""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tune.errors import UserError

_REPAIR = "repair the file there; nothing was written"
_space = re.compile(r"[ \t\r\n]*")
# What is nested deeper cannot be relied on to be written again: Python's encoder stops at its recursion limit.
MAX_DEPTH = 100


@dataclass(frozen=True)
class Row:
    """One row as it stands in a file. ``error`` says why it could not be read; ``value`` is then its raw text."""

    file: str
    line: int
    value: Any
    error: str | None = None


def read_rows(path: Path) -> Iterator[Row]:
    """All rows of one file.

    A broken line of a JSONL file is a row with an error; a broken JSON document has no rows to save.

    Raises:
        UserError: missing, empty, binary or unreadable file, or a JSON document that is not a list of rows.
    """
    text = _read_text(path)
    if not text.strip():
        raise UserError(f"{path} is empty", "put one conversation on each line, such as "
                                            '{"messages": [{"role": "user", "content": "…"}, …]}')
    yield from _document(path, text) if _is_document(text) else _lines(path, text)


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError as e:
        raise UserError(f"there is no file {path}",
                        "check the path; `gemma-tune prepare --help` shows an example") from e
    except IsADirectoryError as e:
        raise UserError(f"{path} is a directory", "name the files in it") from e
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}", "check its permissions") from e
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(_not_utf8(path, raw, e), "give JSONL or JSON saved as UTF-8") from e
    if "\0" in text:
        raise UserError(f"{path} is a binary file (byte {raw.index(0)})", "give JSONL or JSON saved as UTF-8")
    return text


def _not_utf8(path: Path, raw: bytes, e: UnicodeDecodeError) -> str:
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return f"{path} is UTF-16 text, not UTF-8"
    if b"\0" in raw[:4096]:
        return f"{path} is a binary file (byte {raw.index(0)})"
    # The decoder counts from behind a byte order mark.
    return f"{path}:{e.object.count(10, 0, e.start) + 1}: not UTF-8 text (byte {e.object[e.start]:#04x})"


def _is_document(text: str) -> bool:
    """Whether the file is one JSON document: an array, or an object over several lines."""
    start = text.lstrip()
    if start.startswith("["):
        return True
    first = start.split("\n", 1)[0]
    if not start.startswith("{") or _is_json(first):
        return False
    # A broken first row has others below it; the lines of one object do not begin like rows.
    return first.strip() == "{" or _is_json(start) or not re.search(r"\n\{", start)


def _is_json(text: str) -> bool:
    try:
        _loads(text)
    except json.JSONDecodeError:
        return False
    except ValueError:  # well formed, with a value that cannot be used
        return True
    return True


def _lines(path: Path, text: str) -> Iterator[Row]:
    # Only line feeds end a JSONL line: str.splitlines would also split at U+2028, which JSON strings may contain.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            # Files that were put one behind another keep their byte order marks.
            yield Row(path.name, number, _loads(line.removeprefix("\ufeff")))
        except ValueError as e:
            yield Row(path.name, number, line.rstrip("\r"), f"not valid JSON: {_where(e)}")


def _where(e: ValueError) -> str:
    # Some of the decoder's messages end in "at", to be followed by a place.
    return f"{e.msg.removesuffix(' at')} at column {e.colno}" if isinstance(e, json.JSONDecodeError) else str(e)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"the number {_short(digits)} is too large")
    return number


def _integer(digits: str) -> int:
    try:
        return int(digits)
    except ValueError as e:  # Python refuses thousands of digits
        raise ValueError(f"the number {_short(digits)} is too large") from e


def _short(text: str) -> str:
    return text if len(text) <= 24 else f"{text[:24]}…"


_decoder = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite, parse_int=_integer)
_finder = json.JSONDecoder(parse_constant=str, parse_float=str, parse_int=str)  # takes every number, to find an end


def _loads(text: str) -> Any:
    value, end = _decode(text, _skip_space(text, 0))
    if (end := _skip_space(text, end)) != len(text):
        raise json.JSONDecodeError("Extra data", text, end)
    return value


def _decode(text: str, at: int) -> tuple[Any, int]:
    """The JSON value at ``at`` and where it ends.

    Raises:
        ValueError: not JSON (``JSONDecodeError``), or a value that cannot be kept: NaN, too large, too deep.
    """
    try:
        value, end = _decoder.raw_decode(text, at)
    except RecursionError as e:
        raise ValueError("nested too deeply") from e
    brackets = text.count("[", at, end) + text.count("{", at, end)
    if brackets > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise ValueError("nested too deeply")
    return value, end


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [v for v in level if isinstance(v, (dict, list))]:
        depth += 1
        level = [inner for v in level for inner in (v.values() if isinstance(v, dict) else v)]
    return depth


def _document(path: Path, text: str) -> Iterator[Row]:
    """Elements of a JSON array, or one object, with the line that each begins on."""
    at = len(text) - len(text.lstrip())
    if text[at] == "{":
        yield from _object(path, text, at)
        return
    at, line, counted = at + 1, 1, 0
    while True:
        at = _skip_space(text, at)
        if text[at:at + 1] == "]":
            break
        line += text.count("\n", counted, at)
        counted = at
        row, end = _element(path, text, at, line)
        yield row
        at = _skip_space(text, end)
        if text[at:at + 1] == ",":
            at += 1
        elif text[at:at + 1] != "]":
            raise UserError(f"{path}:{_line(text, at)}: not valid JSON: expected ',' or ']'", _REPAIR)
    if not counted:
        raise UserError(f"{path} is an empty list", "put at least one conversation into it")
    if text[at + 1:].strip():
        raise UserError(f"{path}:{_line(text, _skip_space(text, at + 1))}: there is more after the end of the list",
                        "put all rows into one list, or one row on each line (JSONL)")


def _element(path: Path, text: str, at: int, line: int) -> tuple[Row, int]:
    try:
        value, end = _decode(text, at)
        return Row(path.name, line, value), end
    except ValueError as e:
        problem = e
    # The list can still be read if only a value in this element cannot be kept.
    try:
        end = _finder.raw_decode(text, at)[1]
    except ValueError as e:
        raise _broken(path, e, line) from e
    except RecursionError as e:
        raise _broken(path, problem, line) from e
    return Row(path.name, line, text[at:end], f"not valid JSON: {problem}"), end


def _object(path: Path, text: str, at: int) -> Iterator[Row]:
    line = _line(text, at)
    try:
        value = _loads(text)
    except ValueError as e:
        raise _broken(path, e, line) from e
    yield Row(path.name, line, value)


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _skip_space(text: str, at: int) -> int:
    return _space.match(text, at).end()


def _broken(path: Path, e: ValueError, line: int) -> UserError:
    """``line`` is where the value begins, for errors that do not know better."""
    return UserError(f"{path}:{getattr(e, 'lineno', line)}: not valid JSON: {_where(e)}", _REPAIR)
