"""Experts that are adapted, from `train` to a GGUF."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as T
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from support.command import rows, write_rows
from support.gemmas import make_family
from support.llamas import save_random, tokenizer_with_turns
from support.training import stopped_at

SMALL = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
             intermediate_size=96, num_experts_per_tok=2)
QWEN = SMALL | dict(head_dim=32, moe_intermediate_size=32, num_experts=4, norm_topk_prob=True)
MIXTRAL = SMALL | dict(num_local_experts=4, sliding_window=None)
ASK = ("--target-modules", "all,experts", "--learning-rate", 1e-2, "--samples", 0)


def make(name: str, folder: Path) -> None:
    if name == "gemma 4":
        make_family("gemma4-experts", folder)
        return
    tokenizer = tokenizer_with_turns("tekken")
    own = dict(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    model = (T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**QWEN | own)) if name == "qwen 3" else
             T.MixtralForCausalLM(T.MixtralConfig(**MIXTRAL | own)))
    save_random(model, tokenizer, folder)


def prepared(cli, name: str, folder: Path) -> None:
    make(name, folder / "model")
    done(cli("prepare", write_rows(folder / "rows.jsonl", rows(12)), "--model", folder / "model"))


def done(result):
    assert result.code == 0, result.err
    return result


@pytest.mark.parametrize("name", ["qwen 3", "mixtral", "gemma 4"])
def test_what_experts_learned_comes_through_merge_and_export(cli, tmp_path, name):
    prepared(cli, name, tmp_path)
    trained = done(cli("train", *ASK, "--max-steps", 4, "--json"))
    assert "linear layers (" in trained.err and " and 4 experts in each of " in trained.err
    assert "are not adapted: LoRA is on the layers" not in trained.err
    adapter, base = Path(trained.json["artifacts"]["adapter"]), tmp_path / "model"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    evaluated = done(cli("eval", "--max-new-tokens", 2, "--json"))
    merged = done(cli("merge", "--dtype", "fp32", "--json"))
    summary = merged.json["summary"]
    assert summary["check_divergence"] < 1e-5 < 1e-2 < summary["check_adapter_effect"]
    out = Path(merged.json["artifacts"]["merged"])
    assert "`v_proj`, the experts" in (out / "README.md").read_text()
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
    assert {key: value.shape for key, value in after.items()} == {key: value.shape for key, value in before.items()}
    assert all(not torch.equal(before[key].float(), after[key]) for key in before if ".experts." in key)
    # As others load the whole of it, towers included.
    kind = T.AutoModelForImageTextToText if name == "gemma 4" else T.AutoModelForCausalLM
    plain, whole = (kind.from_pretrained(folder, dtype=torch.float32) for folder in (base, out))
    ids = torch.arange(10, 50).reshape(2, 20)
    with torch.inference_mode():
        untrained = plain(input_ids=ids).logits
        found = PeftModel.from_pretrained(plain, adapter)(input_ids=ids).logits
        torch.testing.assert_close(whole(input_ids=ids).logits, found, rtol=1e-3, atol=1e-3)
    assert (found - untrained).abs().max() > 0.1
    loss = evaluated.json["summary"]["measures"]["loss"]
    assert loss["tuned"][0] == pytest.approx(trained.json["summary"]["eval_loss_after"], rel=0.02) and loss["difference"][0] < -0.5
    exported = done(cli("export-ollama", "--quant", "f16", "--no-create", "--json")).json["summary"]["quants"]["f16"]
    assert exported["largest_error"] < 1e-3 and exported["kl"] < 1e-5


def test_an_interrupted_training_of_experts_ends_as_one_that_was_not(cli, tmp_path, monkeypatch):
    prepared(cli, "qwen 3", tmp_path)
    flags = (*ASK, "--max-steps", 4, "--save-steps", 2, "--dtype", "fp32")
    weights = Path(done(cli("train", *flags, "--json")).json["artifacts"]["adapter"]) / "adapter_model.safetensors"
    whole = load_file(weights)
    stopped_at(3, monkeypatch, *flags, "--force")
    again = done(cli("train", *flags, "--json"))
    assert again.json["summary"]["resumed_from_step"] == 3
    for name, value in load_file(weights).items():
        assert torch.equal(value, whole[name]), name
    # The adapter is trained further, with the layers that it brings.
    further = done(cli("train", "--from-adapter", weights.parent, "--max-steps", 2, "--learning-rate", 1e-6, "--json"))
    assert "experts" in further.err
    assert further.json["summary"]["eval_loss_before"] == pytest.approx(again.json["summary"]["eval_loss_after"], rel=1e-3)
    (tmp_path / "asked.jsonl").write_text('{"prompt": "a"}\n')
    assert "folded into the weights" in done(cli("chat", "--use", "adapter", "--input", tmp_path / "asked.jsonl", "-n", 2)).err
    refused = cli("train", "--from-adapter", weights.parent, "--dora")
    assert refused.code == 2 and "dora" in refused.err


def test_an_adapter_on_experts_of_some_layers_stays_on_these(cli, tmp_path):
    """As OpenAI's recipe for GPT-OSS names them."""
    prepared(cli, "qwen 3", tmp_path)
    parameters = [f"model.layers.{place}" for place in ("0.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj")]
    base = T.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], target_parameters=[name[13:] for name in parameters])
                   ).save_pretrained(tmp_path / "begun")
    trained = done(cli("train", "--from-adapter", tmp_path / "begun", *ASK[2:], "--max-steps", 4, "--json"))
    config = json.loads((Path(trained.json["artifacts"]["adapter"]) / "adapter_config.json").read_text())
    assert config["target_parameters"] == parameters
    summary = done(cli("merge", "--dtype", "fp32", "--json")).json["summary"]
    assert summary["check_divergence"] < 1e-5 < 1e-2 < summary["check_adapter_effect"]


