"""Modules that are trained as a whole, against plain autograd: gradients, rounding, what a captured step may do."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as T
from peft import get_peft_model
from train.test_captured import bucket_of, compare, nothing_of_the_cpu, on_gpu, the_same_and_none_waits, weights
from train.test_summed_loss import SMALL, conversations

from gemma_tune.config.stages import TrainConfig
from gemma_tune.lora.targets import lora_config, targets_of
from gemma_tune.lora.whole import copies_in, put_back
from gemma_tune.train.batches import collate
from gemma_tune.train.captured import LearnedTokens, filled
from gemma_tune.train.kernels import fast_layers
from gemma_tune.train.summed_loss import install_summed_loss
from gemma_tune.train.trainer import GemmaTrainer
from gemma_tune.train.whole import train_whole
from support.another_device import THERE

WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "gemma3": (T.Gemma3ForCausalLM, T.Gemma3TextConfig, WINDOW),
    "gemma2": (T.Gemma2ForCausalLM, T.Gemma2Config, {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0,
                                                    "attn_implementation": "eager", **WINDOW}),
    "gemma4": (T.Gemma4ForCausalLM, T.Gemma4TextConfig, {**WINDOW, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 99,
                                                        "num_kv_shared_layers": 0, "global_head_dim": 32}),
    "llama": (T.LlamaForCausalLM, T.LlamaConfig, {"tie_word_embeddings": False, "attention_bias": True}),
    "qwen3": (T.Qwen3ForCausalLM, T.Qwen3Config, {"tie_word_embeddings": True}),
    "olmo2": (T.Olmo2ForCausalLM, T.Olmo2Config, {})}


def base_of(family: str, dtype: torch.dtype) -> torch.nn.Module:
    kind, settings, changes = FAMILIES[family]
    torch.manual_seed(0)
    model = kind(settings(**SMALL | {"vocab_size": 99} | changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.to(dtype)


def whole(base: torch.nn.Module, **settings):
    """The model as training has it, and its rounded copies."""
    config = TrainConfig(**settings)
    model = get_peft_model(base, lora_config(config, targets_of(base, config))).train()
    copies = train_whole(model)
    install_summed_loss(model.get_base_model())
    return model, copies


def plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_whole_model(family, dtype):
    base, batch = base_of(family, dtype), collate(conversations())
    exact = copy.deepcopy(base).double().train()
    model, _ = whole(base, full=True)
    with fast_layers(model) as counts:
        loss = GemmaTrainer._summed_loss(model, batch)
        (loss / 7).backward()
    assert counts["norms"] > 0
    logits = exact(batch["input_ids"]).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    (expected / 7).backward()
    wide = dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5 if wide else 1e-2)
    wanted = dict(exact.named_parameters())
    found = {plain_name(name): p for name, p in weights(model).items()}
    assert found.keys() == wanted.keys(), "all that there is, and a head that is the embedding once"
    for name, p in found.items():
        assert p.dtype == p.grad.dtype == torch.float32
        apart = (p.grad - wanted[name].grad).norm() / wanted[name].grad.norm()
        assert apart < (1e-4 if wide else 0.12), (name, apart)


def test_an_entry_for_padding_learns_as_little_as_it_does_by_itself():
    """Also where it stands in a row, as the end of turns does where a model is padded with that."""
    base, batch = base_of("llama", torch.float32), collate(conversations())
    padding = int(batch["input_ids"][0, 2])
    base.get_input_embeddings().padding_idx = padding
    exact = copy.deepcopy(base)
    model, _ = whole(base, full=True)
    GemmaTrainer._summed_loss(model, batch).backward()
    logits = exact(batch["input_ids"]).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum").backward()
    [found] = [p.grad for name, p in weights(model).items() if "embed_tokens" in name]
    wanted = exact.get_input_embeddings().weight.grad
    assert not wanted[padding].any() and torch.allclose(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_the_model_computes_with_weights_as_they_will_be_saved(family):
    """Of fp32 weights that were moved by less than bf16 holds, the logits are those of the rounded ones, bit for bit."""
    base = base_of(family, torch.bfloat16)
    alone = copy.deepcopy(base).eval()
    model, _ = whole(base, full=True)
    with torch.no_grad():
        for p in weights(model).values():
            p.mul_(1 + 0.01 * torch.rand_like(p))
        for name, p in alone.named_parameters():
            p.copy_(dict((plain_name(n), w) for n, w in weights(model).items())[name])
        ids = torch.arange(5, 45).view(2, 20)
        assert torch.equal(model.eval()(input_ids=ids).logits, alone(input_ids=ids).logits)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, base_of(family, torch.bfloat16).eval()(input_ids=ids).logits)


def test_modules_beside_lora_leave_it_as_it_is():
    base, batch = base_of("gemma3", torch.float32), collate(conversations())
    model, _ = whole(base, rank=4, modules_to_save=("embed_tokens", "norm"))
    with fast_layers(model) as counts:
        assert counts["adapters"] == 14
        GemmaTrainer._summed_loss(model, batch).backward()
    trained = {plain_name(name) for name in weights(model)}
    assert {"model.embed_tokens.weight", "model.norm.weight"} < trained and len(trained) == 2 + 28
    assert all(p.grad is not None for p in weights(model).values())


def test_after_a_step_the_rounded_copies_are_new():
    model, copies = whole(base_of("gemma3", torch.bfloat16), full=True)
    optimizer = torch.optim.AdamW(weights(model).values(), lr=0.1, fused=True)
    batch = collate(conversations())
    with fast_layers(model):
        first = GemmaTrainer._summed_loss(model, batch)
        first.backward()
        optimizer.step()
        copies.refresh()
        assert GemmaTrainer._summed_loss(model, batch).item() != first.item()
    for _, module in copies_in(model).values():
        for name, p in module.named_parameters(recurse=False):
            assert torch.equal(module.whole.narrow(name), p.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_they_begin_as_the_base_whatever_was_made_of_the_copies(dtype):
    """TRL makes what is trained beside a base in 4 bits bf16."""
    base = base_of("gemma3", dtype)
    config = TrainConfig(full=True)
    model = get_peft_model(base, lora_config(config, targets_of(base, config)))
    for p in weights(model).values():
        p.data = p.data.bfloat16()
    train_whole(model)
    for theirs, module in copies_in(model).values():
        for name, p in module.named_parameters(recurse=False):
            assert p.dtype == torch.float32 and torch.equal(p, theirs.get_parameter(name).float())
            assert p.data_ptr() != theirs.get_parameter(name).data_ptr()


def test_the_base_comes_back():
    base, ids = base_of("gemma3", torch.float32), torch.arange(5, 25)[None]
    before = base.eval()(input_ids=ids).logits
    model, _ = whole(base, full=True)
    with torch.no_grad():
        for p in weights(model).values():
            p.add_(1.0)
    put_back(model)
    plain = model.unload()
    vars(plain).pop("forward")
    assert torch.equal(plain.eval()(input_ids=ids).logits, before) and not any("modules_to_save" in n for n, _ in plain.named_modules())


@pytest.mark.parametrize("settings", [{"full": True}, {"rank": 4, "modules_to_save": ("embed_tokens", "norm")}], ids=["full", "some"])
def test_a_step_needs_no_number_and_nothing_of_the_cpu(settings):
    model, _ = whole(base_of("gemma3", torch.bfloat16), **settings)
    part = collate(conversations())
    bucket = bucket_of([part], room=3)
    size = filled(part, bucket).shape
    model = model.to(THERE)
    train_whole(model)
    assert len(nothing_of_the_cpu(LearnedTokens(model), model, bucket, size)) > 300


def test_two_batches_of_a_bucket_are_the_same_operations_and_none_waits():
    model, _ = whole(base_of("gemma3", torch.float32), full=True)
    parts = [collate(conversations()), collate(conversations()[1:])]
    _, gradients = the_same_and_none_waits(LearnedTokens(model), model, parts, bucket_of(parts, room=2))
    for weight, place in zip(gradients.weights, gradients.parts(gradients.as_one)):
        assert weight.grad.data_ptr() == place.data_ptr(), "where a captured step adds to"


@on_gpu
@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_captured_gradients_of_all_weights_are_those_of_the_eager_step(family):
    """Also those of a head and an embedding, which are added by the backward pass itself."""
    model, _ = whole(base_of(family, torch.bfloat16).to("cuda"), full=True)
    compare(model, 5e-2)
