"""Every kind of adapter: merged as PEFT merges it in fp32, and as base + adapter computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.merging import merged


def gemma(tie: bool = True) -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(
        vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=tie, pad_token_id=0, initializer_range=0.2))


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1,
                                      eos_token_id=1, initializer_range=0.2))


def make(folder: Path, model: Any, **settings: Any) -> tuple[Path, Path, torch.Tensor]:
    """A base and an adapter with random numbers, and what base + adapter answers: logits (1, 9, vocabulary)."""
    from peft import LoraConfig, get_peft_model

    model.save_pretrained(folder / "base")
    tuned = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **settings}))
    generator = torch.Generator().manual_seed(1)
    for name, p in tuned.named_parameters():
        if p.requires_grad:
            noise = torch.randn(p.shape, generator=generator)
            p.data += 0.2 * p.data * noise.abs() if "magnitude" in name else 0.1 * noise  # in place: some are tied
    tuned.save_pretrained(folder / "adapter")
    with torch.no_grad():
        return folder / "base", folder / "adapter", tuned.eval()(torch.arange(9)[None] + 3).logits


def logits(checkpoint: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        return model(torch.arange(9)[None] + 3).logits


def peft_merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter))
    return model.merge_and_unload().state_dict()


def rounding(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference in units of one rounding of fp32, of the number or, where a sum went to nothing, its terms."""
    size = other.abs().clamp(min=max(1e-6, other.abs().mean().item()))
    return ((one - other).abs() / (torch.finfo(torch.float32).eps * size)).max().item()


