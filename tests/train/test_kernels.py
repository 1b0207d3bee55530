"""The training's own layers against the library's: values, gradients, what is kept for the backward pass."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from gemma_tune.train.adapters import LoraLinear
from gemma_tune.train.elementwise import RMSNorm, Rotation
from gemma_tune.train.kernels import fast_layers


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Length of the difference against that of the expected tensor."""
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


# ---- adapters --------------------------------------------------------------------------------------------------------

def adapted(base: nn.Module | None = None, *, rank: int = 4, alpha: float = 6.0, **settings) -> nn.Module:
    """A PEFT model of one linear layer ``proj`` whose adapter is not zero."""
    torch.manual_seed(0)
    holder = nn.Module()
    holder.proj = base or nn.Linear(24, 36)
    holder.is_loaded_in_4bit = type(base).__name__ == "Linear4bit"
    model = get_peft_model(holder, LoraConfig(r=rank, lora_alpha=alpha, target_modules=["proj"], **settings))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def layer_of(model: nn.Module) -> nn.Module:
    return model.base_model.model.proj


def results(model: nn.Module, x: torch.Tensor, *, needs_grad: bool = True, transposed: bool = False) -> dict:
    """Output and gradients of a layer; ``transposed`` sends a gradient back that is not contiguous."""
    x = x.clone().requires_grad_(needs_grad)
    model.zero_grad()
    torch.manual_seed(1)  # dropout
    out = layer_of(model)(x)
    generator = torch.Generator().manual_seed(2)
    if transposed:
        last = out.transpose(-1, -2)
        (last * torch.randn(last.shape, generator=generator).to(out.dtype)).sum().backward()
    else:
        (out * torch.randn(out.shape, generator=generator).to(out.dtype)).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"out": out.detach()} | ({"x": x.grad} if needs_grad else {})


def compared(model: nn.Module, x: torch.Tensor, **how) -> tuple[dict, dict]:
    """The library's results, and ours."""
    theirs = results(model, x, **how)
    with fast_layers(model) as counts:
        assert counts["adapters"] == 1
        ours = results(model, x, **how)
    assert ours.keys() == theirs.keys() and len(ours) >= 3
    return theirs, ours


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_dropout", [True, False])
def test_adapter_gradcheck(with_bias, with_dropout):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, a, b = (torch.randn(*shape, dtype=torch.float64, generator=generator)
                             for shape in ((5, 6), (7, 6), (7,), (3, 6), (7, 3)))
    mask = torch.tensor([0.0, 2.0, 2.0, 0.0, 2.0, 2.0], dtype=torch.float64)

    def layer(x, a, b):
        return LoraLinear.apply(x, x * mask if with_dropout else x, lambda: weight, bias if with_bias else None, a, b, 1.5)

    inputs = tuple(t.requires_grad_() for t in (x, a, b))
    assert torch.autograd.gradcheck(layer, inputs)
    plain = x @ weight.t() + (bias if with_bias else 0) + 1.5 * ((x * mask if with_dropout else x) @ a.t()) @ b.t()
    assert torch.allclose(layer(x, a, b), plain, rtol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.3}, {"rank": 1, "alpha": 0.5},
                                      {"use_rslora": True, "rank": 9}], ids=str)
@pytest.mark.parametrize("how", [{}, {"needs_grad": False}, {"transposed": True}], ids=str)
def test_adapter_equals_the_librarys(bias, settings, how):
    model = adapted(nn.Linear(24, 36, bias=bias), **settings).double()
    theirs, ours = compared(model, torch.randn(2, 5, 24, dtype=torch.float64), **how)
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape and ours[name].dtype == expected.dtype
        assert relative(ours[name], expected) < 1e-12, name
    dropped = settings.get("lora_dropout")
    assert (relative(results(copy.deepcopy(model).eval(), torch.ones(3, 24, dtype=torch.float64))["out"],
                     results(model, torch.ones(3, 24, dtype=torch.float64))["out"]) > 0.01) == bool(dropped)


