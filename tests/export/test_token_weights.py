"""How much each token counts, held against gradients of the whole model by autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from gemma_tune.export import gradients, token_weights
from gemma_tune.export.calibration import Calibration
from gemma_tune.export.gradients import Head
from gemma_tune.gguf.writer import parts_of
from gemma_tune.models.layerwise import LayerwiseModel
from gemma_tune.models.placement import Placement
from support.gemmas import FAMILIES, make_family
from support.llamas import make_llama

FP32 = Placement("cpu", torch.float32, "")


def whole_model(model, sequences, token: int):
    """|g|² at each token, by matrix and behind the last layer: of −log p(token), summed over all positions.

    Without what lets the streams of Gemma 3n correct each other, which is small and rounded in no file."""
    linear = {f"{name}.weight": module for name, module in model.named_modules()
              if isinstance(module, torch.nn.Linear) and ".layers." in name and ".altup." not in name}
    found, head = {name: [] for name in linear}, []
    for ids in sequences:
        kept, last = {}, []
        handles = [module.register_forward_hook(lambda m, a, out, name=name, kept=kept: kept.update({name: out}) or out.retain_grad())
                   for name, module in linear.items()]
        handles.append(model.model.layers[-1].register_forward_hook(lambda m, args, out, last=last: last.append(out)))
        logits, [states] = model(input_ids=torch.from_numpy(ids)[None]).logits, last
        states.retain_grad()
        (-logits.log_softmax(-1)[..., token].sum()).backward()
        for handle in handles:
            handle.remove()
        head.append(states.grad.square().sum(-1).reshape(-1, len(ids)).sum(0))
        for name, out in kept.items():
            found[name].append(out.grad[0].square().sum(-1))
    return {name: torch.cat(parts) for name, parts in found.items()}, torch.cat(head)


@pytest.mark.parametrize("family", ["gemma2", "gemma3n", "gemma4-small", "qwen3", "llama3"])
def test_weights_are_squared_gradients(family, tmp_path, monkeypatch):
    """With the drawn token made known: a random number of zero draws the first of the vocabulary."""
    monkeypatch.setattr(token_weights, "POWER", 1.0)
    monkeypatch.setattr(gradients, "_LOGITS", 4096)  # some tokens at a time
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: rand(*args, **kwargs).zero_())
    make_family(family, tmp_path) if family in FAMILIES else make_llama(family, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    sequences = [np.random.default_rng(n).integers(3, model.config.vocab_size - 3, 20 + n) for n in range(3)]
    layerwise = LayerwiseModel(tmp_path, FP32, parts_of(tmp_path).architecture)
    told = []
    calibration = Calibration(layerwise, sequences)
    assert calibration.weigh({}, 0, lambda *done: told.append(done)) == {}
    found = calibration._weights
    expected, head = whole_model(model, sequences, 0)
    assert [done for done, _ in told] == list(range(1, told[-1][1] + 1))
    expected[layerwise.head] = head
    assert {name for name in found if ".altup." not in name} == expected.keys()
    for name in expected:
        weights = found[name]
        assert float(weights.mean()) == pytest.approx(1)
        torch.testing.assert_close(weights, expected[name] / expected[name].mean(), rtol=1e-3, atol=1e-4)


def test_tokens_are_drawn_by_their_probability(tmp_path):
    make_llama("llama3", tmp_path)
    head = Head(LayerwiseModel(tmp_path, FP32, parts_of(tmp_path).architecture))
    states = torch.randn(1, head._weight.shape[1], generator=torch.Generator().manual_seed(0))
    probabilities = (states @ head._weight.T).softmax(1)[0]
    gradient = head._of_logits(states.expand(6000, -1))
    drawn = gradient.argmin(1)
    own = torch.nn.functional.one_hot(drawn, len(probabilities))
    torch.testing.assert_close(gradient, probabilities - own, rtol=1e-4, atol=1e-6)
    share, spread = own.float().mean(0), (probabilities * (1 - probabilities) / 6000).sqrt()
    assert ((share - probabilities).abs() < 5 * spread + 1e-3).all() and (share > 0).sum() > 3


def test_a_matrix_on_which_nothing_depends_has_no_weights():
    assert not token_weights._known(torch.zeros(4)) and not token_weights._known(torch.tensor([1.0, torch.inf]))
    assert token_weights._known(torch.tensor([0.0, 1.0]))
