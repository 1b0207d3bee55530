"""LLaMA-Factory's ``dataset_info.json``: what its entries say about data files, in the file's own directory.

An entry is named as ``data/dataset_info.json:NAME``; and one that names a data file beside it is found when that file
is named. What an entry asks for and cannot be had is refused: its rows are never read in another way than it says.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from gemma_tune.base import strict_json
from gemma_tune.base.errors import UserError
from gemma_tune.base.listener import Listener
from gemma_tune.base.words import near
from gemma_tune.data.reading.rows import Description

INFO = "dataset_info.json"
_NAMED = re.compile(rf"(?P<file>(?:.*[/\\])?{re.escape(INFO)})(?::(?P<entry>.+))?", re.DOTALL)
_ELSEWHERE = {"ms_hub_url": "on ModelScope", "om_hub_url": "on Modelers", "script_url": "made by a program",
              "cloud_file_name": "in a cloud's storage"}
_PLACES = ("hf_hub_url", "file_name", *_ELSEWHERE)
_OF_HUB = ("subset", "folder", "revision")
_KEYS = (*_PLACES, *_OF_HUB, "split", "formatting", "ranking", "num_samples", "columns", "tags")
_MEDIA = ("videos", "audios")
_FOR_BOTH = ("system", "tools", "chosen", "rejected", "kto_tag", "images")
_COLUMNS = {"alpaca": ("prompt", "query", "response", "history", *_FOR_BOTH), "sharegpt": ("messages", *_FOR_BOTH)}
_BY_DEFAULT = {"alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
               "sharegpt": {"messages": "conversations"}}
_TAGS = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
         "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system"}
_SHOWN = 10  # names that a message lists
_LEVELS = 4  # directories that are looked into for a file's entry: its own, and those above


class Entry(NamedTuple):
    """What an entry stands for: a dataset's name on the Hub (``hf:…``), or a path; and how its rows are read."""

    data: str
    description: Description


def split_name(name: str) -> tuple[Path, str | None] | None:
    """The file and the entry of a name such as ``data/dataset_info.json:mine``; None of any other name."""
    found = _NAMED.fullmatch(name)
    return found and (Path(os.path.expanduser(found["file"])), found["entry"])


def file_of(name: str) -> str:
    """The file that a name stands for, without the entry in it."""
    found = split_name(name)
    return f"{found[0]}" if found else name


