"""LoRA on experts: what is adapted, the forward pass against PEFT's, and merging and folding against PEFT's merge."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from gemma_tune.base.errors import UserError
from gemma_tune.config.settings import resolve
from gemma_tune.config.stages import TrainConfig
from gemma_tune.lora.config import CONFIG, WEIGHTS
from gemma_tune.lora.experts import adaptable
from gemma_tune.lora.files import read_adapter
from gemma_tune.lora.fold import fold
from gemma_tune.lora.layers import not_adapted, target_modules, target_parameters
from gemma_tune.lora.load import add_adapter
from gemma_tune.lora.renamed import renamed_adapter
from gemma_tune.lora.routed import install
from gemma_tune.lora.start import load_start, names_in, patterns_of, settings_of, targets_from, weights_of
from gemma_tune.lora.targets import lora_config, targets_of
from gemma_tune.train.effect import AdapterStart
from gemma_tune.train.shape import shape_of
from support.llamas import save_random, tokenizer_with_turns
from support.merging import merged

SMALL = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=16, max_position_embeddings=512, vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2)
TWO = dict(num_experts_per_tok=2)
# Experts with matrices of their own on the disk under two sets of names, and all in one tensor.
FAMILIES = {
    "qwen3_moe": dict(num_experts=6, moe_intermediate_size=32, mlp_only_layers=[0], norm_topk_prob=True, **TWO),
    "mixtral": dict(num_local_experts=4, **TWO),
    "gemma4_text": dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"], global_head_dim=32, num_experts=4,
                        enable_moe_block=True, top_k_experts=2, moe_intermediate_size=32, hidden_size_per_layer_input=0),
}
OTHERS = {  # that keep them in ways of their own
    "gpt_oss": dict(num_local_experts=4, sliding_window=16, **TWO),
    "llama4_text": dict(num_local_experts=2, num_experts_per_tok=1, attention_chunk_size=16, intermediate_size_mlp=96,
                        no_rope_layers=[1, 0]),
    "granitemoe": dict(num_local_experts=4, **TWO),
}
IDS = torch.arange(3, 39).reshape(2, 18)
PARTS = {"both": slice(None), "gate and up": slice(0, None, 2), "down": slice(1, None, 2)}


def make(family: str, folder: Path | None = None):
    config = CONFIG_MAPPING[family](**SMALL | (FAMILIES | OTHERS)[family])
    return save_random(AutoModelForCausalLM.from_config(config), tokenizer_with_turns(), folder)


def adapted(model, parameters, modules=("q_proj",), r: int = 3, **settings):
    """PEFT's, of which B is not zero."""
    torch.manual_seed(2)
    tuned = get_peft_model(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(modules), target_parameters=list(parameters),
                                             **settings))
    with torch.no_grad():
        for name, value in tuned.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.1)
    return tuned


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def learned(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradients of a function of them."""
    model.zero_grad()
    found = model(IDS).logits
    found.logsumexp(-1).square().sum().backward()
    return found.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("rank", [3, 16])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_products_of_routed_tokens_are_what_peft_computes(family, part, rank):
    model = make(family)
    base = logits(model)
    tuned = adapted(model, adaptable(model)[PARTS[part]], r=rank)
    theirs, gradients = learned(tuned)
    assert install(tuned) == (1 if family == "qwen3_moe" else 2)
    ours, own = learned(tuned)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (theirs - base).abs().max() > 0.1 and own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(own[name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item(), msg=name)
    with tuned.disable_adapter():
        torch.testing.assert_close(logits(tuned), base)


def test_it_holds_no_second_copy_of_the_experts():
    """Of what autograd keeps for the backward pass nothing is as large as a layer's experts."""
    model = make("mixtral")
    tuned = adapted(model, adaptable(model))
    experts = max(p.numel() for p in tuned.parameters() if p.ndim == 3)
    own = {p.untyped_storage().data_ptr() for p in tuned.parameters()}

    def largest() -> int:
        kept = [0]

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in own:
                kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            tuned(IDS)
        return max(kept)

    assert largest() >= experts, "PEFT's own does"
    install(tuned)
    assert largest() < experts / 2


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_as_peft_merges_and_under_the_names_that_the_base_has(tmp_path, family, part):
    model = make(family, tmp_path / "base")
    parameters = adaptable(model)[PARTS[part]]
    own = {re_escaped(parameters[0]): 5}
    adapted(deepcopy(model), parameters, rank_pattern=own, alpha_pattern={re_escaped(parameters[-1]): 4}).save_pretrained(
        tmp_path / "adapter")
    read = read_adapter(tmp_path / "adapter")
    assert {name for name, lora in read.layers.items() if lora.experts} == {*parameters}
    assert read.layers[parameters[0]].rank == 5 and read.layers[parameters[0]].experts == len(model.get_parameter(parameters[0]))
    merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    stored, made = (load_file(tmp_path / place / "model.safetensors") for place in ("base", "merged"))
    assert {name: value.shape for name, value in made.items()} == {name: value.shape for name, value in stored.items()}
    plain = PeftModel.from_pretrained(deepcopy(model), tmp_path / "adapter")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(whole), logits(plain), rtol=1e-4, atol=1e-4)
    theirs = plain.merge_and_unload()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=0, atol=1e-5, msg=name)
    assert sum(not torch.equal(stored[name], made[name]) for name in stored) > 2


