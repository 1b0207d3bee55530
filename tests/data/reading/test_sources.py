"""Sources: which files names stand for, and what is read from each kind, in pieces of any size."""

from __future__ import annotations

import codecs
import csv
import datetime
import decimal
import gzip
import io
import json
import os
import pickle
import random
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from gemma_tune.base.errors import BAD_INPUT, WORK_FAILED, UserError
from gemma_tune.base.listener import Listener
from gemma_tune.data.reading import json_rows, json_window
from gemma_tune.data.reading.names import How
from gemma_tune.data.reading.sources import Row, Source, find_sources, read_blocks, source_of
from gemma_tune.data.reading.text import east_asian
from support.hub import LoopbackHub
from support.listener import Said

# The same examples every time. To look for more, raise max_examples and leave derandomize out.
same_examples = settings(derandomize=True, database=None, deadline=None, max_examples=150, suppress_health_check=[
    HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
SIZES = (1, 3, 16, 1 << 20)


def write(content: str | bytes, name: str = "rows.jsonl") -> Source:
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    return source_of(Path(name))


def rows_of(source: Source, size: int = 1 << 20) -> list[Row]:
    """Rows as a worker process would see them."""
    return [row for block in read_blocks(source, size) for row in pickle.loads(pickle.dumps(block)).rows()]


def outcome(source: Source, size: int) -> list[Row] | str:
    try:
        return rows_of(source, size)
    except UserError as e:
        assert e.hint and e.exit_code == BAD_INPUT
        return e.message


def read(content: str | bytes, name: str = "rows.jsonl") -> list[Row] | str:
    """Rows of a file, or the error, which must not depend on how much is read at once."""
    source = write(content, name)
    results = [outcome(source, size) for size in SIZES]
    assert all(result == results[0] for result in results), results
    return results[0]


def values(content: str | bytes, name: str = "rows.jsonl") -> list[Any]:
    found = read(content, name)
    assert isinstance(found, list), found
    assert not [row for row in found if row.error]
    return [row.value for row in found]


# --- JSONL and JSON

@pytest.mark.parametrize("text, expected", [
    ('{"a": 1}\n{"a": 2}\n', [(1, {"a": 1}), (2, {"a": 2})]),
    ('\n {"a": 1} \r\n\t\n{"a": 2}', [(2, {"a": 1}), (4, {"a": 2})]),
    ('\ufeff{"a": 1}\n\ufeff{"a": 2}', [(1, {"a": 1}), (2, {"a": 2})]),
    ('{"a": "x\u2028y\x85"}\n{"a": 2}', [(1, {"a": "x\u2028y\x85"}), (2, {"a": 2})]),
    ('[{"a": 1},\n\n{"a": [2, {"b": "]},{"}]}\n,{"a": 3}]', [(1, {"a": 1}), (3, {"a": [2, {"b": "]},{"}]}), (4, {"a": 3})]),
    ('[12, -3.5e+2,\n"\\ud83d\\ude00", null , true]', [(1, 12), (2, -350.0), (3, "😀"), (4, None), (5, True)]),
    ('{"a": 1,\n"b": [1]}', [(1, {"a": 1, "b": [1]})]),
    ('\n{"messages": [\n{"role": "user", "content": "a"}]}', [(2, {"messages": [{"role": "user", "content": "a"}]})]),
    ('{"a": [{}]}\n{"a": [{}]}', [(1, {"a": [{}]}), (2, {"a": [{}]})]),
    ("[1]\n", [(1, 1)]),
    ("7", [(1, 7)]),
], ids=["lines", "blank lines", "byte order marks", "only line feeds", "array", "array of anything", "one object",
        "one row", "lines that look wrapped", "array in one line", "number"])
def test_layouts(text, expected):
    assert read(text) == [Row("rows.jsonl", line, value) for line, value in expected]


@pytest.mark.parametrize("text, expected", [
    ('{"data": [{"a": 1}, {"a": 2}]}', [(1, {"a": 1}), (2, {"a": 2})]),
    ('{"version": "1", "n": 12,\n"rows": [\n{"a": 1},\n{"a": 2}\n],\n"tags": ["x", "y"], "by": {"z": []}}',
     [(3, {"a": 1}), (4, {"a": 2})]),
    ('{"ids": [1, 2],\n"rows": [{"a": "]"}]}', [(2, {"a": "]"})]),
    # Not the wrapping of a list of rows, but a row: by its keys, before or behind, or because it holds turns.
    ('{"sources": [{"a": 1}], "question": "q"}', None),
    ('{"answer": "q",\n"sources": [{"a": 1}]}', None),
    ('{"tools": [{"a": 1}]}', None),
    ('{"dialog": [{"role": "user", "content": "a"}]}', None),
    ('{"dialog": [{"from": "human",\n"value": "a"}]}', None),
    ('{"dialogue": [{"speaker": "human", "utterance": "a"}]}', None),
    ('{"contents": [{"role": "user", "parts": [{"text": "a"}]}]}', None),
    ('{"rows": [{"contents": [{"role": "user"}]}]}', [(1, {"contents": [{"role": "user"}]})]),
    ('{"train": [{"a": 1}], "test": [{"a": 1}]}', None),
    ('{"data": [{"a": 1}, 2]}', None),
    ('{"data": []}', None),
    ('{"data": {"rows": [{"a": 1}]}}', None),
])
def test_an_object_may_wrap_one_list_of_rows(text, expected):
    whole = [(1, json.loads(text))]
    assert read(text) == [Row("rows.jsonl", line, value) for line, value in expected or whole]


def test_a_long_first_line_is_looked_at_like_any_other(monkeypatch):
    monkeypatch.setattr(json_rows, "_LONG", 4)
    assert values('{"data": [{"a": 1}, {"a": 2}]}') == [{"a": 1}, {"a": 2}]
    assert values('{"data": [{"a": 1}]}\n{"b": 2}') == [{"data": [{"a": 1}]}, {"b": 2}]
    assert values('{"text": "long enough"}\n{"b": 2}') == [{"text": "long enough"}, {"b": 2}]
    assert [r.error is None for r in read('{"text": "long" enough"}\n{"b": 2}')] == [False, True]


@pytest.mark.parametrize("text, message", [
    ("", "rows.jsonl is empty"),
    (" \n\u2003\n", "rows.jsonl is empty"),
    ("\n[ ]", "rows.jsonl is an empty list"),
    ('[{"a": 1},\n {"a" 2}]', "rows.jsonl:2: not valid JSON: Expecting ':' delimiter at column 7"),
    ('[{"a": 1},   {"a": tru}]', "rows.jsonl:1: not valid JSON: Expecting value at column 20"),
    ('[{"a": 1}\n{"a": 2}]', "rows.jsonl:2: not valid JSON: expected ',' or ']'"),
    ('[{"a": "\n"}]', "rows.jsonl:1: not valid JSON: Invalid control character at column 9"),
    ('[{"a": "x}]', "rows.jsonl:1: not valid JSON: Unterminated string starting at column 8"),
    ("[1, 2", "rows.jsonl:1: not valid JSON: expected ',' or ']'"),
    ("[1]\n\n x", "rows.jsonl:3: there is more after the end of the list"),
    ('{"a": 1,\n"b" 2}', "rows.jsonl:2: not valid JSON: Expecting ':' delimiter at column 5"),
    ('{"a": 1\n"b": 2}', "rows.jsonl:2: not valid JSON: Expecting ',' delimiter at column 1"),
    ('{"a": 1,\n}', "rows.jsonl:2: not valid JSON: Expecting property name enclosed in double quotes at column 1"),
    ('{\n"a": 1}\n{\n"a": 2}', "rows.jsonl:3: not valid JSON: Extra data at column 1"),
    ('{\n"a": [NaN]}', "rows.jsonl:1: not valid JSON: NaN is not JSON"),
    ('{"data": [\n {"a": 1},\n {"a" 2}]}', "rows.jsonl:3: not valid JSON: Expecting ':' delimiter at column 7"),
    ("[" + "[" * 5000, "rows.jsonl:1: not valid JSON: nested too deeply"),
])
def test_broken_documents(text, message):
    assert read(text) == message


@pytest.mark.parametrize("value, error", [
    ('{"a": [NaN]}', "NaN is not JSON"), ('{"a": -Infinity}', "-Infinity is not JSON"),
    ('{"a": 1e999}', "the number 1e999 is too large"), ('{"a": ' + "7" * 5000 + "}", f"the number {'7' * 24}… is too large"),
    ("[" * 300 + "]" * 300, "nested too deeply")], ids=["NaN", "Infinity", "float", "integer", "depth"])
def test_values_that_cannot_be_kept_are_errors_of_their_row(value, error):
    for text in (f'{{"a": 1}}\n{value}\n{{"b": 2}}', f'[{{"a": 1}},\n{value},\n{{"b": 2}}]'):
        good, bad, other = read(text)
        assert bad == Row("rows.jsonl", 2, value, f"not valid JSON: {error}")
        assert (good.value, other.value) == ({"a": 1}, {"b": 2})


def test_a_broken_line_is_an_error_of_its_row():
    first, broken, last = read('{"a": 1}\n{"a": 1\r\n{"a": 2}\n')
    assert broken == Row("rows.jsonl", 2, '{"a": 1', "not valid JSON: Expecting ',' delimiter at column 9")
    assert (first.value, last.value) == ({"a": 1}, {"a": 2})


@pytest.mark.parametrize("text", ['{"a": "' + "x" * 5000, '[{"a": "' + "x" * 5000, '{"a": 1,\n"b": "' + "x" * 5000])
def test_what_never_ends_is_given_up(monkeypatch, text):
    monkeypatch.setattr(json_window, "MAX_ROW", 1000)
    monkeypatch.setattr(json_rows, "MAX_ROW", 1000)
    assert "what begins here is too long for a row" in outcome(write(text), 100)


plain = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False),
                               st.text(max_size=8)),
                     lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
                     max_leaves=8)