def entry_of(path: Path, name: str | None) -> Entry | None:
    """The entry of that name; without a name the only one there is. None where the file is none of LLaMA-Factory's,
    and no entry was named.

    Raises:
        UserError: it cannot be read, has no such entry, or one that cannot be followed.
    """
    entries = _entries(path)
    if entries is None:
        if name is None:
            return None
        raise UserError(f"{path} does not describe data sets as LLaMA-Factory's {INFO} does",
                        "name the data files, and --columns where their columns have other names")
    if name is None and len(entries) == 1:
        name = next(iter(entries))
    if name not in entries:
        shown = ", ".join([*entries][:_SHOWN]) + (f" and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else "")
        raise UserError(f"{path} has no entry {name}{near(name, entries)}" if name else
                        f"{path} describes {len(entries)} data sets, and it is not said which is meant",
                        f"name one, such as {path}:{next(iter(entries))}; there are {shown}")
    return _read(path, name, entries[name])


def entries_here(names: str) -> list[str]:
    """What to type for entries that are named as LLaMA-Factory has them in ``dataset``: alone, or with commas. Those of
    a ``dataset_info.json`` in this directory, or in ``data/``, are known.
    """
    for info in (Path(INFO), Path("data", INFO)):
        with contextlib.suppress(UserError):
            entries = _entries(info) if info.is_file() else None
            if found := [f"{info}:{name}" for part in names.split(",") if (name := part.strip()) in (entries or {})]:
                return found
    return []


class Beside:
    """Finds the entries that describe files, each ``dataset_info.json`` being read once."""

    def __init__(self, listener: Listener):
        self._known: dict[Path, Mapping[str, Any] | None] = {}
        self._listener = listener

    def description(self, path: Path) -> Description | None:
        """What an entry beside a file, or beside a directory that it is in, says about it.

        Raises:
            UserError: several entries that differ, or one that cannot be followed.
        """
        found = [*self._naming(path)]
        if not found:
            return None
        info, _ = found[0]
        entries = self._known[info]
        read = [_read(info, name, entries[name], beside=path).description for info, name in found]
        if any(replace(other, name="") != replace(read[0], name="") for other in read):
            names = [name for _, name in found]
            raise UserError(f"{path} is described by {len(names)} entries of {info}: {', '.join(names)}",
                            f"name one of them: {info}:{names[0]}")
        return read[0]

    def is_described(self, path: Path) -> bool:
        """Whether an entry names a file."""
        return next(self._naming(path), None) is not None

    def _naming(self, path: Path) -> Iterator[tuple[Path, str]]:
        """The entries that name a file, or a directory that it is in: in the ``dataset_info.json`` nearest to it."""
        folder, inside = path.parent, PurePosixPath(path.name)
        for _ in range(_LEVELS):
            info = Path(os.path.normpath(folder)) / INFO
            names = {f"{place}" for place in (inside, *inside.parents)} - {"."}
            files = {name: entry.get("file_name") for name, entry in (self._at(info) or {}).items()}
            found = [name for name, file in files.items()
                     if isinstance(file, str) and Path(os.path.normpath(file)).as_posix() in names]
            if found:
                yield from ((info, name) for name in found)
                return
            folder, inside = folder / "..", PurePosixPath(Path(os.path.abspath(folder)).name) / inside

    def _at(self, info: Path) -> Mapping[str, Any] | None:
        if info not in self._known:
            try:
                self._known[info] = _entries(info) if os.path.isfile(info) else None
            except UserError as e:
                self._listener.warn(f"{e.message}; it is not looked at")
                self._known[info] = None
        return self._known[info]


def _entries(path: Path) -> Mapping[str, Any] | None:
    """The entries by name; None where the file is something else, such as what `datasets` writes under that name.

    Raises:
        UserError: it cannot be read, or is not JSON.
    """
    try:
        content = strict_json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}", "check the path") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not text in UTF-8", "save it as UTF-8") from e
    except ValueError as e:
        raise UserError(f"{path} is not JSON: {strict_json.reason(e)}", "repair it") from e
    theirs = isinstance(content, dict) and content and all(isinstance(entry, dict) for entry in content.values())
    return content if theirs and any(place in entry for entry in content.values() for place in _PLACES) else None


def _read(path: Path, name: str, entry: Mapping[str, Any], beside: Path | None = None) -> Entry:
    """An entry as what it says.

    Args:
        beside: the file that it was found for.
    """
    called = f"the entry `{name}` of {path}"
    problems: list[str] = []
    data = f"{beside}" if beside else _place(path, entry, problems)
    description = _description(path, name, entry, problems, data.startswith("hf:"))
    if problems:
        more = ("; or name only the data that are meant; or say how they are read, with --format or --columns: then it "
                "is not looked at") if beside else ""
        raise UserError(f"{called} cannot be followed: {'; '.join(problems)}", f"change the entry{more}")
    return Entry(data, description)


def _place(path: Path, entry: Mapping[str, Any], problems: list[str]) -> str:
    """Where the rows are."""
    for key in ("hf_hub_url", *_ELSEWHERE, "file_name"):  # in the order in which LLaMA-Factory looks
        value = entry.get(key)
        if value is None:
            continue
        if not isinstance(value, str) or not value.strip():
            problems.append(f"`{key}` is no name")
        elif key in _ELSEWHERE and "hf_hub_url" not in entry:
            problems.append(f"its data are {_ELSEWHERE[key]} (`{key}`), where nothing is read from; download them, and "
                            "name the file as `file_name` alone")
        elif key == "hf_hub_url":
            return _of_hub(value, entry, problems)
        elif key == "file_name":
            inside = os.path.normpath(value)
            if os.path.isabs(inside) or Path(inside).drive or inside.split(os.sep)[0] == os.pardir:
                problems.append(f"its file {value} is not in the directory of {path.name}; move one of them to the "
                                "other")
            return os.path.join(path.parent, inside)  # ./ included, behind which neither ~ nor hf: means anything
        return ""
    problems.append("it names no data: `file_name` or `hf_hub_url`")
    return ""


def _of_hub(id: str, entry: Mapping[str, Any], problems: list[str]) -> str:
    if entry.get("folder"):
        problems.append("it names a `folder` of the dataset; download that, and name it as `file_name`")
    subset, split, revision = (entry.get(key) for key in ("subset", "split", "revision"))
    return f"hf:{id}{f'/{subset}' if subset else ''}:{split or 'train'}{f'@{revision}' if revision else ''}"


