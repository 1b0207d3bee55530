"""Tables in which many rows share what is stored once: memory follows what is read, not what it stands for."""

import pyarrow as pa
import pytest
from pyarrow import parquet

from gemma_tune.base.errors import UserError
from gemma_tune.data.reading import arrow_rows
from gemma_tune.data.reading.sources import read_blocks, source_of

ROWS, LONG = 150, "You are a careful analyst. " * 2000  # 54 kB, 8 MB in all rows
SIZE = 1 << 18


def shared(make) -> pa.Table:
    return pa.table({"system": make(pa.array([0] * ROWS), pa.array([LONG])), "user": [f"q {n}" for n in range(ROWS)]})


def texts(table: pa.Table, path, **settings):
    parquet.write_table(table, path, compression="zstd", **settings)


def dictionary(path):
    texts(shared(pa.DictionaryArray.from_arrays), path)


def strings(path):
    texts(shared(lambda indices, values: values.take(indices)), path)


def beginnings(path):
    table = pa.table({"system": [f"{LONG}{n}" for n in range(ROWS)], "user": [f"q {n}" for n in range(ROWS)]})
    texts(table, path, use_dictionary=False, column_encoding={"system": "DELTA_BYTE_ARRAY"})


def turns(path):
    texts(pa.table({"messages": [[{"role": "system", "content": LONG}, {"role": "user", "content": f"q {n}"}]
                                 for n in range(ROWS)]}), path)


def ipc(path):
    table = shared(pa.DictionaryArray.from_arrays)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def runs(path):
    ends = pa.array([ROWS], pa.int32())
    table = shared(lambda indices, values: pa.RunEndEncodedArray.from_arrays(ends, values))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


@pytest.fixture
def pool():
    """Called, it counts Arrow's memory from then on."""
    before = pa.default_memory_pool()
    counted = pa.proxy_memory_pool(before)
    yield lambda: pa.set_memory_pool(counted) or counted
    pa.set_memory_pool(before)


@pytest.mark.parametrize("make", [dictionary, strings, beginnings, turns, ipc, runs], ids=lambda f: f.__name__)
def test_what_rows_share_is_not_written_out_for_all_of_them(make, tmp_path, pool):
    path = tmp_path / ("rows.arrow" if make in (ipc, runs) else "rows.parquet")
    make(path)
    number = 0
    assert path.stat().st_size < 100_000
    counted = pool()
    for block in read_blocks(source_of(path), SIZE):
        rows = list(block.rows())
        assert len(rows) * len(LONG) <= SIZE
        for row in rows:
            if make is turns:
                assert row.value["messages"] == [{"role": "system", "content": LONG},
                                                 {"role": "user", "content": f"q {number}"}]
            else:
                assert row.value["user"] == f"q {number}" and row.value["system"].startswith(LONG)
            number += 1
            assert row.line == number
    assert number == ROWS and counted.max_memory() < 4_000_000


def test_lists_whose_texts_begin_in_a_dictionary_and_go_on_without(tmp_path):
    rows = [[{"role": "user", "content": f"{n} " * 40}] * 2 for n in range(900)]
    texts(pa.table({"messages": rows}), tmp_path / "rows.parquet", dictionary_pagesize_limit=20_000,
          data_page_size=4000, write_batch_size=50)
    read = [row.value["messages"] for block in read_blocks(source_of(tmp_path / "rows.parquet"), 10_000)
            for row in block.rows()]
    assert read == rows


def test_a_row_that_is_larger_than_any_conversation(tmp_path, monkeypatch):
    monkeypatch.setattr(arrow_rows, "MAX_ROW", 1 << 20)
    values = pa.ListArray.from_arrays([0, 1, 40], pa.DictionaryArray.from_arrays([0] * 40, [LONG]))
    texts(pa.table({"messages": values}), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows\.parquet:2: this row is too long"):
        list(read_blocks(source_of(tmp_path / "rows.parquet"), SIZE))