@same_examples
@given(st.lists(plain, min_size=1, max_size=8), st.booleans(), st.sampled_from([None, 0, 2]), st.booleans(), st.integers(1, 40))
def test_rows_come_out_as_they_went_in(content, ascii_only, indent, array, size):
    if array:
        text = json.dumps(content, ensure_ascii=ascii_only, indent=indent)
    else:  # an array as the first line would make it a document, and a single object can be a wrapping
        content = ["first", *content]
        text = "\n".join(json.dumps(value, ensure_ascii=ascii_only) for value in content)
    found = rows_of(write(text.encode("utf-8", "surrogatepass")), size)
    assert [row.value for row in found] == content
    if not array:
        assert [row.line for row in found] == list(range(1, len(content) + 1))


fragments = st.sampled_from(['{', '}', '[', ']', ',', ':', '"a"', '"b": 1', '{"a": 1}', '{"x": [1, 2]}', '\n', '\r\n', ' ',
                             '-1.5e+3', '1e999', 'NaN', 'null', 'tru', '"é\\u2028😀"', '"\\ud83d\\ude00"', '"un', '\\', '\t',
                             '{"messages": [{"role": "user"}]}', '\ufeff', '-Infinity', '[[', '\n{', '{"d": {"e": ["f", {}]}}',
                             '{"rows": [{"a": 1}]}'])


@settings(same_examples, max_examples=500)
@given(st.lists(fragments, max_size=9), st.sampled_from(["", "[", '{"a": 1,\n"k": ', '{"rows": [{"a": 1},']),
       st.lists(st.integers(1, 30), min_size=2, max_size=2))
def test_how_much_is_read_at_once_changes_nothing(parts, start, sizes):
    end = {"": "", "[": "]", "{": "}"}[start[:1]]
    source = write(start + "".join(parts) + ("]" if "rows" in start else "") + end)
    whole = outcome(source, 1 << 20)
    for size in sizes:
        assert outcome(source, size) == whole


# --- encodings and compression

TEXT = '{"a": "é 中 😀"}\n{"b": "\u2028"}\n'
VALUES = [{"a": "é 中 😀"}, {"b": "\u2028"}]