def _description(path: Path, name: str, entry: Mapping[str, Any], problems: list[str], of_hub: bool) -> Description:
    formatting = entry.get("formatting") or "alpaca"
    if formatting == "openai":  # whose rows are ShareGPT's by other names
        formatting = "sharegpt"
    if not isinstance(formatting, str) or formatting not in _COLUMNS:
        problems.append(f"its `formatting` is {formatting!r}, and alpaca, sharegpt and openai are known")
        formatting = "alpaca"
    if unknown := [key for key in entry if key not in _KEYS]:
        problems.append(f"it has `{unknown[0]}`, which is not known{near(unknown[0], _KEYS)}")
    if not of_hub and entry.get("split") not in (None, "train"):
        problems.append(f"its `split` is {entry['split']!r}, and a file has none but train")
    samples = entry.get("num_samples")
    if samples is not None and (not isinstance(samples, int) or isinstance(samples, bool) or samples < 1):
        problems.append("`num_samples` is no number of rows")
        samples = None
    columns = _columns(formatting, entry.get("columns"), problems)
    ranking = entry.get("ranking") or False
    if not isinstance(ranking, bool):
        problems.append("`ranking` is neither true nor false")
    else:
        _check_kind(formatting, columns, ranking, problems)
    tags = _tags(entry.get("tags"), problems)
    return Description(name, path, formatting, tuple(columns.items()), tuple(tags.items()), samples)


def _columns(formatting: str, named: Any, problems: list[str]) -> dict[str, str]:
    """The row's columns by LLaMA-Factory's names of them; those that are not named where some are have none."""
    if named is None:
        return dict(_BY_DEFAULT[formatting])
    columns = _texts("columns", named, (*{name for names in _COLUMNS.values() for name in names}, *_MEDIA), problems)
    _refuse_same("columns", columns, problems)
    if media := [key for key in _MEDIA if key in columns]:
        problems.append(f"`columns` names {media[0]} (`{columns[media[0]]}`), and text and pictures alone are learned")
    if other := [key for key in columns if key not in (*_COLUMNS[formatting], *_MEDIA)]:
        problems.append(f"`columns` names `{other[0]}`, which is none of the `formatting` {formatting}")
    if formatting == "sharegpt":
        return _BY_DEFAULT[formatting] | columns
    if "prompt" not in columns:
        problems.append("`columns` names no `prompt`")
    return columns


def _tags(named: Any, problems: list[str]) -> dict[str, str]:
    tags = _TAGS | ({} if named is None else _texts("tags", named, _TAGS, problems))
    keys = {key: tags[key] for key in ("role_tag", "content_tag")}
    for some in (keys, {key: tag for key, tag in tags.items() if key not in keys}):
        _refuse_same("tags", some, problems)
    return tags


def _refuse_same(what: str, named: Mapping[str, str], problems: list[str]) -> None:
    """One name for two things, of which only one can be meant."""
    first: dict[str, str] = {}
    for key, name in named.items():
        if first.setdefault(name, key) != key:
            problems.append(f"by `{what}`, both `{first[name]}` and `{key}` are `{name}`")


def _texts(what: str, named: Any, known: Any, problems: list[str]) -> dict[str, str]:
    if not isinstance(named, dict) or not all(isinstance(value, str) for value in named.values() if value is not None):
        problems.append(f"`{what}` is no object of names")
        return {}
    if unknown := [key for key in named if key not in known]:
        problems.append(f"`{what}` has `{unknown[0]}`, which is not known{near(unknown[0], known)}")
    return {key: value for key, value in named.items() if value}


def _check_kind(formatting: str, columns: Mapping[str, str], ranking: bool, problems: list[str]) -> None:
    """Whether pairs, judged answers and pictures have what they need."""
    pair = {"chosen", "rejected"} & columns.keys()
    if ranking and len(pair) < 2:
        problems.append("`ranking` is true, and `columns` does not name both `chosen` and `rejected`")
    elif pair and not ranking:
        problems.append(f"`columns` names `{min(pair)}`, and `ranking` is not true")
    elif pair and "kto_tag" in columns:
        problems.append("`columns` names `kto_tag` beside a pair of answers")
    elif formatting == "alpaca" and "images" in columns and "response" not in columns and not pair:
        problems.append("`columns` names `images`, and no `response`, which would be learned of them")
    elif formatting == "alpaca" and "kto_tag" in columns and "response" not in columns:
        problems.append("`columns` names `kto_tag`, and no `response`")
