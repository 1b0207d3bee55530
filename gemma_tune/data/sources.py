"""Read rows from files: JSONL line by line, JSON arrays element by element, each with its file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tune.errors import UserError


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
        raise UserError(f"there is no file {path}", "check the path; `gemma-tune prepare --help` shows an example") from e
    except IsADirectoryError as e:
        raise UserError(f"{path} is a directory", "name the files in it") from e
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}", "check its permissions") from e
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        kind = "a binary file" if b"\0" in raw[:4096] else "not UTF-8 text"
        raise UserError(f"{path} is {kind} (byte {e.start})", "give JSONL or JSON saved as UTF-8") from e
    if "\0" in text:
        raise UserError(f"{path} is a binary file (byte {raw.index(0)})", "give JSONL or JSON saved as UTF-8")
    return text


def _is_document(text: str) -> bool:
    """Whether the file is one JSON document: an array, or an object over several lines."""
    start = text.lstrip()
    if start.startswith("["):
        return True
    first = start.splitlines()[0]
    if not start.startswith("{"):
        return False
    try:
        json.loads(first)
    except json.JSONDecodeError:
        return first.strip() == "{" or ('"messages"' not in first and first.rstrip().endswith(("{", "[", ",")))
    return False


def _lines(path: Path, text: str) -> Iterator[Row]:
    # Only line feeds end a JSONL line: str.splitlines would also split at U+2028, which JSON strings may contain.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield Row(path.name, number, _loads(line))
        except ValueError as e:
            yield Row(path.name, number, line.rstrip("\r"), f"not valid JSON: {_where(e)}")


def _where(e: ValueError) -> str:
    return f"{e.msg} at column {e.colno}" if isinstance(e, json.JSONDecodeError) else str(e)


def _no_constants(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_decoder = json.JSONDecoder(parse_constant=_no_constants)


def _loads(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constants)
    except RecursionError as e:
        raise ValueError("nested too deeply") from e


def _document(path: Path, text: str) -> Iterator[Row]:
    """Elements of a JSON array with the line that each begins on."""
    at = len(text) - len(text.lstrip())
    if text[at] == "{":
        try:
            value = _loads(text)
        except ValueError as e:
            raise _broken(path, text, e) from e
        yield Row(path.name, 1, value)
        return
    at, line, counted = at + 1, 1, 0
    while True:
        at = _skip_space(text, at)
        if text[at:at + 1] == "]":
            break
        try:
            value, end = _decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as e:
            raise _broken(path, text, e) from e
        line += text.count("\n", counted, at)
        counted = at
        yield Row(path.name, line, value)
        at = _skip_space(text, end)
        if text[at:at + 1] == ",":
            at += 1
        elif text[at:at + 1] != "]":
            raise UserError(f"{path}:{text.count(chr(10), 0, at) + 1}: not valid JSON: expected ',' or ']'",
                            "repair the file there; nothing was written")
    if text[at + 1:].strip():
        raise UserError(f"{path}:{text.count(chr(10), 0, at) + 1}: there is more after the end of the list",
                        "put all rows into one list, or one row on each line (JSONL)")


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _broken(path: Path, text: str, e: Exception) -> UserError:
    line = getattr(e, "lineno", 1)
    return UserError(f"{path}:{line}: not valid JSON: {getattr(e, 'msg', e)}",
                     "repair the file there; nothing was written")
