"""Rows of tables that are no text: Parquet files, and Arrow's IPC files and streams, as `datasets` saves them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.base.words import is_text
from gemma_tune.data.reading.arrow_rows import ArrowBlock, arrow_blocks
from gemma_tune.data.reading.rows import BLOCK, Source
from gemma_tune.data.reading.text import TextFile, compression

_ARROW_FILE = b"ARROW1"  # a stream begins otherwise
_MOST_ROWS = 10_000  # that are read at once
_FEW_ROWS = 16  # of which each may be as long as all that is stored
_READ = 1 << 23  # bytes that are read at once
_WORST = 1 << 31  # bytes that these few rows may take in a file that was made for it
_NUMBER = 4  # bytes
_TEXTS = ("STRING", "JSON", "ENUM", "NONE")  # Parquet's logical types of bytes that are no number


def parquet_blocks(source: Source, size: int = BLOCK) -> Iterator[ArrowBlock]:
    """All rows of a Parquet file, also a compressed one (which is unpacked into a temporary file first).

    Raises:
        UserError: damaged file, no rows, or two columns of one name.
    """
    from pyarrow import parquet

    with _unpacked(source, size) as file, _explained(source, "a Parquet file"):
        meta = parquet.read_metadata(file)
        yield from arrow_blocks(source.name, meta.num_rows, _read(file, meta, size), size)


def _read(file: Any, meta: Any, size: int) -> Iterator[Any]:
    """The rows in batches of bounded size, though a text that many rows share is stored once for all of them."""
    texts = {meta.schema.column(n).path for n in range(meta.num_columns)
             if meta.schema.column(n).physical_type == "BYTE_ARRAY"
             and meta.schema.column(n).logical_type.type in _TEXTS}
    for number in range(meta.num_row_groups):
        group = meta.row_group(number)
        shared = [chunk for chunk in map(group.column, range(meta.num_columns)) if _shares(chunk)]
        # As dictionaries they stay as they are stored; but Arrow keeps a row group's whole dictionary.
        kept = [chunk for chunk in shared if chunk.path_in_schema in texts and chunk.total_uncompressed_size <= _READ
                and not any("DELTA" in name for name in chunk.encodings)]
        kept = kept if len(kept) == len(shared) else []  # else few rows are read at once anyway
        rest = [] if kept else shared
        done = 0
        try:
            for batch in _batches_of(file, meta, size, number, _rows(group, rest, size), kept):
                yield batch
                done += batch.num_rows
        except NotImplementedError:  # Arrow's, for lists whose texts begin in a dictionary and go on without
            for batch in _batches_of(file, meta, size, number, _rows(group, shared, size), []):
                if batch.num_rows > done:
                    yield batch.slice(done)
                done = max(0, done - batch.num_rows)


def _shares(chunk: Any) -> bool:
    """Whether values of a column may be stored as what they have in common with others."""
    return chunk.physical_type == "BYTE_ARRAY" and any("DICTIONARY" in name or name == "DELTA_BYTE_ARRAY"
                                                       for name in chunk.encodings)


def _rows(group: Any, shared: Sequence[Any], size: int) -> int:
    """Rows of a group that may be read at once, where each value of the columns in ``shared`` may be the longest."""
    chunks = map(group.column, range(group.num_columns))
    # Numbers that repeat take next to nothing in the file.
    count = _count(max(size, _READ), group.num_rows,
                   sum(max(chunk.total_uncompressed_size, chunk.num_values * _NUMBER) for chunk in chunks))
    worst = sum(chunk.total_uncompressed_size * max(1, chunk.num_values // max(1, group.num_rows)) for chunk in shared)
    return min(count, _FEW_ROWS, max(1, _WORST // max(1, worst))) if shared else count


def _batches_of(file: Any, meta: Any, size: int, group: int, rows: int,
                as_dictionaries: Sequence[Any]) -> Iterator[Any]:
    """One row group in batches of ``rows``."""
    from pyarrow import parquet

    if not isinstance(file, str):
        file.seek(0)
    with parquet.ParquetFile(file, metadata=meta, buffer_size=size, pre_buffer=False,
                             read_dictionary=[chunk.path_in_schema for chunk in as_dictionaries]) as table:
        batches = table.iter_batches(batch_size=rows, row_groups=[group])
        yield from batches if as_dictionaries else _joined(batches, size)


def _joined(batches: Iterator[Any], size: int) -> Iterator[Any]:
    """Batches of few rows put together to about ``size`` bytes."""
    import pyarrow as pa

    waiting, taken = [], 0
    for batch in batches:
        waiting.append(batch)
        taken += batch.nbytes
        if taken >= size:
            yield pa.concat_batches(waiting)
            waiting, taken = [], 0
    if waiting:
        yield pa.concat_batches(waiting)


def ipc_blocks(source: Source, size: int = BLOCK) -> Iterator[ArrowBlock]:
    """All rows of an Arrow IPC file or stream, also a compressed one.

    Raises:
        UserError: damaged file, no rows, or two columns of one name.
    """
    with _unpacked(source, size) as file, _explained(source, "an Arrow file"):
        rows = sum(batch.num_rows for batch in _batches(file))  # a stream does not say how many there are
        yield from arrow_blocks(source.name, rows, _batches(file), size)


def _batches(file: Any) -> Iterator[Any]:
    import pyarrow as pa

    if isinstance(file, str):
        with pa.memory_map(file) as mapped:
            yield from _batches(mapped)
        return
    file.seek(0)
    is_file = file.read(len(_ARROW_FILE)) == _ARROW_FILE
    file.seek(0)
    if is_file:
        reader = pa.ipc.open_file(file)
        yield from (reader.get_batch(n) for n in range(reader.num_record_batches))
    else:
        yield from pa.ipc.open_stream(file)


def _count(size: int, rows: int, stored: int) -> int:
    """Rows that make a block of about ``size`` bytes."""
    return max(1, min(_MOST_ROWS, size * max(1, rows) // max(1, stored)))


@contextlib.contextmanager
def _unpacked(source: Source, size: int) -> Iterator[Any]:
    """The file's name, or an open file with its decompressed content."""
    if not compression(source.path):
        if is_text(str(source.path)):
            yield str(source.path)
            return
        with open(source.path, "rb") as file:  # Arrow takes no names but UTF-8
            yield file
        return
    with contextlib.ExitStack() as stack:
        with _room_to_unpack(source):
            unpacked = stack.enter_context(tempfile.TemporaryFile())
            for piece in TextFile(source, size).bytes():
                unpacked.write(piece)
            unpacked.seek(0)
        yield unpacked


@contextlib.contextmanager
def _room_to_unpack(source: Source) -> Iterator[None]:
    """What the system refuses here is about the directory of temporary files, not about the run."""
    try:
        yield
    except OSError as e:
        place = tempfile.tempdir or "the system's"  # unknown where there is no directory that could be one
        raise WorkFailed(f"{source.name} cannot be unpacked in {place}, the directory for temporary files: "
                         f"{e.strerror or e}", "set TMPDIR to a directory with room, or unpack the file yourself"
                         ) from e


@contextlib.contextmanager
def _explained(source: Source, what: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"{source.name} is not {what}, or damaged: {' '.join(str(e).split())[:200]}",
                        "copy or download it again, or check that its name fits its content; nothing was written"
                        ) from e