@pytest.mark.parametrize("content", [
    TEXT.encode(), codecs.BOM_UTF8 + TEXT.encode(), codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
    codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"), TEXT.replace("\n", "\r\n").encode()],
    ids=["UTF-8", "with mark", "UTF-16 LE", "UTF-16 BE", "CRLF"])
def test_encodings(content):
    assert values(content) == VALUES
    assert values(gzip.compress(content), "rows.json.gz") == VALUES


PAD = '{"a": "' + "é" * 3000 + '"}\n'  # the fault lies behind what is looked at first


@pytest.mark.parametrize("content, message", [
    (b'{"a": 1}\n{"a": "caf\xe9"}', "rows.jsonl:2: not UTF-8 text (byte 0xe9) at offset 19"),
    (codecs.BOM_UTF8 + b'\n\n"\xe9"', "rows.jsonl:3: not UTF-8 text (byte 0xe9) at offset 6"),
    (PAD.encode() + b'{"a": "caf\xe9"}', f"rows.jsonl:2: not UTF-8 text (byte 0xe9) at offset {6000 + 10 + 10}"),
    (b'{"a": "\xe4\xb8', "rows.jsonl:1: not UTF-8 text (byte 0xe4) at offset 7"),
    (codecs.BOM_UTF16_LE + PAD.encode("utf-16-le") + b"\x00\xdc\n\x00",
     f"rows.jsonl:2: not UTF-16 text (byte 0x00) at offset {2 + 2 * 3010}"),
    (codecs.BOM_UTF16_BE + b"\x00", "rows.jsonl:1: not UTF-16 text (byte 0x00) at offset 2"),
    (b"\x7fELF\x02\x01\x00\xff", "rows.jsonl is a binary file (byte 6)"),
    (PAD.encode() + b'"\0"\xff', f"rows.jsonl is a binary file (byte {6000 + 10 + 1})"),
    (codecs.BOM_UTF16_LE + "😀\0".encode("utf-16-le"), "rows.jsonl is a binary file (byte 6)"),
    (TEXT.encode("utf-32"), "rows.jsonl is UTF-32 text, not UTF-8"),
    ('{"a": "é 中 😀"}\n'.encode("utf-16-le"), "rows.jsonl seems to be UTF-16 text without its byte order mark"),
    ("问题,答案\n天是什么颜色的？,蓝的。\n".encode("utf-16-be"), "rows.jsonl seems to be UTF-16 text without its byte order mark"),
])
def test_what_is_no_text(content, message):
    assert read(content) == message
    assert read(gzip.compress(content), "rows.json.gz") == message.replace("rows.jsonl", "rows.json.gz")
    if len(content) < 100:
        assert read(content, "rows.csv") == message.replace("rows.jsonl", "rows.csv")


@pytest.mark.parametrize("content, hint", [
    (gzip.compress(TEXT.encode(), mtime=0), "name end in .gz"), (zstandard.compress(TEXT.encode()), "name end in .zst"),
    (b"PAR1\0\0", "name end in .parquet"), (b"PK\x03\x04\0", "save it as CSV"), (b"\0", "UTF-8")])
def test_the_hint_says_what_the_file_is(content, hint):
    with pytest.raises(UserError) as caught:
        rows_of(write(content))
    assert hint in caught.value.hint


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_so_is_text_with_the_wide_spaces_that_chinese_paragraphs_begin_with(encoding):
    Path("book.txt").write_bytes(("\u3000\u3000今天天气很好，我们去公园散步。\r\n" * 9).encode(encoding))
    with pytest.raises(UserError, match="UTF-16 text without its byte order mark") as caught:
        list(read_blocks(source_of(Path("book.txt"))))
    assert f"--encoding {encoding}, or" in caught.value.hint


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_its_mark_is_read_with_the_name_that_is_proposed(encoding):
    Path("rows.csv").write_bytes("问题,答案\n天是什么颜色的？,蓝的。\n".encode(encoding))
    with pytest.raises(UserError) as caught:
        list(read_blocks(source_of(Path("rows.csv"))))
    assert f"--encoding {encoding}, or" in caught.value.hint
    [row] = [row for block in read_blocks(source_of(Path("rows.csv"), how=How(encoding=encoding))) for row in block.rows()]
    assert row.value == {"问题": "天是什么颜色的？", "答案": "蓝的。"}


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.GZ", "rows.jsonl.zst", "rows.json.zstd", "two.jsonl.gz", "two.jsonl.zst"])
def test_compressed_files(name):
    compress = gzip.compress if name.lower().endswith("gz") else zstandard.compress
    text = TEXT.encode()
    content = compress(text[:20]) + compress(text[20:]) if name.startswith("two") else compress(text)
    assert values(content, name) == VALUES
    assert values(compress(b"q;a\n1;2\n"), name.replace("jsonl", "csv").replace("json", "csv").replace("GZ", "csv.GZ")) \
        == [{"q": "1", "a": "2"}]


@pytest.mark.parametrize("ending, compress", [("gz", gzip.compress), ("zst", zstandard.compress)])
def test_compressed_files_that_are_damaged(ending, compress):
    text = b"".join(b'{"a": %d}\n' % random.Random(n).getrandbits(60) for n in range(300))
    whole = compress(text) if ending == "gz" else zstandard.ZstdCompressor(write_checksum=True).compress(text)
    for length in range(1, len(whole), 97):
        assert f"rows.jsonl.{ending} is damaged: " in outcome(write(whole[:length], f"rows.jsonl.{ending}"), 100)
    for content in (b'{"a": 1}\n', whole[:50] + b"\xff" * 20 + whole[70:], whole + b"and more"):
        assert f"rows.jsonl.{ending} is damaged: " in outcome(write(content, f"rows.jsonl.{ending}"), 100)
    assert outcome(write(b"", f"rows.jsonl.{ending}"), 100) == f"rows.jsonl.{ending} is empty"


# --- memory

@pytest.mark.parametrize("layout", ["lines", "array", "wrapped", "csv", "gzip", "one long line"])
def test_memory_does_not_grow_with_the_file(layout):
    text, count = "x" * 50_000, 600  # 30 MB
    line = json.dumps({"text": text})
    write_it: dict[str, Callable[[], Source]] = {
        "lines": lambda: write((line + "\n") * count),
        "array": lambda: write("[" + ",\n".join([line] * count) + "]"),
        "wrapped": lambda: write('{"rows": [' + ", ".join([line] * count) + "]}"),
        "csv": lambda: write("text,b\n" + f'"{text}",1\n' * count, "rows.csv"),
        "gzip": lambda: write(gzip.compress(((line + "\n") * count).encode(), 1), "rows.jsonl.gz"),
        "one long line": lambda: write("[" + ", ".join([line] * count) + "]"),
    }
    source = write_it[layout]()
    tracemalloc.start()
    try:
        assert sum(1 for block in read_blocks(source) for row in block.rows() if row.value["text"] == text) == count
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12e6


def test_blocks_say_how_much_is_done():
    for source in (write((json.dumps({"a": "x" * 100}) + "\n") * 500), write("a,b\n" + "1,2\n" * 9000, "rows.csv"),
                   write_table(pa.table({"a": [f"{n}" * 50 for n in range(1000)]}))):
        done = [block.done for block in read_blocks(source, 8000)]
        assert len(done) > 3 and done == sorted(done) and 0 < done[0] < 0.5 and done[-1] == 1.0


# --- CSV and TSV

def test_the_empty_rows_of_a_spreadsheet_are_no_rows():
    assert [(row.line, row.value) for row in read('q,a,b\n,,\n1,2,\n" ",,\n,,3\n,\n,,\n', "rows.csv")] == [
        (3, {"q": "1", "a": "2", "b": ""}), (4, {"q": " ", "a": "", "b": ""}), (5, {"q": "", "a": "", "b": "3"})]


def test_csv():
    text = ('question,answer,score\r\n"What, ""so"" now?","two\r\nlines",1\r\n\r\nplain,,\r\n" padded ",[1],3\r\n')
    assert read(text, "rows.csv") == [
        Row("rows.csv", 2, {"question": 'What, "so" now?', "answer": "two\r\nlines", "score": "1"}),
        Row("rows.csv", 5, {"question": "plain", "answer": "", "score": ""}),
        Row("rows.csv", 6, {"question": " padded ", "answer": "[1]", "score": "3"})]


@pytest.mark.parametrize("text, name", [
    ("q\ta\nx, y\tz\n", "rows.tsv"), ("q;a\n\"x, y\";z\n", "rows.csv"), ("q\ta\nx, y\tz\n", "rows.csv"),
    ("\n\nq,a\r\"x, y\",z\r", "rows.csv"), ("q, a\n\"x, y\", \"z\"\n", "rows.csv"), ("\ufeffq,a,\n\"x, y\",z,\n", "rows.csv"),
    (",q,a\n0,\"x, y\",z\n", "rows.csv"), (" q , a \n\"x, y\",z\n", "rows.csv")],
    ids=["TSV", "semicolons", "tabs", "old Mac", "spaces", "mark and trailing commas", "index of a data frame", "padded names"])
def test_tables_as_programs_write_them(text, name):
    assert values(text, name) == [{"q": "x, y", "a": "z"}]


def test_json_in_cells_is_left_to_the_format_which_reads_what_really_is_turns():
    from gemma_tune.data.conversations.formats import Formats

    messages = [{"role": "user", "content": 'say "hi"'}, {"role": "assistant", "content": "hi"}]
    out = io.StringIO()
    table = csv.writer(out)
    table.writerow(["messages", "tools"])
    table.writerow([json.dumps(messages), '[{"name": "f", "parameters": {}}]'])
    assert values(out.getvalue(), "rows.csv") == [
        {"messages": json.dumps(messages), "tools": '[{"name": "f", "parameters": {}}]'}]
    example = Formats().example(values(out.getvalue(), "rows.csv")[0])
    assert example.messages == messages
    assert example.tools[0]["function"]["name"] == "f"
    [value] = values('prompt,completion\n"[1, 2, 3]","{""a"": 1}"\n', "rows.csv")
    assert [m["content"] for m in Formats().example(value).messages] == ["[1, 2, 3]", '{"a": 1}']


def test_rows_that_do_not_fit_the_table():
    found = read('q,a\nx\n1,2\nx,y,z\n"a"b,c\n3,4\n', "rows.csv")
    assert [(row.line, row.value, row.error) for row in found] == [
        (2, "x", "not a row of this table: 1 cell where the header has 2"), (3, {"q": "1", "a": "2"}, None),
        (4, "x,y,z", "not a row of this table: 3 cells where the header has 2"),
        (5, '"a"b,c', "not valid CSV: ',' expected after '\"'"), (6, {"q": "3", "a": "4"}, None)]


@pytest.mark.parametrize("text, message", [
    ("", "rows.csv is empty"), ("\n \n", "rows.csv is empty"), ("q,a\n\n", "rows.csv has a header and no rows"),
    ("q,a\n,\n , \n", "rows.csv has a header and no rows"),
    ("q,a,q\n1,2,3\n", "rows.csv:1: two columns are named 'q'"), (",,\n1,2,3\n", "rows.csv:1: this is no header row"),
    (f"{'x' * 300},a\n1,2\n", "rows.csv:1: this is no header row"),
    ('q,a\n1,2\n3,"4\n5,6\n' + "7,8\n" * 99, "rows.csv:3: a quote that opens in this row is never closed")])
def test_tables_that_cannot_be_read(text, message):
    assert read(text, "rows.csv") == message


@same_examples
@given(st.lists(st.tuples(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6),
                          st.text(st.sampled_from('a,"\n\r ;\t'), max_size=6)), min_size=1, max_size=6),
       st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), st.integers(1, 20))
