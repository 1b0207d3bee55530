"""What a row says of a picture, as one of two references: ``{"path": "img/a.png"}``, as the row has it (relative to the
data file, or absolute; with slashes for the backslashes of Windows), or ``{"base64": "…"}``, the bytes of the file.

A user's turn has ``pictures``, in order: a reference each, with ``at``, the character of ``content`` before which the
picture stands, from 0 to its length.

Here alone is known what references look like: OpenAI's, Anthropic's, Gemini's, Bedrock's and Qwen's, those of
``datasets``' Image feature, and our own in prepared rows. Whether there is such a file, and whether it is a picture, is
not looked at.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple
from urllib.parse import unquote

from gemma_tune.base import shell, strict_json
from gemma_tune.data.conversations.problems import Problem, damaged, kind, python_list, quoted

Picture = dict[str, Any]

COLUMNS = ("images", "image")  # of a row, and keys of a turn
_OTHERS = ("video", "videos", "audio", "audios")
MEDIA = frozenset((*COLUMNS, *_OTHERS))
OWN = "pictures"  # the key of turns as they are prepared
TYPES = ("image", "image_url", "input_image")  # of parts
_METADATA = "metadata."  # how the names of an ImageFolder's own files begin
_FILE_NAMES = {"file_name": "image", "image_file_name": "image", "images_file_names": "images"}  # columns in them

_HELD = ("bytes", "base64", "data")  # keys of what a file holds
# Of these the first one that has something counts.
_KEYS = (*_HELD, "image_url", "url", "image", "path", "file", "source", "src", "fileUri", "file_uri")
_TYPE = ("media_type", "mime_type", "mimeType")
_UNSAID = ("", "application/octet-stream")  # of files whose name said nothing
# Beside these a part of a picture says nothing: it is but the place of one that stands in a column.
_OF_PLACES = ("type", "index", "detail", "cache_control", "min_pixels", "max_pixels", "resized_height", "resized_width")
_LEVELS = 4  # objects inside each other, as {"image_url": {"url": "…"}} has two
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BASE64 = re.compile("[A-Za-z0-9+/]+=*")  # without white space
# How base64 of PNG, JPEG, GIF, WebP, and TIFF begins.
_BEGINNINGS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "SUkqA", "TU0AK")
_LEAST, _SURELY = 64, 1000  # signs of base64: with such a beginning, and without one
_LONGEST_PATH = 4096
_NO_PICTURES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".mp3", ".wav", ".flac", ".ogg", ".m4a", ".pdf")
_SHAPE = 'write the path of its file, or {"base64": "…"}'
_CODE = "picture"


class Column(NamedTuple):
    """The pictures that stand in a column, or under a key, with the words for the place."""

    where: str
    pictures: list[Picture]


def pictures_in(turns: Iterable[Mapping[str, Any]]) -> list[Picture]:
    """All pictures of normalised turns, in order: the objects themselves, each with ``at``."""
    return [picture for turn in turns for picture in turn.get(OWN, ())]


def reference(where: str, value: Any) -> Picture | Problem:
    """A picture as any format has it, as ``{"path": …}`` or ``{"base64": …}``; else what is wrong with it.

    Args:
        where: the words for its place.
    """
    name = ""
    for _ in range(_LEVELS):
        if not isinstance(value, dict):
            break
        sort = next((value[key] for key in _TYPE if isinstance(value.get(key), str)), "image/")
        if not sort.startswith("image/") and sort not in _UNSAID:
            return _no_picture(where, quoted(sort))
        found = next((key for key in _KEYS if holds(value.get(key))), None)
        if found is None:
            return _says_nothing(where, value)
        name, value = found, value[found]
    if not isinstance(value, str):
        return Problem(_CODE, f"{where} is {kind(value)}, not a picture", _SHAPE)
    if not value.strip():
        return Problem(_CODE, f"{where} is empty", f"{_SHAPE}; or leave the row out")
    if value.startswith("data:"):
        return _in_address(where, value)
    return _of_bytes(where, value) if name in _HELD else _of_text(where, value)


def holds(value: Any) -> bool:
    """Whether there is anything in a value; an object of nothing but empty values, as tables have them, is empty."""
    if isinstance(value, dict):
        return any(map(holds, value.values()))
    return value is not None and value is not False and value != "" and value != [] and value != 0


def _no_picture(where: str, what: str) -> Problem:
    return Problem(_CODE, f"{where} is {what}, and beside text pictures alone can be learned", "leave the row out")


def _says_nothing(where: str, value: Mapping[str, Any]) -> Problem:
    """What is wrong with an object that has no reference."""
    if isinstance(binary := value.get("not text"), str):  # so tables are read
        return Problem(_CODE, f"{where} is {binary}, and none of a picture's", _SHAPE)
    names = ", ".join(quoted(key) for key in [*value][:4]) or "nothing in it"
    return Problem(_CODE, f"{where} names no file and holds none: it has {names}", _SHAPE)


def _in_address(where: str, address: str) -> Picture | Problem:
    """What an address holds itself: ``data:image/png;base64,…``."""
    head, comma, data = address.partition(",")
    sort, *said = head.removeprefix("data:").split(";")
    if not comma or "base64" not in said:
        return Problem(_CODE, f"{where} is an address of data that is not base64: {quoted(address)}", _SHAPE)
    if not sort.startswith("image/") and sort not in _UNSAID:
        return _no_picture(where, quoted(sort))
    return _of_bytes(where, data)


def _of_bytes(where: str, data: str) -> Picture | Problem:
    found = "".join(data.split())
    if not _BASE64.fullmatch(found):
        return Problem(_CODE, f"{where} is text that is not base64: {quoted(data)}", _SHAPE)
    return {"base64": found}


def _of_text(where: str, text: str) -> Picture | Problem:
    """A path, an address of a file, or base64 that nothing says to be some."""
    if address := _ADDRESS.match(text):
        if address[1].lower() != "file":
            return Problem(_CODE, f"{where} is at an address, and nothing is downloaded: {quoted(text)}",
                           "download the picture, and write the path of its file")
        text = _path(text[address.end():])
    elif len(text) >= _LEAST and (text.startswith(_BEGINNINGS) or len(text) >= _SURELY) and _BASE64.fullmatch(
            "".join(text.split())):
        return _of_bytes(where, text)
    if len(text) > _LONGEST_PATH or "\0" in text or damaged(text):
        return Problem(_CODE, f"{where} is a text that is no path: {quoted(text)}", _SHAPE)
    if text.lower().endswith(_NO_PICTURES):
        return _no_picture(where, quoted(text))
    return {"path": text.replace("\\", "/")}


def _path(address: str) -> str:
    """The path behind ``file://``; a first part that is no computer's name is a directory, as many write it."""
    path = unquote(address, errors="replace").removeprefix("localhost/")
    if address.startswith("localhost/"):
        path = f"/{path}"
    return path[1:] if re.match("/[A-Za-z]:", path) else path


