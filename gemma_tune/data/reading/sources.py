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
from dataclasses import replace
from pathlib import Path
from typing import IO, NamedTuple

from gemma_tune import samples
from gemma_tune.base import shell
from gemma_tune.base.content import FETCH, described, head_of, is_pointer
from gemma_tune.base.errors import UserError
from gemma_tune.base.files import NEW, os_errors, put_in_place, unfinished
from gemma_tune.base.listener import Listener
from gemma_tune.base.words import counted, near, nearest
from gemma_tune.data.reading import binary_rows, hub_rows, json_rows, plain_rows, table_rows
from gemma_tune.data.reading.dataset_info import INFO, Beside, entries_here, entry_of, split_name
from gemma_tune.data.reading.folders import CHECK, data_files, is_run, passed_over
from gemma_tune.data.reading.names import UNSAID, How, data_among, describes_data, kind_of
from gemma_tune.data.reading.rows import (
    ARROW,
    BLOCK,
    CSV,
    HUB,
    JSON,
    PARQUET,
    PIPED,
    TEXT,
    TSV,
    Block,
    DescribedBlock,
    Description,
    Row,
    Source,
)

__all__ = ["BLOCK", "Block", "Row", "Source", "built_in", "find_sources", "read_blocks", "source_of"]

_MARGIN = b"\xef\xbb\xbf \t\r\n"  # what may stand before the first sign of a text
_SETTINGS = (".yaml", ".yml")  # endings that no data have
STDIN = "-"
EXAMPLE = "example:"
_READERS = {JSON: json_rows.blocks, PARQUET: binary_rows.parquet_blocks, ARROW: binary_rows.ipc_blocks,
            HUB: hub_rows.blocks, TEXT: plain_rows.blocks}


def read_blocks(source: Source, size: int = BLOCK, listener: Listener | None = None) -> Iterator[Block]:
    """All rows of a source in order, as blocks of about ``size`` bytes that can be pickled.

    Args:
        listener: is told how a table was read, where that is no matter of course.

    Raises:
        UserError: nothing in the source can be read, or not to its end: empty, binary, neither UTF-8 nor UTF-16,
            damaged, or a broken JSON document.
    """
    table = source.kind in (CSV, TSV)
    blocks = table_rows.csv_blocks(source, size, listener) if table else _READERS[source.kind](source, size)
    if source.described is None:
        return blocks
    return (DescribedBlock(block.file, block.done, block, source.described) for block in blocks)


_HEAD = 4096  # bytes of standard input from which its kind is told


def source_of(path: Path, name: str | None = None, how: How = UNSAID) -> Source:
    """A file as a source; its kind follows from its name, and what has no known ending is tried as JSONL or JSON.

    Raises:
        UserError: it has the name of a text, and may be a table or a chat; or that of a settings file, as other
            programs have them behind `train`.
    """
    kind = kind_of(path, how) or (CSV if how.delimiter else TEXT if how.all_text else JSON)
    if kind == JSON and path.suffix.lower() in _SETTINGS and not plain_rows.has_rows(
            plain_rows.opening(path, how.encoding)):
        raise UserError(f"{path} is a settings file, by its name, and no data",
                        f"settings are named with --config {shell.quote(str(path))}, and data by their own files")
    if kind == TEXT:
        opening = plain_rows.opening(path, how.encoding)
        if plain_rows.has_rows(opening):
            kind = JSON
        elif not how.all_text and (sign := plain_rows.as_in_a_table(opening)):
            signs = "tabs" if sign == "\t" else sign
            raise UserError(f"{path} may be a table: each of its first lines has as many {signs} as the others",
                            "if it is one, name it .csv or .tsv; if it is plain text, make it a row "
                            '{"text": "…"} of a .jsonl file; `prepare` takes it as it is with --delimiter or with '
                            "--format text")
        elif not how.all_text and plain_rows.as_in_a_chat(opening):
            raise UserError(f"{path} seems to be a chat: its lines say who says something, and when",
                            'make a row of each conversation in it, {"messages": [{"role": "user", "content": "…"}, '
                            '…]}, in a .jsonl file; if it is plain text, make it a row {"text": "…"} there; `prepare` '
                            "takes all of the data for plain text with --format text")
    return Source(f"{path}" if name is None else name, path, kind, os.path.getsize(path),
                  how.delimiter if kind in (CSV, TSV) else None, how.encoding)


