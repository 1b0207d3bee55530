"""What is said about the settings that rows are read by."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.command import rows, write_rows

UNUSED = "and no row is read by"
PAIRS = [{"prompt": f"q {n}", "chosen": f"good {n}", "rejected": [f"bad {n}"]} for n in range(6)]


def test_columns_that_no_row_is_read_by_are_named(prepare):
    write_rows(Path("rows.jsonl"), rows(3))
    said = prepare("rows.jsonl", "--columns", "user=question,assistant=answer", "--valid", 0)["err"]
    assert f"--columns names `question`, `answer`, {UNUSED} that" in said


def test_columns_that_are_read_are_not_named(prepare):
    write_rows(Path("rows.jsonl"), [{"q": f"{n}?", "a": f"{n}.", "s": "Be brief."} for n in range(3)])
    assert UNUSED not in prepare("rows.jsonl", "--columns", "user=q,assistant=a,system=s", "--valid", 0)["err"]


def test_rows_for_validation_of_another_kind(cli, tiny, tmp_path):
    chats = write_rows(tmp_path / "chats.jsonl", rows(8))
    both = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    for data, valid in ((chats, both), (both, chats)):
        refused = cli("prepare", data, "--valid", valid, "--model", tiny)
        assert refused.code == 2 and "the rows for validation are of another kind than those to learn from" in refused.err
        assert "--valid 0.1" in refused.err and "6 pairs of answers, the first at" in refused.err
    refused = cli("prepare", data, chats, "--model", tiny)
    assert "the rows are of several kinds" in refused.err
    assert cli("prepare", both, "--model", tiny, "--valid", 2).code == 0, "a list of one text is that text"


@pytest.mark.parametrize(("valid", "learned", "said"), [
    (rows(4), [*PAIRS[:4], *rows(10)], "the rows are of several kinds"),
    ([*rows(4), {"messages": []}], PAIRS, "the rows for validation are of another kind")])
def test_what_rows_for_validation_are_is_not_told_by_their_number(cli, tiny, tmp_path, valid, learned, said):
    files = [write_rows(tmp_path / f"{n}.jsonl", each) for n, each in enumerate((learned, valid))]
    refused = cli("prepare", files[0], "--valid", files[1], "--model", tiny)
    assert refused.code == 2 and said in refused.err
