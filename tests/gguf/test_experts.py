"""Experts on their way into a GGUF: each with a matrix of its own in the checkpoint, or all of a layer in one tensor."""

from __future__ import annotations

import itertools
import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.base.tensors import open_tensors
from gemma_tune.gguf import tensors as gguf_tensors
from gemma_tune.gguf import writer
from gemma_tune.gguf.architectures.parts import TensorSpec
from gemma_tune.gguf.architectures.registry import architecture_of
from gemma_tune.gguf.check import worst_error
from gemma_tune.gguf.experts import Stack, by_rows, together
from gemma_tune.gguf.reader import GgufFile
from support.gemmas import make_family
from support.gguf import LlamaCpp
from support.llamas import make_llama, pack_experts, save_random, tokenizer_with_turns

APART, IN_ONE, TURNED = "qwen3 with experts", "gemma4-experts", "gpt-oss"


@pytest.fixture(params=[APART, IN_ONE, TURNED])
def checkpoint(request, tmp_path) -> Path:
    (make_family if request.param == IN_ONE else make_llama)(request.param, tmp_path)
    return tmp_path


def export(folder: Path, quant: str = "f32") -> Path:
    out = folder / f"{quant}.gguf"
    writer.write_gguf(folder, out, quant, name="Tiny", chat_template=None, eot_token_id=None)
    return out


def architecture(folder: Path):
    return architecture_of(json.loads((folder / "config.json").read_text()), folder / "config.json")


