"""Weights in 4 bits, unpacked into one place, against bitsandbytes' own result."""

from __future__ import annotations

import pytest
import torch

from gemma_tune.train import unpacking
from gemma_tune.train.adapters import replace_adapters
from gemma_tune.train.unpacking import Room

functional = pytest.importorskip("bitsandbytes.functional")


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    monkeypatch.setattr(unpacking, "LARGE", 2 * 96 * 128)
    monkeypatch.setattr(unpacking, "PIECE", 5 * 128 + 7)


def packed(rows: int, width: int, dtype: torch.dtype = torch.float32, **how) -> tuple[torch.Tensor, object]:
    generator = torch.Generator().manual_seed(rows)
    how = {"quant_type": "nf4", "compress_statistics": True} | how
    return functional.quantize_4bit(torch.randn(rows, width, generator=generator).to(dtype), **how)


@pytest.mark.parametrize("rows", [203, 201])  # in fives; of the second the last piece is a row
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", [{}, {"compress_statistics": False}, {"quant_type": "fp4"}, {"blocksize": 128},
                                 {"quant_storage": torch.bfloat16}], ids=str)
def test_the_numbers_are_bitsandbytes_own(rows, dtype, how):
    room, (weight, state) = Room(), packed(rows, 128, dtype, **how)
    found = room.unpacked(weight, state)
    assert found.dtype == dtype and torch.equal(found, functional.dequantize_4bit(weight, state))
    assert found.data_ptr() == room._place._numbers.data_ptr()


def test_the_next_weight_takes_the_place_of_the_last():
    room = Room()
    large = room.unpacked(*packed(300, 128))
    weight, state = packed(203, 128)
    found = room.unpacked(weight, state)
    assert found.data_ptr() == large.data_ptr() and torch.equal(found, functional.dequantize_4bit(weight, state))


def test_a_place_that_answers_have_made_serves_training():
    room, (weight, state) = Room(), packed(203, 128)
    with torch.inference_mode():
        room.unpacked(weight, state)
    assert torch.equal(room.unpacked(weight, state), functional.dequantize_4bit(weight, state))


@pytest.mark.parametrize(("rows", "width"), [(40, 128), (203, 96)], ids=["small", "scales across rows"])
def test_other_weights_are_left_to_bitsandbytes(rows, width):
    room, (weight, state) = Room(), packed(rows, width)
    assert torch.equal(room.unpacked(weight, state), functional.dequantize_4bit(weight, state))
    assert not len(room._place._numbers)


def test_layers_that_share_the_place_learn_the_same(monkeypatch):
    """Each product has its own weight, also in the backward pass of layers that came later."""
    from contextlib import ExitStack

    from bitsandbytes.nn import Linear4bit
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = torch.nn.Sequential(*(Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
                                  for sizes in ((128, 256), (256, 192), (192, 128)))).to("cpu")
    model.is_loaded_in_4bit = True
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["0", "1", "2"], init_lora_weights=False))
    x = torch.randn(5, 128)

    def learned() -> list[torch.Tensor]:
        model.zero_grad()
        model(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    with ExitStack() as undo:
        assert replace_adapters(model, undo, narrow=False)[0] == 3
        shared = learned()
        monkeypatch.setattr(unpacking, "LARGE", 1 << 40)
        assert all(map(torch.equal, shared, learned())) and len(shared) == 6