@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 1, 3, 24)], ids=str)
def test_adapter_takes_inputs_of_any_shape(shape):
    theirs, ours = compared(adapted(), torch.randn(shape))
    assert ours["out"].shape == (*shape[:-1], 36)
    for name, expected in theirs.items():
        assert relative(ours[name], expected) < 1e-5, name


def test_adapter_in_eval_mode_has_no_dropout():
    model = adapted(lora_dropout=0.5).eval()
    theirs, ours = compared(model, torch.randn(3, 24))
    assert relative(ours["out"], theirs["out"]) < 1e-6


def test_adapter_in_bf16_is_about_as_exact_as_the_librarys():
    """The library multiplies in fp32; here the factors are rounded to bf16, as the frozen layer's are."""
    model = adapted(nn.Linear(128, 96).bfloat16(), rank=16)
    assert layer_of(model).lora_A["default"].weight.dtype == torch.float32
    x = torch.randn(4, 64, 128).bfloat16()
    exact = results(copy.deepcopy(model).double(), x.double())
    theirs, ours = compared(model, x)
    for name, expected in exact.items():
        assert ours[name].dtype == theirs[name].dtype
        assert relative(ours[name], expected) < 8e-3, name
        assert relative(ours[name], expected) < 3 * relative(theirs[name], expected) + 4e-3, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapter_on_a_4_bit_layer_equals_the_librarys(dtype):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = bnb.nn.Linear4bit(128, 96, compute_dtype=dtype, quant_type="nf4", compress_statistics=True)
    base.weight = bnb.nn.Params4bit((torch.randn(96, 128) / 10).to(dtype), requires_grad=False, quant_type="nf4")
    base.bias = nn.Parameter(torch.randn(96).to(dtype), requires_grad=False)
    base = base.to("cpu")
    model = adapted(base)
    assert type(layer_of(model)).__name__ == "Linear4bit" and layer_of(model).base_layer.weight.dtype == torch.uint8
    theirs, ours = compared(model, torch.randn(2, 5, 128).to(dtype))
    for name, expected in theirs.items():
        assert relative(ours[name], expected) < (1e-6 if dtype == torch.float32 else 1e-2), name


def test_a_4_bit_layer_that_is_packed_for_answering_is_left_to_the_library():
    bnb = pytest.importorskip("bitsandbytes")
    base = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.bfloat16, quant_type="nf4").bfloat16().to("cpu")
    model = adapted(base)
    base.weight.quant_state.packing_format_for_cpu = True
    with fast_layers(model) as counts:
        assert counts["adapters"] == 0


def test_a_loaded_4_bit_model_keeps_its_weights_when_it_answers(tiny):
    """On a CPU with AVX512 bitsandbytes would pack them, which no backward pass can read."""
    pytest.importorskip("bitsandbytes")
    from gemma_tune.models.load import load_model
    from gemma_tune.models.placement import Placement

    model = load_model(tiny, Placement("cpu", torch.bfloat16, ""), four_bit=True).eval()
    weights = [m.weight for m in model.modules() if hasattr(getattr(m, "weight", None), "quant_state")]
    before = [w.data.clone() for w in weights]
    with torch.no_grad():
        model(input_ids=torch.arange(3, 9)[None])
    assert len(weights) == 14
    assert all(w.shape == b.shape and torch.equal(w.data, b) for w, b in zip(weights, before))


def test_disabled_and_merged_adapters_go_the_librarys_way():
    model, x = adapted(), torch.randn(3, 24)
    with torch.no_grad():
        whole, base = layer_of(model)(x), layer_of(model).base_layer(x)
        with fast_layers(model):
            with model.disable_adapter():
                assert torch.equal(layer_of(model)(x), base)
            assert relative(layer_of(model)(x), whole) < 1e-6
            model.merge_adapter()
            assert relative(layer_of(model)(x), whole) < 1e-5
            model.unmerge_adapter()
            assert relative(layer_of(model)(x), whole) < 1e-5
        model.merge_adapter()
        with fast_layers(model) as counts:
            assert counts["adapters"] == 0


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_other_kinds_of_adapters_are_left_to_the_library(settings):
    model = adapted(**settings)
    before = layer_of(model).forward
    with fast_layers(model) as counts:
        assert counts["adapters"] == 0
        assert layer_of(model).forward == before


