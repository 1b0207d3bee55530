"""What each expert is multiplied with, computed a second time by Transformers' own modules, and what rounding by it gains."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from gemma_tune.base.errors import WorkFailed
from gemma_tune.export import calibration, expert_inputs, token_weights
from gemma_tune.export.calibration import Calibration
from gemma_tune.export.expert_inputs import ExpertInputs
from gemma_tune.export.quant_loss import measure
from gemma_tune.gguf import tensors
from gemma_tune.gguf.architectures.experts import in_model
from gemma_tune.gguf.architectures.registry import architecture_of
from gemma_tune.gguf.check import worst_error
from gemma_tune.gguf.compensated import DAMPING, Rounding, calibrated
from gemma_tune.gguf.reader import GgufFile
from gemma_tune.gguf.types import dequantise
from gemma_tune.gguf.writer import parts_of, write_gguf
from gemma_tune.measure.likelihood import Wanted
from gemma_tune.models.experts import ExpertProduct
from gemma_tune.models.layerwise import LayerwiseModel
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import Placement
from support.gemmas import FAMILIES, make_family
from support.llamas import make_llama, save_random, tokenizer_with_turns

FP32 = Placement("cpu", torch.float32, "")
OF_EXPERTS = ["qwen3 with experts", "qwen3.5 with experts", "mixtral", "gemma4-experts"]
ROWS = [np.arange(10, 50), np.arange(60, 90), np.array([5, 5, 7])]


@pytest.fixture(params=OF_EXPERTS)
def made(request, tmp_path):
    (make_family if request.param in FAMILIES else make_llama)(request.param, tmp_path)
    return tmp_path


def calibration_of(folder, rows=ROWS) -> Calibration:
    return Calibration(LayerwiseModel(folder, FP32, parts_of(folder).architecture), rows)


def products(known: Calibration) -> list[ExpertProduct]:
    return [module for layer in known.model.layers for module in layer.modules() if isinstance(module, ExpertProduct)]


class Pair:
    """A token that an expert got: by Transformers' model, what comes into its matrices, and the gradients of what comes out."""

    def __init__(self, module, n: int, expert: int, x: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor):
        self.n, self.expert = n, expert
        gates = (module.gate_up_proj[expert] @ x).detach().requires_grad_()
        gate, up = gates.chunk(2)
        inner = module.act_fn(gate) * up
        out = module.down_proj[expert] @ inner * weight
        (found,) = torch.autograd.grad(out, gates, gradient)
        self.x = {"gate_up_proj": x, "down_proj": inner.detach()}
        self.gradients = {"gate_up_proj": found, "down_proj": gradient * weight}

    def of(self, part: str, half: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        gradient = self.gradients[part]
        return self.x[part], gradient if half is None else gradient.chunk(2)[half]


def by_hand(folder) -> dict[str, list[Pair]]:
    """By what the model calls a layer's experts, in the order of the tokens and of the experts that each got."""
    model = load_model(folder, FP32).requires_grad_()
    seen = {name: [] for name, _ in model.named_modules() if name.endswith(".experts")}

    def note(kept, module, args, out):
        out.retain_grad()
        kept.append((module, *(arg.detach() for arg in args), out))

    for name, kept in seen.items():
        model.get_submodule(name).register_forward_hook(lambda *noted, kept=kept: note(kept, *noted))
    for ids in ROWS:
        logits = model(torch.from_numpy(ids)[None]).logits[0].float()
        drawn = torch.zeros(len(ids), dtype=torch.long)  # the token that a random number of zero draws
        torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    return {name: [Pair(module, n, int(chosen[t, n]), x[t], weights[t, n], out.grad[t])
                   for module, x, chosen, weights, out in kept for t in range(len(x)) for n in range(chosen.shape[1])]
            for name, kept in seen.items()}


def pairs_of(pairs: dict[str, list[Pair]], known: Calibration, product: ExpertProduct):
    """A product's inputs (pairs, columns), the gradients of what comes out, and the experts."""
    name, half = in_model(product.source)
    experts, _, part = name.rpartition(".")
    own = next(found for prefix, found in pairs.items() if prefix.replace(".language_model", "") == experts.replace(".language_model", ""))
    x, gradients = zip(*(pair.of(part, half) for pair in own), strict=True)
    return torch.stack(x), torch.stack(gradients), torch.tensor([pair.expert for pair in own])


@pytest.mark.parametrize("kept", [1 << 30, 1], ids=["all are kept", "layer by layer"])
def test_inputs_are_those_of_the_tokens_that_an_expert_got(made, kept, monkeypatch):
    monkeypatch.setattr(calibration, "KEPT", kept)
    known, pairs = calibration_of(made), by_hand(made)
    assert len(products(known)) >= 2 * len(known.model.layers)
    for product in products(known):
        x, _, experts = pairs_of(pairs, known, product)
        found = known.inputs(product.source)
        assert found.known and len(experts) > 2 * len(found.importance)
        whole = x.square().mean(0)
        for n in range(len(found.importance)):
            own = x[experts == n]
            level = whole if product.shared else (own.square().mean() if len(own) else whole.mean()).expand(x.shape[1])
            gram = own.T @ own + torch.diag(expert_inputs.PRIOR * level)
            torch.testing.assert_close(found.importance[n], gram.diagonal(), rtol=1e-3, atol=1e-5)
            one = found.of(n)
            gram += DAMPING * gram.diagonal().mean() * torch.eye(len(gram))
            torch.testing.assert_close(one.factors[0] @ one.factors[0].T, gram, rtol=1e-2, atol=1e-3 * float(gram.max()))
            np.testing.assert_allclose(one.importance, found.importance[n].numpy(), rtol=1e-6)
    layers = {name.split(".layers.")[1].split(".")[0] for name in known._known}
    assert len(layers) == (len(known.model.layers) if kept > 1 else 1)


def test_a_token_counts_for_an_expert_by_its_gradient_there(made, monkeypatch):
    """With the drawn token made known: a random number of zero draws the first of the vocabulary."""
    monkeypatch.setattr(token_weights, "POWER", 1.0)
    monkeypatch.setattr(expert_inputs, "PRIOR", 0.0)
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: rand(*args, **kwargs).zero_())
    known, pairs = calibration_of(made), by_hand(made)
    known.weigh({}, 0)
    for product in products(known):
        x, gradients_there, experts = pairs_of(pairs, known, product)
        weights = gradients_there.square().sum(1)
        weights /= weights.mean()
        torch.testing.assert_close(known._weights[product.source], weights, rtol=1e-2, atol=1e-3)
        found = known.inputs(product.source).importance
        expected = torch.zeros_like(found).index_add_(0, experts, x.square() * weights[:, None])
        torch.testing.assert_close(found[expected.sum(1) > 0], expected[expected.sum(1) > 0], rtol=1e-2, atol=1e-3 * float(expected.max()))


