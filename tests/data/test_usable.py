"""Rows of a file that is named beside the data."""

from __future__ import annotations

from gemma_tune.config.stages import PrepareConfig
from gemma_tune.data.conversations.problems import Problem, RowError
from gemma_tune.data.reading.rows import Row
from gemma_tune.data.usable import usable
from gemma_tune.encoding.sequences import Encoder
from support.command import rows
from support.picture_files import shown
from support.prepared import format_of


def test_rows_with_pictures_have_the_turns_that_somebody_makes_of_them(tiny):
    """It is asked about these alone, and what it refuses is named."""
    given = [Row("more.jsonl", n, value) for n, value in enumerate((shown("a.png"), *rows(2), shown("b.png")), start=1)]

    def showing(row: Row, turns: list[dict]) -> list[dict]:
        if row.line == 4:
            raise RowError([Problem("picture", "the picture 'b.png' of turn 1 is not there", "draw it")])
        assert turns[0]["pictures"] == [{"at": 0, "path": "a.png"}]
        return [{"role": "user", "content": "Shown."}, turns[1]]

    good, faults = usable(given, Encoder(format_of(tiny), 512), PrepareConfig(), showing)
    assert [item.row.line for item in good] == [1, 2, 3]
    assert good[0].example["messages"][0] == {"role": "user", "content": "Shown."}
    assert faults == ["more.jsonl:4: the picture 'b.png' of turn 1 is not there (draw it)"]