def find_sources(names: Sequence[str], keep: Path, listener: Listener | None = None, how: How = UNSAID,
                 held_out: bool = False) -> list[Source]:
    """The sources that names stand for, in their order, each file once.

    A name is a file; a directory, for all files below it with a known ending, hidden ones and other runs excepted; a
    glob (``**`` goes through directories); ``-`` for standard input; ``example:NAME`` for a built-in example; or
    ``hf:org/name[/config][:split][@revision]``, or an entry of LLaMA-Factory's file, ``dataset_info.json:NAME``.

    Args:
        keep: a directory for what must be there again when the stage is repeated: a copy of standard input, and lock
            files of datasets. Only made when needed.
        how: what was said of the files.
        held_out: they are for validation: of a directory with splits, those files are taken.

    Raises:
        UserError: every name that leads to nothing, all together. Standard input is read, and the Hub asked, only if
            all files are there.
    """
    listener = listener or Listener()
    found, problems = _on_disk(names, keep, listener, how, held_out)
    if not problems:
        found = [_elsewhere(f, keep, listener, how, problems) if isinstance(f, _Later) else f for f in found]
    if problems:
        raise _together(problems)
    once: dict[str, Source] = {}
    for source in found:
        first = once.setdefault(os.path.realpath(source.path), source)
        if first.described != source.described:
            raise UserError(f"{source.name} is named twice, to be read in two ways: as {first.argument} and as "
                            f"{source.argument}", "leave one of them out, or give each a file of its own")
    return list(once.values())


def require_files(names: Sequence[str], held_out: Sequence[str] = (), how: How = UNSAID) -> None:
    """Find out what is wrong with files, before a model is looked for, which can mean a download.

    Args:
        names: as in :func:`find_sources`; standard input and the Hub are left for later.
        held_out: those for validation.
        how: what was said of the files.

    Raises:
        UserError: every name that leads to nothing, all together.
    """
    nowhere = Path(os.devnull)  # nothing is kept
    problems = [problem for some in (names, held_out)
                for problem in _on_disk(some, nowhere, Listener(), how, some is held_out)[1]]
    if problems:
        raise _together(problems)


class _Later(NamedTuple):
    """What is to be resolved when all files are there: its name, as people gave it, and where it stands."""

    argument: str
    data: str
    described: Description | None = None


def _on_disk(names: Sequence[str], keep: Path, listener: Listener, how: How, held_out: bool,
             ) -> tuple[list[Source | _Later], list[UserError]]:
    """Sources of names, and what is wrong with them."""
    found: list[Source | _Later] = []
    problems: list[UserError] = []
    beside = Beside(listener)
    for name in dict.fromkeys(names):
        try:
            info = split_name(name)
            entry = entry_of(*info) if info and (info[1] or info[0].is_file()) else None
            data, described = entry or (name, None)
            if described:
                _tell_how(data, described, held_out, listener)
            if data == STDIN or data.startswith(hub_rows.PREFIX):
                found.append(_Later(name, data, described))
                continue
            paths = _files(built_in(data), keep, listener, how, held_out)
            sources = [replace(source_of(path, None, how), argument=name, described=described) for path in paths]
            found += sources if described or name.startswith(EXAMPLE) else _as_described(
                sources, beside, listener, how, held_out)
        except UserError as e:
            problems.append(e)
    return found, problems


def _tell_how(name: str, described: Description, held_out: bool, listener: Listener) -> None:
    whole = "; all of its rows are taken, as `num_samples` is for training" if held_out and described.samples else ""
    listener.note(f"{name}: read {described}{whole}")


