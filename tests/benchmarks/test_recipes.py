"""The comparison of recipes, on a tiny model."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from support.command import rows, write_rows

sys.path.insert(0, str(Path(__file__).parent))

import recipes  # noqa: E402


def compare(monkeypatch, data: Path, model: Path, results: Path, *names: str) -> None:
    monkeypatch.setattr(sys, "argv", ["recipes.py", str(data), "--model", str(model), "--rows", "16", "--valid-rows", "4",
                                      "--epochs", "1", "--only", *names, "--results", str(results)])
    recipes.main()


@pytest.mark.timeout(400)
def test_recipes_are_compared_on_the_same_rows_and_not_twice(tmp_path, tiny, monkeypatch, capsys):
    """Of two trainings the base model's held-out loss is the same, by plain PEFT's logits and by ours."""
    data, results = write_rows(tmp_path / "rows.jsonl", rows(20)), tmp_path / "results.jsonl"
    compare(monkeypatch, data, tiny, results, "reference", "eva-plus-4-0.0016")
    plain, patched = map(json.loads, results.read_text().splitlines())
    assert plain["losses"][0][1] == pytest.approx(patched["losses"][0][1], rel=1e-2)  # bf16 where the CPU has it
    seen = [tokens for tokens, _ in patched["losses"]]
    assert seen[0] == 0 and seen[-1] == patched["tokens"] and seen == sorted(seen)
    assert plain["losses"][-1][0] == 3 * plain["tokens"] and plain["losses"][-1][1] < plain["losses"][0][1]
    written = results.read_bytes()
    monkeypatch.setattr(recipes.Comparison, "prepare", lambda self: pytest.fail("there is nothing left to do"))
    compare(monkeypatch, data, tiny, results, "reference", "eva-plus-4-0.0016")
    assert results.read_bytes() == written
    assert "| reference | rank 8, alpha 16, learning_rate 0.0001," in capsys.readouterr().out


def test_the_table_has_the_lowest_loss_first_and_the_last_record_of_each(tmp_path):
    path, data = tmp_path / "results.jsonl", write_rows(tmp_path / "rows.jsonl", rows(3))
    options = Namespace(results=path, model="m", data=str(data), rows=2, valid_rows=1)
    record = {"model": "m", "data": recipes.digest(options), "settings": {"rank": 4}, "changes": {}, "tokens": 100}
    write_rows(path, [record | {"name": "a", "losses": [[0, 3.0], [100, 2.0]]},
                      record | {"name": "b", "losses": [[0, 3.0], [100, 1.0], [200, 2.5]]},
                      record | {"name": "c", "losses": [[0, 3.0]], "failed": "no memory"},
                      record | {"name": "a", "model": "other", "losses": [[0, 1.0]]},
                      record | {"name": "d", "data": "others", "losses": [[0, 1.0]]},
                      record | {"name": "a", "losses": [[0, 3.0], [101, 1.5]]}])
    lines = recipes.table(recipes.read_results(options)).splitlines()
    assert lines[0] == "| recipe | settings | 0 | 1 | 2 |"
    assert lines[2:] == ["| a | rank 4 | 3.0000 | 1.5000 |  |", "| b | rank 4 | 3.0000 | 1.0000 | 2.5000 |"]


def test_settings_are_options():
    assert recipes.as_options({"rank": 4, "dora": True, "weight_decay": 0.1}) == [
        "--rank", "4", "--dora", "--weight-decay", "0.1"]