EVERYWHERE = {"target_modules": "all-linear"}
PATTERNS = {**EVERYWHERE, "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 3},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 5.0, "q_proj": 9.0, r"mlp\.down.*": 1.0}}
CONV1D = {"target_modules": ["c_attn", "c_proj", "c_fc"]}
SAVED = {"target_modules": ["q_proj"]}
KINDS = {
    "plain": (gemma, EVERYWHERE),
    "rslora": (gemma, {**EVERYWHERE, "use_rslora": True}),
    "dora": (gemma, {**EVERYWHERE, "use_dora": True}),
    "patterns": (gemma, PATTERNS),
    "patterns, rslora and dora": (gemma, {**PATTERNS, "use_rslora": True, "use_dora": True}),
    "mica": (gemma, {**EVERYWHERE, "init_lora_weights": "mica"}),
    "embedding": (lambda: gemma(tie=False), {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding, dora": (lambda: gemma(tie=False), {"target_modules": ["embed_tokens"], "use_dora": True}),
    "head": (lambda: gemma(tie=False), {"target_modules": ["lm_head", "o_proj"]}),
    "conv1d": (gpt2, CONV1D),
    "conv1d, dora": (gpt2, {**CONV1D, "use_dora": True}),
    "conv1d, square alone": (gpt2, {"target_modules": ["attn.c_proj"]}),
    "norms": (gemma, {**SAVED, "modules_to_save": ["input_layernorm", "norm"]}),
    "whole embedding": (lambda: gemma(tie=False), {**SAVED, "modules_to_save": ["embed_tokens"]}),
    "tied, whole embedding": (gemma, {**SAVED, "modules_to_save": ["embed_tokens"]}),
    "tied, whole head": (gemma, {**SAVED, "modules_to_save": ["lm_head"]}),
    "tied, both whole": (gemma, {**SAVED, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "rows": (gemma, {**SAVED, "trainable_token_indices": [5, 11]}),
    "rows of both": (lambda: gemma(tie=False), {**SAVED, "trainable_token_indices": {"embed_tokens": [5, 11], "lm_head": [3]}}),
    "tied, one whole": (gemma, {**SAVED, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_as_peft_merges_it(tmp_path, kind):
    model, settings = KINDS[kind]
    base, adapter, expected = make(tmp_path, model(), **settings)
    plan = merged(base, adapter, tmp_path / "out")
    ours, theirs, before = load_file(tmp_path / "out/model.safetensors"), peft_merged(base, adapter), load_file(
        base / "model.safetensors")
    for name, tensor in ours.items():
        assert rounding(tensor, theirs[name]) < 4, name
    changed = {name for name, tensor in ours.items() if name not in before or not torch.equal(tensor, before[name])}
    assert len(changed) >= plan.changed > 0
    assert (logits(tmp_path / "out") - expected).abs().max() < 2e-4 * expected.abs().max()
    assert plan.untied == kind.startswith(("embedding", "head", "whole", "tied")) - (kind == "tied, one whole")


TIED = {
    "embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, True),
    "embedding, dora": ({"target_modules": ["embed_tokens"], "use_dora": True}, True),
    "head": ({"target_modules": ["lm_head", "q_proj"]}, True),
    "rows": ({"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 11], "lm_head": [3]}}, True),
    "each by itself": ({"target_modules": ["lm_head", "embed_tokens"]}, True),
    "as one": ({"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}, False),
}


@pytest.mark.parametrize("kind", TIED)
def test_tied_embeddings_answer_as_base_and_adapter(tmp_path, kind):
    """PEFT's own merge adds each change to the one tensor that embedding and head share, so it answers otherwise."""
    settings, untied = TIED[kind]
    base, adapter, expected = make(tmp_path, gemma(), **settings)
    plan = merged(base, adapter, tmp_path / "out")
    assert plan.untied is untied
    assert ("lm_head.weight" in load_file(tmp_path / "out/model.safetensors")) is untied
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is (not untied)
    assert (logits(tmp_path / "out") - expected).abs().max() < 2e-4 * expected.abs().max()


def changed(adapter: Path, name: str) -> None:
    """Make one number of an adapter another, the last of a tensor."""
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[name][-1, -1] += 1
    save_file(tensors, path)


def test_a_whole_head_that_differs_from_the_embedding_in_its_last_row_unties_them(tmp_path, monkeypatch):
    from gemma_tune.merge import plan as merge_plan

    monkeypatch.setattr(merge_plan, "_ROWS", 4)
    base, adapter, _ = make(tmp_path, gemma(), **SAVED, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    assert not merged(base, adapter, tmp_path / "same").untied
    changed(adapter, "base_model.model.lm_head.weight")
    assert merged(base, adapter, tmp_path / "out").untied


@pytest.mark.parametrize("other", ["lora_A", "lora_B", "scale"])
def test_an_adapted_head_that_is_another_than_the_embeddings_unties_them(tmp_path, other):
    base, adapter, _ = make(tmp_path, gemma(), target_modules=["embed_tokens"], ensure_weight_tying=True)
    assert not merged(base, adapter, tmp_path / "same").untied
    if other == "scale":
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"alpha_pattern": {"lm_head": 7}}))
    else:
        changed(adapter, f"base_model.model.lm_head.{other}.weight")
    assert merged(base, adapter, tmp_path / "out").untied


def test_a_square_layer_lies_as_the_others_do_whatever_the_config_says(tmp_path):
    base, adapter, expected = make(tmp_path, gpt2(), **CONV1D)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fan_in_fan_out": False}))
    merged(base, adapter, tmp_path / "out")
    assert (logits(tmp_path / "out") - expected).abs().max() < 2e-4 * expected.abs().max()


def test_rounded_once_to_the_type_of_the_base(tmp_path):
    base, adapter, _ = make(tmp_path, gemma().to(torch.bfloat16), **EVERYWHERE)
    merged(base, adapter, tmp_path / "out")
    theirs = peft_merged(base, adapter)
    for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
        assert torch.equal(tensor, theirs[name].bfloat16()), name


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_blocks_of_rows_join_without_a_seam(tmp_path, monkeypatch, dora, columns):
    from gemma_tune.merge import weights as merge_weights

    settings = CONV1D if columns else EVERYWHERE
    base, adapter, _ = make(tmp_path, gpt2() if columns else gemma(), use_dora=dora, **settings)
    merged(base, adapter, tmp_path / "whole")
    monkeypatch.setattr(merge_weights, "_BLOCK", 7 * 32)
    monkeypatch.setattr(merge_weights, "_COPIED", 100)
    merged(base, adapter, tmp_path / "blocks")
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "blocks"))
    for name, tensor in whole.items():
        assert rounding(parts[name], tensor) < 4, name


# --- names

def wrapped(tensors: dict[str, torch.Tensor], **prefixes: str) -> dict[str, torch.Tensor]:
    """Names with other beginnings: ``model="language_model.model"``."""
    return {next((new + name.removeprefix(old) for old, new in prefixes.items() if name.startswith(f"{old}.")), name): t
            for name, t in tensors.items()}


NAMES = {  # the base's on the disk, the adapter's
    "as in memory": ("model.language_model", "model.language_model"),
    "as Gemma 3 stores them": ("language_model.model", "model.language_model"),
    "an older adapter": ("language_model.model", "language_model.model"),
    "an older adapter, a newer base": ("model.language_model", "language_model.model"),
    "text model by itself": ("language_model.model", "model"),
    "text part as a model": ("model", "model.language_model"),
    "no prefix": ("", "model"),
}
TOWERS = {  # of pictures: the base's on the disk, the adapter's
    "as Gemma 3 stores it": ("vision_tower.vision_model", "model.vision_tower"),
    "an older adapter": ("vision_tower.vision_model", "model.vision_tower.vision_model"),
    "an older adapter, a newer base": ("model.vision_tower", "model.vision_tower.vision_model"),
}


@pytest.mark.parametrize("case", TOWERS)
def test_the_part_for_pictures(tmp_path, case):
    from gemma_tune.lora.names import running_name

    stored, adapters = (f"{name}.encoder.layers.0.mlp.fc1.weight" for name in TOWERS[case])
    assert running_name(stored) == running_name(adapters)


@pytest.mark.parametrize("case", NAMES)
def test_names_on_the_disk_are_kept(tmp_path, case):
    stored, adapters = NAMES[case]
    base, adapter, _ = make(tmp_path, gemma(), **EVERYWHERE)
    expected = load_file(base / "model.safetensors")
    merged(base, adapter, tmp_path / "expected")
    tensors = {name.removeprefix("model.") if not stored else name: t for name, t in expected.items()}
    tensors = wrapped(tensors, model=stored) | {"vision_tower.q_proj.weight": torch.ones(2, 2)}
    save_file(tensors, base / "model.safetensors")
    path = adapter / "adapter_model.safetensors"
    save_file(wrapped(load_file(path), **{"base_model.model.model": f"base_model.model.{adapters}"}), path)
    merged(base, adapter, tmp_path / "out")
    ours = load_file(tmp_path / "out/model.safetensors")
    assert ours.keys() == tensors.keys()
    back = {name: ours[new] for name, new in zip(expected, list(wrapped(
        {name.removeprefix("model.") if not stored else name: t for name, t in expected.items()}, model=stored)))}
    for name, tensor in load_file(tmp_path / "expected/model.safetensors").items():
        assert torch.equal(back[name], tensor), name


def refused_settings(tmp_path, settings):
    """How an adapter is refused whose adapter_config.json says something else besides."""
    from gemma_tune.base.errors import UserError
    from gemma_tune.lora.files import read_adapter

    _, adapter, _ = make(tmp_path, gemma(), **SAVED)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(UserError) as raised:
        read_adapter(adapter)
    return raised.value


@pytest.mark.parametrize(("settings", "said"), [
    ({"init_lora_weights": "pissa"}, "init_lora_weights"), ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ({"target_parameters": ["mlp.up_proj.weight"]}, "target_parameters"), ({"lora_bias": True}, "lora_bias"),
    ({"bias": "all"}, "bias: 'all'")])
def test_kinds_that_are_not_merged(tmp_path, settings, said):
    refused = refused_settings(tmp_path, settings)
    assert said in " ".join([refused.message, *refused.problems])
    assert "PEFT" in refused.hint


@pytest.mark.parametrize(("ids", "said"), [
    ([1], "lacks the rows of the tokens"), ([1, 1], "no numbers of tokens"), ({"embed_tokens": []}, "no numbers of tokens"),
    ([-1], "no numbers of tokens")])
def test_rows_that_are_not_there_are_told_of(tmp_path, ids, said):
    refused = refused_settings(tmp_path, {"trainable_token_indices": ids})
    assert said in " ".join([refused.message, *refused.problems]) and "copy the adapter" in refused.hint


def test_rows_of_a_larger_vocabulary_are_refused(tmp_path):
    from gemma_tune.base.errors import UserError

    base, adapter, _ = make(tmp_path, gemma(), **KINDS["rows"][1])
    path = adapter / "adapter_config.json"
    path.write_text(path.read_text().replace("11", "9999"))
    with pytest.raises(UserError, match="does not fit") as caught:
        merged(base, adapter, tmp_path / "out")
    assert "row 9999" in caught.value.problems[0]


def test_rows_of_a_matrix_that_is_changed_as_a_whole_are_refused(tmp_path):
    from gemma_tune.base.errors import UserError

    base, adapter, _ = make(tmp_path, gemma(), target_modules=["lm_head", "q_proj"], trainable_token_indices=[5, 11])
    with pytest.raises(UserError, match="does not fit") as caught:
        merged(base, adapter, tmp_path / "out")
    assert caught.value.problems == ("lm_head.weight is changed as a whole by the adapter, which has some of its rows by themselves as well",)


def test_every_tensor_of_the_adapter_is_used_or_listed(tmp_path):
    from gemma_tune.base.errors import UserError
    from gemma_tune.lora.files import read_adapter

    base, adapter, _ = make(tmp_path, gemma(), **SAVED)
    path = adapter / "adapter_model.safetensors"
    good = load_file(path)
    save_file(good | {"base_model.model.model.norm.weight": torch.ones(32), "x.lora_C": torch.ones(2)}, path)
    with pytest.raises(UserError, match="2 tensors that merge does not know") as raised:
        read_adapter(adapter)
    assert raised.value.problems == ("base_model.model.model.norm.weight", "x.lora_C")
    more = {name.replace("layers.1", "layers.7"): t.clone() for name, t in good.items()}
    save_file(good | more, path)
    with pytest.raises(UserError, match="not in the base model") as raised:
        merged(base, adapter, tmp_path / "out")
    assert raised.value.problems == ("model.layers.7.self_attn.q_proj.weight",)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(good | {name: torch.ones(4, 31)}, path)
    with pytest.raises(UserError, match="does not fit the base model") as raised:
        merged(base, adapter, tmp_path / "out2")
    assert raised.value.problems == ("model.layers.0.self_attn.q_proj.weight has the shape (32, 32) in the base, "
                                     "(32, 31) in the adapter",)


def test_what_peft_would_leave_out_is_not_merged(tmp_path):
    """The check would compare with a base without an adapter."""
    from gemma_tune.base.errors import UserError
    from gemma_tune.lora.files import read_adapter

    _, adapter, _ = make(tmp_path, gemma(), **SAVED)
    path = adapter / "adapter_model.safetensors"
    save_file({name.removeprefix("base_model.model."): t for name, t in load_file(path).items()}, path)
    with pytest.raises(UserError, match="4 tensors that merge does not know"):
        read_adapter(adapter)


@pytest.mark.parametrize(("settings", "said"), [
    ({"lora_alpha": "x"}, "lora_alpha: 'x' is no number"), ({"alpha_pattern": ["q"]}, "alpha_pattern: ['q'] does not"),
    ({"rank_pattern": {"(": 4}}, "rank_pattern: '(' is no pattern"), ({"modules_to_save": "norm"}, "no list of names"),
    ({"r": 5}, "the rank 5, and its factors have 4")])
def test_settings_that_cannot_be(tmp_path, settings, said):
    refused = refused_settings(tmp_path, settings)
    assert said in " ".join([refused.message, *refused.problems])


@pytest.mark.parametrize("gone", ["null", "missing"])
@pytest.mark.parametrize(("name", "scale"), [("lora_alpha", 8 / 4), ("r", 6 / 8)])
def test_settings_that_an_adapter_does_not_give_are_those_of_peft(tmp_path, name, scale, gone):
    from gemma_tune.lora.config import for_peft
    from gemma_tune.lora.files import read_adapter
    from gemma_tune.lora.start import settings_of

    _, folder, _ = make(tmp_path, gemma(), target_modules=["q_proj"], **({"r": 8} if name == "r" else {}))
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | {name: None}
    path.write_text(json.dumps({k: v for k, v in config.items() if gone == "null" or k != name}))
    adapter = read_adapter(folder)
    assert {lora.scale for lora in adapter.layers.values()} == {scale} and for_peft(adapter.config)[name] == 8
    settings = settings_of(adapter)
    assert settings["alpha"] / settings["rank"] == scale


def test_pickled_weights_are_not_read(tmp_path):
    from gemma_tune.base.errors import UserError
    from gemma_tune.lora.files import read_adapter

    _, adapter, _ = make(tmp_path, gemma(), **SAVED)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="can run code"):
        read_adapter(adapter)


@pytest.mark.parametrize("root", [False, True], ids=["plain", "rslora"])
def test_an_adapter_under_the_names_that_peft_looks_for(tmp_path, root):
    """The check loads base + adapter through PEFT, which finds layers by the names of the running model."""
    from peft import PeftModel

    from gemma_tune.lora.files import read_adapter
    from gemma_tune.lora.renamed import renamed_adapter

    base, adapter, expected = make(tmp_path, gemma(), **{**PATTERNS, "modules_to_save": ["norm"], "use_dora": True,
                                                   "use_rslora": root})
    path = adapter / "adapter_model.safetensors"
    save_file(wrapped(load_file(path), **{"base_model.model.model": "base_model.model.text"}), path)
    described = read_adapter(adapter)
    names = [*described.layers, *(name.rpartition(".")[0] for name in described.copies)]
    (tmp_path / "renamed").mkdir()
    renamed_adapter(described, {name: name.replace("text.", "model.", 1) for name in names}, tmp_path / "renamed")
    tuned = PeftModel.from_pretrained(type(gemma()).from_pretrained(base), str(tmp_path / "renamed")).eval()
    with torch.no_grad():
        assert torch.equal(tuned(torch.arange(9)[None] + 3).logits, expected)
