"""What a GPU computes with in place of the library's layers, on a CPU: adapters with rounded copies, gates, whole models."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from gemma_tune.train import elementwise, kernels
from gemma_tune.train.adapters import NarrowCopies, NarrowLoraLinear
from gemma_tune.train.kernels import fast_layers
from support.triton_cpu import interpreted

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double().cpu() - expected.double().cpu()).norm() / expected.double().norm()).item()


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch) -> str:
    """Where the layers are replaced as on a GPU; on a CPU the kernels are interpreted."""
    pytest.importorskip("triton")
    if request.param == "cpu":
        monkeypatch.setattr(kernels, "_operations", lambda device: interpreted("gemma_tune.train.fused"))
    return request.param


# ---- adapters --------------------------------------------------------------------------------------------------------

def adapted(dtype: torch.dtype = torch.float32, layers: int = 1, base: nn.Module | None = None, **settings) -> nn.Module:
    """Linear layers ``proj0``, ``proj1``, … one after another, with adapters that are not zero."""
    torch.manual_seed(0)
    holder = nn.Module()
    for n in range(layers):
        setattr(holder, f"proj{n}", base or nn.Linear(32, 32).to(dtype))
    holder.is_loaded_in_4bit = type(base).__name__ == "Linear4bit"
    model = get_peft_model(holder, LoraConfig(r=4, lora_alpha=6.0, target_modules=r"proj\d", **settings))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


def through(model: nn.Module, x: torch.Tensor, checkpointed: bool = False) -> torch.Tensor:
    for name, layer in model.base_model.model.named_children():
        assert name.startswith("proj")
        x = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
    return x


def results(model: nn.Module, x: torch.Tensor, **how) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(1)  # dropout
    out = through(model, x, **how)
    above = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    out.backward(above.to(out))
    return {"out": out.detach(), "x": x.grad} | {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("with_dropout", [True, False])
@pytest.mark.parametrize("scale", [1.5, 1.0])
def test_gradients_are_those_of_the_formula(with_dropout, scale):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, a, b = (torch.randn(*shape, dtype=torch.float64, generator=generator)
                             for shape in ((5, 6), (7, 6), (7,), (3, 6), (7, 3)))
    mask = torch.tensor([0.0, 2.0, 2.0, 0.0, 2.0, 2.0], dtype=torch.float64) if with_dropout else None

    def layer(x, a, b):
        dropped = x if mask is None else x * mask
        return NarrowLoraLinear.apply(x, dropped, lambda: weight, bias, a, b, a.detach(), b.detach(), scale)

    inputs = tuple(t.requires_grad_() for t in (x, a, b))
    plain = x @ weight.t() + bias + scale * ((x if mask is None else x * mask) @ a.t()) @ b.t()
    assert torch.allclose(layer(x, a, b), plain, rtol=1e-12)
    ours, theirs = (torch.autograd.grad(out.square().sum(), inputs) for out in (layer(x, a, b), plain))
    assert all(relative(o, t) < 1e-12 for o, t in zip(ours, theirs))


@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.3}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("how", [{}, {"checkpointed": True}], ids=str)
def test_adapters_equal_the_librarys(device, settings, how):
    model, x = adapted(layers=2, **settings).to(device), torch.randn(2, 5, 32).to(device)
    theirs = results(model, x, **how)
    with fast_layers(model) as counts:
        assert counts["adapters"] == 2
        ours = results(model, x, **how)
    assert all(ours[n].dtype == t.dtype and relative(ours[n], t) < 1e-5 for n, t in theirs.items()) and len(ours) == 6


def test_adapters_in_bf16_are_about_as_exact_as_the_librarys(device):
    model, x = adapted(torch.bfloat16).to(device), torch.randn(4, 64, 32).bfloat16().to(device)
    exact, theirs = results(copy.deepcopy(model).double(), x.double()), results(model, x)
    with fast_layers(model):
        ours = results(model, x)
    for name, expected in exact.items():
        assert ours[name].dtype == theirs[name].dtype
        assert relative(ours[name], expected) < min(8e-3, 3 * relative(theirs[name], expected) + 4e-3), name


def four_bit(device: str, dtype: torch.dtype) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    base = bnb.nn.Linear4bit(64, 64, compute_dtype=dtype, quant_type="nf4")
    base.weight = bnb.nn.Params4bit((torch.randn(64, 64) / 8).to(dtype), requires_grad=False, quant_type="nf4")
    base.bias.data = base.bias.data.to(dtype)
    return adapted(base=base.to(device)).to(device)


def test_a_4_bit_layer(device):
    model, x = four_bit(device, torch.bfloat16), torch.randn(2, 5, 64).bfloat16().to(device)
    theirs = results(model, x)
    with fast_layers(model) as counts:
        assert counts["adapters"] == 1
        ours = results(model, x)
    assert all(relative(ours[n], t) < 1e-2 for n, t in theirs.items())


@pytest.mark.parametrize("kind", [four_bit, lambda device, dtype: adapted(dtype, base=nn.Linear(64, 64).to(dtype)).to(device)],
                         ids=["4 bits", "16 bits"])
@pytest.mark.parametrize("narrow", [True, False])
def test_fp16_whose_norms_hand_on_fp32(device, monkeypatch, kind, narrow):
    """As LayerNorm does under autocast on a GPU, there without Triton's kernels as well."""
    if not narrow:
        monkeypatch.setattr(kernels, "_operations", lambda device: elementwise)
    model, x = kind(device, torch.float16), torch.randn(2, 5, 64).to(device)
    with torch.autocast(device, dtype=torch.float16):
        theirs = results(model, x)
        with fast_layers(model) as counts:
            assert counts["adapters"] == 1
            ours = results(model, x)
    assert all(relative(ours[n], t) < 5e-3 for n, t in theirs.items())