def _as_described(sources: Sequence[Source], beside: Beside, listener: Listener, how: How,
                  held_out: bool) -> list[Source]:
    """The sources of a name, with what is said about each beside it.

    Raises:
        UserError: what is said cannot be followed.
    """
    read: list[Source] = []
    for source in sources:
        if how.read_by:
            if beside.is_described(source.path):
                listener.note(f"{source.name}: read as {' and '.join(how.read_by)} says, not as {INFO} does")
            read.append(source)
            continue
        described = beside.description(source.path)
        if described:
            _tell_how(source.name, described, held_out, listener)
        # A number of samples is that of the entry, and not of a directory with others in it.
        counts = len(sources) > 1 and described is not None and described.samples is not None
        argument = f"{described.file}:{described.name}" if counts else source.argument
        read.append(replace(source, described=described, argument=argument))
    return sorted(read, key=lambda source: source.argument)  # those of one argument together


def _missing(path: Path, held_out: bool = False) -> UserError:
    if entries := entries_here(f"{path}"):
        return UserError(f"there is no file {path}", f"an entry of {INFO} is named with it: {' '.join(entries)}")
    if f"{path}".lower() in ("true", "false"):
        return UserError(f"there is no file {path}", "a switch takes no value: it stands alone, such as --qlora, or is "
                                                     "left out")
    number = held_out and path.name[:1].isdigit()
    return UserError(f"there is no file {path}{_near(path)}",
                     "--valid takes a share such as 0.1, a number of rows such as 50, or a file" if number else CHECK)


def built_in(name: str) -> str:
    """The file of a built-in example, of its name ``example:pairs``; another name as it is.

    Raises:
        UserError: there is no such example.
    """
    if not name.startswith(EXAMPLE):
        return name
    called = name.removeprefix(EXAMPLE)
    if called not in samples.EXAMPLES:
        raise UserError(f"there is no built-in example {called}{near(called, samples.EXAMPLES)}",
                        f"there are {' and '.join(EXAMPLE + known for known in samples.EXAMPLES)}")
    return str(samples.example_path(called))


def as_typed(path: str) -> str:
    """The other way round: a built-in example's name, of where it is installed; another path as it is."""
    names = {str(samples.example_path(name)): f"{EXAMPLE}{name}" for name in samples.EXAMPLES}
    return names.get(path, path)


def _elsewhere(later: _Later, keep: Path, listener: Listener, how: How,
               problems: list[UserError]) -> Source | None:
    try:
        found = _stdin(keep, how) if later.data == STDIN else hub_rows.find(later.data, keep, listener)
        return replace(found, argument=later.argument, described=later.described)
    except UserError as e:
        problems.append(e)
    return None


def _together(problems: Sequence[UserError]) -> UserError:
    if len(problems) == 1:
        return problems[0]
    plain = [e.message if e.hint in (None, CHECK) else f"{e.message} ({e.hint})" for e in problems]
    error = UserError(f"{len(problems)} data sources cannot be read", CHECK, plain)
    error.exit_code = max(e.exit_code for e in problems)  # wrong input, if any of them is
    return error


def _files(name: str, keep: Path, listener: Listener, how: How, held_out: bool) -> list[Path]:
    """A file, or the files of a directory or a glob.

    Raises:
        UserError: there is none, or it cannot be read. Asked before anything is hashed.
    """
    path = Path(os.path.expanduser(name))
    if not name:
        raise UserError("a data file's name is empty", CHECK)
    if os.path.isdir(path):
        paths = data_files(path, keep, listener, how, held_out)
    elif not os.path.exists(path) and glob.has_magic(name):
        matches = sorted(Path(m) for m in glob.glob(os.path.expanduser(name), recursive=True) if os.path.isfile(m))
        written = [m for m in matches if any(is_run(folder, keep) for folder in m.parents)]
        matches = [m for m in matches if m not in written]
        paths = data_among(matches, how) or matches
        if not paths:
            raise UserError(f"no file matches {path}"
                            + (" but what a run wrote, which only counts by its full name" if written else ""), CHECK)
        listener.note(f"{path}: {counted(len(paths), 'file')}{passed_over(matches, paths, how)}")
    elif not os.path.lexists(path):
        raise _missing(path, held_out)
    else:
        paths = [path]
    if problems := [problem for path in paths if (problem := _problem(path))]:
        raise _together(problems)
    return paths


