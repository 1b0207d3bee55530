"""Rows of tables that are no text: Parquet files, and Arrow's IPC files and streams, as `datasets` saves them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any

from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.base.words import is_text
from gemma_tune.data.reading.arrow_rows import ArrowBlock, arrow_blocks
from gemma_tune.data.reading.rows import BLOCK, Source
from gemma_tune.data.reading.text import TextFile, compression

_ARROW_FILE = b"ARROW1"  # a stream begins otherwise
_MOST_ROWS = 10_000  # of a block


def parquet_blocks(source: Source, size: int = BLOCK) -> Iterator[ArrowBlock]:
    """All rows of a Parquet file, also a compressed one (which is unpacked into a temporary file first).

    Raises:
        UserError: damaged file, no rows, or two columns of one name.
    """
    from pyarrow import parquet

    with _unpacked(source, size) as file, _explained(source, "a Parquet file"), \
            parquet.ParquetFile(file, buffer_size=size, pre_buffer=False) as table:
        meta = table.metadata
        stored = sum(meta.row_group(n).total_byte_size for n in range(meta.num_row_groups))
        batches = table.iter_batches(batch_size=_count(size, meta.num_rows, stored))
        yield from arrow_blocks(source.name, meta.num_rows, batches)


def ipc_blocks(source: Source, size: int = BLOCK) -> Iterator[ArrowBlock]:
    """All rows of an Arrow IPC file or stream, also a compressed one.

    Raises:
        UserError: damaged file, no rows, or two columns of one name.
    """
    with _unpacked(source, size) as file, _explained(source, "an Arrow file"):
        rows = stored = 0
        for batch in _batches(file):  # a stream does not say how many there are
            rows += batch.num_rows
            stored += batch.nbytes
        count = _count(size, rows, stored)
        pieces = (batch.slice(at, count) for batch in _batches(file) for at in range(0, batch.num_rows, count))
        yield from arrow_blocks(source.name, rows, pieces)


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
                         f"{e.strerror or e}", "name one with room: export TMPDIR=/a/directory; or unpack the file "
                                               "yourself") from e


@contextlib.contextmanager
def _explained(source: Source, what: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"{source.name} is not {what}, or damaged: {' '.join(str(e).split())[:200]}",
                        "copy or download it again, or check that its name fits its content; nothing was written"
                        ) from e
