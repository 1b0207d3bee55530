"""Rows of a file that a setting names: those with pictures are refused by name."""

from __future__ import annotations

import pytest

from gemma_tune.base.errors import UserError
from gemma_tune.encoding.sequences import Encoder
from gemma_tune.encoding.tokenizer import load_format
from gemma_tune.evaluate.rows import FILE
from gemma_tune.run.session import open_session
from support.command import rows, write_rows
from support.picture_files import prepared_row, save, shown


def test_they_are_named_with_their_lines(trained, tmp_path):
    """Wherever the pictures are: as files, inside the row, or as another run has them."""
    save(tmp_path / "a.png")
    path = write_rows(tmp_path / "asked.jsonl", [*rows(2), shown("a.png"), shown(b"GIF89a"), prepared_row("a.png")])
    session = open_session("eval", trained, data=str(path))
    with pytest.raises(UserError) as refused:
        FILE.rows(session, str(path), Encoder(load_format(session.model.path, "gemma3_text"), 512), 99)
    assert [problem.partition(", and ")[0] for problem in refused.value.problems] == [
        f"{path}:{line}: the row has a picture" for line in (3, 4, 5)]