def seems_one(value: Any) -> bool:
    """Whether a value, under any name, is a picture for certain, or a list of such."""
    if isinstance(value, list):
        return bool(value) and all(map(seems_one, value))
    if isinstance(value, dict):
        return value.keys() <= {"bytes", "base64", "path"} and holds(value) and isinstance(reference("", value), dict)
    return isinstance(value, str) and (value.startswith("data:image/") or len(value) < _LONGEST_PATH and
                                       value.lower().endswith((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")))


def is_held(value: Any) -> bool:
    """Whether a value, under any name, holds a picture itself, or is a list of such; a name of a file may be but where
    a text comes from."""
    if isinstance(value, list):
        return bool(value) and all(map(is_held, value))
    return (isinstance(value, dict) and any(holds(value.get(key)) for key in _HELD)
            or isinstance(value, str) and value.startswith("data:image/")) and seems_one(value)


# --- columns of rows, and keys of turns

def beside(where: str, holder: Mapping[str, Any], problems: list[Problem], named: str | None = None) -> Column | None:
    """The pictures that stand beside texts; None where there are none.

    Args:
        where: what the row or the turn is called, behind a column's name: nothing, or `` of turn 3``.
        holder: the row, or the turn.
        named: the column that has them, where that was named; else the usual ones.
    """
    if others := [name for name in _OTHERS if _filled(holder.get(name)) and name != named]:
        problems.append(Problem("not_text", f"{_owner(where)} has `{others[0]}`; only text and pictures can be learned",
                                "leave the row out"))
    names = [name for name in ((named,) if named else COLUMNS) if _filled(holder.get(name))]
    found = [Column(f"`{name}`{where}", _listed(f"`{name}`{where}", holder[name], problems)) for name in names]
    if len(found) == 2 and found[0].pictures != found[1].pictures:
        problems.append(Problem(_CODE, f"{_owner(where)} has other pictures in `{names[0]}` than in `{names[1]}`",
                                "keep one of them"))
    return found[0] if found else None


def _filled(value: Any) -> bool:
    """Whether a cell has something in it; tables have empty lists as text."""
    return holds(value) and value != "[]"


def _owner(where: str) -> str:
    return where.removeprefix(" of ") or "the row"


def _listed(where: str, value: Any, problems: list[Problem]) -> list[Picture]:
    """The pictures of a column: one, or a list, also as the JSON text in which tables have it."""
    if problem := python_list(where, value):
        problems.append(problem)
        return []
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        with contextlib.suppress(ValueError):  # a path may begin so
            value = strict_json.loads(value)
    found = [(where, value)]
    if isinstance(value, list):
        found = [(f"picture {number} in {where}", one) for number, one in enumerate(value, start=1)]
    read = [reference(name, one) for name, one in found]
    problems += [one for one in read if isinstance(one, Problem)]
    return [one for one in read if isinstance(one, dict)]


def columns_of_folder(file: str, row: Any) -> Mapping[str, str]:
    """The columns of an ImageFolder's metadata that name files, as ``datasets`` reads them, by the usual names; nothing
    of any other file, where a name may say no more than where a text comes from."""
    if not isinstance(row, dict) or _FILE_NAMES.keys().isdisjoint(row) or not (
            PurePath(file).name.lower().startswith(_METADATA)):
        return {}
    return {name: column for column, name in _FILE_NAMES.items() if column in row and name not in row}


def unasked(column: str, answer: str | None) -> Problem:
    """The problem of a picture about which nothing is asked.

    Args:
        answer: the column of what seems to be said about it.
    """
    said = f"`{answer}` stands beside a picture (`{column}`)" if answer else f"there is a picture (`{column}`)"
    named = f"user=question,assistant={answer or '…'},images={column}"
    text = ", or --format text to learn the text alone" if answer == "text" else ""
    return Problem("unknown_format", f"{said}, and no column asks a question about it",
                   'add a column with the question, such as "question": "What does the picture show?", and use '
                   f"--columns {shell.quote(named) if answer else named}{text}")


# --- parts of what is said

def is_part(part: Any) -> bool:
    """Whether a part of a content is a picture, or the place of one; Qwen's parts have no type."""
    if not isinstance(part, dict):
        return False
    if part.get("type") is None:
        return holds(part.get("image")) or holds(part.get("image_url"))
    return part["type"] in TYPES


def has_both(part: Any) -> bool:
    """Whether a part has a text and a picture, of which nobody can tell which stands first."""
    return isinstance(part, dict) and holds(part.get("text")) and (holds(part.get("image"))
                                                                   or holds(part.get("image_url")))


def is_place(part: Any) -> bool:
    """Whether a part says that a picture stands here, and another place has it."""
    return is_part(part) and not any(holds(value) for key, value in part.items() if key not in _OF_PLACES)


def again(number: int, value: Any, content: str, problems: list[Problem]) -> list[Picture]:
    """The pictures of a turn that was prepared, each with ``at``; its files are relative to what has the row."""
    found: list[Picture] = []
    for n, one in enumerate(value if isinstance(value, list) else [value], start=1):
        where = f"picture {n} of turn {number}"
        at = one.get("at") if isinstance(one, dict) else None
        first = found[-1]["at"] if found else 0
        if type(at) is not int or not first <= at <= len(content):
            problems.append(Problem(_CODE, f"{where} has no place in what is said: its `at` is {quoted(at)}",
                                    f"write the character before which it stands, from {first} to {len(content)}"))
        elif isinstance(read := reference(where, one), Problem):
            problems.append(read)
        else:
            found.append({"at": at, **read})
    return found