def product_of(count: int, rows: int, columns: int, shared: bool) -> ExpertProduct:
    product = ExpertProduct.__new__(ExpertProduct)
    torch.nn.Module.__init__(product)
    product.weight, product.shared = torch.nn.Parameter(torch.zeros(count, rows, columns)), shared
    return product


@pytest.mark.parametrize("shared", [True, False])
def test_an_expert_that_got_no_token_is_rounded_soundly(shared):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(40, 64, generator=rng) * torch.linspace(0.1, 3, 64)
    found = ExpertInputs(product_of(3, 8, 64, shared), [64])
    found.add(x, torch.tensor([0, 1]).repeat(20)[:, None])
    found.add(torch.zeros(1, 64), torch.tensor([[1]]))
    one = found.of(2)
    profile = x.square().mean(0) if shared else torch.ones(64)
    np.testing.assert_allclose(one.importance / one.importance.mean(), profile / profile.mean(), rtol=0.05)
    weights = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    data, error = calibrated(weights, Type.Q4_0, one)
    assert data.shape == (8, 36) and 0 < error < 0.02 * float((weights ** 2 @ one.importance).sum())


def test_experts_of_which_nothing_came_in_are_rounded_alike_in_all_columns():
    found = ExpertInputs(product_of(2, 4, 32, False), [32])
    found.add(torch.zeros(5, 32), torch.zeros(5, 1, dtype=torch.long))
    assert found.known and bool((found.importance == 1).all())
    found.add(torch.full((1, 32), torch.inf), torch.ones(1, 1, dtype=torch.long))
    del found.importance
    assert not found.known


def write(folder, known: Calibration | None, kind: Type = Type.Q4_0, quant: str = "q8_0", name: str = "out.gguf"):
    """A file with its experts in one type."""
    experts = {spec.name: kind for spec in parts_of(folder).architecture.tensors if len(spec.shape) == 3}
    return write_gguf(folder, folder / name, quant, name="n", chat_template=None, eot_token_id=None, types=experts,
                      rounding=Rounding(known.inputs) if known else None)


@pytest.mark.parametrize("elements", [13 * 64, 1 << 20], ids=["some rows of one", "several at once"])
def test_a_file_has_each_expert_as_its_own_inputs_round_it(made, elements, monkeypatch):
    monkeypatch.setattr(tensors, "CALIBRATED_ELEMENTS", elements)
    known = calibration_of(made)
    file, stored = GgufFile(write(made, known).path, keys=()), {p.source: known.model.stored(p.source) for p in products(known)}
    for spec in parts_of(made).architecture.tensors:
        if len(spec.shape) != 3:
            continue
        inputs, each = calibration_of(made).inputs(spec.source), spec.shape[1]
        for n in range(spec.shape[0]):
            rows = stored[spec.source].rows(n * each, (n + 1) * each)
            data, _ = calibrated(rows, Type.Q4_0, inputs.of(n))
            got = file.rows(spec.name, n * each, (n + 1) * each)
            same = (got == dequantise(data, Type.Q4_0)).mean()
            assert same == 1 if elements > 1 << 10 else same > 0.95, "the sums of some rows alone come out otherwise"


