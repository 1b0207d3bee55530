"""The ends of texts are kept aside where there are so few that a whole one would be too much."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_tune.encoding.origins import origins_of
from gemma_tune.prepare.ends import are_few, divided
from support.command import rows, write_rows
from support.prepared import DATA, format_of, read, report, same_examples, sequences

WORDS = ["the", "shells", "and", "the", "sea", "were", "quiet", "when", "she", "walked",
         "along", "the", "water", "under", "a", "grey", "sky"]


def book(seed: int = 0, paragraphs: int = 40, between: str = "\n\n") -> str:
    draw = random.Random(seed)
    return between.join(" ".join(draw.choices(WORDS, k=30)).capitalize() + "." for _ in range(paragraphs))


@given(st.text("ab。 \n", min_size=1, max_size=400), st.sampled_from([0.02, 0.1, 0.3, 0.9]))
@same_examples(300)
def test_the_parts_are_the_text(text, share):
    begin, end = divided(text, share)
    assert begin + end == text
    length = len(text.rstrip())
    assert 0.74 * share * length - 3 <= length - len(begin) <= 1.26 * share * length + 3


@pytest.mark.parametrize(("between", "borders"), [("\n\n", ".\n\n"), ("\n", ".\n"), (" ", " ")])
def test_an_end_begins_where_something_does(between, borders):
    begin, end = divided(book(between=between), 0.1)
    assert begin.endswith(borders) and end[0].isalpha()
    assert len(end) == pytest.approx(0.1 * len(begin + end), rel=0.26)


def test_a_text_without_spaces_is_divided_behind_a_sentence_or_anywhere():
    begin, end = divided("他说好了。" * 100, 0.1)
    assert begin.endswith("。") and len(end) == pytest.approx(50, abs=3)
    assert divided("字" * 100, 0.1) == ("字" * 90, "字" * 10)


@pytest.mark.parametrize(("texts", "share", "few"), [(0, 0.1, False), (1, 0.1, True), (4, 0.1, True), (5, 0.1, False),
                                                     (2, 0.5, False), (1, 0.9, True), (3, 0.4, False)])
def test_which_texts_are_few(texts, share, few):
    assert are_few(texts, share) == few


def test_of_one_book_the_end_is_for_validation(prepare, tiny):
    text = book()
    Path("book.txt").write_text(text)
    done = prepare("book.txt", "--on-long", "split", "--max-length", 128)
    [[begin], [end]] = [[row["text"] for row in read(side)] for side in ("train", "valid")]
    assert begin + end == text and begin.endswith("\n\n")
    assert len(end) == pytest.approx(0.1 * len(text), rel=0.26)
    line = 1 + begin.count("\n")
    assert f"no text can be kept aside whole: the last 10% is for validation, from book.txt:{line} on" in done["err"]
    assert "no rows for validation" not in done["err"]
    assert report()["ends_held_out"] == [{"file": "book.txt", "line": 1, "from_line": line}]
    chat = format_of(tiny)
    for side, part in (("train", begin), ("valid", end)):
        whole = chat.encode_text(part).ids.tolist()
        pieces = [s.ids for s in sequences(side)]
        assert [*pieces[0], *(i for piece in pieces[1:] for i in piece[1:])] == whole, "each piece begins with the last token before"
    assert origins_of(DATA, [0]) == ["book.txt:1"]
    assert done["summary"]["rows"] == 1 and report()["formats"] == {"text": 1} and report()["files"] == [{"file": "book.txt", "rows": 1}]
    assert prepare()["status"] == "up-to-date"


def test_of_a_few_texts_each_has_its_end_kept_aside_that_is_long_enough(prepare):
    write_rows(Path("texts.jsonl"), [{"text": book(n)} for n in range(2)])
    Path("short.md").write_text("A few words.")
    write_rows(Path("chats.jsonl"), rows(20))
    done = prepare("texts.jsonl", "short.md", "chats.jsonl", "--on-long", "split", "--max-length", 256)
    valid, train = ([row["text"] for row in read(side) if "text" in row] for side in ("valid", "train"))
    assert [begin + end for begin, end in zip(train[1:], valid, strict=True)] == [book(0), book(1)] and train[0] == "A few words."
    assert sum("messages" in row for row in read("valid")) == 3, "of the conversations as many as without the texts"
    assert "the last 10% of each is for validation, of texts.jsonl:1 and of texts.jsonl:2" in " ".join(done["err"].split())


@pytest.mark.parametrize(("texts", "options"), [(5, ()), (2, ("--valid", 0.5)), (2, ("--valid", 1))])
def test_where_a_whole_one_is_not_too_much_it_is_kept_aside_whole(prepare, texts, options):
    write_rows(Path("texts.jsonl"), [{"text": book(n)} for n in range(texts)])
    prepare("texts.jsonl", "--on-long", "split", "--max-length", 256, *options)
    assert len(read("valid")) == 1 and len(read("train")) == texts - 1 and not report()["ends_held_out"]


@pytest.mark.parametrize("options", [(), ("--near-duplicates",), ("--duplicates", "keep")])
def test_a_copy_of_a_text_does_not_learn_what_is_kept_aside(prepare, options):
    for name in ("a.txt", "b.txt"):
        Path(name).write_text(book())
    prepare("a.txt", "b.txt", "--on-long", "split", "--max-length", 128, *options)
    ends, begins = ({row["text"] for row in read(side)} for side in ("valid", "train"))
    assert len(ends) == len(begins) == 1 and begins.pop() + ends.pop() == book()
    duplicates = read("duplicates")
    assert [(row["file"], row["same_as"]) for row in duplicates] == ([] if "keep" in options else [("b.txt", "a.txt:1")])


def test_of_drawn_texts_no_more_rows_are_counted_than_were_drawn(prepare):
    write_rows(Path("texts.jsonl"), [{"text": book(n)} for n in range(9)])
    summary = prepare("texts.jsonl", "--max-samples", 3, "--on-long", "split", "--max-length", 256)["summary"]
    assert summary["rows"] == summary["drawn"][0]["rows"] == summary["train_rows"] == summary["valid_rows"] == 3


def test_before_the_limit_a_divided_text_is_one_row_as_long_as_it_is(prepare, tiny):
    write_rows(Path("texts.jsonl"), [{"text": book(n)} for n in range(2)])
    write_rows(Path("chats.jsonl"), rows(20))
    prepare("texts.jsonl", "chats.jsonl", "--on-long", "split", "--max-length", 256)
    before, whole = report()["before_the_limit"], [len(format_of(tiny).encode_text(book(n)).ids) for n in range(2)]
    assert len(report()["ends_held_out"]) == before["long"]["rows"] == 2
    assert before["length"]["longest"] == max(whole)


def test_a_number_keeps_whole_texts_aside_and_says_what_a_share_does(prepare):
    write_rows(Path("texts.jsonl"), [{"text": book(n)} for n in range(3)])
    done = prepare("texts.jsonl", "--on-long", "split", "--max-length", 256, "--valid", 1)
    assert "--valid 1 keeps 1 of 3 texts aside, whole; a share, such as --valid 0.1, keeps the end of each" in " ".join(done["err"].split())
    done = prepare("texts.jsonl", "--on-long", "split", "--max-length", 256, "--valid", 0.4)
    assert "a share, such as" not in done["err"] and len(read("valid")) == 1
    Path("book.txt").write_text(book())
    error = prepare("book.txt", "--on-long", "split", "--valid", 1, code=2)
    assert error["hint"] == "ask for a share: --valid 0.1 keeps the end of each text aside"


def test_a_text_that_is_too_short_says_what_would_do(prepare):
    Path("note.md").write_text("The shells and the sea. " * 10)
    done = prepare("note.md")
    assert "no rows for validation: that needs a second text, or one whose last 10% has 64 tokens" in done["err"]
    assert len(read("train")) == 1 and not read("valid")
    prepare("note.md", "--valid", 0.9)
    assert len(read("valid")) == 1


def test_the_share_that_was_asked_for_is_said_as_it_is(prepare):
    Path("book.txt").write_text(book())
    assert "the last 5.5% is for validation" in prepare("book.txt", "--max-length", 4096, "--valid", 0.055)["err"]
    for name in ("a.md", "b.md"):
        Path(name).write_text("The shells and the sea. " * 10)
    done = prepare("a.md", "b.md", "--duplicates", "keep", "--valid", 1)
    assert "that needs two different prompts, or texts, at least" in done["err"], "a number of rows is no share"


def test_a_text_that_is_too_long_is_called_one(prepare):
    Path("book.txt").write_text(book())
    error = prepare("book.txt", "--max-length", 128, code=2)
    assert "or --on-long split, or shorten the text" in error["hint"]


def test_eval_says_how_sure_it_is_of_the_end_of_one_text(cli, tiny, tmp_path):
    Path("book.txt").write_text(book(paragraphs=60))
    for args in (("prepare", "book.txt", "--model", tiny, "--on-long", "split", "--max-length", 64),
                 ("train", "--epochs", 1, "--rank", 4, "--dtype", "fp32")):
        done = cli(*args)
        assert done.code == 0, done.err
    assert np.isfinite(cli("status", "--json").json["stages"]["train"]["summary"]["eval_loss_after"])
    compared = cli("eval", "--json")
    assert compared.code == 0, compared.err
    summary = compared.json["summary"]
    loss = summary["measures"]["loss"]
    assert summary["rows"] == 1 and loss["rows"] == len(sequences("valid")) > 1
    assert None not in loss["difference"]
