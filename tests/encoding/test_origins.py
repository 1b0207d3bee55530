"""Where prepared rows come from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gemma_tune.encoding.origins import NAME, origins_of, write_origins
from support.command import rows, write_rows
from support.prepared import DATA, read


def test_each_training_row_has_its_file_and_line(prepare, tmp_path):
    """Also behind rows that are rejected, repeated or held out, and in files of several kinds."""
    first = rows(9)
    first[3] = {"messages": []}
    first[5] = first[1]
    write_rows(Path("a.jsonl"), first)
    Path("b.csv").write_text("prompt,completion\n" + "".join(f'"Ask\n{n}",Answer {n}.\n' for n in range(4)))
    prepare("a.jsonl", "b.csv", "--valid", 0.3)
    kept = read("train")
    found = origins_of(DATA, range(len(kept)))
    assert len(set(found)) == len(kept) > 6
    for place, row in zip(found, kept, strict=True):
        name, line = place.split(":")
        if name == "a.jsonl":
            assert json.loads(Path(name).read_text().splitlines()[int(line) - 1]) == row
        else:
            said = row["messages"][0]["content"].split("\n")[1]
            assert (name, int(line)) == ("b.csv", 2 + 2 * int(said))


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / NAME).unlink(), lambda folder: (folder / NAME).write_bytes(b""),
    lambda folder: (folder / NAME).write_bytes(b"\x93NUMPY\x01\x00"), lambda folder: np.save(folder / NAME, np.zeros(1)),
    lambda folder: (folder / "report.json").write_text("{"), lambda folder: (folder / "report.json").write_text('{"files": []}'),
    lambda folder: np.save(folder / NAME, np.array([[7, 1], [7, 2]]))])
def test_what_cannot_be_read_is_not_known(tmp_path, damage):
    write_origins(tmp_path, np.array([0, 0]), np.array([4, 9]))
    (tmp_path / "report.json").write_text('{"files": [{"file": "x.jsonl", "rows": 2}]}')
    assert origins_of(tmp_path, [1, 0]) == ["x.jsonl:9", "x.jsonl:4"]
    assert origins_of(tmp_path, [2]) is None
    damage(tmp_path)
    assert origins_of(tmp_path, [1, 0]) is None
