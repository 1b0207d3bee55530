"""Token sequences in Arrow files: written as a stream, read memory-mapped, so that their number does not matter.

``train.arrow`` and ``valid.arrow`` in ``data/tokens/`` have the columns ``input_ids`` (list of int32), ``spans``
(list of int32: start and end of each learned range, one after the other), ``row`` (int32: the line of the JSONL
file, from 0), ``answer`` (int8: 1 of a chosen or good answer, -1 of a rejected or bad one, else 0; a pair is two
sequences, the chosen answer first) and ``pictures`` (names of files, in order, with spaces between). The manifest says
what they depend on beside the data, see :func:`encoding_key`.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gemma_tune.base.files import PACKAGE
from gemma_tune.base.versions import library_versions
from gemma_tune.encoding.columns import lists, numbers, texts
from gemma_tune.encoding.labels import labels_of

SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("spans", pa.list_(pa.int32())), ("row", pa.int32()),
                    ("answer", pa.int8()), ("pictures", pa.large_binary())])
PICTURES = "pictures"  # the column that tokens lack that were prepared before there were pictures
# What decides how a row becomes tokens: a change in one of these files makes older tokens unusable.
_SOURCES = ("encoding/*.py", "encoding/templates/*.jinja", "data/reading/*.py", "data/conversations/*.py",
            "base/strict_json.py", "base/content.py", "prepare/*.py")
_LIBRARIES = ("transformers", "tokenizers", "jinja2")
_BATCH, _MOST_TOKENS = 1_000, 1_000_000  # sequences and tokens that wait in memory for being written


def encoding_key(base: str) -> dict[str, str]:
    """What tokens depend on beside the rows and the settings: tokenizer and template, code and library versions.

    Args:
        base: fingerprint of the base model, which covers its tokenizer and template.
    """
    code = hashlib.sha256()
    for pattern in _SOURCES:
        found = sorted(PACKAGE.glob(pattern))
        if not found:  # a file that was moved would otherwise stop counting without a word
            raise FileNotFoundError(f"{PACKAGE / pattern} names no file of gemma-tune")
        for path in found:
            code.update(path.read_bytes())
    libraries = library_versions()
    return {"base": base, "code": code.hexdigest(), **{name: libraries[name] for name in _LIBRARIES}}


class TokenWriter:
    """Writes one side's sequences; a context manager. It counts rows, of them those with ``good`` and ``bad`` answers,
    sequences, and their tokens."""

    def __init__(self, path: Path):
        self.rows = self.sequences = self.tokens = self.trained = self.good = self.bad = 0
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._sink, SCHEMA)
        self._ids: list[np.ndarray] = []
        self._spans: list[np.ndarray] = []
        self._row: list[int] = []
        self._answer: list[int] = []
        self._pictures: list[bytes] = []
        self._waiting = 0

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()
        self._sink.close()

    def add(self, sequences: Sequence[tuple[np.ndarray, np.ndarray, str]], answers: Sequence[int] = (0,)) -> None:
        """The next row's sequences: ids (int32), spans (int32: start, end, start, …), and names of pictures.

        Args:
            answers: their marks, or one mark for all of them.
        """
        for n, (ids, spans, pictures) in enumerate(sequences):
            self._answer.append(answers[n] if len(answers) > 1 else answers[0])
            # Copies: the arrays are views of a whole block of rows with their texts.
            self._ids.append(ids.copy())
            self._spans.append(spans.copy())
            self._pictures.append(pictures.encode())
            self._row.append(self.rows)
            self.tokens += len(ids)
            self._waiting += len(ids)
            self.trained += int(spans[1::2].sum() - spans[::2].sum())
        self.rows += 1
        self.good, self.bad = self.good + (1 in answers), self.bad + (-1 in answers)
        self.sequences += len(sequences)
        if len(self._ids) >= _BATCH or self._waiting >= _MOST_TOKENS:
            self._flush()

    def _flush(self) -> None:
        if self._ids:
            columns = [lists(self._ids), lists(self._spans), numbers(self._row, np.int32),
                       numbers(self._answer, np.int8), texts(self._pictures)]
            self._writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
            self._ids, self._spans, self._row, self._answer, self._pictures, self._waiting = [], [], [], [], [], 0


def open_tokens(path: Path) -> Any:
    """The sequences as a memory-mapped ``datasets.Dataset`` that yields ``input_ids``, ``labels``, and as ``pictures``
    the names of their files."""
    from datasets import Dataset

    return Dataset.from_file(str(path)).with_transform(_with_labels)


def _with_labels(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    pairs = [(np.asarray(ids, np.int64), spans) for ids, spans in zip(batch["input_ids"], batch["spans"])]
    return {"input_ids": [ids for ids, _ in pairs], "labels": [labels_of(ids, spans) for ids, spans in pairs],
            "pictures": [names.decode().split() for names in batch.get(PICTURES, [b""] * len(pairs))]}


def lengths_of(dataset: Any) -> np.ndarray:
    """Tokens of each sequence (int64), without reading them."""
    import pyarrow.compute as pc

    column = dataset.data.column("input_ids")
    return pc.list_value_length(column).to_numpy().astype(np.int64)


def trained_of(dataset: Any) -> np.ndarray:
    """How many tokens of each sequence are learned (int64), without reading them: all in spans but the first of the
    sequence, which nothing predicts."""
    chunks = [np.zeros(0, np.int64)]
    for column in dataset.data.column("spans").chunks:
        ends = np.maximum(column.flatten().to_numpy().astype(np.int64), 1)
        sums = np.concatenate([[0], np.cumsum(ends[1::2] - ends[::2])])
        offsets = np.concatenate([[0], np.cumsum(column.value_lengths().to_numpy())]) // 2
        chunks.append(sums[offsets[1:]] - sums[offsets[:-1]])
    return np.concatenate(chunks)


def answers_of(dataset: Any) -> np.ndarray:
    """The mark of each sequence (int8), without reading them: 1 of a chosen or good answer, -1 of a rejected or bad
    one, 0 of what is no answer to be compared."""
    chunks = [np.zeros(0, np.int8), *(chunk.to_numpy() for chunk in dataset.data.column("answer").chunks)]
    return np.concatenate(chunks)


def new_tokens_in(dataset: Any, ids: Sequence[int]) -> set[int]:
    """Which of these ids the sequences have."""
    wanted, found = np.asarray(sorted(ids)), set()
    for column in dataset.data.column("input_ids").chunks if len(wanted) else ():
        tokens = column.flatten().to_numpy()
        found |= {*tokens[np.isin(tokens, wanted)].tolist()}
    return found


def pictures_in(dataset: Any) -> list[str]:
    """Names of all files of pictures, each once, in their order."""
    names: dict[str, None] = {}
    for chunk in dataset.data.column(PICTURES).chunks if PICTURES in dataset.data.column_names else ():
        if len(chunk.buffers()[2] or b""):  # of texts alone nothing is walked through
            names |= dict.fromkeys(b" ".join(chunk.to_pylist()).decode().split())
    return list(names)


def pictured(dataset: Any) -> np.ndarray:
    """Which sequences have pictures (bool), without reading them."""
    return _pictured(dataset.data)


def pictured_rows(path: Path) -> int:
    """How many rows of a file have pictures, without `datasets`, which takes a second to import."""
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        table = stream.read_all()
        return len(np.unique(table.column("row").to_numpy()[_pictured(table)]))


def _pictured(table: Any) -> np.ndarray:
    import pyarrow.compute as pc

    if PICTURES not in table.column_names:
        return np.zeros(len(table), bool)
    return pc.binary_length(table.column(PICTURES)).to_numpy() > 0


def digests_of(dataset: Any) -> set[bytes]:
    """What tells each sequence from others, see :func:`digest`."""
    found = set()
    for batch in dataset.data.to_batches():
        ids, ends = batch["input_ids"].values.to_numpy(), batch["input_ids"].offsets.to_numpy()
        names = batch[PICTURES].to_pylist() if PICTURES in batch.schema.names else itertools.repeat(b"")
        found |= {digest(ids[start:end], pictures.decode().split())
                  for start, end, pictures in zip(ends[:-1], ends[1:], names)}
    return found


def digest(ids: np.ndarray, pictures: Sequence[str] = ()) -> bytes:
    """Of one sequence's ids (tokens,), whatever their type, and the names of its pictures, whose tokens are all the
    same."""
    found = hashlib.blake2b(np.asarray(ids, np.int32).tobytes(), digest_size=16)
    found.update(" ".join(pictures).encode())
    return found.digest()


def liked(dataset: Any) -> Any:
    """The sequences that a model is to answer like, as another dataset of the same kind: not rejected and bad ones."""
    return those(dataset, answers_of(dataset) >= 0)


def those(dataset: Any, kept: np.ndarray) -> Any:
    """Some of the sequences (bool of each), as another dataset of the same kind."""
    from datasets import Dataset
    from datasets.table import MemoryMappedTable

    if kept.all():
        return dataset
    table = dataset.data.table.filter(pa.array(kept))
    return Dataset(MemoryMappedTable(table, "")).with_transform(_with_labels)
