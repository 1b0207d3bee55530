"""Models as they are loaded to compute."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from gemma_tune.base.errors import UserError
from gemma_tune.export import files
from gemma_tune.merge import check
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import Placement
from gemma_tune.models.towers import auto_class, without_towers
from support.gemmas import make_family
from support.llamas import make_llama, pack_experts


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


@pytest.mark.parametrize(("error", "four_bit", "hint"), [
    ("No module named 'mamba_ssm'", False, "pip install mamba_ssm"),
    ("No module named 'mamba_ssm.ops'", True, "pip install mamba_ssm"),
    ("Reader requires the PyAv library but it was not found. You can install it with:\npip install av\n", False, "pip install av"),
    ("It requires the TorchCodec library, but it was not found", False, "pip install TorchCodec"),
    ("Using `bitsandbytes` 4-bit quantization requires accelerate: `pip install 'accelerate>=1.1'`", True, "pip install accelerate"),
    ("requires bitsandbytes: `pip install -U bitsandbytes>=0.46.1`", False,
     "pip install bitsandbytes (Linux and Windows), or take the 16-bit model"),
    ("no backend", True, "pip install bitsandbytes (Linux and Windows), or take the 16-bit model without --qlora"),
    ("libcudart.so.12: cannot open shared object file", False, "install what it names, or repair it: gemma-tune doctor looks at it")])
def test_the_hint_names_the_package_that_is_missing(tiny, monkeypatch, error, four_bit, hint):
    """bitsandbytes where it is that one, and --qlora where that was asked for."""
    def fail(*_, **__):
        raise ImportError(error)

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(UserError, match="this needs a package") as raised:
        load_model(tiny, Placement("cpu", torch.float32, "test"), four_bit=four_bit)
    assert raised.value.hint == hint


def test_a_tower_is_not_loaded(tmp_path):
    """The text's logits are the whole model's, which others can load afterwards."""
    make_family("gemma3", tmp_path)
    model = load_model(tmp_path, Placement("cpu", torch.float32, "test"))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours, theirs = ({name for name, _ in network.named_parameters()} for network in (model, whole))
    assert ours == {name for name in theirs if "vision_tower" not in name} != theirs
    with torch.inference_mode():
        logits = [network(input_ids=torch.arange(10, 50).reshape(2, 20)).logits for network in (model, whole)]
    torch.testing.assert_close(*logits, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["Qwen2_5_VL", "Qwen3VL"])  # which ask their tower's own class, and AutoModel
def test_families_without_a_class_for_their_text_leave_their_tower_out(kind):
    config = getattr(transformers, f"{kind}Config")()
    for of_text in (config.text_config, config.vision_config):
        of_text.update({"num_hidden_layers": 1, "depth": 1})
    with torch.device("meta"):
        with without_towers(config):
            ours = auto_class(config.model_type).from_config(config)
        whole = auto_class(config.model_type).from_config(config)
    parameters = [{name for name, _ in model.named_parameters()} for model in (ours, whole)]
    assert parameters[0] == {name for name in parameters[1] if ".visual." not in name} != parameters[1]


def test_the_memory_of_packed_experts_is_that_of_unpacked_ones(tmp_path, monkeypatch):
    """Where a model is loaded to be compared, by `merge` and by the export."""
    make_llama("gpt-oss", tmp_path)
    pack_experts(tmp_path)
    asked = []
    monkeypatch.setattr(files, "place", lambda parameters, extra: asked.append(parameters) or (None, "no room"))
    assert files.load_merged(tmp_path, 0) == (None, "no room")
    asked.append(check._parameters(tmp_path))
    numbers = sum(p.numel() for p in load_model(tmp_path, Placement("cpu", torch.float32, "test")).parameters())
    assert all(numbers <= found < 1.05 * numbers for found in asked), (asked, numbers)
