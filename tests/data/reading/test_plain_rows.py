"""Books and notes: files of plain text, each of which is one row where plain text is asked for."""

from __future__ import annotations

import gzip
import json

import pytest

from gemma_tune.base.errors import UserError
from gemma_tune.data.reading import plain_rows
from gemma_tune.data.reading.names import How
from gemma_tune.data.reading.sources import find_sources, read_blocks
from gemma_tune.encoding.tokenizer import load_format
from gemma_tune.encoding.tokens import open_tokens
from gemma_tune.train import samples
from support.command import QUICK, rows, write_rows

BOOK = "Once upon a time.\r\n\r\nThere was a {text}.\r\n"


def texts(*names, keep):
    return [(row.file.rsplit("/", 1)[-1], row.line, row.value) for source in find_sources([*map(str, names)], keep, how=How(format="text"))
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


def test_notes_and_conversations_are_learned_together(cli, tiny, tmp_path):
    """Each file by its kind, with the counts of each, and both kinds on either side of the validation."""
    (tmp_path / "notes").mkdir()
    for n in range(6):
        (tmp_path / f"notes/{n}.md").write_text(f"Note {n}. " + "the shells and the sea " * 10)
    write_rows(tmp_path / "chats.jsonl", rows(20))
    done = cli("prepare", "notes", "chats.jsonl", "--model", tiny, "--json")
    assert done.code == 0, done.err
    said = " ".join(done.err.split())
    assert ": 6 rows" in said and ": 20 rows" in said and "plain text makes" in said
    data = tmp_path / "runs/tiny-gemma/data"
    sides = [[json.loads(line) for line in (data / f"{side}.jsonl").read_text().splitlines()] for side in ("train", "valid")]
    assert [("text" in row) for row in sides[1]].count(True) == 1 and len(sides[1]) == 4
    assert sorted(row["text"][:7] for side in sides for row in side if "text" in row) == [f"Note {n}." for n in range(6)]
    chat = load_format(tiny, "gemma3_text")
    for row, tokens in zip(sides[0], open_tokens(data / "tokens/train.arrow"), strict=True):
        expected = chat.encode_text(row["text"]) if "text" in row else chat.encode(row["messages"])[0]
        assert (tokens["input_ids"].tolist(), tokens["labels"].tolist()) == (expected.ids.tolist(), expected.labels)
    report = json.loads((data / "report.json").read_text())
    texts = sum(chat.encode_text(row["text"]).trained for side in sides for row in side if "text" in row)
    assert report["formats"] == {"text": 6, "messages": 20} and report["trained_tokens_of_texts"] == texts
    assert done.json["summary"]["text_rows"] == 6


def test_of_a_run_of_both_the_next_stages_know_what_is_what(cli, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "SHARE", 100)  # of a training that is over in a moment
    for n in range(6):
        (tmp_path / f"{n}.md").write_text(f"Note {n}. " + "the shells and the sea " * 10)
    write_rows(tmp_path / "chats.jsonl", [{"messages": [{"role": "system", "content": "Count."}, *row["messages"]]} for row in rows(20)])
    for args in (("prepare", "*.md", "chats.jsonl", "--model", tiny), ("train", *QUICK, "--samples", 2), ("merge", "--no-check"),
                 ("export-ollama", "--no-verify", "--no-measure", "--quant", "f16")):
        done = cli(*args)
        assert done.code == 0, done.err
    run = tmp_path / "runs/tiny-gemma"
    asked = [json.loads(line)["begins"][:4] for line in (run / "logs/samples.jsonl").read_text().splitlines()]
    assert asked == ["Note", "Say "] * 2
    assert "Data | 22 rows, 4 more held out" in (run / "tiny-gemma_lora_merged/README.md").read_text()
    assert 'SYSTEM """Count."""' in (run / "ollama/Modelfile").read_text()
    compared = cli("eval", "--json")
    assert compared.code == 0, compared.err
    assert "1 row of plain text has no question to ask: its loss alone is measured" in " ".join(compared.err.split())
    assert compared.json["summary"]["questions"] == 3 and compared.json["summary"]["measures"]["loss"]["rows"] == 4


def test_texts_and_pairs_of_answers_are_not_learned_together(cli, tiny, tmp_path):
    (tmp_path / "note.md").write_text("Only words.")
    write_rows(tmp_path / "pairs.jsonl", [{"prompt": f"q{n}", "chosen": "a", "rejected": "b"} for n in range(6)])
    refused = cli("prepare", "note.md", "pairs.jsonl", "--model", tiny, "--json")
    assert refused.code == 2
    error = refused.json["error"]
    assert error["problems"] == ["1 row to answer like, the first at note.md:1", "6 pairs of answers, the first at pairs.jsonl:1"]
    assert "--take chosen" in error["hint"] and "a run of its own" in error["hint"]


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
