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


def test_a_device_alone_gets_no_hooks_and_the_same_weights(tiny, monkeypatch):
    """What is asked of transformers for a GPU, here of the CPU, as the library does the same for each device."""
    from transformers import AutoModelForCausalLM

    asked, original = [], AutoModelForCausalLM.from_pretrained

    def from_pretrained(*args, **settings):
        asked.append(settings["device_map"])
        return original(*args, **settings | {"device_map": {"": "cpu"}})

    expected = load_model(tiny, Placement("cpu", torch.float32, "test"))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(type(expected), "to", lambda model, device: model)
    model = load_model(tiny, Placement("cuda", torch.float32, "test"))
    assert asked == ["cuda"]
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    assert not hasattr(model, "hf_device_map")
    for (name, ours), (_, theirs) in zip(model.state_dict().items(), expected.state_dict().items(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=name)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_weights_and_buffers_are_on_the_gpu(tiny):
    model = load_model(tiny, Placement("cuda", torch.bfloat16, "test"))
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cuda"}
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