def re_escaped(name: str) -> str:
    return name.replace(".", r"\.")


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_and_loaded_adapters_answer_as_peft_s(tmp_path, family):
    model = make(family)
    adapted(deepcopy(model), adaptable(model)).save_pretrained(tmp_path)
    theirs = logits(PeftModel.from_pretrained(deepcopy(model), tmp_path))
    ours = add_adapter(deepcopy(model), tmp_path)
    assert any("forward" in vars(module) for module in ours.modules()), "not the forward pass of PEFT"
    torch.testing.assert_close(logits(ours), theirs, rtol=1e-4, atol=1e-4)
    folded = fold(ours)
    torch.testing.assert_close(logits(folded), theirs, rtol=1e-4, atol=1e-4)
    assert {name for name, _ in folded.named_parameters()} == {name for name, _ in model.named_parameters()}


def test_a_merge_reads_a_few_rows_of_all_experts_at_a_time(tmp_path, monkeypatch):
    """Blocks that begin and end within an expert."""
    model = make("gemma4_text", tmp_path / "base")
    adapted(model, adaptable(model)).save_pretrained(tmp_path / "adapter")
    merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "whole")
    monkeypatch.setattr("gemma_tune.merge.weights._BLOCK", 7 * 64)
    merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "blocks")
    whole, blocks = (load_file(tmp_path / place / "model.safetensors") for place in ("whole", "blocks"))
    for name, value in whole.items():
        torch.testing.assert_close(blocks[name], value, rtol=0, atol=1e-6, msg=name)


def test_an_adapter_of_another_number_of_experts_fits_neither_a_merge_nor_a_training(tmp_path):
    model = make("mixtral", tmp_path / "base")
    adapted(make("mixtral"), adaptable(model)).save_pretrained(tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / WEIGHTS)
    for name in [name for name in weights if ".experts." in name]:  # three of four experts
        kept = weights[name][:9] if "lora_A" in name else weights[name].view(len(weights[name]), 3, 4)[..., :3].flatten(1)
        weights[name] = kept.contiguous()
    save_file(weights, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(UserError) as refused:
        names_in(model, read_adapter(tmp_path / "adapter"))
    assert "model.layers.0.mlp.experts.gate_up_proj has the shape (4, 192, 64) in the base, (3, 192, 64) in the adapter" in (
        refused.value.problems)
    with pytest.raises(UserError, match="does not fit the base model|not in the base model"):
        plain = tmp_path / "fused"
        plain.mkdir()
        (plain / "config.json").write_bytes((tmp_path / "base" / "config.json").read_bytes())
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, plain / "model.safetensors")
        merged(plain, tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_that_starts_from_one_has_its_weights_ranks_and_scales(tmp_path, family):
    model = make(family)
    parameters = adaptable(model)
    adapted(deepcopy(model), parameters, rank_pattern={re_escaped(parameters[0]): 5}).save_pretrained(tmp_path)
    read = read_adapter(tmp_path)
    assert settings_of(read)["target_modules"] == ("experts", "q_proj") and settings_of(read)["rank"] == 3
    names = names_in(model, read)
    targets = targets_from(model, read, names)
    assert targets.parameters == sorted(parameters) and {name.rsplit(".", 1)[-1] for name in targets.layers} == {"q_proj"}
    config = TrainConfig(rank=3, alpha=6.0, target_modules=("experts", "q_proj"))
    again = get_peft_model(deepcopy(model), lora_config(config, targets, **patterns_of(read, names)))
    load_start(again, weights_of(read, names))
    torch.testing.assert_close(logits(again), logits(PeftModel.from_pretrained(deepcopy(model), tmp_path)))


def test_an_adapter_is_written_anew_under_the_names_of_another_form_of_its_model(tmp_path):
    model = make("gemma4_text")
    adapted(deepcopy(model), adaptable(model)).save_pretrained(tmp_path / "adapter")
    (tmp_path / "renamed").mkdir()
    read = read_adapter(tmp_path / "adapter")
    renamed_adapter(read, {name: name for name in read.layers}, tmp_path / "renamed")
    given, written = (logits(PeftModel.from_pretrained(deepcopy(model), tmp_path / place)) for place in ("adapter", "renamed"))
    torch.testing.assert_close(written, given)


@pytest.mark.parametrize("begun", [False, True])
def test_how_far_experts_moved_is_the_norm_of_their_change(begun):
    model = make("mixtral")
    parameters = adaptable(model)
    tuned = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=[], target_parameters=parameters))
    factors = [p for name, p in tuned.named_parameters() if "lora_" in name]

    def weights() -> list[torch.Tensor]:
        whole = deepcopy(tuned).merge_and_unload()
        return [whole.get_parameter(name).detach().double() for name in parameters]

    with torch.no_grad():
        for factor in factors:
            factor += begun * torch.randn_like(factor) * 0.1
        start, before = AdapterStart(tuned), weights()
        assert start.moved(tuned).norm == 0 and len(start.moved(tuned).still) == 4
        for factor in factors:
            factor += 0.1 * torch.randn_like(factor)
        change = sum((now - then).square().sum() for now, then in zip(weights(), before)).sqrt().item()
    assert start.moved(tuned).norm == pytest.approx(change, rel=1e-3) and not start.moved(tuned).still