def test_tables_come_out_as_they_went_in(content, quoting, size):
    out = io.StringIO(newline="")
    table, content = csv.writer(out, quoting=quoting), [*content, ("q", "a")]
    table.writerows([("question", "answer"), *content])
    found = rows_of(write(out.getvalue(), "rows.csv"), size)
    read = [(row.value["question"], row.value["answer"]) for row in found]
    if quoting == csv.QUOTE_ALL:
        assert read == content
    else:  # delimiters alone are a spreadsheet's empty row
        assert [row for row in read if any(map(str.strip, row))] == [row for row in content if any(map(str.strip, row))]


# --- Parquet

def write_table(table: pa.Table, name: str = "rows.parquet", **how: Any) -> Source:
    parquet.write_table(table, name, **how)
    return source_of(Path(name))


def test_parquet():
    messages = [{"role": "user", "content": "a", "tool_calls": None},
                {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"x": 1, "y": None}}]}]
    source = write_table(pa.table({"messages": [messages] * 5, "n": range(5)}), row_group_size=2)
    kept = [{"role": "user", "content": "a"},
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}]
    for size in (1, 1 << 20):
        assert rows_of(source, size) == [Row("rows.parquet", n + 1, {"messages": kept, "n": n}) for n in range(5)]


def test_parquet_values_become_json():
    table = pa.table({
        "time": pa.array([datetime.datetime(2024, 5, 6, 7, 8)]), "day": pa.array([datetime.date(2024, 5, 6)]),
        "price": pa.array([decimal.Decimal("1.50")]), "score": pa.array([float("nan")]), "half": pa.array([1.5], pa.float16()),
        "raw": pa.array(["é".encode()]), "none": pa.array([None]), "kind": pa.array(["a"]).dictionary_encode(),
        "map": pa.array([[("k", 1.0)]], pa.map_(pa.string(), pa.float64())), "list": pa.array([[None, float("inf")]]),
        "json": pa.array(['{"a": [1]}'], pa.json_()), "text": pa.array(["[1]"])})
    [row] = rows_of(write_table(table))
    assert row.error is None
    json.dumps(row.value, allow_nan=False)
    assert row.value == {
        "time": "2024-05-06T07:08:00", "day": "2024-05-06", "price": "1.50", "score": None, "half": 1.5, "raw": "é",
        "none": None, "kind": "a", "map": {"k": 1.0}, "list": [None, None], "json": {"a": [1]}, "text": "[1]"}


