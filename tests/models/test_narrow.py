"""Weights that are kept in 16 bits compute as the fp32 model of the same numbers."""

from __future__ import annotations

import copy

import pytest
import torch

from gemma_tune.lora.fold import fold
from gemma_tune.models import narrow, placement
from gemma_tune.models.load import load_model
from gemma_tune.models.narrow import Narrow, Place, keep_narrow, widened
from gemma_tune.models.placement import Placement
from support.gemmas import make_family
from support.llamas import make_llama
from support.narrow import NARROW, without_instructions

FP32 = Placement("cpu", torch.float32, "test")
linear = torch.nn.functional.linear


def pair(*shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Narrow, torch.Tensor]:
    """A weight that is kept narrow, and the same numbers in fp32."""
    kept = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return Narrow(kept, Place()), kept.float()


def both(weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A linear layer's output and the gradient of its input."""
    x = x.detach().requires_grad_()
    out = linear(x, weight, bias)
    out.square().sum().backward()
    return out.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 90])
def test_a_linear_layer_is_that_of_the_widened_weight_bit_for_bit(monkeypatch, rows, with_bias, dtype):
    monkeypatch.setattr(narrow, "FEW", 0)
    kept, wide = pair(200, 48, dtype=dtype)
    x, bias = torch.randn(2, rows, 48), torch.randn(200) if with_bias else None
    assert all(map(torch.equal, both(kept, x, bias), both(wide, x, bias)))
    with torch.inference_mode():
        assert torch.equal(linear(x, kept, bias), linear(x, wide, bias))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 90])
def test_in_pieces_it_is_off_by_rounding_at_most(monkeypatch, rows, with_bias):
    """Both where few rows meet small pieces, and where a weight is larger than the place: 64 of 200 rows at once."""
    monkeypatch.setattr(narrow, "PIECE", 1)
    monkeypatch.setattr(narrow, "PLACE", 1)
    kept, wide = pair(200, 48)
    x, bias = torch.randn(rows, 48), torch.randn(200) if with_bias else None
    torch.testing.assert_close(both(kept, x, bias), both(wide, x, bias), rtol=1e-5, atol=1e-3)
    assert len(kept.place._numbers) == 64 * 48 and widened(kept) is kept


def test_one_weight_after_the_other_is_made_in_one_place():
    place = Place()
    first, second = (Narrow(torch.full(shape, value).bfloat16(), place) for shape, value in (((30, 8), 1.0), ((5, 8), 2.0)))
    with torch.inference_mode():
        assert torch.equal(linear(torch.ones(3, 8), first), torch.full((3, 30), 8.0))
    assert torch.equal(widened(second), torch.full((5, 8), 2.0)) and widened(second).data_ptr() == widened(first).data_ptr()
    other = torch.ones(1)
    assert widened(other) is other


def test_lookups_views_and_copies():
    kept, wide = pair(50, 8)
    ids = torch.tensor([[3, 49], [0, 3]])
    assert torch.equal(torch.nn.functional.embedding(ids, kept, padding_idx=0), wide[ids])
    assert torch.equal(kept[ids], wide[ids]) and torch.equal(kept.index_select(0, ids[0]), wide[ids[0]])
    for view in (kept[4:9], kept.t(), kept.T, kept.detach(), copy.deepcopy(kept), kept[None], kept.clone(), *kept.split(30), kept.view(100, 4),
                 kept.expand(2, 50, 8)):
        assert isinstance(view, Narrow) and view.dtype == torch.float32
    assert torch.equal(kept[4:9] + 0, wide[4:9]) and torch.equal(kept[7] * 2, wide[7] * 2)
    assert torch.equal(kept.square().sum(1), wide.square().sum(1)) and kept.float() is kept and kept.to("cpu") is kept
    assert "bfloat16" in repr(kept)


def test_nothing_is_written_to_one():
    kept, wide = pair(50, 8)
    for write in (lambda: kept.normal_(), lambda: kept.copy_(wide), lambda: kept.add_(1)):
        with pytest.raises(RuntimeError, match="kept in torch.bfloat16 and frozen"):
            write()
    assert torch.equal(kept + 0, wide)


def test_products_of_experts():
    kept, wide = pair(4, 16, 32)
    x = torch.randn(9, 32)
    ends = torch.tensor([2, 2, 8, 9], dtype=torch.int32)
    expected = torch.cat([x[:2] @ wide[0].t(), x[2:8] @ wide[2].t(), x[8:] @ wide[3].t()])
    grouped = torch.nn.functional.grouped_mm
    torch.testing.assert_close(grouped(x, kept.transpose(1, 2), offs=ends), expected)
    given, same = x.clone().requires_grad_(), x.clone().requires_grad_()
    grouped(given, kept.transpose(1, 2), offs=ends).square().sum().backward()
    grouped(same, wide.transpose(1, 2), offs=ends).square().sum().backward()
    torch.testing.assert_close(given.grad, same.grad)