def test_experts_beside_layers_in_4_bits(cli, tmp_path):
    """A merge goes into the 16-bit base."""
    prepared(cli, "qwen 3", tmp_path)
    trained = done(cli("train", *ASK, "--max-steps", 6, "--qlora", "--json")).json["summary"]
    assert trained["eval_loss_after"] < 0.9 * trained["eval_loss_before"]
    assert done(cli("merge", "--json")).json["summary"]["check_adapter_effect"] > 1e-2


def test_an_adapter_on_experts_alone_is_called_one(cli, tmp_path):
    """It has no layers, as all weights have none."""
    prepared(cli, "qwen 3", tmp_path)
    trained = done(cli("train", "--target-modules", "experts", *ASK[2:], "--max-steps", 4, "--json"))
    config = json.loads((Path(trained.json["artifacts"]["adapter"]) / "adapter_config.json").read_text())
    assert config["target_modules"] == [] and config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    card = (Path(done(cli("merge", "--json")).json["artifacts"]["merged"]) / "README.md").read_text()
    assert "- lora" in card and "full fine-tuning" not in card


def test_nothing_is_loaded_where_experts_cannot_be_adapted(cli, tmp_path, monkeypatch):
    tokenizer = tokenizer_with_turns("tekken")
    own = dict(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    save_random(T.GraniteMoeForCausalLM(T.GraniteMoeConfig(**SMALL | own | dict(num_local_experts=4))), tokenizer, tmp_path / "model")
    done(cli("prepare", write_rows(tmp_path / "rows.jsonl", rows(12)), "--model", tmp_path / "model"))
    monkeypatch.setattr("gemma_tune.train.stage.load_model", lambda *_, **__: pytest.fail("the weights were loaded"))
    refused = cli("train", *ASK)
    assert refused.code == 2 and "this model (granitemoe) keeps them in a way of its own" in refused.err
    for flags, name in ((("--dora",), "dora"), (("--dropout", 0.1), "dropout")):
        refused = cli("train", *ASK, *flags)
        assert refused.code == 2 and f"experts does not go together with {name}" in refused.err
