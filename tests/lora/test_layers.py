"""Which layers are adapted, in families whose linear layers are not all what they look like."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from gemma_tune.base.errors import UserError
from gemma_tune.encoding.tokens import open_tokens
from gemma_tune.lora.files import read_adapter
from gemma_tune.lora.layers import left_out, not_adapted, target_modules
from gemma_tune.lora.start import names_in
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import Placement
from support.command import rows, write_rows
from support.gemmas import make_family
from support.llamas import save_random, tokenizer_with_turns

SMALL = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=16, max_position_embeddings=512)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=32)
FAMILIES = {
    "qwen3_moe": dict(num_experts=4, mlp_only_layers=[0], **EXPERTS),  # the first layer is none of experts
    "deepseek_v3": dict(q_lora_rank=16, head_dim=8, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
                        n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1, num_key_value_heads=4, **EXPERTS),
    "qwen2_moe": dict(num_experts=4, shared_expert_intermediate_size=32, **EXPERTS),
    "llama4_text": dict(num_local_experts=2, num_experts_per_tok=1, attention_chunk_size=16, intermediate_size_mlp=96,
                        no_rope_layers=[1, 0], pad_token_id=0),
    "mamba2": dict(num_heads=8, head_dim=16, state_size=16, n_groups=1, chunk_size=16),
    "gpt_oss": dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=16),
    "gemma3n_text": dict(num_hidden_layers=4, sliding_window=16, layer_types=["sliding_attention", "full_attention"] * 2,
                         num_kv_shared_layers=2, hidden_size_per_layer_input=16, laurel_rank=8,
                         activation_sparsity_pattern=[0.0] * 4, intermediate_size=[96] * 4),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"], num_local_experts=0, shared_intermediate_size=96,
                             mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_chunk_size=16),
    "bamba": dict(attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1, mamba_chunk_size=16),
    "zamba2": dict(layers_block_type=["mamba", "hybrid"], n_mamba_heads=8, mamba_headdim=16, mamba_d_state=16, chunk_size=16,
                   mamba_ngroups=1, adapter_rank=4, num_mem_blocks=1, attention_head_dim=16, num_key_value_heads=4),
    "gemma4_text": dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"], global_head_dim=32, num_experts=4,
                        enable_moe_block=True, top_k_experts=2, moe_intermediate_size=32, hidden_size_per_layer_input=0),
    "hunyuan_v1_moe": dict(num_experts=4, moe_topk=2, pad_token_id=0),
    "qwen3": {},
}
OUT = {"qwen3_moe": ["down_proj", "gate_proj", "up_proj"], "deepseek_v3": ["down_proj", "gate_proj", "up_proj"], "qwen2_moe": [],
       "llama4_text": ["router"], "mamba2": ["out_proj"], "granitemoehybrid": ["out_proj"],
       "gemma4_text": [], "hunyuan_v1_moe": ["down_proj", "gate_proj", "up_proj"], "bamba": ["out_proj"], "zamba2": ["out_proj"], "gpt_oss": [], "gemma3n_text": ["correction_coefs"], "qwen3": []}


def make(family: str, folder: Path | None = None):
    """A random model; with a folder it is saved there with its tokenizer."""
    tokenizer, settings = tokenizer_with_turns(), SMALL | FAMILIES[family]
    if family == "gemma3n_text":
        settings["vocab_size_per_layer_input"] = len(tokenizer)
    config = CONFIG_MAPPING[family](vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
                                    eos_token_id=tokenizer.eos_token_id, **settings)
    return save_random(AutoModelForCausalLM.from_config(config), tokenizer, folder)


def leaves(names) -> list[str]:
    """Their last parts, each once."""
    return sorted({name.rsplit(".", 1)[-1] for name in names})


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_named_is_what_peft_adapts(family):
    model = make(family)
    chosen = target_modules(model, ())
    assert leaves(left_out(model)) == OUT[family] and not {*leaves(chosen)} & {*OUT[family]}
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=chosen, task_type="CAUSAL_LM"))
    found = sorted(name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
                   for name, _ in adapted.named_modules() if name.endswith(".lora_A.default"))
    assert found == chosen and not adapted.peft_config["default"].target_parameters


def test_of_experts_the_router_is_adapted_only_where_it_is_named(tmp_path):
    model = make("gemma4_text")
    every = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert leaves(target_modules(model, ())) == every
    named = target_modules(model, ["proj"])
    assert named == [f"model.layers.{n}.router.proj" for n in range(2)]
    router, experts = not_adapted(model, ())
    assert router.startswith("proj is not adapted: it chooses the experts, and is left as it was trained")
    share = 2 * 4 * 3 * 64 * 32 / sum(p.numel() for p in model.parameters())
    assert experts.startswith(f"the 4 experts of each layer, {share:.0%} of the weights, are not adapted")
    assert not_adapted(model, ["proj"]) == [experts]
    # An adapter from elsewhere can have it, and is trained further.
    get_peft_model(deepcopy(model), LoraConfig(r=2, target_modules=[*every, "proj"])).save_pretrained(tmp_path)
    assert {*named} < {*names_in(model, read_adapter(tmp_path)).values()}


def test_a_router_inside_a_gate_is_one():
    model = make("hunyuan_v1_moe")
    assert leaves(target_modules(model, ())) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert target_modules(model, ["wg"]) == [f"model.layers.{n}.mlp.gate.wg" for n in range(2)]
    assert [said.split(":")[0] for said in not_adapted(model, ())][-2] == "wg is not adapted"


def test_experts_are_said_where_they_are_asked_for():
    model = make("gpt_oss")
    assert [said.split(",")[0] for said in not_adapted(model, ())] == ["the 4 experts of each layer"]
    with pytest.raises(UserError) as refused:
        target_modules(model, ["q_proj", "gate_up_proj"])
    assert "names what the model does not have: gate_up_proj" in refused.value.message
    assert refused.value.hint.endswith("; its experts are not among them: these are not adapted here")
    with pytest.raises(UserError) as refused:
        target_modules(make("qwen2_moe"), ["q_proj", "gate_up_proj"])
    assert refused.value.hint.endswith("; its experts are not among them: `experts` names these")
    dense = make("qwen3")
    assert not_adapted(dense, ()) == []
    with pytest.raises(UserError) as refused:
        target_modules(dense, ["gate_up_proj"])
    assert "experts" not in refused.value.hint


def test_a_layer_that_cannot_be_adapted_is_refused_by_its_name():
    with pytest.raises(UserError) as refused:
        target_modules(make("qwen3_moe"), ["q_proj", "gate_proj"])
    assert "--target-modules: gate_proj is what PEFT calls the fused experts of such a model; `experts` names these" in refused.value.message
    assert refused.value.hint == "layers that can be adapted are k_proj, o_proj, q_proj, v_proj"


@pytest.mark.parametrize("odd", [0, 1])
def test_a_layer_is_judged_by_itself_and_not_by_its_name(odd):
    """In one of two layers it is of its own kind, the first or the last by name."""
    class OwnKind(torch.nn.Linear):
        __module__ = "transformers.models.llama.modeling_llama"

        def forward(self, x):
            return super().forward(x).relu()

    model = make("qwen3")
    model.model.layers[odd].self_attn.o_proj = OwnKind(64, 64)
    name, other = (f"model.layers.{number}.self_attn.o_proj" for number in (odd, 1 - odd))
    assert [*left_out(model)] == [name] and target_modules(model, ["o_proj"]) == [other]
    [said] = not_adapted(model, ())
    assert said.startswith("o_proj is not adapted in 1 of 2 places: it is a layer of its own kind")
    assert not_adapted(model, ["o_proj"]) == [said] and not_adapted(model, ["q_proj"]) == []


def test_a_start_on_a_layer_that_is_left_out_is_refused_with_the_reason(tmp_path):
    model = make("mamba2", tmp_path / "base")
    adapted = get_peft_model(torch.nn.Sequential(deepcopy(model.backbone.layers[0].mixer)), LoraConfig(r=2, target_modules=["out_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        tensors = {name.replace("model.0.", "model.backbone.layers.0.mixer."): file.get_tensor(name) for name in file.keys()}
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(UserError) as refused:
        names_in(model, read_adapter(tmp_path / "adapter"))
    [problem] = refused.value.problems
    assert problem.startswith("backbone.layers.0.mixer.out_proj is read past an adapter by Mamba's kernels")


def test_a_start_on_layers_of_a_tower_is_refused_as_one_on_what_is_not_trained(tmp_path):
    """They are not loaded, which does not mean that the base has none."""
    make_family("gemma3", tmp_path / "base")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(whole, LoraConfig(r=2, target_modules=["layers.0.self_attn.q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError) as refused:
        names_in(load_model(tmp_path / "base", Placement("cpu", torch.float32, "")), read_adapter(tmp_path / "adapter"))
    [problem] = refused.value.problems
    assert "vision_tower" in problem and problem.endswith("is no linear layer of the text model's blocks, which alone are trained here")


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma4_text", "llama4_text", "gpt_oss", "gemma3n_text"])
def test_it_is_trained_as_plain_peft_computes_it_and_merged(cli, tmp_path, family):
    """From the settings by default to a merged model, in families that broke on the way."""
    make(family, tmp_path / family)
    assert cli("prepare", write_rows(tmp_path / "rows.jsonl", rows(8)), "--model", tmp_path / family).code == 0
    result = cli("train", "--epochs", 2, "--batch-size", 2, "--dtype", "fp32", "--learning-rate", 1e-2, "--rank", 4, "--keep",
                 "last", "--samples", 0, "--json")
    assert result.code == 0, result.err
    assert all(f"{leaf} is not adapted: it " in result.err for leaf in OUT[family])
    assert ("experts of each layer" in result.err) == (family != "gemma3n_text")
    run = tmp_path / "runs" / family
    base = AutoModelForCausalLM.from_pretrained(tmp_path / family, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(base, str(run / f"{family}_lora_adapter")).eval()
    total, count = 0.0, 0
    for row in open_tokens(run / "data/tokens/valid.arrow"):
        labels = torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(row["input_ids"])[None]).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    assert result.json["summary"]["eval_loss_after"] == pytest.approx(total / count, rel=1e-4)
    merged = cli("merge", "--json")
    assert merged.code == 0, merged.err
    assert merged.json["summary"]["check_divergence"] < 1e-3


def test_gemma_3n_says_a_width_for_each_layer(tmp_path):
    from gemma_tune.base.checkpoint import read_config
    from gemma_tune.config.families import parameters

    make("gemma3n_text", tmp_path)
    config = read_config(tmp_path)
    assert config["intermediate_size"] == [96] * 4
    assert parameters(config) == parameters(config | {"intermediate_size": 96})
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": [96, -1]}))
    with pytest.raises(UserError, match="describes no model"):
        read_config(tmp_path)
