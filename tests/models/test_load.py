"""Models as they are loaded to compute."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile

from gemma_tune.models.load import load_model
from gemma_tune.models.placement import Placement


def elements_copied(work) -> list[int]:
    """Elements of each copy between tensors while ``work`` is done."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        work()
    return [math.prod(event.input_shapes[0]) for event in profiler.events() if event.name == "aten::copy_"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("prompts", [1, 4])
def test_the_first_token_of_an_answer_is_made_without_copies_of_the_head(tiny, dtype, prompts):
    """The head is tied to the embedding and frozen under an adapter; only the last position of a prompt goes through."""
    model = load_model(tiny, Placement("cpu", dtype, "test"))
    head = model.get_output_embeddings().weight
    assert head is model.get_input_embeddings().weight
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    assert not head.requires_grad
    ids = torch.randint(10, 100, (prompts, 30))
    with torch.inference_mode():
        whole = model(input_ids=ids).logits[:, -1:]
        copied = elements_copied(lambda: model(input_ids=ids, logits_to_keep=1))
        last = model(input_ids=ids, logits_to_keep=1).logits
    assert copied and max(copied) < head.numel()
    torch.testing.assert_close(last, whole)
