"""The count of a training's matrix products that the benchmark divides by, against PyTorch's own count of a real step."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from support.models import make_model

sys.path.insert(0, str(Path(__file__).parent))

from matrix_limit import limit, pairs, shapes_of, training_flops  # noqa: E402

RANK = 4


MIXED = {"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 160,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


@pytest.mark.parametrize("changes, windows, rank", [({}, (64, 64), RANK), (MIXED, (64, None, 64), RANK), (MIXED, (64, None, 64), None)])
def test_the_count_is_that_of_a_real_step(tmp_path, changes, windows, rank):
    """Frozen layers, adapters and head exactly; attention exactly but for its causal half, which eager computes whole."""
    length, trained = 90, 37
    folder = make_model(tmp_path / "model", **changes)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    shapes = shapes_of(base, rank)
    assert shapes.windows == windows
    expected = training_flops(shapes, [length], trained)
    model = get_peft_model(base, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")) if rank else base
    ids = torch.arange(length)[None] + 5
    with FlopCounterMode(display=False) as counter:
        hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state[0, :trained]
        torch.nn.functional.cross_entropy(hidden @ base.lm_head.weight.t(), ids[0, :trained]).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    counted = counter.get_flop_counts()["Global"]
    assert counted[torch.ops.aten.mm] == expected["linear"] + expected["head"]
    square = 12 * shapes.attention_width * length ** 2 * len(shapes.windows)
    rotations = counted[torch.ops.aten.bmm] - square  # angle = frequency x position, by a product without gradient
    assert 0 <= rotations <= 2 * length * shapes.attention_width * len(shapes.windows)
    seen = sum(pairs(length, window) for window in shapes.windows)
    assert expected["attention"] * length ** 2 * len(shapes.windows) == square * seen


@pytest.mark.parametrize("length", [1, 3, 4, 5, 11])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_pairs_are_those_of_the_mask(length, window):
    distance = torch.arange(length)[:, None] - torch.arange(length)
    assert pairs(length, window) == ((distance >= 0) & (distance < (window or length))).sum()


def test_each_product_counts_at_its_own_speed(tiny):
    shapes = shapes_of(AutoModelForCausalLM.from_pretrained(tiny), RANK)
    rates = {key[:2]: 1e9 for key in shapes.linear} | {shapes.head: 1e9}
    even = limit(shapes, rates, [50, 20], 30)
    assert even["seconds"] == pytest.approx(even["flops"] / 1e9)
    slower_head = limit(shapes, rates | {shapes.head: 0.5e9}, [50, 20], 30)
    assert slower_head["seconds"] - even["seconds"] == pytest.approx(even["flops_by_part"]["head"] / 1e9)
