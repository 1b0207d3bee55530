"""Names that people give (files, directories, globs, standard input, datasets on the Hub) become sources of rows.

``find_sources`` looks at every name before anything is read and reports all problems together; ``read_blocks`` streams
a source's rows in constant memory. The formats have modules of their own beside this one.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from gemma_tune.base.errors import UserError
from gemma_tune.base.files import NEW, os_errors, put_in_place, unfinished
from gemma_tune.base.listener import Listener
from gemma_tune.base.words import counted
from gemma_tune.data.reading import hub_rows, json_rows, table_rows
from gemma_tune.data.reading.rows import BLOCK, CSV, HUB, JSON, PARQUET, TSV, Block, Row, Source
from gemma_tune.data.reading.text import compression

__all__ = ["BLOCK", "Block", "Row", "Source", "find_sources", "read_blocks", "source_of"]

STDIN = "-"
KINDS = {".jsonl": JSON, ".ndjson": JSON, ".json": JSON, ".csv": CSV, ".tsv": TSV, ".parquet": PARQUET}
_HINT = "check the path; `gemma-tune prepare --help` shows an example"
_READERS = {JSON: json_rows.blocks, CSV: table_rows.csv_blocks, TSV: table_rows.csv_blocks,
            PARQUET: table_rows.parquet_blocks, HUB: hub_rows.blocks}


def read_blocks(source: Source, size: int = BLOCK) -> Iterator[Block]:
    """All rows of a source in order, as blocks of about ``size`` bytes that can be pickled.

    Raises:
        UserError: nothing in the source can be read, or not to its end: empty, binary, neither UTF-8 nor UTF-16,
            damaged, or a broken JSON document.
    """
    return _READERS[source.kind](source, size)


_HEAD = 4096  # bytes of standard input from which its kind is told


def source_of(path: Path, name: str | None = None) -> Source:
    """A file as a source; its kind follows from its name, and what has no known ending is tried as JSONL or JSON."""
    return Source(f"{path}" if name is None else name, path, _kind(path) or JSON, os.path.getsize(path))


def find_sources(names: Sequence[str], keep: Path, listener: Listener | None = None) -> list[Source]:
    """The sources that names stand for, in their order, each file once.

    A name is a file; a directory, for all files below it with a known ending, hidden ones and other runs excepted; a
    glob (``**`` goes through directories); ``-`` for standard input; or ``hf:org/name[/config][:split][@revision]``.

    Args:
        keep: a directory for what must be there again when the stage is repeated: a copy of standard input, and lock
            files of datasets. Only made when needed.

    Raises:
        UserError: every name that leads to nothing, all together. Standard input is read, and the Hub asked, only if
            all files are there.
    """
    listener = listener or Listener()
    found: list[Source | str] = []  # a text is a name to resolve when the files are known to be there
    problems: list[UserError] = []
    for name in dict.fromkeys(names):
        if name == STDIN or name.startswith(hub_rows.PREFIX):
            found.append(name)
            continue
        try:
            found += _files(name, keep, listener)
        except UserError as e:
            problems.append(e)
    if not problems:
        found = [_elsewhere(f, keep, listener, problems) if isinstance(f, str) else f for f in found]
    if problems:
        raise _together(problems)
    once: dict[str, Source] = {}
    for source in found:
        once.setdefault(os.path.realpath(source.path), source)
    return list(once.values())


def _elsewhere(name: str, keep: Path, listener: Listener, problems: list[UserError]) -> Source | None:
    try:
        return _stdin(keep) if name == STDIN else hub_rows.find(name, keep, listener)
    except UserError as e:
        problems.append(e)
    return None


def _together(problems: Sequence[UserError]) -> UserError:
    if len(problems) == 1:
        return problems[0]
    plain = [e.message if e.hint in (None, _HINT) else f"{e.message} ({e.hint})" for e in problems]
    error = UserError(f"{len(problems)} data sources cannot be read", _HINT, plain)
    error.exit_code = max(e.exit_code for e in problems)  # wrong input, if any of them is
    return error


def _kind(path: Path) -> str | None:
    if compression(path):
        path = path.with_suffix("")
    return KINDS.get(path.suffix.lower())


def _files(name: str, keep: Path, listener: Listener) -> list[Source]:
    """A file, or the files of a directory or a glob.

    Raises:
        UserError: there is none, or it cannot be read. Asked before anything is hashed.
    """
    path = Path(os.path.expanduser(name))
    if not name:
        raise UserError("a data file's name is empty", _HINT)
    if os.path.isdir(path):
        there = sorted(_below(path, keep))
        paths = [p for p in there if _kind(p)]
        if not paths:
            raise UserError(f"{path} is a directory without data files ({', '.join(KINDS)})",
                            "name the files, or another directory")
        listener.note(f"{path}: {counted(len(paths), 'data file')}{_passed_over(there, paths)}")
    elif not os.path.exists(path) and glob.has_magic(name):
        matches = sorted(Path(m) for m in glob.glob(os.path.expanduser(name), recursive=True) if os.path.isfile(m))
        written = [m for m in matches if any(_is_run(folder, keep) for folder in m.parents)]
        matches = [m for m in matches if m not in written]
        paths = [m for m in matches if _kind(m)] or matches
        if not paths:
            raise UserError(f"no file matches {path}"
                            + (" but what a run wrote, which only counts by its full name" if written else ""), _HINT)
        listener.note(f"{path}: {counted(len(paths), 'file')}{_passed_over(matches, paths)}")
    else:
        paths = [path]
    if problems := [problem for path in paths if (problem := _unreadable(path))]:
        raise _together([UserError(problem, _HINT) for problem in problems])
    return [source_of(path) for path in paths]


def _below(folder: Path, keep: Path) -> Iterator[Path]:
    """Files below a directory; not hidden ones, and not what a run in it wrote."""
    def refuse(error: OSError) -> None:  # os.walk would pass over a directory that it cannot read
        raise UserError(f"{error.filename} cannot be read: {error.strerror}", _HINT)

    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [f for f in folders if not f.startswith(".") and not _is_run(Path(place, f), keep)]
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _passed_over(there: Sequence[Path], taken: Sequence[Path]) -> str:
    """What is said of files that are no data by their names."""
    others = [path for path in there if path not in set(taken)]
    endings = ", ".join(sorted({path.suffix or "without an ending" for path in others})[:5])
    return f"; {counted(len(others), 'other')} passed over ({endings})" if others else ""


def _is_run(folder: Path, keep: Path) -> bool:
    return folder.resolve() == keep.resolve() or (folder / "manifest.json").exists() and (folder / "data").is_dir()


def _unreadable(path: Path) -> str | None:
    """Why a path is not a file to read."""
    if not os.path.exists(path):
        return f"there is no file {path}"
    if not os.path.isfile(path):  # a pipe could be read only once
        return f"{path} is not a regular file; save its content to a file first"
    return None if os.access(path, os.R_OK) else f"no permission to read {path}"


def _stdin(keep: Path) -> Source:
    """Copy standard input to ``keep`` under a name that follows from its content, so that it can be read again."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("`-` reads standard input, and nothing is piped into it",
                        "pipe rows into the command: `gemma-tune prepare - < rows.jsonl`")
    with os_errors(keep):
        keep.mkdir(parents=True, exist_ok=True)
        # The run is not locked yet: another command may do the same.
        with unfinished(keep / f"{NEW}stdin-{os.getpid()}") as fresh:
            with open(fresh, "wb") as f:
                digest, head = _copied(sys.stdin.buffer, f)
            if not head:
                raise UserError("standard input is empty", "pipe rows into the command: `gemma-tune prepare - < "
                                                           "rows.jsonl`")
            path = keep / f"stdin-{digest[:12]}{_ending(head)}"
            put_in_place(fresh, path)
    return source_of(path, "<stdin>")


def _copied(source: IO[bytes], target: IO[bytes]) -> tuple[str, bytes]:
    """Copy all bytes; their sha256, and the first ones."""
    digest, head = hashlib.sha256(), b""
    while piece := source.read(BLOCK):
        head = head or piece[:_HEAD]
        digest.update(piece)
        target.write(piece)
    return digest.hexdigest(), head


def _ending(head: bytes) -> str:
    """The name's end for content that begins like this."""
    for magic, ending in ((b"PAR1", ".parquet"), (b"\x1f\x8b", ".jsonl.gz"), (b"\x28\xb5\x2f\xfd", ".jsonl.zst")):
        if head.startswith(magic):
            return ending
    first = head.lstrip(b"\xef\xbb\xbf \t\r\n").split(b"\n", 1)[0]
    if first[:1] not in (b"{", b"[") and (b"," in first or b";" in first or b"\t" in first):
        return ".tsv" if b"\t" in first else ".csv"
    return ".jsonl"
