"""A GGUF as a base model: how its file is read. What it holds is compared in tests/gguf."""

from __future__ import annotations

import contextlib

import gguf
import pytest

from gemma_tune.base.errors import UserError
from gemma_tune.base.listener import Listener
from gemma_tune.gguf.writer import write_gguf
from gemma_tune.models import from_gguf


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The files that gguf's reader opens, as often as it does."""
    names, plain = [], gguf.GGUFReader.__init__
    monkeypatch.setattr(gguf.GGUFReader, "__init__", lambda self, path, *args: (
        names.append(str(path)), plain(self, path, *args))[1])
    return names


def test_the_file_is_read_once_and_gives_what_reading_it_each_time_does(tiny, tmp_path, opened, monkeypatch):
    reader, path = gguf.GGUFReader, tmp_path / "tiny.gguf"
    write_gguf(tiny, path, "f16", name="tiny", eot_token_id=None, chat_template=None)
    assert not opened
    once = from_gguf.dequantised(path, "a" * 64, Listener())
    assert len(opened) == 1
    assert gguf.GGUFReader is reader
    monkeypatch.setattr(from_gguf, "read_once", contextlib.nullcontext)
    each_time = from_gguf.dequantised(path, "b" * 64, Listener())
    assert len(opened) > 2
    for file in {p.name for p in once.iterdir()} - {"complete.json"}:
        assert (once / file).read_bytes() == (each_time / file).read_bytes(), file


def test_the_reader_is_the_plain_one_again_after_a_failure(tmp_path):
    reader, path = gguf.GGUFReader, tmp_path / "damaged.gguf"
    path.write_bytes(b"no GGUF file at all, " * 10)
    with pytest.raises(UserError, match="cannot be dequantised"):
        from_gguf.dequantised(path, "a" * 64, Listener())
    assert gguf.GGUFReader is reader