def test_bytes_in_parquet_harm_only_who_wants_to_learn_from_them():
    from gemma_tune.data.conversations.formats import Formats, RowError

    good, seen = rows_of(write_table(pa.table({"text": ["a", "b"], "thumb": [None, b"\x89RAW"]})))
    assert good == Row("rows.parquet", 1, {"text": "a", "thumb": None})
    assert seen == Row("rows.parquet", 2, {"text": "b", "thumb": {"not text": "4 bytes of binary data"}})
    assert Formats().example(seen.value).text == "b"
    for value in ({"prompt": seen.value["thumb"], "completion": "x"},
                  {"image": seen.value["thumb"], "conversations": [{"from": "human", "value": "What?"},
                                                                   {"from": "gpt", "value": "A cat."}]}):
        with pytest.raises(RowError) as refused:
            Formats().example(value)
        assert refused.value.code in ("not_text", "picture")


def test_compressed_parquet():
    source = write_table(pa.table({"a": [1, 2]}))
    assert values(gzip.compress(source.path.read_bytes()), "rows.parquet.gz") == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b"PAR1" * 9, lambda b: b"", lambda b: b[:4] + b"\xff" * 60 + b[64:]])
def test_parquet_that_is_damaged(damage):
    content = write_table(pa.table({"a": [f"text {n}" for n in range(100)]})).path.read_bytes()
    with pytest.raises(UserError, match="^bad.parquet is not a Parquet file, or damaged: .+"):
        rows_of(write(damage(content), "bad.parquet"))


def test_parquet_without_rows():
    with pytest.raises(UserError, match="(?m)^rows.parquet is empty$"):
        rows_of(write_table(pa.table({"a": pa.array([], pa.string())})))


# --- which sources names stand for

@pytest.fixture
def tree() -> None:
    """A directory with data files of every kind among others."""
    for name in ("one.jsonl", "data/b.csv", "data/a.JSON", "data/deep/c.tsv.gz", "data/deep/d.parquet", "data/README.md",
                 "data/.hidden.jsonl", "data/.cache/e.jsonl", "data/runs/x/manifest.json", "data/runs/x/data/train.jsonl",
                 "data/keep/stdin-0.jsonl", "notes.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("{}")


def found(*names: str) -> list[tuple[str, str]]:
    return [(source.name, source.kind) for source in find_sources(names, Path("data/keep"))]


ALL = [("data/a.JSON", "jsonl-or-json"), ("data/b.csv", "csv"), ("data/deep/c.tsv.gz", "tsv"), ("data/deep/d.parquet", "parquet")]


def test_names_of_files(tree):
    assert found("notes.txt", "./one.jsonl") == [("notes.txt", "jsonl-or-json"), ("one.jsonl", "jsonl-or-json")]
    assert found() == []
    [source] = find_sources(["one.jsonl"], Path("keep"))
    assert source == Source("one.jsonl", Path("one.jsonl"), "jsonl-or-json", 2, argument="one.jsonl")
    assert not Path("keep").exists()


def test_directories_are_searched_for_data(tree):
    assert found("data") == found("data/") == ALL
    assert [name for name, _ in found("data/deep", "one.jsonl")] == ["data/deep/c.tsv.gz", "data/deep/d.parquet", "one.jsonl"]
    assert found("data/runs/x/data") == [("data/runs/x/data/train.jsonl", "jsonl-or-json")]  # asked for by name
    notes = Said()
    find_sources(["data", "one.jsonl"], Path("data/keep"), notes)
    assert notes.notes == ["data: 4 data files; 1 other passed over (.md)"]


def test_a_run_is_no_data(tree):
    """As in `gemma-tune train runs/x`, which would learn what else lies there in the newest run."""
    assert found("data/runs/x") == [("data/runs/x/data/train.jsonl", "jsonl-or-json"), ("data/runs/x/manifest.json", "jsonl-or-json")]
    Path("data/runs/x/manifest.json").write_text('{"schema": 1, "gemma_tune": "0.1", "stages": {}}')
    error = refused("data/runs/x/")
    assert error.message == "data/runs/x is a run, and no data"
    assert error.hint == ("to work on it, name it behind --run: --run data/runs/x; to prepare its rows for another run, name them: "
                          "data/runs/x/data/train.jsonl")
    Path("data/runs/x/data/train.jsonl").unlink()
    assert refused("data/runs/x").hint.endswith("--run data/runs/x")
    with pytest.raises(UserError, match="data/runs/x is this run itself, and no data") as own:
        find_sources(["data/runs/x"], Path("data/runs/x/inputs"))
    assert own.value.hint == "name the files in it that are data, each by its own name"


def test_globs_leave_out_what_runs_wrote(tree):
    assert Path("data/runs/x/data/train.jsonl").exists()
    assert [name for name, _ in found("**/*.jsonl")] == ["one.jsonl"]
    assert refused("data/runs/*/data/*.jsonl").message.endswith("but what a run wrote, which only counts by its full name")


def test_globs(tree):
    assert [name for name, _ in found("data/*")] == ["data/a.JSON", "data/b.csv"]
    assert [name for name, _ in found("data/**/*.[tc]s*")] == ["data/b.csv", "data/deep/c.tsv.gz"]
    assert found("*.txt") == [("notes.txt", "jsonl-or-json")]
    Path("odd[1].jsonl").write_text("{}")
    assert [name for name, _ in found("odd[1].jsonl")] == ["odd[1].jsonl"], "a file of that name is meant"


def test_a_file_is_read_once(tree):
    os.symlink("one.jsonl", "link.jsonl")
    assert [name for name, _ in found("data/b.csv", "data", "one.jsonl", "one.jsonl", "link.jsonl")] \
        == ["data/b.csv", "data/a.JSON", "data/deep/c.tsv.gz", "data/deep/d.parquet", "one.jsonl"]


def refused(*names: str) -> UserError:
    with pytest.raises(UserError) as caught:
        find_sources(names, Path("keep"))
    assert caught.value.hint
    return caught.value


def test_all_problems_are_named_together(tree, monkeypatch):
    assert refused("none.jsonl").message == "there is no file none.jsonl"
    Path("empty").mkdir()
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr("gemma_tune.data.reading.hub_rows.find", lambda *_: pytest.fail("the Hub is asked although a file is missing"))
    error = refused("none.jsonl", "one.jsonl", "empty", "*.xyz", "", "~nobody-here/x", "x" * 300, "-", "hf:a/b")
    assert error.message == "6 data sources cannot be read"
    assert error.exit_code == BAD_INPUT
    assert error.problems == (
        "there is no file none.jsonl",
        "empty is a directory without data files (.jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow) (name the files, or another directory)",
        "no file matches *.xyz", "a data file's name is empty", "there is no file ~nobody-here/x", f"there is no file {'x' * 300}")


@pytest.mark.parametrize("name", ["sft.yaml", "SFT.YML"])
def test_settings_of_another_program_are_no_data(tree, name):
    Path(name).write_text("model_name_or_path: a/b\nlora_rank: 8\n")
    error = refused(name)
    assert error.message == f"{name} is a settings file, by its name, and no data" and f"--config {name}" in error.hint
    assert source_of(Path(name), how=How(format="text")).kind == "text", "which is what somebody asked for"
    Path(name).write_text('{"prompt": "q", "completion": "a"}\n')
    assert [source.kind for source in find_sources([name], Path("keep"))] == ["jsonl-or-json"]


@pytest.mark.parametrize("folder", [".", "data"])
def test_an_entry_that_is_named_alone_has_a_way_out(tree, folder):
    Path(folder).mkdir(exist_ok=True)
    info = Path(folder, "dataset_info.json")
    info.write_text(json.dumps({name: {"file_name": f"{name}.jsonl"} for name in ("identity", "mine")}))
    assert refused("mine").hint == f"an entry of dataset_info.json is named with it: {info}:mine"
    assert refused("identity, mine,other").hint.endswith(f" {info}:identity {info}:mine")
    assert refused("other").message == "there is no file other" and "dataset_info" not in refused("other").hint
    info.write_text("{")
    assert "dataset_info" not in refused("mine").hint


def test_the_value_of_a_switch_is_no_file(tree):
    for value in ("true", "False"):
        assert refused(value).message == f"there is no file {value}" and "a switch takes no value" in refused(value).hint
    assert "switch" not in refused("true.jsonl").hint


def test_files_that_cannot_be_read(tree, monkeypatch):
    """The superuser may read everything, so the answer is simulated."""
    if hasattr(os, "mkfifo"):
        os.mkfifo("pipe")
        assert refused("pipe").message == "pipe is not a regular file; save its content to a file first"
    monkeypatch.setattr("gemma_tune.data.reading.sources.os.access", lambda path, mode: path.name != "one.jsonl")
    assert refused("one.jsonl").message == "no permission to read one.jsonl"


# --- standard input

@pytest.fixture
def piped(monkeypatch) -> Callable[[bytes], None]:
    def pipe(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    return pipe


def test_standard_input_is_kept(piped):
    piped(TEXT.encode())
    [source] = find_sources(["-"], Path("keep"))
    assert (source.name, source.kind) == ("<stdin>", "jsonl-or-json")
    assert source.path.read_bytes() == TEXT.encode()
    assert rows_of(source) == [Row("<stdin>", 1, VALUES[0]), Row("<stdin>", 2, VALUES[1])]
    piped(TEXT.encode())
    assert find_sources(["-"], Path("keep")) == [source]
    assert [p.name for p in Path("keep").iterdir()] == [source.path.name]
    assert source.path.name.startswith("stdin-") and source.path.suffix == ".jsonl"


def test_standard_input_may_be_compressed_or_parquet(piped):
    for content in (gzip.compress(TEXT.encode()), zstandard.compress(TEXT.encode()),
                    write_table(pa.table({"a": [1]})).path.read_bytes()):
        piped(content)
        [source] = find_sources(["-"], Path("keep"))
        assert [row.value for row in rows_of(source)] in (VALUES, [{"a": 1}])


@pytest.mark.parametrize("packed", [gzip.compress, zstandard.compress])
def test_standard_input_may_be_a_compressed_text(piped, packed):
    for content, values in (("Only words.\n", [{"text": "Only words.\n"}]), (TEXT, VALUES)):
        piped(packed(content.encode()))
        [source] = find_sources(["-"], Path("keep"), how=How(format="text"))
        assert [row.value for row in rows_of(source)] == values


@pytest.mark.parametrize("content", [b"q,a\n1,2\n", b"\xef\xbb\xbfq;a\n1;2\n", b"q\ta\n1\t2\n"])
def test_standard_input_may_be_a_table(piped, content):
    piped(content)
    [source] = find_sources(["-"], Path("keep"))
    assert [row.value for row in rows_of(source)] == [{"q": "1", "a": "2"}]


def test_standard_input_that_has_nothing(piped, monkeypatch):
    piped(b"")
    assert refused("-").message == "standard input is empty"
    assert list(Path("keep").iterdir()) == []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    error = refused("-")
    assert "nothing is piped" in error.message and "<" in error.hint


# --- datasets on the Hub

ID = "org/tiny-Chats"
GOOD, OTHER = "hf_" + "G" * 34, "hf_" + "O" * 34


def chats(count: int, word: str = "a") -> list[dict[str, Any]]:
    return [{"messages": [{"role": "user", "content": f"{word}{n}"}, {"role": "assistant", "content": "b"}]} for n in range(count)]


def repository(folder: Path, **files: list[Any]) -> Path:
    """A folder with JSONL files; ``train`` becomes data/train.jsonl."""
    for name, content in files.items():
        (folder / "data").mkdir(parents=True, exist_ok=True)
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in content))
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[LoopbackHub]:
    """A hub, and this process as its anonymous visitor."""
    with LoopbackHub() as server:
        server.isolate(monkeypatch, tmp_path / "home")
        server.isolate_datasets(monkeypatch, tmp_path / "home")
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        yield server


