"""What is said about the settings that rows are read by."""

from __future__ import annotations

from pathlib import Path

from support.command import rows, write_rows

UNUSED = "and no row is read by"


def test_columns_that_no_row_is_read_by_are_named(prepare):
    write_rows(Path("rows.jsonl"), rows(3))
    said = prepare("rows.jsonl", "--columns", "user=question,assistant=answer", "--valid", 0)["err"]
    assert f"--columns names `question`, `answer`, {UNUSED} that" in said


def test_columns_that_are_read_are_not_named(prepare):
    write_rows(Path("rows.jsonl"), [{"q": f"{n}?", "a": f"{n}.", "s": "Be brief."} for n in range(3)])
    assert UNUSED not in prepare("rows.jsonl", "--columns", "user=q,assistant=a,system=s", "--valid", 0)["err"]
