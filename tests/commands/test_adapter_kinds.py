"""DoRA, rank-stabilised LoRA and their 4-bit forms: trained, resumed, loaded and merged as PEFT would."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.merging import merged_tensors, peft_merge
from support.models import make_model
from support.training import adapter_bytes, by_hand, plain_loss, stopped_at

RUN = Path("runs/tiny-gemma")
ADAPTER = RUN / "tiny-gemma_lora_adapter"
LEARN = ("--epochs", 4, "--rank", 4, "--learning-rate", 2e-2, "--dtype", "fp32", "--json")


@pytest.fixture
def prepared(cli, tiny, data):
    assert cli("prepare", data, "--model", tiny).code == 0
    return RUN


@pytest.mark.parametrize(("kind", "said"), [
    (("--dora",), "DoRA of rank 4, scaled by alpha / r = 8, on 14 linear layers"),
    (("--rslora", "--alpha", 4), "LoRA of rank 4, scaled by alpha / sqrt(r) = 2, on 14 linear layers"),
    (("--qlora", "--rslora", "--alpha", 4), "LoRA of rank 4, scaled by alpha / sqrt(r) = 2,"),
    (("--qlora", "--dora", "--rslora", "--dropout", 0.1), "DoRA of rank 4, scaled by alpha / sqrt(r) = 16,")])
def test_it_is_trained_and_merged_as_peft_does(cli, prepared, tiny, kind, said):
    result = cli("train", *LEARN, *kind)
    assert result.code == 0, result.err
    assert said in result.err
    summary = result.json["summary"]
    assert summary["eval_loss_after"] < 0.9 * summary["eval_loss_before"]
    config = json.loads((ADAPTER / "adapter_config.json").read_text())
    assert (config["use_dora"], config["use_rslora"]) == ("--dora" in kind, "--rslora" in kind)

    merged = cli("merge", "--json")
    assert merged.code == 0, merged.err
    assert merged.json["summary"]["check_divergence"] < 1e-3
    expected, base = peft_merge(tiny, ADAPTER), load_file(tiny / "model.safetensors")
    changed = 0
    for name, tensor in merged_tensors(RUN).items():
        assert torch.equal(tensor, expected[name]), name
        changed += not torch.equal(tensor, base[name])
    assert changed == 14


def test_dora_starts_as_the_base_model_and_learns_lengths(cli, prepared, tiny):
    """PEFT's own start rounds the lengths to bf16, which moves the loss."""
    flags = ("--epochs", 1, "--rank", 4, "--dtype", "bf16", "--json")
    lora, dora = (cli("train", *flags, *more) for more in ((), ("--dora", "--force")))
    assert dora.code == lora.code == 0, dora.err + lora.err
    lora, dora = lora.json["summary"], dora.json["summary"]
    assert dora["eval_loss_before"] == lora["eval_loss_before"]
    base = load_file(tiny / "model.safetensors")
    lengths = {name.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector"): tensor
               for name, tensor in load_file(ADAPTER / "adapter_model.safetensors").items() if "magnitude" in name}
    assert len(lengths) == 14
    for name, tensor in lengths.items():
        start = base[f"{name}.weight"].float().norm(dim=1)
        assert tensor.dtype == torch.float32
        # Three steps of at most 2e-4 each.
        assert 0 < (tensor - start).abs().max() < 6.1e-4, name
    rows = sum(tensor.numel() for tensor in lengths.values())
    assert dora["trainable_parameters"] == lora["trainable_parameters"] + rows