def hub_rows(name: str, notes: Listener | None = None) -> list[Row]:
    [source] = find_sources([name], Path("keep"), notes)
    assert source.kind == "hf" and source.size is None and source.path.parent == Path("keep")
    return rows_of(source)


def test_a_dataset(hub):
    commit = hub.add_repo(f"datasets/{ID}", repository(Path("repo"), train=chats(30), test=chats(2)))
    notes = Said()
    found = hub_rows(f"hf:{ID}", notes)
    assert found == [Row(f"hf:{ID}:train", n + 1, value) for n, value in enumerate(chats(30))]
    assert notes.notes == [f"hf:{ID}:train: 30 rows of commit {commit[:12]}"]
    assert json.loads(Path("keep/hf-org-tiny-Chats.json").read_text()) == {
        "id": ID, "config": "default", "split": "train", "commit": commit}
    assert [row.value for row in hub_rows(f"hf:{ID}:test")] == chats(2)
    assert [len(hub_rows(f"hf:{ID}:train{part}")) for part in ("[:90%]", "[90%:]", "[:10%]")] == [27, 3, 3]
    assert len({p.name for p in Path("keep").iterdir()}) == 5, "each has a lock file of its own"


def test_a_dataset_is_of_one_commit_and_is_asked_for_once(hub, capfd):
    first = hub.add_repo(f"datasets/{ID}", repository(Path("repo"), train=chats(3)))
    hub_rows(f"hf:{ID}")
    lock = Path("keep/hf-org-tiny-Chats.json").stat()
    seen = len(hub.requests)
    hub_rows(f"hf:{ID}")
    assert len(hub.requests) == seen + 1 and "/revision/" not in hub.requests[-1].path
    assert Path("keep/hf-org-tiny-Chats.json").stat().st_mtime_ns == lock.st_mtime_ns
    assert all("/resolve/main/" not in request.path for request in hub.requests)
    second = hub.commit(f"datasets/{ID}", repository(Path("newer"), train=chats(4, "new")))
    assert [row.value for row in hub_rows(f"hf:{ID}")] == chats(4, "new")
    assert json.loads(Path("keep/hf-org-tiny-Chats.json").read_text())["commit"] == second
    assert [row.value for row in hub_rows(f"hf:{ID}@{first}")] == chats(3)
    hub.tag(f"datasets/{ID}", "v1", first)
    assert [row.value for row in hub_rows(f"hf:{ID}@v1")] == chats(3)
    assert capfd.readouterr().err == ""


