"""An adapter on either form of its model: for text alone, and to see pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from gemma_tune.lora.layers import target_modules
from gemma_tune.lora.load import add_adapter
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import choose_placement
from support.merging import merged
from support.towers import make_seer

IDS = torch.arange(9)[None] + 12
FAMILIES = {"qwen3.5": "model.layers.", "mistral3": "model.language_model.layers."}


@pytest.fixture(scope="session")
def seers(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("forms")
    return {name: make_seer(name, folder / name).folder for name in FAMILIES}


def loaded(folder: Path, sight: str):
    return load_model(folder, choose_placement("fp32"), sight=sight)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("trained", "asked"), [("features", "none"), ("none", "features"), ("none", "towers")])
def test_an_adapter_of_one_form_is_found_by_the_other(seers, tmp_path, family, trained, asked, dora):
    base = loaded(seers[family], trained)
    chosen = target_modules(base, ())
    in_text_class = [name.startswith(FAMILIES["qwen3.5"]) for name in chosen]
    assert all(in_text_class) if (family, trained) == ("qwen3.5", "none") else not any(in_text_class)
    torch.manual_seed(0)
    tuned = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, use_dora=dora, target_modules=chosen, init_lora_weights=False,
                                            rank_pattern={chosen[0]: 5}, task_type="CAUSAL_LM"))
    tuned.save_pretrained(tmp_path)
    expected = logits(tuned)
    with tuned.disable_adapter():
        assert (logits(tuned) - expected).abs().max() > 0.1
    torch.testing.assert_close(logits(add_adapter(loaded(seers[family], asked), tmp_path)), expected, rtol=1e-4, atol=1e-4)


def test_peft_itself_finds_it_in_the_form_that_sees(seers, tmp_path):
    from transformers import AutoModelForImageTextToText

    base = loaded(seers["qwen3.5"], "features")
    tuned = get_peft_model(base, LoraConfig(r=3, target_modules=target_modules(base, ()), init_lora_weights=False, task_type="CAUSAL_LM"))
    tuned.save_pretrained(tmp_path)
    whole = AutoModelForImageTextToText.from_pretrained(seers["qwen3.5"], dtype=torch.float32)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(whole, tmp_path)), logits(tuned), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trained", ["none", "features"])
def test_either_is_merged(seers, tmp_path, trained):
    base = loaded(seers["qwen3.5"], trained)
    tuned = get_peft_model(base, LoraConfig(r=3, target_modules=target_modules(base, ()), init_lora_weights=False, task_type="CAUSAL_LM"))
    tuned.save_pretrained(tmp_path / "adapter")
    merged(seers["qwen3.5"], tmp_path / "adapter", tmp_path / "merged", dtype="F32")
    for asked in ("none", "features"):
        torch.testing.assert_close(logits(loaded(tmp_path / "merged", asked)), logits(tuned), rtol=1e-4, atol=1e-4)