def test_the_check_sees_calibrated_experts_that_changed_places(tmp_path):
    """Two of 160, which are hardly more of the whole than rounding to four bits changes."""
    tokenizer = tokenizer_with_turns()
    save_random(Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=64, moe_intermediate_size=32, num_experts=160, num_experts_per_tok=2, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, norm_topk_prob=True)), tokenizer, tmp_path)
    written = write(tmp_path, calibration_of(tmp_path))
    architecture = parts_of(tmp_path).architecture
    assert worst_error(tmp_path, written.path, architecture, written.calibrated)[0] < 0.15
    tensors = load_file(tmp_path / "model.safetensors")
    one, two = (f"model.layers.1.mlp.experts.{n}.down_proj.weight" for n in (0, 3))
    save_file(tensors | {one: tensors[two], two: tensors[one]}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WorkFailed) as failed:
        worst_error(tmp_path, written.path, architecture, written.calibrated)
    [problem] = failed.value.problems
    assert problem.startswith("blk.1.ffn_down_exps.weight: its output is off by")


QWEN3_30B_A3B = dict(
    model_type="qwen3_moe", hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
    num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128, norm_topk_prob=True, vocab_size=151936,
    tie_word_embeddings=False)


@pytest.mark.parametrize(("settings", "gigabytes"), [
    ({}, 6.64),
    ({"num_hidden_layers": 96}, 6.76),  # one layer's, but for the states before each and an input of each expert
    ({"num_experts": 256}, 9.18),  # a layer's weights of 2.4 GB more
    ({"num_experts_per_tok": 32}, 11.96),  # what goes into the matrices and comes out of them
])
def test_memory_is_that_of_one_layer(tmp_path, settings, gigabytes, monkeypatch):
    make_llama(OF_EXPERTS[0], tmp_path)  # for its tokenizer
    architecture = architecture_of(QWEN3_30B_A3B | settings, tmp_path / "config.json")
    monkeypatch.setattr(calibration, "available", lambda device: 0)
    said = calibration._lacking(FP32, architecture, 4500)
    assert float(re.search(r"it takes ([\d.]+) GB of memory", said)[1]) == pytest.approx(gigabytes, abs=0.06)


GEMMA_3N_E2B = dict(
    model_type="gemma3n_text", intermediate_size=[8192] * 30, num_hidden_layers=30, num_kv_shared_layers=10,
    activation_sparsity_pattern=[0.95] * 10 + [0.0] * 20, layer_types=[*["sliding_attention"] * 4, "full_attention"] * 6)


def test_memory_is_not_that_of_a_table_that_is_looked_up(monkeypatch):
    """The states before each layer in four streams, 4.6 GB, and a head of 2.1; the table would be 8.1."""
    monkeypatch.setattr(calibration, "available", lambda device: 0)
    said = calibration._lacking(FP32, architecture_of(GEMMA_3N_E2B, Path("config.json")), 4500)
    assert 7.5 < float(re.search(r"it takes ([\d.]+) GB of memory", said)[1]) < 9


def chains(count: int, seed: int) -> list[np.ndarray]:
    """Sequences in which each token leaves four for the next."""
    after, rng = np.random.default_rng(0).integers(0, 64, (64, 4)), np.random.default_rng(seed)
    ids = [rng.integers(0, 64, count)]
    while len(ids) < 48:
        ids.append(after[ids[-1], rng.integers(0, 4, count)])
    return list(10 + np.stack(ids, 1))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small mixture that has learned to predict them."""
    folder, tokenizer = tmp_path_factory.mktemp("trained"), tokenizer_with_turns()
    torch.manual_seed(0)
    config = Qwen3MoeConfig(vocab_size=len(tokenizer), hidden_size=64, moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2,
                            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32, norm_topk_prob=True,
                            output_router_logits=True, router_aux_loss_coef=0.01)
    model = Qwen3MoeForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(250):
        ids = torch.from_numpy(np.stack(chains(16, 100 + step)))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_calibrated_experts_lose_less_on_other_rows(trained):
    files = {"plain": write(trained, None, name="plain.gguf")}
    for name, sequences, weighed in (("calibrated", 60, True), ("few tokens", 3, False)):
        known = calibration_of(trained, chains(sequences, 1))
        if weighed:
            known.weigh({}, 0)
        files[name] = write(trained, known, name=f"{weighed}.gguf")
    dense = Rounding(lambda source: None if ".experts." in source else known.inputs(source))
    experts = {spec.name: Type.Q4_0 for spec in parts_of(trained).architecture.tensors if len(spec.shape) == 3}
    files["dense alone"] = write_gguf(trained, trained / "dense.gguf", "q8_0", name="n", chat_template=None, eot_token_id=None,
                                      types=experts, rounding=dense)
    others = [Wanted(ids[None], np.arange(47), ids[1:]) for ids in chains(40, 2)]
    losses = measure(load_model(trained, FP32), {"t": others}, {name: file.path for name, file in files.items()},
                     parts_of(trained).architecture)["t"]
    kl = {name: loss.kl for name, loss in losses.items()}
    assert losses["f16"].perplexity < 8, "it has learned something"
    assert kl["calibrated"] < 0.6 * min(kl["plain"], kl["dense alone"]) and kl["few tokens"] < 0.9 * kl["plain"]