def test_without_a_connection_the_commit_of_before_is_used(hub, monkeypatch):
    first = hub.add_repo(f"datasets/{ID}", repository(Path("repo"), train=chats(3)))
    hub_rows(f"hf:{ID}")
    hub.commit(f"datasets/{ID}", repository(Path("newer"), train=chats(4)))
    hub_rows(f"hf:{ID}@main")  # the newest in the cache is another commit
    hub.fail("/", 503)
    notes = Said()
    assert [row.value for row in hub_rows(f"hf:{ID}", notes)] == chats(3)
    assert "503" in notes.notes[0] and f"commit {first[:12]} is used, as before" in notes.notes[0]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    seen = len(hub.requests)
    assert len(hub_rows(f"hf:{ID}")) == 3
    assert len(hub.requests) == seen
    error = refused("hf:org/never-seen")
    assert error.exit_code == WORK_FAILED and "HF_HUB_OFFLINE" in error.message and "--model" not in error.hint
    # A commit that is not in the cache is not replaced by another one.
    lock = json.loads(Path("keep/hf-org-tiny-Chats.json").read_text()) | {"commit": "0" * 40}
    Path("keep/hf-org-tiny-Chats.json").write_text(json.dumps(lock))
    assert refused(f"hf:{ID}").exit_code == WORK_FAILED


def test_configs_and_splits_that_are_not_there(hub):
    folder = repository(Path("repo"), a=chats(1), b=chats(2), c=chats(3))
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: one\n  data_files:\n  - split: test\n    path: data/a.jsonl\n"
                                      "- config_name: two\n  data_files:\n  - split: x\n    path: data/b.jsonl\n"
                                      "  - split: y\n    path: data/c.jsonl\n---\n")
    hub.add_repo(f"datasets/{ID}", folder)
    assert len(hub_rows(f"hf:{ID}/one")) == 1
    assert hub_rows(f"hf:{ID}/two:y")[2] == Row(f"hf:{ID}/two:y", 3, chats(3)[2])
    error = refused(f"hf:{ID}")
    assert "one" in error.message and "two" in error.message and f"hf:{ID}/CONFIG" in error.hint
    assert "three" in refused(f"hf:{ID}/three").message
    error = refused(f"hf:{ID}/two")
    assert (error.message, error.hint) == (f"hf:{ID} has no split `train`, only x, y", f"name one: hf:{ID}/two:x")
    assert refused(f"hf:{ID}/two:train").message == f"hf:{ID} has no split 'train', only x, y"


def test_a_folder_of_the_dataset_s_name_is_not_meant(hub):
    Path("org/tiny-Chats").mkdir(parents=True)
    write(json.dumps(chats(1, "local")[0]), "org/tiny-Chats/test.jsonl")
    hub.add_repo(f"datasets/{ID}", repository(Path("repo"), train=chats(3)))
    assert [row.value for row in hub_rows(f"hf:{ID}")] == chats(3)


def test_datasets_that_cannot_be_had(hub, monkeypatch):
    error = refused(f"hf:{ID}")
    assert f"datasets/{ID} cannot be seen without a login" in error.message
    assert f"{hub.url}/datasets/{ID}" in error.hint and "--model" not in error.hint
    folder = repository(Path("repo"), train=chats(3))
    hub.add_repo("datasets/org/gated", folder, gated=True)
    assert "datasets/org/gated is gated" in refused("hf:org/gated").message
    hub.add_repo("datasets/org/here", folder)
    assert "no revision 'v9'" in refused("hf:org/here@v9").message
    (Path("repo") / "data" / "train.jsonl").write_text('{"a": 1}\n{"a" 2}\n' * 3)
    hub.add_repo("datasets/org/broken", folder)
    assert refused("hf:org/broken").message.startswith("hf:org/broken cannot be loaded: ")
    (Path("repo") / "data" / "train.jsonl").unlink()
    (Path("repo") / "notes.md").write_text("nothing")
    hub.add_repo("datasets/org/empty", folder)
    assert refused("hf:org/empty").message == "hf:org/empty holds no data files that can be read"
    (Path("repo") / "program.py").write_text("print()")
    hub.add_repo("datasets/org/program", folder)
    assert "made by a program" in refused("hf:org/program").message
    monkeypatch.setenv("HF_TOKEN", OTHER)
    assert "token of HF_TOKEN is not valid" in refused("hf:org/here").message
    monkeypatch.setenv("HF_TOKEN", hub.add_token(GOOD, accepted=["datasets/org/gated"]))
    assert len(hub_rows("hf:org/gated")) == 3
    assert not [p for p in Path("keep").iterdir() if p.name != "hf-org-gated.json"]


def test_datasets_without_a_place_to_keep_them(hub, tmp_path, monkeypatch):
    from datasets import config

    hub.add_repo(f"datasets/{ID}", repository(Path("repo"), train=chats(3)))
    Path("file").write_text("")
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "file" / "datasets")
    assert "HF_HOME" in refused(f"hf:{ID}").hint
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", "~nobody-here/datasets")
    error = refused(f"hf:{ID}")
    assert "the home directory in ~nobody-here/datasets is not known" in error.message and "HF_HOME" in error.hint


@pytest.mark.parametrize("name", ["hf:", "hf:squad", "hf:a/b/c/d", "hf:a/b:train@", "hf:../x", "hf:a b/c"])
def test_names_of_datasets_have_a_form(name):
    error = refused(name)
    assert "hf:org/name" in error.message + error.hint


