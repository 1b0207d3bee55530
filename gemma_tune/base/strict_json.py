"""JSON as the standard has it, and as it can be written again: no NaN, no number out of range, no endless nesting."""

from __future__ import annotations

import json
import math
import re
from itertools import chain
from pathlib import Path
from typing import Any

# What is nested deeper cannot be relied on to be written again: Python's encoder stops at its recursion limit.
MAX_DEPTH = 100
_space = re.compile(r"[ \t\r\n]*")

# After what is said of a value behind which there is more.
COMMA, SECOND = ", a comma behind the value,", ", a second value behind the first,"
MORE = ", a comma and more behind the value,"
SINGLE = ", not in single ones as Python shows it,"  # after what is said of a name in quotes
WIDE = ", and not the sign of Chinese text there,"
COMMENT = ", a comment, which JSON does not have,"
_WIDE_SIGNS = "“”‘’＂：，｛｝［］【】"


class NoObject(ValueError):
    """JSON that is well formed, and a list or a number where an object ought to be."""


def loads(text: str) -> Any:
    """The one JSON value that a text holds.

    Raises:
        ValueError: not JSON (``JSONDecodeError``), or a value that cannot be kept: NaN, too large, too deep, a key with
            two values.
    """
    return _whole(_decoder, text)


def list_in(value: Any) -> Any:
    """The list that a text holds as JSON, as tables have lists; anything else as it is: a text may be any JSON, too."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return loads(value)
        except ValueError:
            return value
    return value


def row(text: str) -> Any:
    """As :func:`loads`; a member of the outermost object that is NaN, as data frames write what is missing, is None."""
    try:
        return loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:
        if "NaN" not in text:
            raise
        value, found = _with_nan(text)
        empty = [key for key, cell in value.items() if cell is _NAN] if isinstance(value, dict) else []
        if found != len(empty):  # inside a cell it might be a part of what is learned
            raise
        return value | dict.fromkeys(empty)


_NAN = object()


def _with_nan(text: str) -> tuple[Any, int]:
    """The value of a text with ``_NAN`` where it has NaN, and how often that is; raises what :func:`loads` does."""
    found = []

    def constant(name: str) -> Any:
        if name != "NaN":
            _no_constant(name)
        found.append(name)
        return _NAN

    decoder = json.JSONDecoder(parse_constant=constant, parse_float=_finite, parse_int=_integer,
                               object_pairs_hook=_object)
    return _whole(decoder, text), len(found)


def object_in(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; other than in rows, NaN and infinities are numbers (configurations have them).

    Raises:
        OSError: it cannot be read.
        ValueError: it is no UTF-8, not JSON (``JSONDecodeError``), no object (``NoObject``), or nested too deeply.
    """
    return whole_object(path.read_bytes())


def whole_object(data: bytes) -> dict[str, Any]:
    """The object that bytes of UTF-8 are; raises the ValueErrors of :func:`object_in`."""
    value = _whole(_lenient, data.decode("utf-8"))
    if not isinstance(value, dict):
        raise NoObject("it holds no object")
    return value


def decode(text: str, at: int) -> tuple[Any, int]:
    """The JSON value at ``at`` and where it ends; raises what :func:`loads` does."""
    return _decoded(_decoder, text, at)


def _whole(decoder: json.JSONDecoder, text: str) -> Any:
    value, end = _decoded(decoder, text, skip_space(text, 0))
    if (end := skip_space(text, end)) != len(text):
        raise json.JSONDecodeError("Extra data", text, end)
    return value


def _decoded(decoder: json.JSONDecoder, text: str, at: int) -> tuple[Any, int]:
    try:
        value, end = decoder.raw_decode(text, at)
    except RecursionError as e:
        raise ValueError("nested too deeply") from e
    brackets = text.count("[", at, end) + text.count("{", at, end)
    if brackets > MAX_DEPTH and _is_deep(value):
        raise ValueError("nested too deeply")
    return value, end


def end_of(text: str, at: int) -> int:
    """Where the JSON value at ``at`` ends, also if it cannot be kept because of a number in it.

    Raises:
        ValueError: not JSON (``JSONDecodeError``), or nested too deeply to know.
    """
    try:
        return _finder.raw_decode(text, at)[1]
    except RecursionError as e:
        raise ValueError("nested too deeply") from e


def lenient(text: str) -> Any:
    """The value of a text that :func:`end_of` took; numbers are text."""
    return _finder.decode(text)


def is_json(text: str) -> bool:
    """Whether a text is well formed, even if a value in it cannot be kept."""
    try:
        loads(text)
    except json.JSONDecodeError:
        return False
    except ValueError:
        return True
    return True


def skip_space(text: str, at: int) -> int:
    """Where JSON's white space from ``at`` on ends."""
    return _space.match(text, at).end()


def reason(e: ValueError | RecursionError) -> str:
    """What is wrong, with the column where it is known."""
    return f"{problem(e)} at column {e.colno}" if isinstance(e, json.JSONDecodeError) else str(e)


def problem(e: json.JSONDecodeError) -> str:
    """What is wrong, without the place."""
    met = e.doc[e.pos:e.pos + 1]
    more = SINGLE if met == "'" else WIDE if met and met in _WIDE_SIGNS else ""
    if e.msg == "Extra data":
        comma = COMMA if met == "," and not e.doc[e.pos + 1:].strip() else MORE
        more = {",": comma, "{": SECOND}.get(met, "")
    if e.doc.startswith(("//", "/*", "#"), e.pos):
        more = COMMENT
    return f'{e.msg.removesuffix(" at").rstrip(": ")}{more}'  # some messages end so, to be followed by a place


def _is_deep(value: Any) -> bool:
    """Whether objects and lists are nested more than ``MAX_DEPTH`` deep; a vocabulary has half a million of them."""
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        depth += 1
        inner = chain(chain.from_iterable(v.values() for v in level if type(v) is dict),
                      chain.from_iterable(v for v in level if type(v) is list))
        level = [v for v in inner if type(v) is list or type(v) is dict]
    return depth > MAX_DEPTH


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


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, of which JSON's other readers take the first or the last value where a key stands twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        for key, value in pairs:
            if value != found[key]:
                raise ValueError(f"the key {_short(repr(key))} stands twice in one object, with two values")
    return found


def _short(text: str) -> str:
    return text if len(text) <= 24 else f"{text[:24]}…"


_decoder = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite, parse_int=_integer,
                            object_pairs_hook=_object)
_lenient = json.JSONDecoder()
_finder = json.JSONDecoder(parse_constant=str, parse_float=str, parse_int=str)  # takes every number