def test_two_active_adapters_and_a_trained_base_are_left_to_the_library():
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["proj"]))
    model.base_model.set_adapter(["default", "second"])
    with fast_layers(model) as counts:
        assert counts["adapters"] == 0
    model = adapted()
    layer_of(model).base_layer.weight.requires_grad_()
    with fast_layers(model) as counts:
        assert counts["adapters"] == 0


# ---- norms -----------------------------------------------------------------------------------------------------------

def norm_of(family: str, width: int = 32, **settings) -> nn.Module:
    """A frozen norm of a family with random weights."""
    from importlib import import_module

    kinds = {"gemma": "Gemma", "gemma2": "Gemma2", "gemma3": "Gemma3", "gemma4": "Gemma4", "llama": "Llama", "qwen3": "Qwen3"}
    kind = getattr(import_module(f"transformers.models.{family}.modeling_{family}"), f"{kinds[family]}RMSNorm")
    norm = kind(width, eps=1e-3, **settings)
    torch.manual_seed(0)
    for parameter in norm.parameters():
        nn.init.normal_(parameter.requires_grad_(False))
    return norm


FAMILIES = ["gemma", "gemma2", "gemma3", "gemma4", "llama", "qwen3"]


def through(norm: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, and the gradient of x."""
    x = x.detach().requires_grad_()
    out = norm(x)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)).sum().backward()
    return out.detach(), x.grad


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strided", [False, True])
def test_norm_equals_the_librarys(family, strided):
    norm = norm_of(family)
    x = 0.1 * torch.randn(2, 5, 3, 32)  # small, so that eps counts
    x = x.transpose(1, 2) if strided else x  # as attention's queries and keys are
    theirs = through(norm, x)
    with fast_layers(nn.ModuleList([norm])) as counts:
        assert counts["norms"] == 1
        ours = through(norm, x)
    assert ours[0].shape == theirs[0].shape
    assert max(map(relative, ours, theirs)) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_norm_in_bf16_is_no_less_exact_than_the_librarys(family):
    norm = norm_of(family).bfloat16()
    x = torch.randn(64, 32).bfloat16()
    exact = through(copy.deepcopy(norm).double(), x.double())
    # A family that rounds to fp32 on the way is no exact reference, but an fp32 one is exact enough for bf16.
    theirs = through(norm, x)
    with fast_layers(nn.ModuleList([norm])):
        ours = through(norm, x)
    for got, library, expected in zip(ours, theirs, exact):
        assert got.dtype == torch.bfloat16
        assert relative(got, expected) < max(1.1 * relative(library, expected), 3e-3)


def test_norm_gradcheck():
    x = torch.randn(3, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: RMSNorm.apply(x, torch.linspace(0.5, 2, 8).double(), 0.1), (x,))


class Norm(nn.Module):
    """The usual attributes, with a formula to be filled in."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(width), requires_grad=False), 1e-6


class CenteredRMSNorm(Norm):
    def forward(self, x):
        return nn.functional.layer_norm(x, x.shape[-1:], self.weight, eps=self.eps)


class DoubledRMSNorm(Norm):
    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (2 + self.weight)


class GatedRMSNorm(Norm):
    def forward(self, x, gate):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight * gate


class BiasedRMSNorm(Norm):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.rand(32), requires_grad=False)

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight + self.bias


@pytest.mark.parametrize("norm", [CenteredRMSNorm(), DoubledRMSNorm(), GatedRMSNorm(), BiasedRMSNorm(), nn.LayerNorm(32),
                                  norm_of("gemma4", with_scale=False)], ids=lambda norm: type(norm).__name__)
def test_a_norm_with_another_formula_is_left_alone(norm):
    before = norm.forward
    with fast_layers(nn.ModuleList([norm])) as counts:
        assert counts["norms"] == 0
        assert norm.forward == before


def test_a_norm_that_is_trained_is_left_alone():
    norm = norm_of("llama")
    norm.weight.requires_grad_()
    with fast_layers(nn.ModuleList([norm])) as counts:
        assert counts["norms"] == 0


