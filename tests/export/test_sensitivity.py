"""What rounding is measured to cost, held against what it costs: the divergence of a model that computes with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from gemma_tune.export import sensitivity
from gemma_tune.export.calibration import Calibration
from gemma_tune.export.gradients import Head
from gemma_tune.export.quant_loss import _weights
from gemma_tune.export.sensitivity import Sensitivity
from gemma_tune.gguf.compensated import by_importance
from gemma_tune.gguf.types import dequantise, quantise
from gemma_tune.gguf.writer import parts_of
from gemma_tune.models.layerwise import LayerwiseModel
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import Placement
from support.gemmas import FAMILIES, make_family
from support.llamas import make_llama

FP32 = Placement("cpu", torch.float32, "")
KINDS = (Type.Q4_0, Type.Q4_1, Type.Q8_0)


def costs(layerwise, sequences, types, tokens=1000, told=None):
    return Calibration(layerwise, sequences).weigh(types, tokens, told)


def rows(vocabulary: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(3, vocabulary, 40) for _ in range(5)]


def log_probabilities(model, sequences) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(torch.from_numpy(ids)[None]).logits[0].log_softmax(-1) for ids in sequences])


def divergence(model, module, kind, x, sequences, before) -> float:
    """KL(model || model with one matrix rounded by the importance of its inputs), nats per token."""
    kept = module.weight.data.clone()
    data = by_importance(kept.numpy(), kind, x.square().mean(0).numpy())
    module.weight.data.copy_(torch.from_numpy(dequantise(data, kind)))
    after = log_probabilities(model, sequences)
    module.weight.data.copy_(kept)
    return float((before.exp() * (before - after)).sum(-1).mean())


def inputs_of_module(model, module, sequences) -> torch.Tensor:
    seen = []
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    log_probabilities(model, sequences)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("family", ["gemma2", "qwen3", "llama3"])
def test_the_cost_is_the_divergence(family, tmp_path, monkeypatch):
    """To second order, and by samples: within a factor of two for matrices of each kind, and in their sum."""
    monkeypatch.setattr(sensitivity, "COMPENSATED", 1.0)
    model = make_family(family, tmp_path) if family in FAMILIES else make_llama(family, tmp_path)[0]
    sequences = rows(model.config.vocab_size - 3)
    layerwise = LayerwiseModel(tmp_path, FP32, parts_of(tmp_path).architecture)
    linear = {f"{name}.weight": module for name, module in model.named_modules()
              if isinstance(module, torch.nn.Linear) and ".layers." in name}
    found = costs(layerwise, sequences, dict.fromkeys([*linear, layerwise.head], KINDS))
    assert found.keys() == {*linear, layerwise.head}
    before = log_probabilities(model, sequences)
    expected, measured = [], []
    for n, (name, module) in enumerate(linear.items()):
        if len(linear) < 16 or n % 3 == 0:  # seven in a layer, so that each kind is among them
            x = inputs_of_module(model, module, sequences)
            expected.append(divergence(model, module, KINDS[n % 2], x, sequences, before))
            measured.append(found[name][KINDS[n % 2]])
    ratios = np.log2(np.array(measured) / np.array(expected))
    assert abs(np.log2(sum(measured) / sum(expected))) < 0.6 and np.abs(ratios).mean() < 0.6, ratios
    head = model.get_output_embeddings()
    if layerwise.head != layerwise.embedding:
        real = divergence(model, head, Type.Q4_0, inputs_of_module(model, head, sequences), sequences, before)
        assert 0.5 < found[layerwise.head][Type.Q4_0] / real < 2
    for by_kind in found.values():
        assert by_kind[Type.Q8_0] < 0.05 * by_kind[Type.Q4_0]


@pytest.mark.parametrize("family", ["qwen3 with experts", "mixtral", "gemma4-experts"])
def test_the_cost_of_experts_is_the_divergence(family, tmp_path, monkeypatch):
    """Of each tensor of all experts; in layers before the last that other experts are chosen behind it comes on top, of which
    the random numbers of these routers make much."""
    monkeypatch.setattr(sensitivity, "COMPENSATED", 1.0)
    (make_family if family in FAMILIES else make_llama)(family, tmp_path)
    architecture, sequences = parts_of(tmp_path).architecture, rows(280)
    layerwise, model = LayerwiseModel(tmp_path, FP32, architecture), load_model(tmp_path, FP32)
    specs = [spec for spec in architecture.tensors if len(spec.shape) == 3]
    calibration = Calibration(layerwise, sequences)
    found = calibration.weigh({spec.source: KINDS for spec in specs}, 1000)
    assert found.keys() == {spec.source for spec in specs}
    weights, before, ratios = _weights(model, architecture), log_probabilities(model, sequences), []
    for spec in specs:
        tensor = weights[spec.source]
        kept, importance = tensor.clone(), calibration.inputs(spec.source).importance.numpy()
        for own, columns in zip(tensor, importance, strict=True):
            own.copy_(torch.from_numpy(dequantise(by_importance(own.numpy().copy(), Type.Q4_0, columns), Type.Q4_0)))
        after = log_probabilities(model, sequences)
        tensor.copy_(kept)
        ratios.append(np.log2(found[spec.source][Type.Q4_0] / float((before.exp() * (before - after)).sum(-1).mean())))
    last = [ratio for ratio, spec in zip(ratios, specs, strict=True) if f"blk.{architecture.layers - 1}." in spec.name]
    assert len(last) in (2, 3) and np.abs(last).max() < 0.5, ratios
    assert min(ratios) > -2.5 and max(ratios) < 0.6, ratios
    assert all(by_kind[Type.Q8_0] < 0.05 * by_kind[Type.Q4_0] for by_kind in found.values())


@pytest.mark.parametrize("family", ["gemma3n", "qwen3"])
def test_an_embedding_that_is_the_head_costs_in_both_places(family, tmp_path):
    """Gemma 3n begins four streams of states with it."""
    model = make_family(family, tmp_path) if family in FAMILIES else make_llama(family, tmp_path)[0]
    sequences = rows(model.config.vocab_size - 3)
    layerwise = LayerwiseModel(tmp_path, FP32, parts_of(tmp_path).architecture)
    assert layerwise.head == layerwise.embedding
    found = costs(layerwise, sequences, {layerwise.head: (Type.Q4_0,)})[layerwise.head][Type.Q4_0]
    before = log_probabilities(model, sequences)
    head = model.get_output_embeddings()
    real = divergence(model, head, Type.Q4_0, inputs_of_module(model, head, sequences), sequences, before)
    assert 0.5 < found / real < 2


@pytest.mark.parametrize("family", ["gemma3n", "gemma4-small"])
def test_a_table_of_which_each_layer_gets_a_part(family, tmp_path):
    model = make_family(family, tmp_path)
    sequences = rows(model.config.vocab_size - 6)
    layerwise = LayerwiseModel(tmp_path, FP32, parts_of(tmp_path).architecture)
    table = "model.embed_tokens_per_layer.weight"
    found = costs(layerwise, sequences, {table: KINDS})[table]
    before = log_probabilities(model, sequences)
    weight = model.get_parameter(table)
    with torch.no_grad():
        weight.copy_(torch.from_numpy(dequantise(quantise(weight.numpy(), Type.Q4_0), Type.Q4_0)))
    real = float((before.exp() * (before - log_probabilities(model, sequences))).sum(-1).mean())
    assert 0.5 < found[Type.Q4_0] / real < 2
    assert found[Type.Q8_0] < 0.05 * found[Type.Q4_0]


def test_a_part_of_the_tokens_tells_about_the_same(tmp_path):
    """Some of 200 tokens, with the rows and the tokens that are drawn: each cost within a factor of two on average."""
    model, _ = make_llama("llama3", tmp_path)
    sequences = rows(model.config.vocab_size - 3)
    layerwise = LayerwiseModel(tmp_path, FP32, parts_of(tmp_path).architecture)
    types = {f"{name}.weight": KINDS[:1] for name, module in model.named_modules()
             if isinstance(module, torch.nn.Linear) and ".layers." in name} | {layerwise.head: KINDS[:1]}
    whole, part = (costs(layerwise, sequences, types, tokens) for tokens in (1000, 100))
    assert whole.keys() == part.keys()
    ratios = [np.log2(part[name][Type.Q4_0] / whole[name][Type.Q4_0]) for name in whole]
    assert 0 < np.abs(ratios).mean() < 1, ratios
    assert sum(Sensitivity(layerwise, sequences, types, 100).some) == 100
    assert Sensitivity(layerwise, sequences, types, 1000).some == [40] * 5
    assert not any(Sensitivity(layerwise, sequences, {}, 100).some)


def test_the_energy_is_of_the_leading_tokens(tmp_path):
    make_llama("llama3", tmp_path)
    layerwise = LayerwiseModel(tmp_path, FP32, parts_of(tmp_path).architecture)
    heads = []
    for some in (0, 7, 20):
        heads.append(Head(layerwise))
        [row] = layerwise.start([np.arange(10, 30)])
        heads[-1].gradient(row, some)
    row = layerwise.start([np.arange(10, 30)])[0]
    again = Head(layerwise)
    with torch.no_grad():
        slopes = again._of_logits(layerwise.finish(row)[0])
    for head, some in zip(heads, (0, 7, 20), strict=True):
        torch.testing.assert_close(head.energy, slopes[:some].square().sum(0), rtol=1e-3, atol=1e-6)
    assert heads[0].energy.count_nonzero() == 0 < heads[2].energy.count_nonzero()


def test_progress_reaches_its_end(tiny):
    layerwise = LayerwiseModel(tiny, FP32, parts_of(tiny).architecture)
    told = []
    costs(layerwise, [np.arange(10, 30)], {}, told=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] and [done for done, _ in told] == list(range(1, len(told) + 1))
