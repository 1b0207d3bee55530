"""How far an adapter and the logits moved, against plain products and plain transformers."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from gemma_tune.train.effect import AdapterStart, divergence
from support.training import by_hand


class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 5), torch.nn.Linear(5, 4)

    def forward(self, x):
        return self.second(self.first(x))


def adapted(**more):
    torch.manual_seed(0)
    return get_peft_model(Two(), LoraConfig(r=2, lora_alpha=6, target_modules=["first", "second"], **more))


def parts(model, layer: str) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    found = dict(model.named_parameters())
    return tuple(found[f"base_model.model.{layer}.lora_{side}.default.weight"] for side in "AB")


def product(model, layer: str) -> torch.Tensor:
    a, b = parts(model, layer)
    return 3.0 * (b @ a).detach().double()


@pytest.mark.parametrize("begun", [False, True])
def test_the_change_is_that_of_the_adapted_weights(begun):
    model = adapted()
    for layer in ("first", "second") if begun else ():
        torch.nn.init.normal_(parts(model, layer)[1])
    start, before = AdapterStart(model), {layer: product(model, layer) for layer in ("first", "second")}
    assert start.moved(model).norm == 0 and start.moved(model).still == ("first", "second")
    with torch.no_grad():
        for part in parts(model, "first"):
            part += 1e-3 * torch.randn_like(part)
    moved = start.moved(model)
    assert moved.layers == 2 and moved.still == ("second",)
    assert moved.norm == pytest.approx((product(model, "first") - before["first"]).norm().item(), rel=1e-4)


def test_the_lengths_that_dora_learns_count_as_well():
    model = adapted(use_dora=True)
    start = AdapterStart(model)
    assert start.moved(model).still == ("first", "second")
    with torch.no_grad():
        dict(model.named_parameters())["base_model.model.second.lora_magnitude_vector.default.weight"][1] += 0.1
    assert start.moved(model).still == ("first",)


def test_the_divergence_of_two_distributions():
    base = torch.tensor([[0.0, 0.0, -torch.inf], [1.0, 2.0, 3.0]])
    tuned = torch.tensor([[0.0, 1.0, -torch.inf], [1.0, 2.0, 3.0]])
    p = torch.tensor([0.0, 1.0]).softmax(-1)
    assert divergence(base, tuned).tolist() == pytest.approx([(p * (2 * p).log()).sum().item(), 0.0])
    tuned[1, 1] = torch.nan
    assert torch.isnan(divergence(base, tuned)).tolist() == [False, True]


def test_the_divergence_is_that_of_plain_transformers_and_peft(trained, tiny):
    """Of the tuned from the base model, at the first learned tokens of the held-out row."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    summary = json.loads((trained / "manifest.json").read_text())["stages"]["train"]["summary"]
    assert summary["unchanged_layers"] == 0 and summary["adapter_norm"] > 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32),
                                      trained / "tiny-gemma_lora_adapter")
    total = count = 0
    for ids, labels in by_hand(trained, "valid"):
        learned = [n for n, label in enumerate(labels) if label != -100][:16]
        with torch.no_grad():
            tuned = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            with model.disable_adapter():
                base = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for n in learned:
            total += (tuned[n - 1].exp() * (tuned[n - 1] - base[n - 1])).sum().item()
        count += len(learned)
    assert total > 0
    assert summary["divergence_from_base"] == pytest.approx(total / count, rel=1e-3)