@pytest.mark.parametrize(("encoding", "expected", "text"), [
    ("gbk", "GB18030", "问题,回答\n你好,您好！有什么可以帮您？\n"),
    ("gb18030", "GB18030", "question,answer\n请问3乘以11等于多少？,3乘以11等于33。\n"),
    ("big5", "BIG5", "問題,回答\n請問什麼是現金流量？,營業活動的現金減去資本支出。\n"),
    ("cp932", "CP932", "質問,回答\nこれは何ですか。,それは本です。\n"),
    ("cp949", "CP949", "질문,답변\n현금흐름이 무엇입니까?,회사의 돈입니다.\n"),
    ("cp1252", None, "q,a\nWo?,Tür\n"), ("cp1252", None, "q,a\nOù est la réponse à côté?,Elle est là, déjà prête.\n"),
    ("cp1250", None, "otázka,odpověď\nCo je to peněžní tok?,Jsou to peníze společnosti.\n"),
    ("ascii", None, "q,a\nx,y\n")])
def test_the_encoding_of_east_asian_text_is_told(encoding, expected, text):
    assert east_asian(text.encode(encoding)) == east_asian(50 * text.encode(encoding)) == expected


def test_a_misspelt_file_and_a_windows_file_have_a_way_out(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("chats.jsonl").write_text('{"a": 1}\n')
    assert refused("chat.jsonl").message == "there is no file chat.jsonl; did you mean chats.jsonl?"
    assert refused("other.jsonl").message == "there is no file other.jsonl"
    Path("my chats.csv").write_bytes("q,a\nWo?,Tür\n".encode("cp1252"))
    with pytest.raises(UserError, match=r"my chats.csv:2: not UTF-8 text") as raised:
        list(read_blocks(source_of(Path("my chats.csv"))))
    assert "--encoding windows-1252" in raised.value.hint
    assert "iconv -f windows-1252 -t utf-8 'my chats.csv' > 'my chats-utf8.csv'" in raised.value.hint
    Path("gb.csv").write_bytes("问题,回答\n什么是自由现金流？,经营现金流减去资本支出。\n".encode("gb18030"))
    with pytest.raises(UserError, match=r"gb.csv:1: not UTF-8 text") as raised:
        list(read_blocks(source_of(Path("gb.csv"))))
    assert "--encoding gb18030, or save it as UTF-8" in raised.value.hint
    assert "iconv -f GB18030 -t utf-8 gb.csv > gb-utf8.csv" in raised.value.hint
    Path("py.jsonl").write_text("{'a': 1}\n{'a': 2}\n")
    [row, _] = [row for block in read_blocks(source_of(Path("py.jsonl"))) for row in block.rows()]
    assert row.error == ("not valid JSON: Expecting property name enclosed in double quotes, not in single ones as Python "
                         "shows it, at column 2")
    Path("py.jsonl").write_text("{'a': 1}\n")
    with pytest.raises(UserError, match="py.jsonl:1: .* not in single ones as Python shows it, at column 2"):
        list(read_blocks(source_of(Path("py.jsonl"))))


@pytest.mark.parametrize(("encoding", "text"), [
    ("gb18030", "问题,回答\n什么是自由现金流？,经营现金流减去资本支出。€\n"), ("big5", "問題,回答\n什麼是現金流量？,營業活動的現金。\n"),
    ("cp932", "質問,回答\nこれは何ですか。,それは本です。\n"), ("windows-1252", "q,a\nWo?,Tür\n"), ("utf-16-le", "问题,回答\n你,好\n")])
@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
def test_text_in_the_encoding_that_is_named(monkeypatch, tmp_path, encoding, text, size, zipped):
    monkeypatch.chdir(tmp_path)
    name = "rows.csv.gz" if zipped else "rows.csv"
    Path(name).write_bytes(gzip.compress(text.encode(encoding)) if zipped else text.encode(encoding))
    [source] = find_sources([name], Path("keep"), how=How(encoding=encoding))
    [row] = [row for block in read_blocks(source, size) for row in block.rows()]
    head, line = (part.split(",") for part in text.strip().split("\n"))
    assert (row.line, row.value) == (2, dict(zip(head, line)))


def test_an_encoding_that_is_not_the_files(monkeypatch, tmp_path):
    """UTF-8 is read as such, as other files of a directory may be; what fits neither has its line named."""
    monkeypatch.chdir(tmp_path)
    text = "问题,回答\n什么是自由现金流？,经营现金流减去资本支出。\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        Path("rows.csv").write_bytes(text.encode(encoding))
        [row] = [row for block in read_blocks(source_of(Path("rows.csv"), how=How(encoding="gb18030"))) for row in block.rows()]
        assert row.value == {"问题": "什么是自由现金流？", "回答": "经营现金流减去资本支出。"}
    Path("rows.csv").write_bytes(text.encode("gb18030") + "Tür".encode("cp1252") + b",\xff\xff\n")
    with pytest.raises(UserError, match=r"rows.csv:3: not gb18030 text \(byte 0xff\) at offset") as raised:
        list(read_blocks(source_of(Path("rows.csv"), how=How(encoding="gb18030"))))
    assert raised.value.hint == "name another one with --encoding, or leave it out for UTF-8"


def test_chinese_from_excel_is_prepared(cli, tiny, tmp_path):
    lines = ["问题,回答", *(f"{n} 加 {n} 等于多少？,等于 {2 * n}。" for n in range(20))]
    (tmp_path / "excel.csv").write_bytes("\r\n".join(lines).encode("gbk"))
    command = ("prepare", tmp_path / "excel.csv", "--model", tiny, "--columns", "user=问题,assistant=回答")
    refused = cli(*command)
    assert refused.code == 2 and "--encoding gb18030" in refused.err
    done = cli(*command, "--encoding", "gb18030", "--json")
    assert done.code == 0 and done.json["summary"]["rows"] == 20, done.err
    again = cli("prepare", "--json")
    assert again.json["status"] == "up-to-date"
    assert "3 加 3 等于多少？" in Path("runs/tiny-gemma/data/train.jsonl").read_text() + Path("runs/tiny-gemma/data/valid.jsonl").read_text()
    wrong = cli(*command, "--encoding", "gb1803")
    assert wrong.code == 2 and "'gb1803' is no encoding of text; there are gb18030" in wrong.err


# --- built-in examples ------------------------------------------------------------------------------------------------


def test_a_built_in_example_is_named_and_stays_findable_from_anywhere():
    from gemma_tune import samples

    found = find_sources(["example:finance", "example:pairs"], Path("keep"))
    assert [source.path for source in found] == [samples.training_path(), samples.example_path("pairs")]
    assert [len([row for block in read_blocks(source) for row in block.rows()]) for source in found] == [72, 120]
    with pytest.raises(UserError, match="no built-in example pears; did you mean `pairs`") as caught:
        find_sources(["example:pears"], Path("keep"))
    assert caught.value.hint == "there are example:finance and example:pairs"
    with pytest.raises(UserError, match="2 data sources") as caught:
        find_sources(["example:", "nowhere.jsonl"], Path("keep"))
    assert "no built-in example" in caught.value.problems[0]