def edited(folder: Path, change) -> None:
    """Give the checkpoint's tensors, by name, to a function that changes them."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_rows_are_those_of_one_expert_below_the_others(tmp_path):
    values = torch.arange(3 * 5 * 4, dtype=torch.bfloat16).reshape(3, 5, 4)
    save_file({"a.experts.w": values, **{f"b.experts.{n}.w": values[n].clone() for n in range(3)}}, tmp_path / "model.safetensors")
    stored = together(open_tensors(tmp_path))
    assert {name: len(members) for name, members in stored.items()} == {"a.experts.w": 1, "b.experts.w": 3}
    spec = TensorSpec("blk.0.ffn_up_exps.weight", (3, 5, 4))
    whole, stack = (by_rows(stored[f"{name}.experts.w"], spec) for name in "ab")
    assert isinstance(stack, Stack)
    flat = values.float().numpy().reshape(15, 4)
    for start, stop in [(0, 15), (0, 1), (4, 6), (3, 12), (5, 10), (9, 15), (14, 99)]:
        for tensor in (whole, stack):
            np.testing.assert_array_equal(tensor.rows(start, stop), flat[start:stop], err_msg=str((start, stop)))


def test_experts_without_one_of_them_are_not_put_together():
    names = [f"l.{n}.experts.{e}.w" for n in range(2) for e in range(11) if (n, e) != (1, 3)]
    found = together(dict(zip(names, names)))
    assert found["l.0.experts.w"] == tuple(f"l.0.experts.{e}.w" for e in range(11)), "by number, not by letters"
    assert "l.1.experts.w" not in found and found["l.1.experts.10.w"] == ("l.1.experts.10.w",)


def test_how_many_experts_a_token_meets_is_known(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    text = config.get("text_config", config)
    assert architecture(checkpoint).experts_used == text.get("num_experts_per_tok", text.get("top_k_experts")) > 0


@pytest.mark.parametrize("quant", ["q8_0", "q4_0"])
def test_a_few_rows_at_a_time_give_the_same_file(checkpoint, quant, monkeypatch):
    whole = export(checkpoint, quant).read_bytes()
    monkeypatch.setattr(gguf_tensors, "CHUNK_ELEMENTS", 7 * 64)
    assert export(checkpoint, quant).read_bytes() == whole


def test_writing_holds_no_layers_experts_at_once(tmp_path, monkeypatch):
    tokenizer = tokenizer_with_turns()
    config = Qwen3MoeConfig(vocab_size=len(tokenizer), hidden_size=256, moe_intermediate_size=256, num_experts=48, num_hidden_layers=1,
                            num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=2, norm_topk_prob=True)
    save_random(Qwen3MoeForCausalLM(config), tokenizer, tmp_path)
    monkeypatch.setattr(gguf_tensors, "CHUNK_ELEMENTS", 256 * 256)
    export(tmp_path)  # what is loaded once
    tracemalloc.start()
    try:
        size = GgufFile(export(tmp_path, "q8_0"), keys=()).tensors["blk.0.ffn_up_exps.weight"].nbytes
        assert tracemalloc.get_traced_memory()[1] < size < 4 * 1024 * 1024
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("quant", ["f16", "q4_k_m"])
def test_the_check_sees_experts_that_changed_places(checkpoint, quant):
    path = export(checkpoint, quant)
    error, _ = worst_error(checkpoint, path, architecture(checkpoint))
    assert error < (1e-3 if quant == "f16" else 0.1)

    def swap(tensors):
        names = ("model.language_model.layers.1.experts.down_proj", "model.layers.1.mlp.experts.down_proj")
        if name := next((name for name in names if name in tensors), None):
            tensors[name] = tensors[name][[1, 0, *range(2, len(tensors[name]))]].contiguous()
        else:
            one, two = (f"model.layers.1.mlp.experts.{n}.down_proj.weight" for n in range(2))
            tensors[one], tensors[two] = tensors[two], tensors[one]

    edited(checkpoint, swap)
    with pytest.raises(WorkFailed) as failed:
        worst_error(checkpoint, path, architecture(checkpoint))
    [problem] = failed.value.problems
    assert problem.startswith("blk.1.ffn_down_exps.weight: off by")


def test_gate_and_up_in_one_tensor_give_the_same_file(tmp_path):
    """As Transformers saves a model that it loaded from a GGUF."""
    make_llama(APART, tmp_path)
    whole = export(tmp_path, "q8_0").read_bytes()
    experts = "model.layers.{}.mlp.experts."

    def join(tensors):
        for n in range(2):
            gate, up, down = (torch.stack([tensors.pop(f"{experts.format(n)}{e}.{part}_proj.weight") for e in range(6)])
                              for part in ("gate", "up", "down"))
            tensors |= {f"{experts.format(n)}gate_up_proj": torch.cat([gate, up], 1), f"{experts.format(n)}down_proj": down}

    edited(tmp_path, join)
    path = export(tmp_path, "q8_0")
    assert path.read_bytes() == whole and worst_error(tmp_path, path, architecture(tmp_path))[0] < 0.01
    name = f"{experts.format(1)}gate_up_proj"
    edited(tmp_path, lambda tensors: tensors.update({name: tensors[name].flip(1)}))
    with pytest.raises(WorkFailed) as failed:
        worst_error(tmp_path, path, architecture(tmp_path))
    assert [problem.split(":")[0] for problem in failed.value.problems] == [
        f"blk.1.ffn_{part}_exps.weight" for part in ("gate", "up")]
    edited(tmp_path, lambda tensors: tensors.update({name: tensors[name][:, :60].clone()}))
    assert f"{name} is not a tensor of this model" in problems_of(tmp_path)


def problems_of(folder: Path) -> list[str]:
    with pytest.raises(UserError, match="don't fit its config.json") as refused:
        export(folder)
    return list(refused.value.problems)


def test_experts_that_do_not_fit_are_named(tmp_path):
    make_llama(APART, tmp_path)
    part = "model.layers.0.mlp.experts.{}.up_proj.weight"
    edited(tmp_path, lambda tensors: tensors.pop(part.format(5)))
    assert problems_of(tmp_path) == [f"{part.format(0)} is one of 5, config.json asks for 6"]
    edited(tmp_path, lambda tensors: tensors.pop(part.format(2)))
    assert f"{part.format(4)} is not a tensor of this model" in problems_of(tmp_path)
    assert "model.layers.0.mlp.experts.up_proj.weight is missing" in problems_of(tmp_path)
    edited(tmp_path, lambda tensors: tensors.update({part.format(n): torch.zeros(16 if n == 4 else 32, 64) for n in range(6)}))
    assert problems_of(tmp_path) == [f"{part.format(4)} has shape (16, 64), config.json asks for (32, 64)"]


def test_a_tensor_of_too_few_experts_is_named(tmp_path):
    make_family(IN_ONE, tmp_path)
    name = "model.language_model.layers.2.experts.gate_up_proj"
    edited(tmp_path, lambda tensors: tensors.update({name: tensors[name][:3].clone()}))
    assert problems_of(tmp_path) == [f"{name} has shape (3, 64, 64), config.json asks for (4, 64, 64)"]


def test_gate_and_up_are_every_second_column_of_gpt_oss(tmp_path):
    """And each matrix stands the other way round there; their biases are columns of one tensor as well."""
    make_llama(TURNED, tmp_path)
    name, tensors = "model.layers.1.mlp.experts", load_file(tmp_path / "model.safetensors")
    file = GgufFile(export(tmp_path), keys=())

    def held(part: str) -> np.ndarray:
        tensor = file.tensors[f"blk.1.{part}"]
        return file.rows(f"blk.1.{part}", 0, int(np.prod(tensor.shape[:-1]))).reshape(tensor.shape)

    both, biases = tensors[f"{name}.gate_up_proj"].float().numpy(), tensors[f"{name}.gate_up_proj_bias"].float().numpy()
    for start, part in enumerate(("gate", "up")):
        np.testing.assert_array_equal(held(f"ffn_{part}_exps.weight"), both[:, :, start::2].transpose(0, 2, 1))
        np.testing.assert_array_equal(held(f"ffn_{part}_exps.bias"), biases[:, start::2])
    np.testing.assert_array_equal(held("ffn_down_exps.weight"), tensors[f"{name}.down_proj"].float().numpy().transpose(0, 2, 1))


@pytest.mark.parametrize("part", ["gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"])
def test_the_check_sees_each_part_of_gpt_oss(tmp_path, part):
    make_llama(TURNED, tmp_path)
    path, name = export(tmp_path, "q8_0"), f"model.layers.1.mlp.experts.{part}"
    assert worst_error(tmp_path, path, architecture(tmp_path))[0] < 0.01
    edited(tmp_path, lambda tensors: tensors.update({name: tensors[name].flip(-1)}))
    with pytest.raises(WorkFailed) as failed:
        worst_error(tmp_path, path, architecture(tmp_path))
    kind = "bias" if part.endswith("bias") else "weight"
    assert [problem.split(":")[0] for problem in failed.value.problems] == [
        f"blk.1.ffn_{each}_exps.{kind}" for each in (("gate", "up") if "gate" in part else ("down",))]
    edited(tmp_path, lambda tensors: tensors.update({name: tensors[name][..., :-2].clone()}))
    assert any(problem.startswith(f"{name} ") for problem in problems_of(tmp_path))


def test_biases_of_experts_stay_as_they_are_in_every_format(tmp_path):
    make_llama(TURNED, tmp_path)
    tensors = GgufFile(export(tmp_path, "q4_0"), keys=()).tensors
    assert {tensors[f"blk.0.ffn_{part}_exps.bias"].type.name for part in ("gate", "up", "down")} == {"F32"}
    assert tensors["blk.0.ffn_gate_exps.weight"].type.name == "Q4_0"


def test_experts_of_gpt_oss_that_were_not_trained_keep_their_mxfp4_bit_for_bit(tmp_path):
    """The released ones lie on its grid, in bf16; none of their blocks has to use all of its range."""
    make_llama(TURNED, tmp_path)
    generator = np.random.default_rng(3)
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)

    def on_grid(shape: torch.Size) -> torch.Tensor:
        experts, rows, columns = shape  # blocks go down the columns, which are rows in the file
        values = generator.choice(grid, (experts, columns, rows // 32, 32)) * generator.choice([-1, 1], (experts, columns, rows // 32, 32))
        values = np.where(generator.random(values.shape[:-1] + (1,)) < 0.3, np.clip(values, -1, 1), values)
        scaled = values * 2.0 ** generator.integers(-9, -3, values.shape[:-1] + (1,))
        return torch.from_numpy(scaled.reshape(experts, columns, rows)).transpose(1, 2).to(torch.bfloat16).contiguous()

    edited(tmp_path, lambda tensors: tensors.update({
        name: on_grid(tensor.shape) for name, tensor in tensors.items() if name.endswith(("gate_up_proj", "down_proj"))}))
    exact, small = (GgufFile(export(tmp_path, quant), keys=()) for quant in ("f32", "mxfp4"))
    for name in (f"blk.3.ffn_{part}_exps.weight" for part in ("gate", "up", "down")):
        assert small.tensors[name].type.name == "MXFP4"
        rows = int(np.prod(small.tensors[name].shape[:-1]))
        np.testing.assert_array_equal(small.rows(name, 0, rows), exact.rows(name, 0, rows))
    assert worst_error(tmp_path, small.path, architecture(tmp_path))[0] < 0.01
    llama_cpp, prompt = LlamaCpp(small.path), list(range(40, 60))
    [first, second] = (engine.complete(prompt, 8)["tokens"] for engine in (llama_cpp, LlamaCpp(tmp_path / "f32.gguf")))
    assert first[:1] == second[:1], "llama.cpp reads it"


def test_packed_experts_give_the_file_of_those_that_transformers_unpacks(tmp_path):
    packed, whole = tmp_path / "packed", tmp_path / "whole"
    make_llama(TURNED, packed)
    pack_experts(packed)
    shutil.copytree(packed, whole)
    experts = "model.layers.{}.mlp.experts.{}"

    def unpack(tensors):
        for n, part in itertools.product(range(4), ("gate_up_proj", "down_proj")):
            name = experts.format(n, part)
            tensors[name] = convert_moe_packed_tensors(tensors.pop(f"{name}_blocks"), tensors.pop(f"{name}_scales")).contiguous()

    edited(whole, unpack)
    for quant in ("f32", "mxfp4"):
        path = export(packed, quant)
        assert path.read_bytes() == export(whole, quant).read_bytes()
        assert worst_error(packed, path, architecture(packed))[0] < (0.01 if quant == "mxfp4" else 1e-7)
    name = f"{experts.format(2, 'gate_up_proj')}_scales"
    edited(packed, lambda tensors: tensors.update({name: tensors[name] + 1}))
    with pytest.raises(WorkFailed) as failed:
        worst_error(packed, path, architecture(packed))
    assert [problem.split(":")[0] for problem in failed.value.problems] == [f"blk.2.ffn_{part}_exps.weight" for part in ("gate", "up")]
    edited(packed, lambda tensors: tensors.update({name: tensors[name][:, :10].clone()}))
    assert f"{name} is not a tensor of this model" in problems_of(packed)


def test_packed_experts_go_through_llama_quantize_in_bf16(tmp_path, monkeypatch):
    """Of 120B parameters the file between takes 234 GB so, and twice as much in f32."""
    make_llama(TURNED, tmp_path)
    pack_experts(tmp_path)
    seen = []

    def quantised(source: Path, out: Path, quant: str) -> None:
        seen.append({info.type.name for name, info in GgufFile(source, keys=()).tensors.items() if name.endswith("_exps.weight")})
        shutil.copy(source, out)

    monkeypatch.setattr(writer, "needs_llama_quantize", lambda quant, *_: quant == "q4_k_m")
    monkeypatch.setattr(writer, "llama_quantize", quantised)
    path = export(tmp_path, "q4_k_m")
    assert seen == [{"BF16"}] and worst_error(tmp_path, path, architecture(tmp_path))[0] == 0