def test_experts_are_adapted_where_they_are_asked_for():
    model = make("gemma4_text")
    every, experts = target_modules(model, ()), [f"model.layers.{n}.experts.{p}" for n in range(2) for p in ("gate_up_proj", "down_proj")]
    assert target_parameters(model, ()) == target_parameters(model, ("q_proj",)) == []
    for asked, modules in ((("all", "experts"), every), (("experts",), []), (("experts", "experts"), []),
                           (("experts", "q_proj"), target_modules(model, ["q_proj"]))):
        assert (target_modules(model, asked), target_parameters(model, asked)) == (modules, experts)
    assert not_adapted(model, ("experts",)) == not_adapted(model, ("experts", "experts")) == []
    assert not any("experts of each" in said for said in not_adapted(model, ("all", "experts")))
    assert not_adapted(model, ())[-1].endswith("; --target-modules all,experts adapts them too")


@pytest.mark.parametrize("family", [*OTHERS, "qwen3"])
def test_experts_that_are_kept_in_another_way_are_refused(family):
    model = make(family) if family in OTHERS else AutoModelForCausalLM.from_config(CONFIG_MAPPING["qwen3"](**SMALL))
    assert adaptable(model) == [] and not any("adapts them" in said for said in not_adapted(model, ()))
    with pytest.raises(UserError) as refused:
        target_parameters(model, ("all", "experts"))
    assert "--target-modules names experts, and this model" in refused.value.message
    assert ("has none" in refused.value.message) == (family == "qwen3")
    assert "leave experts out of --target-modules" in refused.value.hint


@pytest.mark.parametrize(("settings", "named"), [
    ({"dora": True}, ["dora"]), ({"dropout": 0.1, "compile": True}, ["dropout", "compile"]),
    ({"strategy": "fsdp", "num_processes": 2}, ["strategy fsdp"])])
def test_what_does_not_go_with_experts_is_told_before_anything_is_read(settings, named):
    with pytest.raises(UserError) as refused:
        resolve(TrainConfig, settings | {"target_modules": "all,experts"})
    assert refused.value.problems == tuple(
        f"target_modules: experts does not go together with {name}; leave one of them out" for name in named)
    resolve(TrainConfig, settings)


def test_other_parameters_of_an_adapter_are_named(tmp_path):
    model = make("mixtral")
    adapted(model, adaptable(model)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text()) | {"target_parameters": ["experts.down_proj", "self_attn.sinks"]}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match="a kind of adapter that gemma-tune does not merge") as refused:
        read_adapter(tmp_path)
    [problem] = refused.value.problems
    assert "self_attn.sinks" in problem and "gate_up_proj and down_proj" in problem


@pytest.mark.parametrize("asked", [("experts",), ("all", "experts"), ("q_proj", "experts")])
def test_a_plan_counts_what_is_trained_and_what_of_it_a_token_meets(tmp_path, asked):
    model = make("qwen3_moe", tmp_path)
    config = TrainConfig(rank=4, target_modules=asked)
    tuned = get_peft_model(deepcopy(model), lora_config(config, targets_of(model, config)))
    shape = shape_of(tmp_path, config, torch.bfloat16)
    experts = 6 * 4 * (64 + 64 + 32 + 64)
    assert shape.adapter == tuned.get_nb_trainable_parameters()[0] and shape.experts == 2
    assert shape.adapter_active == shape.adapter - experts + experts // 3, "two of six"
    assert shape.widest >= 2 * 64 and shape.kept(2, 30) > shape.kept(1, 30) > 0