def test_a_step_of_the_optimiser_is_seen_without_being_told(device):
    model, x = adapted(torch.bfloat16, layers=2).to(device), torch.randn(3, 32).bfloat16().to(device)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with fast_layers(model):
        before = results(model, x)
        assert torch.equal(results(model, x)["out"], before["out"])
        optimiser.step()
        after = through(model, x)
    assert relative(after, before["out"]) > 0.05 and relative(after, through(model, x)) < 1e-2


def test_copies_keep_their_addresses_and_are_made_once_for_all():
    weights = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4, 3))]
    copies = NarrowCopies(weights)
    narrow = [copies.of(n, torch.bfloat16) for n in (0, 1)]
    assert [t.dtype for t in narrow] == [torch.bfloat16] * 2 and not any(t.requires_grad for t in narrow)
    with torch.no_grad():
        weights[1].mul_(2)
    assert not torch.equal(narrow[1], weights[1].bfloat16()), "nobody asked yet, as in a replay"
    copies.refresh()
    assert all(torch.equal(t, w.bfloat16()) for t, w in zip(narrow, weights))
    with torch.no_grad():
        weights[0].mul_(2)
        weights[1].mul_(2)
    assert copies.of(0, torch.bfloat16) is narrow[0] and copies.of(0, torch.float32).dtype == torch.float32
    assert all(torch.equal(t, w.bfloat16()) for t, w in zip(narrow, weights)), "one question is enough for all"


def test_a_change_between_forward_and_backward_is_an_error(device):
    """The backward pass would use other weights than the forward pass did."""
    model = adapted(torch.bfloat16).to(device)
    with fast_layers(model) as layers:
        out = through(model, torch.randn(3, 32).bfloat16().to(device))
        layers.refresh()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_on_a_cpu_nothing_is_copied():
    with fast_layers(adapted()) as layers:
        layers.refresh()
        assert layers["gates"] == 0 and layers["adapters"] == 1


# ---- gates -----------------------------------------------------------------------------------------------------------

def gate_of(family: str, **settings) -> nn.Module:
    from importlib import import_module

    from transformers import AutoConfig

    kinds = {"gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3", "llama": "Llama", "qwen3": "Qwen3"}
    place = family.removesuffix("_text")
    kind = getattr(import_module(f"transformers.models.{place}.modeling_{place}"), f"{kinds[family]}MLP")
    torch.manual_seed(0)
    module = kind(AutoConfig.for_model(family, hidden_size=16, intermediate_size=24, num_attention_heads=4,
                                            **settings))
    return module.requires_grad_(False)


@pytest.mark.parametrize(("family", "settings", "kind"), [
    ("gemma3_text", {}, "gelu_tanh"), ("gemma", {}, "gelu_tanh"), ("gemma2", {"hidden_activation": "gelu"}, "gelu"),
    ("llama", {}, "silu"), ("qwen3", {}, "silu"), ("llama", {"mlp_bias": True}, "silu"),
    ("llama", {"hidden_act": "relu"}, None), ("llama", {"hidden_act": "quick_gelu"}, None)], ids=str)
def test_gates_are_known_by_what_they_compute(device, family, settings, kind):
    module, x = gate_of(family, **settings).to(device), torch.randn(2, 3, 16, device=device)
    holder = nn.ModuleList([module])
    expected, before = module(x), vars(module).copy()
    assert elementwise._gate_like(module) == kind
    with fast_layers(holder) as counts:
        assert counts["gates"] == bool(kind)
        assert relative(module(x), expected) < 1e-6
    assert vars(module) == before


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.act_fn = nn.SiLU()


class Sparse(Gate):
    """As Gemma 3n's: something happens before the activation."""

    def forward(self, x):
        gate = self.gate_proj(x)
        return self.down_proj(self.act_fn(gate - gate.mean(-1, keepdim=True)) * self.up_proj(x))


class Swapped(Gate):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class Routed(Gate):
    def forward(self, x, weights):
        return weights * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Several(Gate):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)), x


@pytest.mark.parametrize("kind", [Sparse, Swapped, Routed, Several])
def test_another_formula_is_left_alone(kind):
    assert elementwise._gate_like(kind()) is None


# ---- a whole model ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("four_bit", [False, True])
def test_a_model_with_all_of_it_trains_as_the_library_does(device, tiny, four_bit):
    from gemma_tune.models.load import load_model
    from gemma_tune.models.placement import Placement

    if four_bit:
        pytest.importorskip("bitsandbytes")
    model = load_model(tiny, Placement(device, torch.float32, ""), four_bit=four_bit)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"]))
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(3, 60, (2, 9), device=device)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    theirs = gradients()
    with fast_layers(model) as counts:
        assert counts == {"adapters": 10, "norms": 13, "rotations": 2, "gates": 2}
        ours = gradients()
    assert max(map(relative, ours, theirs)) < 1e-4
