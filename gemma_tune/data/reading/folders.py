"""Which files of a directory are data: by their names, and by what `datasets` and the Hub write beside them.

A directory is followed through symbolic links. What a run wrote is left out, and so are the test and validation files
of a dataset, which are not to be learned unasked.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from gemma_tune.base import shell
from gemma_tune.base.errors import UserError
from gemma_tune.base.listener import Listener
from gemma_tune.base.words import counted
from gemma_tune.data.reading.card import NAME as CARD
from gemma_tune.data.reading.card import configuration
from gemma_tune.data.reading.names import (
    AS_TEXT,
    KINDS,
    REPORT,
    SAVED,
    UNSAID,
    How,
    data_among,
    describes_data,
    is_about_data,
    is_text,
    kind_of,
)
from gemma_tune.data.reading.rows import TEXT

CHECK = f"check the path; `gemma-tune prepare --help` shows an example{shell.COMMAS}"
# How the parts of a dataset are called, as `datasets` has it.
_SPLITS = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"),
           "test": ("test", "testing", "eval", "evaluation")}
_NAMED = 5  # files that a message names
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def data_files(folder: Path, keep: Path, listener: Listener, how: How = UNSAID, held_out: bool = False) -> list[Path]:
    """The data files below a directory, in the order of their names.

    Args:
        keep: a directory that is no data, see :func:`is_run`.
        how: what was said of the files.
        held_out: they are for validation, so that of a dataset with splits those files are taken.

    Raises:
        UserError: there are none, or a part of the directory cannot be read, or it is not clear which split is meant;
            or it is a run's.
    """
    _refuse_run(folder, keep)
    there = sorted(_below(folder, keep))
    data = data_among(there, how)
    if not data:
        raise UserError(f"{folder} is a directory without data files ({', '.join(KINDS)})",
                        AS_TEXT if any(map(is_text, there)) else _about_pictures(folder, there)
                        or "name the files, or another directory")
    config = configuration(folder, data)
    splits = {path: _split(Path(config.splits[path]) if config else path.relative_to(folder))
              for path in (config.splits if config else data)}
    taken, others = _of_split(folder, splits, held_out)
    of = f" of the configuration `{config.name}`, by its {CARD}" if config else ""
    listener.note(f"{folder}: {counted(len(taken), 'data file')}{of}{passed_over(there, data, how)}")
    if config and (left := [path for path in data if path not in splits]):
        whose = f"of other configurations ({', '.join(config.others)})" if config.others else "of no configuration"
        listener.warn(f"{folder}: not read, as they are {whose}: {_named(folder, left)}; they are used if they are "
                      "named")
    if others and not held_out:
        listener.warn(f"{folder}: not trained on, as the names say that they are for validation or tests: "
                      f"{_named(folder, others)}; they are used if they are named, to validate with --valid")
    elif others:
        listener.note(f"{folder}: not validated with: {_named(folder, others)}")
    return taken


def _refuse_run(folder: Path, keep: Path) -> None:
    """A run is named behind --run, and holds much beside its rows that looks like data.

    Raises:
        UserError: the directory is one.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if isinstance(manifest, dict) and {"gemma_tune", "stages"} <= manifest.keys():
        if keep.parent.resolve() == folder.resolve():
            raise UserError(f"{folder} is this run itself, and no data",
                            "name the files in it that are data, each by its own name")
        rows = folder / "data" / "train.jsonl"
        again = f"; to prepare its rows for another run, name them: {shell.quote(str(rows))}" if rows.exists() else ""
        raise UserError(f"{folder} is a run, and no data",
                        f"to work on it, name it behind --run: --run {shell.quote(str(folder))}{again}")


def _about_pictures(folder: Path, there: Sequence[Path]) -> str | None:
    """What to write beside pictures, where that is all there is."""
    found = next((path for path in there if path.suffix.lower() in _PICTURES), None)
    row = found and {"file_name": found.relative_to(folder).as_posix(), "question": "…", "answer": "…"}
    return row and (f"write what is asked about its pictures into {folder / 'metadata.jsonl'}, a line each: "
                    f"{json.dumps(row, ensure_ascii=False)}")


