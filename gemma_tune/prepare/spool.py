"""Rows between the two passes of ``prepare``: on disk in Arrow batches, with a few numbers of each in memory.

The first pass cannot know which rows are duplicates or on which side of the split a row falls; the second can.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gemma_tune.encoding.columns import array_of, hashes, lists, numbers, texts

_LISTS = ("ids", "lengths", "counts", "spans", "full_lengths", "full_counts", "full_spans")
SCHEMA = pa.schema([
    ("line", pa.int64()), ("text", pa.large_binary()), ("conversation", pa.binary(16)), ("prompt", pa.uint64()),
    ("turns", pa.int32()), ("script", pa.int8()), ("signature", pa.large_binary()),
    ("answers", pa.list_(pa.int8())), ("pictures", pa.large_binary()),
    *((name, pa.list_(pa.int32())) for name in _LISTS)])


@dataclass(frozen=True)
class Kept:
    """One row on its way: ``outcome`` (of ``encoding.sequences``) has the sequences; ``conversation`` (16 bytes) and
    ``prompt`` (64 bits) are hashes; ``answers`` are the marks of its sequences."""

    line: int
    text: bytes
    conversation: bytes
    prompt: int
    turns: int
    script: int
    signature: bytes
    outcome: Any
    answers: tuple[int, ...] = (0,)


def batch_of(rows: Sequence[Kept]) -> bytes:
    """Rows as the bytes of an Arrow stream with one batch.

    ``lengths`` are the tokens of each kept sequence, whose ``ids`` stand one after the other; ``counts`` the number of
    spans of each, and ``spans`` their starts and ends within their own sequence. ``full_…`` are the same without limit.
    ``pictures`` has a line of names for each kept sequence, where any has a picture.
    """
    columns = [
        numbers([r.line for r in rows], np.int64), texts([r.text for r in rows]),
        hashes([r.conversation for r in rows], 16), numbers([r.prompt for r in rows], np.uint64),
        numbers([r.turns for r in rows], np.int32), numbers([r.script for r in rows], np.int8),
        texts([r.signature for r in rows]), lists([r.answers for r in rows], np.int8),
        texts([_names(r.outcome.kept) for r in rows]),
        lists([_joined([s.ids for s in r.outcome.kept]) for r in rows]),
        *_shape([r.outcome.kept for r in rows]), *_shape([r.outcome.full for r in rows])]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
    return sink.getvalue().to_pybytes()


def _shape(rows: Sequence[Sequence[Any]]) -> list[pa.ListArray]:
    return [lists([np.array([len(s.ids) for s in sequences], np.int32) for sequences in rows]),
            lists([np.array([len(s.spans) for s in sequences], np.int32) for sequences in rows]),
            lists([_joined([s.spans.reshape(-1) for s in sequences]) for sequences in rows])]


def _names(sequences: Sequence[Any]) -> bytes:
    lines = [" ".join(name for name, _ in s.pictures) for s in sequences]
    return "\n".join(lines).encode() if any(lines) else b""


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    if len(arrays) == 1:
        return arrays[0]
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int32)


class Batch:
    """One batch read back: columns as arrays, lists as (values, offsets)."""

    def __init__(self, batch: pa.RecordBatch, source: int, first: int):
        self.source, self.first, self.size = source, first, batch.num_rows
        self._batch = batch

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers, one per row."""
        return array_of(self._batch.column(name))

    def bytes_of(self, name: str) -> list[bytes]:
        """A column of bytes."""
        return self._batch.column(name).to_pylist()

    def hashes(self) -> np.ndarray:
        """The conversations' hashes, shape (rows, 2), uint64."""
        column = self._batch.column("conversation")
        data = np.frombuffer(column.buffers()[1], np.uint64)
        return data[2 * column.offset:2 * (column.offset + len(column))].reshape(-1, 2)

    def lists(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Values (int32) and offsets (rows + 1) of a column of lists."""
        column = self._batch.column(name)
        return array_of(column.values), array_of(column.offsets)

    def sequences(self) -> list[list[tuple[np.ndarray, np.ndarray, str]]]:
        """Of each row its kept sequences: ids, spans (starts and ends, flat), and the names of pictures."""
        ids, ids_at = self.lists("ids")
        spans, spans_at = self.lists("spans")
        (lengths, lengths_at), (counts, _) = self.lists("lengths"), self.lists("counts")
        pictures = self.bytes_of("pictures")
        rows = []
        for n in range(self.size):
            row, id_at, span_at = [], ids_at[n], spans_at[n]
            names = pictures[n].decode().split("\n") if pictures[n] else [""] * int(lengths_at[n + 1] - lengths_at[n])
            for s, seen in zip(range(lengths_at[n], lengths_at[n + 1]), names, strict=True):
                row.append((ids[id_at:id_at + lengths[s]], spans[span_at:span_at + 2 * counts[s]], seen))
                id_at, span_at = id_at + lengths[s], span_at + 2 * counts[s]
            rows.append(row)
        return rows


class Spool:
    """Rows in a temporary file, in the order in which they came."""

    def __init__(self, path: Path):
        self._path, self._sources, self.size = path, [], 0
        self._file = open(path, "wb")  # noqa: SIM115 - closed by close()

    def add(self, batch: bytes, source: int) -> Batch:
        """Append a batch of :func:`batch_of` that came from the given source."""
        self._file.write(len(batch).to_bytes(8, "little") + batch)
        self._sources.append(source)
        read = self._batch(batch, source, self.size)
        self.size += read.size
        return read

    def read(self) -> Iterator[Batch]:
        """All batches, one in memory at a time."""
        self._file.flush()
        first = 0
        with open(self._path, "rb") as f:
            for source in self._sources:
                batch = self._batch(f.read(int.from_bytes(f.read(8), "little")), source, first)
                yield batch
                first += batch.size

    def close(self) -> None:
        """Delete the file."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    @staticmethod
    def _batch(content: bytes, source: int, first: int) -> Batch:
        return Batch(next(iter(pa.ipc.open_stream(content))), source, first)
