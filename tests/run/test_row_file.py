"""Rows of a file that a setting names: those with pictures are refused by name."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from gemma_tune.base.errors import UserError
from gemma_tune.data import usable as reading
from gemma_tune.encoding.labels import FormatError
from gemma_tune.encoding.sequences import Encoder
from gemma_tune.encoding.tokenizer import load_format
from gemma_tune.evaluate.rows import FILE
from gemma_tune.run.row_file import OfText
from gemma_tune.run.session import open_session


def row(question: str, *pictures: dict) -> dict:
    first = {"role": "user", "content": question, **({"pictures": [*pictures]} if pictures else {})}
    return {"messages": [first, {"role": "assistant", "content": "Red."}]}


def test_those_with_pictures_have_no_sequences(tiny):
    """Wherever the pictures are."""
    chat = load_format(tiny, "gemma3_text")
    rows = [row("a", {"at": 0, "path": "a.png"}), row("b"), row("c", {"at": 1, "base64": "AA=="}),
            row("d", {"at": 0, "file": "pictures/a.png"}), {"text": "e"}]
    found = OfText(chat, 64).encode(rows)
    assert [isinstance(one, FormatError) and str(one) for one in found] == [
        "it has pictures, which only `prepare` reads", False] + ["it has pictures, which only `prepare` reads"] * 2 + [False]
    plain = Encoder(chat, 64).encode([rows[1], rows[4]])
    assert [one.kept[0].ids.tolist() for one in (found[1], found[4])] == [one.kept[0].ids.tolist() for one in plain]


def test_they_are_named_with_their_lines(trained, tmp_path, monkeypatch):
    """As readers give them that know of pictures."""
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(row(f"Question {n}")) + "\n" for n in range(4)))

    class Seeing(reading.Formats):
        def example_of(self, source):
            example = super().example_of(source)
            shown = row("?", {"at": 0, "path": "a.png"}) if source.line == 3 else example.as_row()
            return SimpleNamespace(as_row=lambda: shown, **vars(example))

    monkeypatch.setattr(reading, "Formats", Seeing)
    monkeypatch.setattr(reading.TextChecks, "problems", lambda *_: [])
    session = open_session("eval", trained, data=str(path))
    with pytest.raises(UserError) as refused:
        FILE.rows(session, str(path), Encoder(load_format(session.model.path, "gemma3_text"), 64), 99)
    assert [*refused.value.problems] == [f"{path}:3: it has pictures, which only `prepare` reads"]