def _near(path: Path) -> str:
    """The end of a message about a file that is not there: one beside it of nearly the same name."""
    try:
        beside = {other.stem: other for other in path.parent.iterdir()
                  if other.name[:1] == path.name[:1] and (kind_of(other) or other.is_dir())}
    except OSError:
        return ""
    return "".join(f"; did you mean {beside[stem]}?" for stem in nearest(path.stem, beside, least=0.75))


def _problem(path: Path) -> UserError | None:
    """Why a path is not a file with rows."""
    if not os.path.exists(path):
        return UserError(f"there is no file {path}", CHECK)
    if not os.path.isfile(path):  # a pipe could be read only once
        return UserError(f"{path} is not a regular file; save its content to a file first", CHECK)
    if not os.access(path, os.R_OK):
        return UserError(f"no permission to read {path}", CHECK)
    if describes_data(path):
        return UserError(f"{path} describes a dataset and holds none of its rows",
                         f"name its directory, {path.parent}, or its data files")
    try:
        return _pointer(f"{path}", head_of(path))
    except OSError as e:
        return UserError(f"{path} cannot be read: {e.strerror}", CHECK)


def _pointer(name: str, head: bytes) -> UserError | None:
    return UserError(f"{name} is {described(head)}", FETCH) if is_pointer(head) else None


def _stdin(keep: Path, how: How) -> Source:
    """Copy standard input to ``keep`` under a name that follows from its content, so that it can be read again.

    Whoever calls this owns the run's lock: what a killed command left half written has the same name.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("`-` reads standard input, and nothing is piped into it",
                        "pipe rows into the command: `gemma-tune prepare - < rows.jsonl`")
    with os_errors(keep):
        keep.mkdir(parents=True, exist_ok=True)
        with unfinished(keep / f"{NEW}stdin") as fresh:
            with open(fresh, "wb") as f:
                digest, head = _copied(sys.stdin.buffer, f)
            if not head:
                raise UserError("standard input is empty", "pipe rows into the command: `gemma-tune prepare - < "
                                                           "rows.jsonl`")
            if problem := _pointer("standard input", head):
                raise problem
            path = keep / f"stdin-{digest[:12]}{_ending(head, how)}"
            put_in_place(fresh, path)
    return source_of(path, PIPED, how)


def _copied(source: IO[bytes], target: IO[bytes]) -> tuple[str, bytes]:
    """Copy all bytes; their sha256, and the first ones."""
    digest, head = hashlib.sha256(), b""
    while piece := source.read(BLOCK):
        head = head or piece[:_HEAD]
        digest.update(piece)
        target.write(piece)
    return digest.hexdigest(), head


_MAGIC = {b"PAR1": ".parquet", b"ARROW1": ".arrow", b"\xff\xff\xff\xff": ".arrow"}
_PACKED = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}


def _ending(head: bytes, how: How) -> str:
    """The name's end for content that begins like this."""
    for magic, ending in _MAGIC.items():
        if head.startswith(magic):
            return ending
    packed = next((ending for magic, ending in _PACKED.items() if head.startswith(magic)), "")
    if how.all_text or packed:
        return (".txt" if how.all_text else ".jsonl") + packed
    first = head.lstrip(_MARGIN).split(b"\n", 1)[0]
    if first[:1] not in (b"{", b"[") and any(sign in first for sign in (how.delimiter or ",;\t|").encode()):
        return ".tsv" if b"\t" in first else ".csv"
    return ".jsonl"