# ---- rotations -------------------------------------------------------------------------------------------------------

def modeling(family: str):
    from importlib import import_module

    return import_module(f"transformers.models.{family}.modeling_{family}")


class SelfAttention(nn.Module):
    """Stands for a family's attention: only where its class was made counts."""


def attention_of(family: str) -> nn.Module:
    return type("SelfAttention", (SelfAttention,), {"__module__": modeling(family).__name__})()


def rotated(function, heads: list[torch.Tensor], angles: list[torch.Tensor], **how) -> list[torch.Tensor]:
    """Results and gradients."""
    heads = [x.detach().requires_grad_() for x in heads]
    out = function(*heads, *angles, **how)
    out = list(out) if isinstance(out, tuple) else [out]
    generator = torch.Generator().manual_seed(4)
    sum((x * torch.randn(x.shape, generator=generator).to(x.dtype)).sum() for x in out).backward()
    return [x.detach() for x in out] + [x.grad for x in heads]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma4", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_rotation_equals_the_librarys(family, dtype):
    theirs = modeling(family).apply_rotary_pos_emb
    generator = torch.Generator().manual_seed(0)
    # Queries and keys have other numbers of heads, and are transposed views.
    q, k = (torch.randn(2, 5, heads, 16, dtype=torch.float64, generator=generator).to(dtype).transpose(1, 2) for heads in (4, 1))
    angles = [torch.randn(1, 5, 16, dtype=torch.float64, generator=generator).to(dtype) for _ in range(2)]
    heads = [q] if family == "gemma4" else [q, k]
    with fast_layers(nn.ModuleList([attention_of(family)])) as counts:
        ours = modeling(family).apply_rotary_pos_emb
        assert counts["rotations"] == 1 and ours is not theirs
    assert modeling(family).apply_rotary_pos_emb is theirs
    cases = [(heads, {}), ([x.transpose(1, 2) for x in heads], {"unsqueeze_dim": 2})]
    for tensors, how in cases:
        for got, expected in zip(rotated(ours, tensors, angles, **how), rotated(theirs, tensors, angles, **how), strict=True):
            assert got.dtype == expected.dtype and got.shape == expected.shape
            assert relative(got, expected) < (1e-14 if dtype == torch.float64 else 6e-3)


def test_rotation_gradcheck():
    generator = torch.Generator().manual_seed(0)
    x, cos, sin = (torch.randn(*shape, 6, dtype=torch.float64, generator=generator) for shape in ((2, 3, 4), (1, 4), (1, 4)))
    assert torch.autograd.gradcheck(lambda x: Rotation.apply(x, cos, sin), (x.requires_grad_(),))


@pytest.mark.parametrize("family", ["phi3", "gpt_oss", "olmo2", "cohere", "glm"])
def test_a_rotation_that_can_do_more_or_gives_another_type_is_left_alone(family):
    """Parts of a head (Phi), angles of half the width (GPT-OSS), fp32 inside (OLMo), neighbours (Cohere, GLM)."""
    theirs = modeling(family).apply_rotary_pos_emb
    with fast_layers(nn.ModuleList([attention_of(family)])) as counts:
        assert counts["rotations"] == 0
        assert modeling(family).apply_rotary_pos_emb is theirs


# ---- whole models ----------------------------------------------------------------------------------------------------

SMALL = dict(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=128, initializer_range=0.3, pad_token_id=0,
             bos_token_id=1, eos_token_id=2)