@pytest.fixture
def small(monkeypatch):
    without_instructions(monkeypatch)


# Tied and not, with a scaled embedding (Gemma), biases, states, a table of inputs to each layer, experts.
FAMILIES = ("gemma2", "gemma3", "gemma3n", "gemma4-small", "gemma4-experts", "biases", "minicpm3", "lfm2", "qwen3.5",
            "qwen3 with experts", "mixtral", "gpt-oss")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_is_the_fp32_model_of_its_checkpoint(tmp_path, small, monkeypatch, name):
    make_family(name, tmp_path) if name.startswith("gemma") else make_llama(name, tmp_path)
    kept, wide = load_model(tmp_path, NARROW).eval(), load_model(tmp_path, FP32).eval()
    large = [name for name, p in kept.named_parameters() if isinstance(p, Narrow)]
    assert len(large) >= 8 and kept.dtype == torch.float32
    assert all(p.ndim == 1 or isinstance(p, Narrow) for p in kept.parameters())
    ids = torch.arange(5, 45).reshape(2, 20)
    with torch.inference_mode():
        torch.testing.assert_close(kept(input_ids=ids).logits, wide(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
        monkeypatch.setattr(narrow, "FEW", 0)
        found, expected = kept(input_ids=ids).logits, wide(input_ids=ids).logits
    if not {"experts", "gpt-oss", "mixtral"} & {*name.replace("-", " ", name.startswith("gemma")).split(), name}:  # whose products are made for one expert after the other
        assert torch.equal(found, expected)


def test_it_is_never_there_in_fp32(tiny, small, monkeypatch):
    seen = []
    theirs = narrow.keep_narrow
    monkeypatch.setattr(narrow, "keep_narrow", lambda model, dtype: seen.extend(
        p.dtype for p in model.parameters() if p.ndim > 1) or theirs(model, dtype))
    load_model(tiny, NARROW)
    assert set(seen) == {torch.bfloat16} and len(seen) == 15


def test_a_head_that_is_the_embedding_stays_it(tiny, small):
    model = load_model(tiny, NARROW)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert keep_narrow(torch.nn.Linear(3, 4), torch.bfloat16) == 1


def test_small_weights_are_not_worth_it(tiny):
    assert not any(isinstance(p, Narrow) for p in load_model(tiny, NARROW).parameters())


def test_an_adapter_is_not_rounded_into_such_weights(tiny, small):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    assert fold(get_peft_model(load_model(tiny, NARROW), config)) is None
    assert fold(get_peft_model(load_model(tiny, FP32), config)) is not None


# ---- where it is taken

NUMBERS = 1_000_000_000


@pytest.mark.parametrize(("room", "short", "dtype"), [
    (6e9, "fp32", torch.float32), (4e9, "bf16", torch.float32), (2e9, None, None)])
def test_models_that_are_compared_are_kept_so_where_fp32_does_not_fit(small, monkeypatch, room, short, dtype):
    monkeypatch.setattr(placement, "available", lambda device: room)
    found, lacking = placement.place(NUMBERS)
    assert (found and found.short, found and found.dtype) == (short, dtype) and bool(lacking) is (found is None)
    assert found is None or (found.stored == torch.bfloat16) is (short == "bf16")


@pytest.mark.parametrize("instructions", ["AVX512-BF16", None])
def test_elsewhere_bf16_is_what_is_computed_in(small, monkeypatch, instructions):
    monkeypatch.setattr(placement, "bf16_instructions", lambda: instructions)
    monkeypatch.setattr(placement, "bf16_speed", lambda: 1.2)
    monkeypatch.setattr(placement, "available", lambda device: 4e9)
    for found in (placement.place(NUMBERS)[0], placement.choose_placement("bf16")):
        assert (found.dtype, found.stored, found.instead) == (torch.bfloat16, None, None)
    assert placement.choose_placement("auto").instead is None


@pytest.mark.parametrize(("room", "dtype", "stored"), [
    (1e12, "auto", None), (0, "auto", torch.bfloat16), (0, "fp32", None), (1e12, "bf16", torch.bfloat16)])
def test_who_answers_is_kept_so_where_fp32_does_not_fit(small, tiny, monkeypatch, room, dtype, stored):
    monkeypatch.setattr(placement, "available", lambda device: room)
    found = placement.placed(dtype, tiny)
    assert (found.dtype, found.stored) == (torch.float32, stored)
    assert ("weights in bf16 and products in fp32, as the CPU has no instructions for bf16" in found.reason) is bool(stored)
    assert ("does not fit" in found.reason) is (dtype == "auto" and bool(stored))
