"""Files that were put together from several: of several encodings, and with a header for each part."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from gemma_tune.base.errors import UserError
from gemma_tune.data.reading.mixed import mixed
from gemma_tune.data.reading.names import How
from gemma_tune.data.reading.sources import Row, read_blocks, source_of
from gemma_tune.data.reading.text import east_asian

CHINESE = ("什么是自由现金流？,经营现金流减去资本支出。", "毛利率在下降吗？,是的，因为原材料涨价。")


def rows_of(name: str, **how: str) -> list[Row]:
    return [row for block in read_blocks(source_of(Path(name), how=How(**how))) for row in block.rows()]


@pytest.mark.parametrize(("encoding", "apart", "others"), [
    ("gb18030", CHINESE[0], [CHINESE[1]]), ("windows-1252", "Größe – Maß?,Tür", ["Où,là “ici”", "a,b"])])
@pytest.mark.parametrize(("first", "named"), [(True, False), (False, False), (False, True)])
def test_lines_of_another_encoding_are_named_and_the_command_converts_them(monkeypatch, tmp_path, encoding, apart, others, first, named):
    """Also where the encoding is named that the lines are in: the others, which are read before them, are not."""
    monkeypatch.chdir(tmp_path)
    several = 3 * others
    parts = [apart.encode(encoding), *(line.encode() for line in several)]
    Path("my rows.csv").write_bytes(b"\n".join([b"q,a", *(parts if first else parts[::-1])]) + b"\n")
    with pytest.raises(UserError, match="not .* text") as raised:
        rows_of("my rows.csv", **({"encoding": encoding} if named else {}))
    assert f"1 line is not UTF-8 ({2 if first else 5 if len(others) == 1 else 8}), and others are" in raised.value.hint
    assert "--encoding " + encoding not in raised.value.hint
    subprocess.run(["bash", "-c", raised.value.hint.partition("as they seem to be: ")[2]], check=True)
    assert sorted(",".join(row.value.values()) for row in rows_of("my rows-utf8.csv")) == sorted([apart, *several])


def test_what_happens_to_be_utf_8_does_not_make_a_file_one_of_several_encodings():
    lines = [*100 * [CHINESE[0].encode("gb18030")], "一".encode("gb18030"), "一一一一".encode("gb18030")]
    assert lines[-1].decode() and mixed([b"\n".join(lines)], east_asian) is None
    assert mixed([b"\n".join([*lines, *20 * [CHINESE[0].encode()]])], east_asian).lines == (*range(1, 101),)
    assert mixed([b"q,a\n", "Tür\n".encode("cp1252")], east_asian) is None


def test_a_file_that_is_all_utf_8_is_not_of_several_encodings(monkeypatch, tmp_path):
    """Where another one is named, and the beginning does not say that it is wrong."""
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("q,a\nTür,x\n", encoding="utf-8")
    with pytest.raises(UserError, match="not ascii text") as raised:
        rows_of("rows.csv", encoding="ascii")
    assert raised.value.hint == "name another one with --encoding, or leave it out for UTF-8"


@pytest.mark.parametrize("again", ["q,a", "\ufeffq,a", '"q","a"', '\ufeff"q","a"', "q , a", "q\u3000,a", "Q,A", "q,A"])
def test_a_header_that_stands_there_again_is_no_row_to_learn(monkeypatch, tmp_path, again):
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text(f"q,a\n1,2\n{again}\n3,4\n")
    assert [(row.line, row.error) for row in rows_of("rows.csv")] == [
        (2, None), (3, "the header again, as in files that were put together"), (4, None)]
    Path("texts.csv").write_text("text\nsome\ntext\n")
    assert [row.error for row in rows_of("texts.csv")] == [None, None]
