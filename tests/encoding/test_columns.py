"""Arrow columns that are made and read without pandas, as pyarrow itself would make them."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from gemma_tune.encoding.columns import array_of, hashes, lists, numbers, texts


def read_back(column: pa.Array) -> pa.Array:
    """As an Arrow stream gives it back."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pa.schema([("x", column.type)])) as writer:
        writer.write_batch(pa.record_batch([column], ["x"]))
    return next(iter(pa.ipc.open_stream(sink.getvalue()))).column("x")


@pytest.mark.parametrize(("made", "kind", "values"), [
    (lambda values: numbers(values, np.int64), pa.int64(), [3, -1, 2**62]),
    (lambda values: numbers(values, np.uint64), pa.uint64(), [2**64 - 1, 0]),
    (lambda values: numbers(np.array(values)[::2], np.int8), pa.int8(), [1, 0, -1]),
    (texts, pa.large_binary(), [b"", "好".encode(), b"\0x", b""]),
    (lambda values: hashes(values, 16), pa.binary(16), [b"0123456789abcdef", b"\0" * 16]),
    (lambda values: lists([np.array(v, np.int32) for v in values]), pa.list_(pa.int32()), [[], [1, 2], [], [2**31 - 1]]),
    (lambda values: lists(values, np.int8), pa.list_(pa.int8()), [(0,), (1, -1)])])
def test_they_are_what_pyarrow_makes_of_the_same(made, kind, values):
    whole = values if kind != pa.int8() else [v for value in values for v in (value, 0)]  # of which every other is taken
    for column in (made(whole), read_back(made(whole))):
        column.validate(full=True)
        assert column.equals(pa.array(values, kind))
    assert read_back(made([])).equals(pa.array([], kind))


def test_numbers_of_a_part_of_a_column_and_of_an_empty_one():
    column = read_back(numbers(range(5), np.uint64))
    assert array_of(column).dtype == np.uint64 and array_of(column[1:3]).tolist() == [1, 2]
    nothing = read_back(lists([[], []]))
    assert array_of(nothing.values).tolist() == [] and array_of(nothing.offsets).tolist() == [0, 0, 0]


def test_data_are_prepared_without_pandas(tiny, data):
    trace = subprocess.run([sys.executable, "-m", "gemma_tune", "prepare", data, "--model", tiny], capture_output=True,
                           text=True, timeout=120, env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"})
    assert trace.returncode == 0, trace.stderr[-2000:]
    loaded = {line.rsplit("|", 1)[-1].strip() for line in trace.stderr.splitlines() if line.startswith("import time:")}
    assert "pyarrow" in loaded and "pandas" not in loaded
