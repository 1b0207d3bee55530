"""Adapters whose embeddings were saved with them, and those that were trained with tokens of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from support.answering import greedy_answers
from support.command import write_rows
from support.merging import merged

from .test_plan import gemma, gpt2, logits, rounding

BOTH = ["embed_tokens", "lm_head"]
SAVED = {"target_modules": ["q_proj"], "modules_to_save": BOTH}
ALONE = {"target_modules": ["q_proj"]}


def trained(folder: Path, model: Any, entries: int | None, save: bool | str, **settings: Any) -> Path:
    """A base and an adapter with random numbers on it, trained with ``entries`` tokens; returns the adapter."""
    from peft import LoraConfig, get_peft_model

    model.save_pretrained(folder / "base")
    if entries:
        torch.manual_seed(2)
        model.resize_token_embeddings(entries)
    model.name_or_path = str(folder / "base")
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(1)
    for _, p in tuned.named_parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    tuned.save_pretrained(folder / "adapter", save_embedding_layers=save)
    return folder / "adapter"


def peft_merged(base: Path, adapter: Path, entries: int | None) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if entries:
        model.resize_token_embeddings(entries)
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()


KINDS = {  # tied, entries in training (the base has 90), save_embedding_layers, what is adapted
    "both whole": (True, None, True, SAVED),
    "both whole, apart": (False, None, True, SAVED),
    "embedding whole": (True, None, True, {**ALONE, "modules_to_save": ["embed_tokens"]}),
    "both whole, as one": (True, None, True, {**ALONE, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "none, saved all the same": (True, None, True, ALONE),
    "grown": (True, 92, "auto", ALONE),
    "grown, apart": (False, 92, "auto", ALONE),
    "grown, both whole": (True, 92, "auto", SAVED),
    "grown, both whole, not saved twice": (True, 92, False, SAVED),
    "grown, both whole, apart": (False, 92, True, SAVED),
    "grown, both adapted": (False, 92, "auto", {"target_modules": ["q_proj", *BOTH]}),
    "cut": (True, 80, "auto", ALONE),
    "cut, both whole": (False, 80, False, SAVED),
}


@pytest.mark.parametrize("kind", KINDS)
def test_as_peft_merges_it_after_resizing(tmp_path, kind):
    tie, entries, save, settings = KINDS[kind]
    adapter = trained(tmp_path, gemma(tie), entries, save, **settings)
    plan = merged(tmp_path / "base", adapter, tmp_path / "out")
    theirs = peft_merged(tmp_path / "base", adapter, entries)
    ours, expected = load_file(tmp_path / "out/model.safetensors"), theirs.state_dict()
    for name, tensor in ours.items():
        assert tensor.shape == expected[name].shape, name
        assert rounding(tensor, expected[name]) < 4, name
    assert plan.vocabulary == entries
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == (entries or 90)
    with torch.no_grad():
        answer = theirs(torch.arange(9)[None] + 3).logits
    assert (logits(tmp_path / "out") - answer).abs().max() < 2e-4 * answer.abs().max()


def test_base_and_adapter_of_another_vocabulary(tmp_path):
    """What the check compares with: PEFT on the base, after as many entries were given to it."""
    from gemma_tune.lora.load import add_adapter

    adapter = trained(tmp_path, gemma(), 92, False, **SAVED)
    tuned = add_adapter(type(gemma()).from_pretrained(tmp_path / "base"), adapter, 92)
    theirs = peft_merged(tmp_path / "base", adapter, 92)
    with torch.no_grad():
        ids = torch.arange(83, 92)[None]
        assert (tuned(ids).logits - theirs(ids).logits).abs().max() < 1e-4
        with tuned.disable_adapter():
            assert not tuned(ids).logits[..., 90:].any()  # always the same, so that figures are


@pytest.mark.parametrize(("tie", "settings", "lacking"), [
    (True, {"target_modules": ["q_proj", "embed_tokens"]}, ["lm_head.weight", "model.embed_tokens.weight"]),
    (False, {**ALONE, "modules_to_save": ["embed_tokens"]}, ["lm_head.weight"]),
    (True, {**ALONE, "modules_to_save": ["embed_tokens"]}, ["lm_head.weight"])])
def test_embeddings_that_were_not_saved_are_named(tmp_path, tie, settings, lacking):
    from gemma_tune.base.errors import UserError

    adapter = trained(tmp_path, gemma(tie), 92, False, **settings)
    with pytest.raises(UserError, match="vocabulary of 92 entries, where the base has 90") as raised:
        merged(tmp_path / "base", adapter, tmp_path / "out")
    assert [problem.split()[0] for problem in raised.value.problems] == lacking
    assert "save_embedding_layers=True" in raised.value.hint


def test_another_model_is_still_another_model(tmp_path):
    """One whose other layers do not fit either has not only another vocabulary."""
    from gemma_tune.base.errors import UserError

    adapter = trained(tmp_path, gemma(), 92, "auto", target_modules=["gate_proj"])
    shutil.rmtree(tmp_path / "base")
    from transformers import Gemma3ForCausalLM

    config = gemma().config
    config.intermediate_size = 56
    Gemma3ForCausalLM(config).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="does not fit the base model") as raised:
        merged(tmp_path / "base", adapter, tmp_path / "out")
    assert all("gate_proj" in problem for problem in raised.value.problems)


def test_a_grown_vocabulary_of_transposed_layers(tmp_path):
    adapter = trained(tmp_path, gpt2(), 95, True, target_modules=["c_attn", "c_proj"])
    merged(tmp_path / "base", adapter, tmp_path / "out")
    expected = peft_merged(tmp_path / "base", adapter, 95).state_dict()
    ours = load_file(tmp_path / "out/model.safetensors")
    assert ours["transformer.wte.weight"].shape == (95, 32)
    for name, tensor in ours.items():
        assert rounding(tensor, expected[name]) < 4, name


# --- whole commands, with the tokenizer

ADDED = ["<call>", "</call>"]


@pytest.fixture
def grown(tiny, tmp_path) -> Path:
    """An adapter that was trained elsewhere with two tokens more, with its tokenizer; its embeddings are not saved."""
    return grown_adapter(tiny, tmp_path / "away", False, **ALONE)


def grown_adapter(tiny: Path, folder: Path, save: bool | str, **settings: Any) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens(ADDED)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer))
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **settings))
    for _, p in tuned.named_parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    tuned.save_pretrained(folder, save_embedding_layers=save)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("settings", [ALONE, SAVED])
def test_tokens_that_were_added_are_in_the_merged_model(cli, tiny, tmp_path, settings):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = grown_adapter(tiny, tmp_path / "away", "auto", **settings)
    result = cli("merge", "--adapter", adapter, "--base", tiny, "--json")
    assert result.code == 0, result.err
    assert "a vocabulary of 423 entries, where the base has 421" in result.err
    assert result.json["summary"]["check_divergence"] < 5e-3
    folder = Path("runs/tiny-gemma/tiny-gemma_lora_merged")
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer(ADDED[1], add_special_tokens=False).input_ids == [422]
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == 423
    expected = peft_merged(tiny, adapter, 423).get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight.float(), expected.to(torch.bfloat16).float())


@pytest.mark.parametrize("settings", [ALONE, SAVED])
def test_tokens_that_were_added_are_compared_with_the_base(cli, tiny, tmp_path, settings):
    from gemma_tune.encoding.tokenizer import load_format
    from gemma_tune.models.load import load_model
    from gemma_tune.models.placement import Placement

    adapter = grown_adapter(tiny, tmp_path / "away", "auto", **settings)
    merge = cli("merge", "--adapter", adapter, "--base", tiny, "--no-check", "--dtype", "fp32", "--run", "run")
    assert merge.code == 0, merge.err
    asked = [{"messages": [{"role": "user", "content": f"Call {n}."}, {"role": "assistant", "content": f"<call>{n}</call>"}]}
             for n in range(3)]
    result = cli("eval", "--run", "run", "--data", write_rows(tmp_path / "held-out.jsonl", asked), "--dtype", "fp32",
                 "--max-new-tokens", 6, "--json")
    assert result.code == 0, result.err
    assert "another size than the base's, 423 entries: both are measured with that" in " ".join(result.err.split())
    summary, place = result.json["summary"], Placement("cpu", torch.float32, "test")
    folder = Path("run/tiny-gemma_lora_merged")
    model, chat = load_model(folder, place).eval(), load_format(folder, "gemma3_text")
    expected = greedy_answers(model, chat, [row["messages"][:1] for row in asked], 6)
    assert [answer["tuned"] for answer in summary["answers"]] == [answer.text for answer in expected]
    encoded = [sequence for row in asked for sequence in chat.encode(row["messages"])]
    assert all({421, 422} <= set(sequence.ids.tolist()) for sequence in encoded), "the tokens that were added"
    with torch.no_grad():
        losses = [torch.nn.functional.cross_entropy(model(torch.tensor(sequence.ids)[None]).logits[0, :-1],
                                                    torch.tensor(sequence.labels[1:]), reduction="sum") for sequence in encoded]
    per_token = sum(losses) / sum(sequence.trained for sequence in encoded)
    assert summary["measures"]["loss"]["tuned"][0] == pytest.approx(float(per_token), rel=1e-4)


def test_tokens_without_embeddings_are_refused(cli, grown, tiny):
    result = cli("merge", "--adapter", grown, "--base", tiny)
    assert result.code == 2
    assert "has 2 tokens more than the base's, and the adapter does not hold their embeddings" in result.err
    assert "save_embedding_layers=True" in result.err
    assert not Path("runs/tiny-gemma/tiny-gemma_lora_merged").exists()


def test_a_grown_vocabulary_without_its_tokenizer_is_told_of(cli, tiny, tmp_path):
    adapter = grown_adapter(tiny, tmp_path / "away", "auto", **ALONE)
    for path in adapter.glob("*token*"):
        path.unlink()
    result = cli("merge", "--adapter", adapter, "--base", tiny, "--no-check")
    assert result.code == 0, result.err
    assert "has no tokenizer, so the base's is used" in result.err


@pytest.mark.parametrize("settings", [{"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20.0}}, {}])
def test_an_adapter_of_mlx_is_called_one(cli, tiny, tmp_path, settings):
    away = tmp_path / "away"
    away.mkdir()
    (away / "adapters.safetensors").write_bytes(b"\0" * 16)
    (away / "adapter_config.json").write_text(json.dumps({"model": "org/model", "num_layers": 16, **settings}))
    for base in (["--base", tiny], []):
        result = cli("merge", "--adapter", away, *base)
        assert result.code == 2
        assert "is an adapter of mlx-lm" in result.err
        assert f"mlx_lm.fuse --model org/model --adapter-path {away}" in " ".join(result.err.split())
