"""Rows of a file that is named beside the data."""

from __future__ import annotations

import pytest

from gemma_tune.config.stages import PrepareConfig
from gemma_tune.data.reading.rows import Row
from gemma_tune.data.usable import usable
from gemma_tune.encoding.sequences import Encoder
from support.command import rows
from support.models import make_seeing
from support.picture_files import save, shown
from support.prepared import format_of


@pytest.mark.parametrize("sees", [True, False])
def test_a_row_with_a_picture_is_refused_by_name(tiny, tmp_path, sees):
    save("a.png")
    model = make_seeing(tmp_path / "seeing") if sees else tiny
    given = [Row("more.jsonl", n, value) for n, value in enumerate((shown("a.png"), *rows(2)), start=1)]
    good, faults = usable(given, Encoder(format_of(model), 512), PrepareConfig())
    assert [item.row.line for item in good] == [2, 3]
    [fault] = faults
    assert fault.startswith("more.jsonl:1: the row has a picture") and "prepare --valid" in fault
