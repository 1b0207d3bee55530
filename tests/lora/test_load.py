"""PEFT's import, and adapters on layers of other kinds."""

from __future__ import annotations

import pytest
import torch

from gemma_tune.lora.load import _compiling_at_the_first_call, add_adapter, import_peft


def test_functions_that_are_compiled_on_import_are_compiled_when_they_are_called(monkeypatch):
    calls = []

    def compiled(function, **options):
        calls.append((function.__name__, options))
        return lambda *args: ("compiled", *args)

    monkeypatch.setattr(torch, "compile", compiled)
    with _compiling_at_the_first_call():
        @torch.compile
        def plain(x): ...

        @torch.compile(dynamic=False)
        def with_options(x): ...

    assert torch.compile is compiled
    assert calls == [], "the compiler would have been loaded"
    assert plain(1) == plain(1) == ("compiled", 1)
    assert with_options(2) == ("compiled", 2)
    assert with_options.__name__ == "with_options"
    assert calls == [("plain", {}), ("with_options", {"dynamic": False})]


def test_the_compiler_comes_back_when_the_import_fails(monkeypatch):
    before = torch.compile
    with pytest.raises(ImportError, match="planted"), _compiling_at_the_first_call():
        raise ImportError("planted")
    assert torch.compile is before


def test_bitsandbytes_computes_after_that():
    import_peft()
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.linspace(-1, 1, 4096).reshape(64, 64)
    packed, state = quantize_4bit(weight, quant_type="nf4")
    assert (dequantize_4bit(packed, state) - weight).abs().max() < 0.2


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_on_a_base_in_4_bits(tiny, tmp_path, dora):
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, get_peft_model
    from peft.utils.integrations import dequantize_module_weight
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.manual_seed(0)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(
        r=4, use_dora=dora, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)).save_pretrained(tmp_path)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny, quantization_config=how, device_map={"": "cpu"}, dtype=torch.float32)
    layer = add_adapter(base, tmp_path).base_model.model.model.layers[0].self_attn.q_proj
    changed = dequantize_module_weight(layer.get_base_layer()) + layer.scaling["default"] * (
        layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
    if dora:
        changed *= (layer.lora_magnitude_vector["default"].weight / changed.norm(dim=1)).unsqueeze(1)
    x = torch.randn(2, 5, layer.in_features)
    with torch.no_grad():
        expected = x @ changed.t()
        assert (layer(x) - expected).abs().max() < 0.01 * expected.abs().max()


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_on_layers_that_lie_the_other_way_round(tmp_path, dora):
    """GPT-2's, of which some are square."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2)).eval()
    base.save_pretrained(tmp_path / "base")
    tuned = get_peft_model(base, LoraConfig(r=4, use_dora=dora, fan_in_fan_out=True, target_modules=["c_attn", "c_proj"],
                                            task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    for layer in tuned.modules():  # as after a training
        for magnitude in getattr(layer, "lora_magnitude_vector", {}).values():
            magnitude.weight.data *= 1 + torch.rand_like(magnitude.weight)
    tuned.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(9)[None]
    with torch.no_grad():
        ours = add_adapter(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter")(ids).logits
        torch.testing.assert_close(ours, tuned(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_on_the_embedding_beside_layers(tiny, tmp_path, dora, dtype):
    """`merge --adapter` takes such, and compares with base and adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), LoraConfig(
        r=4, use_dora=dora, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    tuned.save_pretrained(tmp_path, save_embedding_layers=False)
    ids = torch.arange(9)[None] + 3
    with torch.no_grad():
        expected = tuned(ids).logits
        ours = add_adapter(AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype), tmp_path)(ids).logits.float()
    assert (ours - expected).abs().max() < (1e-4 if dtype == torch.float32 else 0.05) * expected.abs().max()
