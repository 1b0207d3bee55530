"""Books and notes: files of plain text, each of which is one row where plain text is asked for."""

from __future__ import annotations

import gzip
import json

import pytest

from gemma_tune.base.errors import UserError
from gemma_tune.data.reading import plain_rows
from gemma_tune.data.reading.names import How
from gemma_tune.data.reading.sources import find_sources, read_blocks
from support.command import QUICK

BOOK = "Once upon a time.\r\n\r\nThere was a {text}.\r\n"


def texts(*names, keep):
    return [(row.file.rsplit("/", 1)[-1], row.line, row.value) for source in find_sources([*map(str, names)], keep, how=How(plain=True))
            for block in read_blocks(source) for row in block.rows()]


def test_each_file_is_a_row_and_rows_stay_rows(tmp_path):
    folder = tmp_path / "notes"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_bytes(BOOK.encode())
    (folder / "deep/b.md").write_bytes("\ufeff# 标题\n正文".encode())
    (folder / "c.jsonl").write_text('{"text": "row"}\n')
    (folder / "d.txt").write_text(' {"text": "in lines"}\n{"text": "two"}\n')
    (folder / "e.txt").write_text(" \n")
    (folder / "badge.md").write_text("[![Build](a)](b)\n\ntext")
    (folder / "list.md").write_text("[1] first\n{2} second")
    (folder / "h.txt.gz").write_bytes(gzip.compress(b'{"text": "in a packed line"}\n'))
    (folder / "i.txt").write_text("[\n" + '  {"text": "in a document"}' + "\n]")
    (folder / "f.txt.gz").write_bytes(gzip.compress(b"packed"))
    (folder / "g.log").write_text("passed over")
    found = {(file, line): value["text"] for file, line, value in texts(folder, keep=tmp_path / "k")}
    assert found == {("a.txt", 1): BOOK.replace("\r\n", "\n"), ("b.md", 1): "# 标题\n正文", ("c.jsonl", 1): "row",
                     ("d.txt", 1): "in lines", ("d.txt", 2): "two", ("f.txt.gz", 1): "packed", ("h.txt.gz", 1): "in a packed line",
                     ("badge.md", 1): "[![Build](a)](b)\n\ntext", ("list.md", 1): "[1] first\n{2} second", ("i.txt", 2): "in a document"}
    assert texts(folder / "**/b.md", keep=tmp_path / "k") == texts(folder / "deep/b.md", keep=tmp_path / "k")


def test_a_text_that_is_piped_is_one_too(cli, tiny, tmp_path):
    text = "Only words, with a comma.\n\nAnd the shells and the sea. " * 3
    done = cli("prepare", "-", "--format", "text", "--model", tiny, "--json", stdin=text)
    assert done.code == 0, done.err
    [line] = (tmp_path / "runs/tiny-gemma/data/train.jsonl").read_text().splitlines()
    assert json.loads(line)["text"] == text


def test_what_a_run_of_texts_is_measured_on_is_read_as_it_was_prepared(cli, tiny, tmp_path):
    for name in ("a.md", "b.txt", "c.md"):
        (tmp_path / name).write_text(f"Text {name}. " + "the shells and the sea " * 20)
    assert cli("prepare", "a.md", "b.txt", "--format", "text", "--model", tiny).code == 0
    assert cli("train", *QUICK).code == 0
    done = cli("eval", "--data", "c.md", "--json")
    assert done.code == 0 and done.json["summary"]["rows"] == 1, done.err
    assert "had 1 of 1 row itself" in " ".join(cli("eval", "--data", "b.txt").err.split()).replace("1 of one", "1 of 1")


def test_without_being_asked_for_a_text_is_not_learned(tmp_path):
    (tmp_path / "book.txt").write_bytes(BOOK.encode())
    [source] = find_sources([str(tmp_path / "book.txt")], tmp_path / "k")
    with pytest.raises(UserError, match="is plain text") as e:
        [*read_blocks(source)]
    assert "--format text" in e.value.hint


def test_a_text_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(plain_rows, "MAX_ROW", 10)
    (tmp_path / "book.txt").write_text("a" * 11)
    with pytest.raises(UserError, match="is a text of more than") as e:
        texts(tmp_path / "book.txt", keep=tmp_path / "k")
    assert "chapter" in e.value.hint


def test_books_are_prepared_in_parts_none_of_which_is_lost(cli, tiny, tmp_path):
    (tmp_path / "books").mkdir()
    for n in range(4):
        (tmp_path / f"books/{n}.txt").write_text(f"Book {n}. " + "the shells and the sea " * 60)
    long = cli("prepare", "books", "--format", "text", "--model", tiny, "--max-length", 64)
    assert long.code == 2 and "--on-long split" in " ".join(long.err.split())
    done = cli("prepare", "books", "--format", "text", "--model", tiny, "--max-length", 64, "--on-long", "split", "--json")
    assert done.code == 0, done.err
    summary = done.json["summary"]
    assert (summary["rows"], summary["train_rows"]) == (4, 3) and summary["sequences"] > 12
    assert json.loads((tmp_path / "runs/tiny-gemma/data/train.jsonl").read_text().splitlines()[0])["text"].startswith("Book")
    assert cli("prepare", "--json").json["status"] == "up-to-date"