def test_interrupted_dora_goes_on_to_the_same_adapter(cli, prepared, monkeypatch):
    flags = (*LEARN, "--dora")
    assert cli("train", *flags).code == 0
    expected = adapter_bytes(prepared)
    stopped_at(5, monkeypatch, *flags, "--force")
    resumed = cli("train", *flags)
    assert resumed.code == 0, resumed.err
    assert resumed.json["summary"]["resumed_from_step"] == 5
    assert adapter_bytes(prepared) == expected


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_loaded_dora_adapter_answers_as_trained(cli, prepared, tiny, dtype):
    from gemma_tune.lora.load import add_adapter
    from gemma_tune.models.load import load_model
    from gemma_tune.models.placement import choose_placement

    summary = cli("train", *LEARN, "--dora").json["summary"]
    model = add_adapter(load_model(tiny, choose_placement(dtype)), ADAPTER)
    total, count = plain_loss(model, by_hand(prepared, "valid"))
    assert total / count == pytest.approx(summary["eval_loss_after"], rel=1e-5 if dtype == "fp32" else 5e-3)
    kept = {name: p for name, p in model.named_parameters() if "magnitude" in name}
    assert len(kept) == 14
    for name, tensor in load_file(ADAPTER / "adapter_model.safetensors").items():
        if "magnitude" in name:
            assert torch.equal(kept[name.replace("magnitude_vector", "magnitude_vector.default.weight")], tensor)
    with model.disable_adapter():
        total, count = plain_loss(model, by_hand(prepared, "valid"))
    assert total / count == pytest.approx(summary["eval_loss_before"], rel=1e-5 if dtype == "fp32" else 5e-3)


@pytest.mark.parametrize("four_bit", [False, True])
def test_doras_forward_and_backward_pass_equal_pefts(tmp_path, four_bit):
    """Layers with and without a bias, an adapter far from its start."""
    from peft import get_peft_model

    from gemma_tune.config.stages import TrainConfig
    from gemma_tune.lora.dora import settle, start_from_base
    from gemma_tune.lora.targets import lora_config, targets_of
    from gemma_tune.models.load import load_model
    from gemma_tune.models.placement import choose_placement

    model = load_model(make_model(tmp_path / "biased", attention_bias=True), choose_placement("fp32"), four_bit=four_bit)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data.normal_(generator=torch.Generator().manual_seed(3))
    config = TrainConfig(rank=4, dora=True)
    model = get_peft_model(model, lora_config(config, targets_of(model, config))).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    values = {name: p.detach() * (1 + torch.rand(p.shape, generator=generator)) if "magnitude" in name
              else torch.randn(p.shape, generator=generator) * 0.2 for name, p in trained.items()}
    ids = torch.arange(10, 40).view(2, 15)

    def step():
        for name, p in trained.items():
            p.data.copy_(values[name])
            p.grad = None
        logits = model(input_ids=ids).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        return logits.detach(), {name: p.grad for name, p in trained.items()}

    theirs, gradients = step()
    assert start_from_base(model) == 14
    ours, own = step()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())
    if not four_bit:
        settle(model)
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, theirs, rtol=1e-4, atol=1e-4)


def test_dora_needs_no_matrix_as_large_as_the_weights(tmp_path):
    """PEFT multiplies B A out in every layer; a step's largest new tensors are those of the activations here."""
    from peft import LoraConfig, get_peft_model
    from torch.utils._python_dispatch import TorchDispatchMode

    from gemma_tune.lora.dora import start_from_base

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != weight.data_ptr():  # no view of W
                self.size = max(self.size, out.numel())
            return out

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(500, 400, bias=False)

        def forward(self, x):
            return self.linear(x)

    model = Model()
    weight = model.linear.weight
    model = get_peft_model(model, LoraConfig(r=4, use_dora=True, target_modules=["linear"]))
    sizes = []
    for ours in (False, True):
        if ours:
            start_from_base(model)
        with Largest() as largest:
            model(torch.ones(8, 500)).sum()
        sizes.append(largest.size)
    assert sizes[0] >= 400 * 500
    assert sizes[1] <= 8 * 500


def test_memory_counts_what_dora_adds(tiny):
    from gemma_tune.config.stages import TrainConfig
    from gemma_tune.train.shape import shape_of

    lora, dora = (shape_of(tiny, TrainConfig(rank=4, dora=dora), torch.bfloat16) for dora in (False, True))
    tensors = load_file(tiny / "model.safetensors")
    outputs = sum(t.shape[0] for name, t in tensors.items() if name.endswith("proj.weight"))
    assert dora.adapter - lora.adapter == outputs
    assert lora.kept(2, 32) < dora.kept(2, 32) < 2 * lora.kept(2, 32)


@pytest.mark.parametrize(("flags", "scale"), [({}, 2.0), ({"rank": 64}, 0.5), ({"rslora": True}, 8.0),
                                              ({"rank": 64, "rslora": True}, 4.0)])
def test_the_scale(flags, scale):
    from gemma_tune.config.stages import TrainConfig

    assert TrainConfig(**flags).scale == scale
