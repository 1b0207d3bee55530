"""A GGUF as a base model: how its file is read. What it holds is compared in tests/gguf."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest

from gemma_tune.base.errors import UserError
from gemma_tune.base.listener import Listener
from gemma_tune.gguf.writer import write_gguf
from gemma_tune.models import from_gguf
from support.gemmas import FAMILIES, make_family
from support.gguf import write
from support.llamas import make_llama


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The files that gguf's reader opens, as often as it does."""
    names, plain = [], gguf.GGUFReader.__init__
    monkeypatch.setattr(gguf.GGUFReader, "__init__", lambda self, path, *args: (
        names.append(str(path)), plain(self, path, *args))[1])
    return names


@pytest.fixture
def whole(tiny, tmp_path) -> Path:
    path = tmp_path / "tiny.gguf"
    write_gguf(tiny, path, "f16", name="tiny", eot_token_id=None, chat_template=None)
    return path


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


def test_the_reader_is_the_plain_one_again_after_a_failure(whole):
    reader = gguf.GGUFReader
    whole.write_bytes(whole.read_bytes().replace(b"gemma3", b"gemmaX"))
    with pytest.raises(UserError, match="cannot be dequantised: .*gemmaX"):
        from_gguf.dequantised(whole, "a" * 64, Listener())
    assert gguf.GGUFReader is reader


def test_tokenizer_files_beside_a_gguf_are_passed_over_where_nobody_may_make_symbolic_links(tiny, whole, monkeypatch):
    """As on Windows; transformers' loader would mix them in."""
    alone = from_gguf.dequantised(whole, "a" * 64, Listener())
    foreign = (tiny / "tokenizer.json").read_text(encoding="utf-8").replace("<bos>", "<foreign>")
    (whole.parent / "tokenizer.json").write_text(foreign, encoding="utf-8")

    def refused(*_: object, **__: object) -> None:
        raise OSError(22, "A required privilege is not held by the client")

    monkeypatch.setattr("os.symlink", refused)
    beside = from_gguf.dequantised(whole, "b" * 64, Listener())
    assert (beside / "tokenizer.json").read_bytes() == (alone / "tokenizer.json").read_bytes()
    assert not [*beside.glob("*.gguf")] and whole.is_file()