def small(family: str, dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    """A tiny random PEFT model of a family, all of whose linear layers have an adapter that is not zero."""
    import transformers

    name = {"gemma2": "Gemma2", "gemma3": "Gemma3", "gemma4": "Gemma4", "llama": "Llama", "qwen3": "Qwen3", "phi3": "Phi3",
            "olmo2": "Olmo2", "gpt_oss": "GptOss"}[family]
    text = "Text" if family in ("gemma3", "gemma4") else ""
    settings = SMALL | ({"sliding_window": 8} if family.startswith("gemma") else {}) | changes
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}{text}Config")(**settings))
    for module_name, parameter in model.named_parameters():
        if "norm" in module_name:
            nn.init.normal_(parameter, std=0.3)
    model = get_peft_model(model.to(dtype), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def step(model: nn.Module) -> dict[str, torch.Tensor]:
    """Loss and the adapter's gradients."""
    ids = torch.randint(3, 99, (3, 21), generator=torch.Generator().manual_seed(5))
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("family", "norms", "rotations", "changes"), [
    ("gemma2", 9, 2, {}), ("gemma3", 13, 2, {}), ("gemma4", None, 2, {}), ("llama", 5, 2, {}), ("qwen3", 9, 2, {}),
    ("phi3", 5, 0, {"partial_rotary_factor": 0.5}), ("olmo2", 9, 0, {}), ("gpt_oss", 5, 0, {"num_local_experts": 2, "num_experts_per_tok": 1})],
    ids=lambda value: value if isinstance(value, str) else "")
def test_a_model_learns_the_same(family, norms, rotations, changes):
    model = small(family, **changes)
    theirs = step(model)
    with fast_layers(model) as counts:
        ours = step(model)
    assert counts["adapters"] == sum(hasattr(m, "lora_A") for m in model.modules()) > 0
    assert counts["rotations"] == rotations
    assert counts["norms"] == norms if norms else counts["norms"] > 8
    assert theirs["loss"] > 1
    for name, expected in theirs.items():
        assert relative(ours[name], expected) < 1e-5, name


@pytest.mark.parametrize("family", ["gemma3", "olmo2"])
def test_a_model_in_bf16_learns_about_the_same(family):
    """Also where a family's rotation computes in fp32: its attention must not get queries and values of two types."""
    model = small(family, torch.bfloat16)
    theirs = step(model)
    with fast_layers(model):
        ours = step(model)
    assert ours["loss"].item() == pytest.approx(theirs["loss"].item(), rel=2e-2)
    assert relative(torch.cat([g.flatten() for g in ours.values()]), torch.cat([g.flatten() for g in theirs.values()])) < 0.1


def attributes(model: nn.Module) -> dict:
    """Everything that fast_layers might leave behind."""
    functions = {(m.__name__, "apply_rotary_pos_emb"): m.apply_rotary_pos_emb
                 for m in {sys.modules[type(x).__module__] for x in model.modules()} if hasattr(m, "apply_rotary_pos_emb")}
    return functions | {(name, key): value for name, m in model.named_modules() for key, value in vars(m).items()}


def test_everything_is_as_before_afterwards_also_after_an_error():
    model = small("gemma3")
    special = model.base_model.model.model.layers[0].mlp.up_proj
    special.forward = special.forward  # as a library does that puts its hooks around a layer
    before = attributes(model)
    with fast_layers(model):
        assert attributes(model) != before
        changed = {key for key, value in attributes(model).items() if before.get(key) is not value}
        assert ("base_model.model.model.layers.0.self_attn.q_norm", "forward") in changed
        assert len(changed) == 14 + 13 + 1
    assert attributes(model) == before
    with pytest.raises(KeyError), fast_layers(model):
        raise KeyError
    assert attributes(model) == before


def kept_for_backward(model: nn.Module, ids: torch.Tensor) -> tuple[int, list[torch.Tensor]]:
    """Bytes of the activations that autograd keeps during a forward pass of the decoder, and these tensors."""
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point():
            kept[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.get_base_model().get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    out.sum().backward()
    return sum(t.untyped_storage().nbytes() for t in kept.values()), list(kept.values())


def test_less_is_kept_for_the_backward_pass_and_nothing_large_in_fp32():
    model = small("gemma3", torch.bfloat16, hidden_size=64, intermediate_size=256, head_dim=16)
    ids = torch.randint(3, 99, (2, 50), generator=torch.Generator().manual_seed(5))
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
    plain, tensors = kept_for_backward(model, ids)
    assert any(t.dtype == torch.float32 and t.numel() >= ids.numel() * 64 for t in tensors)
    with fast_layers(model):
        fast, tensors = kept_for_backward(model, ids)
    assert fast < plain / 1.5
    assert max(t.numel() for t in tensors if t.dtype == torch.float32) < ids.numel() * 16