def _named(folder: Path, paths: Sequence[Path]) -> str:
    shown = [os.path.relpath(path, folder) for path in paths[:_NAMED]]
    more = len(paths) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _below(folder: Path, keep: Path) -> Iterator[Path]:
    """Files below a directory; not hidden ones, and not what a run in it wrote. Of a saved dataset, its own alone."""
    def refuse(error: OSError) -> None:  # os.walk would pass over a directory that it cannot read
        raise UserError(f"{error.filename} cannot be read: {error.strerror}", CHECK)

    real = Path(os.path.realpath(folder))
    seen = {real, *real.parents}  # a link that leads up again would have no end

    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        inside = [Path(place, f) for f in sorted(folders) if not f.startswith(".")]
        folders[:] = [f.name for f in sorted(inside, key=os.path.islink) if not is_run(f, keep) and _is_new(f, seen)]
        if SAVED in names and (saved := _saved(Path(place))) is not None:
            folders.clear()
            yield from saved
            continue
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _is_new(folder: Path, seen: set[Path]) -> bool:
    real = Path(os.path.realpath(folder))
    if real in seen:
        return False
    seen.add(real)
    return True


def _saved(folder: Path) -> list[Path] | None:
    """The files of a dataset that ``save_to_disk`` wrote; None if it is none.

    Raises:
        UserError: its rows are chosen by an index beside them, as older versions of `datasets` wrote.
    """
    try:
        state = json.loads((folder / SAVED).read_text(encoding="utf-8"))
        files = [folder / Path(item["filename"]).name for item in state["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    if state.get("_indices_data_files"):
        raise UserError(f"{folder} was saved with an index of its rows, which only `datasets` can follow",
                        "save it again: load_from_disk(…).flatten_indices().save_to_disk(…)")
    return files


def is_run(folder: Path, keep: Path) -> bool:
    """Whether a directory is that of a run, or of the tokens in it, or ``keep``."""
    if folder.name == "tokens" and (folder.parent / REPORT).exists():  # of a run's data, the rows once more
        return True
    return folder.resolve() == keep.resolve() or (folder / "manifest.json").exists() and (folder / "data").is_dir()


def passed_over(there: Sequence[Path], taken: Sequence[Path], how: How) -> str:
    """What is said of files that are no data by their names, or are texts beside some."""
    others = [path for path in there if path not in set(taken)]
    texts = [path for path in others if kind_of(path, how) == TEXT and not is_about_data(path)]
    learned = f"; texts beside data are learned where they are named, such as {texts[0]}" if texts else ""
    endings = ", ".join(sorted({path.name if describes_data(path) else path.suffix or "without an ending"
                                for path in others})[:5])
    return f"; {counted(len(others), 'other')} passed over ({endings}){learned}" if others else ""


# --- splits

def _of_split(folder: Path, splits: Mapping[Path, str | None], held_out: bool) -> tuple[list[Path], list[Path]]:
    """The files to learn from, or to validate with, and the others."""
    there = set(splits.values())
    if there <= {None, "train"} or len(there) == 1:
        return list(splits), []
    if held_out:
        wanted: set[str | None] = {"validation" if "validation" in there else "test"}
    elif wanted := there & {None, "train"}:
        pass
    else:
        raise UserError(f"{folder} has no files for training, only for {' and '.join(sorted(filter(None, there)))}",
                        "name the files that are meant")
    return [p for p in splits if splits[p] in wanted], [p for p in splits if splits[p] not in wanted]


def _split(path: Path) -> str | None:
    """The part of a dataset that a path below its directory names: a folder does, else the file."""
    for part in path.parts:
        for split, words in _SPLITS.items():
            if re.search(rf"(?:^|[-._ 0-9])(?:{'|'.join(words)})(?:[-._ 0-9]|$)", part.lower()):
                return split
    return None