@pytest.mark.parametrize(("says", "rope"), [
    ({}, {"rope_type": "default"}), ({"scaling.type": "none", "scaling.factor": 4.0}, {"rope_type": "default"}),
    ({"scaling.type": "linear"}, {"rope_type": "default"}), ({"scaling.factor": 1.0}, {"rope_type": "default"}),
    ({"scaling.type": "linear", "scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    ({"scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    ({"scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0})])
def test_rotations_are_stretched_as_llama_cpp_does(says, rope):
    """It takes a factor alone for a linear one, and a kind without a factor for none."""
    from transformers import LlamaConfig

    config = LlamaConfig(rope_theta=5e5)
    metadata = {"general.architecture": "llama"} | {f"llama.rope.{name}": value for name, value in says.items()}
    from_gguf._stretch_rotations(config, SimpleNamespace(path=Path("m.gguf"), metadata=metadata, tensors={}))
    assert config.rope_parameters == {"rope_theta": 5e5, **rope}


def test_what_is_no_gguf_is_refused_before_it_is_loaded(tmp_path, opened):
    path = tmp_path / "damaged.gguf"
    path.write_bytes(b"no GGUF file at all, " * 10)
    with pytest.raises(UserError, match="not a little-endian GGUF file"):
        from_gguf.dequantised(path, "a" * 64, Listener())
    assert not opened


# --- damage -----------------------------------------------------------------------------------------------------------


def number(data: bytes, key: str, value: int) -> bytes:
    """The file with another 32-bit number under a key."""
    at = data.index(key.encode()) + len(key) + 4
    return data[:at] + struct.pack("<I", value) + data[at + 4:]


def moved(data: bytes, name: str, by: int) -> bytes:
    """The file with a matrix's offset moved."""
    at = data.index(name.encode()) + len(name) + 4 + 2 * 8 + 4
    return data[:at] + struct.pack("<Q", struct.unpack_from("<Q", data, at)[0] + by) + data[at + 8:]


@pytest.mark.parametrize("damage, said", [
    (lambda data: data.replace(b"blk.0.attn_q.weight", b"blk.0.attn_Q.weight"),
     ["missing: model.layers.0.self_attn.q_proj.weight", "not read: blk.0.attn_Q.weight"]),
    (lambda data: data.replace(b"output_norm.weight", b"output_nprm.weight"),
     ["missing: model.norm.weight", "not read: output_nprm.weight"]),
    (lambda data: data.replace(b"blk.1.attn_q.weight", b"blk.2.attn_q.weight"), ["tensors of 3 blocks"]),
    (lambda data: number(data, "gemma3.block_count", 1), ["block_count is 1, and there are tensors of 2 blocks"]),
    (lambda data: number(data, "gemma3.block_count", 1_000_000), ["block_count is 1000000"]),
    (lambda data: number(data, "gemma3.block_count", 0), ["block_count is 0"]),
    (lambda data: number(data, "gemma3.context_length", 0), ["gemma3.context_length is 0"]),
    (lambda data: number(number(data, "gemma3.context_length", 0), "gemma3.embedding_length", 0),
     ["gemma3.context_length is 0", "gemma3.embedding_length is 0"]),
    (lambda data: moved(data, "blk.1.attn_q.weight", 1), ["blk.1.attn_q.weight does not begin at a multiple of 32"]),
    (lambda data: moved(data, "blk.1.attn_q.weight", 32), ["overlap"]),
    (lambda data: data[:-1000], ["it ends before its tensor"]),
], ids=["name", "norm", "block", "fewer blocks", "a million blocks", "no blocks", "context", "two", "misaligned", "overlap", "short"])
def test_a_damaged_file_is_refused_and_nothing_is_made_up(whole, damage, said):
    data = whole.read_bytes()
    whole.write_bytes(damaged := damage(data))
    assert damaged != data
    with pytest.raises(UserError) as e:
        from_gguf.dequantised(whole, "a" * 64, Listener())
    text = "\n".join([e.value.message, *e.value.problems])
    assert all(part in text for part in said), text
    assert str(whole) in text
    assert "again" in e.value.hint
    checkpoints = from_gguf.cache_dir() / "checkpoints"
    assert not checkpoints.exists() or not [p for p in checkpoints.iterdir() if p.is_dir()]


def test_damage_ends_the_command_with_its_code(cli, whole, data):
    whole.write_bytes(number(whole.read_bytes(), "gemma3.context_length", 0))
    result = cli("prepare", data, "--model", whole)
    assert result.code == 2
    assert "gemma3.context_length is 0" in result.err


@pytest.mark.parametrize("name, model, joined", [
    ("big-00002-of-00003.gguf", "big-00002-of-00003.gguf", "big-00001-of-00003.gguf big.gguf"),
    ("big-00001-of-00003.gguf", ".", "big-00001-of-00003.gguf big.gguf"), ("odd.gguf", "odd.gguf", "odd.gguf whole-odd.gguf")])
def test_a_gguf_in_parts_is_refused_before_it_is_read(cli, data, name, model, joined):
    import gguf

    for path in {name, name.replace("00001", "00002")}:
        writer = gguf.GGUFWriter(path, "gemma3")
        writer.add_uint16("split.count", 3)
        write(writer)
    result = cli("prepare", data, "--model", model, "--run", "r")
    assert result.code == 2, result.err
    assert f"{name} is one of 3 files that are a model together" in result.err
    assert f"llama-gguf-split --merge {joined}" in " ".join(result.err.split())


def written(path: Path, architecture: str, kind: str | None = None, tensors: int = 1) -> Path:
    """A GGUF with a matrix or none."""
    writer = gguf.GGUFWriter(path, architecture)
    if kind:
        writer.add_type(kind)
    for n in range(tensors):
        writer.add_tensor(f"blk.{n}.attn_q.weight", np.zeros((8, 8), np.float32))
    write(writer)
    return path


@pytest.mark.parametrize(("architecture", "kind", "tensors", "said", "hint"), [
    ("clip", "mmproj", 1, "holds no model, but a projector of pictures or sounds", "the model's own file"),
    ("clip", None, 1, "holds no model, but a projector of pictures", "the model's own file"),
    ("gemma3", "adapter", 1, "holds no model, but a LoRA adapter", "gemma-tune train --from-adapter DIR"),
    ("imatrix", "imatrix", 1, "holds no model, but statistics to quantise by", "the model's own file"),
    ("gemma3", None, 0, "holds no model, but a vocabulary alone", "the model's own file"),
    ("gemma9", None, 1, "cannot be dequantised: GGUF model with architecture gemma9", "pip install --upgrade transformers")])
def test_other_files_than_models_are_told_apart(tmp_path, opened, architecture, kind, tensors, said, hint):
    path = written(tmp_path / "some.gguf", architecture, kind, tensors)
    with pytest.raises(UserError, match=f"some.gguf {said}") as error:
        from_gguf.dequantised(path, "a" * 64, Listener())
    assert hint in error.value.hint and "download" not in error.value.hint


@pytest.mark.parametrize(("family", "name"), [("mixtral", "Mixtral"), ("gpt-oss", "GPT-OSS"),
                                              ("gemma4-experts", "Gemma 4 with experts")])
def test_experts_that_cannot_be_read_are_told_as_such(tmp_path, family, name):
    """It is no damage, and downloading the file again helps nobody."""
    (make_family if family in FAMILIES else make_llama)(family, tmp_path / "model")
    path = tmp_path / "experts.gguf"
    write_gguf(tmp_path / "model", path, "f16", name="m", eot_token_id=None, chat_template=None)
    with pytest.raises(UserError) as error:
        from_gguf.dequantised(path, "a" * 64, Listener())
    assert error.value.message == f"{path} holds a mixture of experts ({name}), which Transformers does not load from a GGUF"
    assert error.value.hint == "name the model's Hugging Face repository instead of its GGUF file"


@pytest.mark.parametrize(("content", "said"), [
    (b"GGUF\3\0\0", "is not a whole GGUF file: it ends in the middle of its metadata"),
    (b"GGUF\3\0\0\0" + bytes(8) + b"\5" + bytes(7), "is not a whole GGUF file: it ends in the middle of its metadata"),
    (b"GGUF\3\0\0\0" + bytes(16), r"some.gguf does not say which model it is \(general.architecture is missing\)")])
def test_where_a_file_is_cut_off_is_said_in_words(tmp_path, content, said):
    (tmp_path / "some.gguf").write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        from_gguf.dequantised(tmp_path / "some.gguf", "a" * 64, Listener())
    assert "ownload" in error.value.hint and "checkpoints" not in error.value.message


def test_shapes_that_do_not_fit_are_told_by_their_names(whole):
    data = whole.read_bytes()
    at = data.index(b"gemma3.feed_forward_length") + len(b"gemma3.feed_forward_length") + 4
    whole.write_bytes(data[:at] + struct.pack("<I", struct.unpack_from("<I", data, at)[0] * 2) + data[at + 4:])
    with pytest.raises(UserError, match="does not hold the tensors of a whole model of its kind") as error:
        from_gguf.dequantised(whole, "a" * 64, Listener())
    assert "mismatched: model.layers.0.mlp.down_proj.weight has shape (64, 128), config.json asks for (64, 256)" in error.value.problems
