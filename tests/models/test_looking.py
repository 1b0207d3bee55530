"""What a model sees with is loaded alone, and an adapter fits the model that takes pictures as the one that takes none."""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from gemma_tune.answers.sight import SEEN, see
from gemma_tune.base.errors import UserError
from gemma_tune.encoding.eye import eye_of
from gemma_tune.encoding.tokenizer import load_tokenizer
from gemma_tune.lora.load import add_adapter
from gemma_tune.models import looking
from gemma_tune.models.load import load_model, load_towers
from gemma_tune.models.looking import Looking
from gemma_tune.models.placement import choose_placement
from support import seers

PLACEMENT = choose_placement("fp32")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return seers.write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.mark.parametrize("family", seers.FAMILIES)
def test_towers_alone_see_what_they_see_in_the_model(family, tmp_path, pictures):
    folder = seers.make(family, tmp_path / family)
    eye = eye_of(folder, load_tokenizer(folder), pictures)
    whole, alone = load_model(folder, PLACEMENT, sight="towers").eval(), load_towers(folder, PLACEMENT)
    expected, found = see(whole, eye, "0.png"), see(alone, eye, "0.png")
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in found)
    assert 2 * sum(p.numel() for p in alone.parameters()) < sum(p.numel() for p in whole.parameters()), "no text model"


@pytest.mark.parametrize("skipped", [None, ["lm_head", "vision_tower"], ["lm_head", "model.vision_tower"]], ids=str)
def test_towers_of_a_checkpoint_in_4_bits(tmp_path, pictures, skipped):
    """It says which layers are not in 4 bits, by their names in the whole model."""
    folder, packed = seers.make("gemma3", tmp_path / "gemma3"), tmp_path / "packed"
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skipped)
    shutil.copytree(folder, packed, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": "cpu"},
                                                quantization_config=how).save_pretrained(packed)
    eye = eye_of(packed, load_tokenizer(packed), pictures)
    expected, found = (see(load_towers(of, PLACEMENT), eye, "0.png")[SEEN] for of in (folder, packed))
    distance = (found - expected).norm() / expected.norm()
    assert distance < 0.2 and bool(distance) == ("model.vision_tower" not in (skipped or ())) and found.dtype == torch.float32


def test_towers_are_loaded_once_and_a_picture_looked_at_once(tmp_path, pictures, monkeypatch):
    folder = seers.make("gemma3", tmp_path / "gemma3")
    done = []
    monkeypatch.setattr(looking, "load_towers", lambda *a: done.append("loaded") or load_towers(*a))
    monkeypatch.setattr(looking, "see", lambda model, eye, name: done.append(name) or see(model, eye, name))
    seen = Looking(folder, eye_of(folder, load_tokenizer(folder), pictures), PLACEMENT)
    assert done == []
    assert seen["0.png"] is seen["0.png"] and seen["1.png"]
    assert done == ["loaded", "0.png", "1.png"]
    monkeypatch.setattr(looking, "_KEPT", seen["0.png"]["features"].nbytes * 5 // 2)  # room for two
    assert seen["2.png"] and seen["0.png"] and done[3:] == ["2.png"], "the last used ones stay"
    assert seen["1.png"] and done[4:] == ["1.png"], "and the others do not fill the memory"


def test_a_checkpoint_without_its_towers_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = seers.make("gemma3", tmp_path / "gemma3")
    path = folder / "model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if "vision" not in name}, path, {"format": "pt"})
    with pytest.raises(UserError, match="does not fit") as refused:
        load_towers(folder, PLACEMENT)
    assert any("vision_tower" in problem for problem in refused.value.problems)


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["model.{}layers.3.self_attn.q_proj", "model.{}layers.0.mlp.up_proj"]])
@pytest.mark.parametrize("trained", ["none", "features"])
def test_an_adapter_fits_a_model_that_was_loaded_in_another_way(tmp_path, trained, targets):
    """Qwen 3.5's text model is a class of its own, whose layers have other names."""
    folder = seers.make("qwen3.5", tmp_path / "qwen")
    base = load_model(folder, PLACEMENT, sight=trained)
    inside = "" if trained == "none" else "language_model."
    torch.manual_seed(0)
    tuned = get_peft_model(base, LoraConfig(r=2, target_modules=[name.format(inside) for name in targets])).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    tuned.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        expected = tuned(input_ids=ids).logits
        for sight in ("none", "features"):
            found = add_adapter(load_model(folder, PLACEMENT, sight=sight).eval(), tmp_path / "adapter")
            torch.testing.assert_close(found(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
            with found.disable_adapter():
                assert not torch.allclose(found(input_ids=ids).logits, expected, atol=1e-2)
