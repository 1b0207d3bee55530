"""The base's own weights of modules that are trained as a whole: on the disk, and back bit for bit when it answers."""

from __future__ import annotations

import os

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from gemma_tune.base.errors import WorkFailed
from gemma_tune.config.stages import TrainConfig
from gemma_tune.lora.targets import lora_config, targets_of
from gemma_tune.lora.whole import copies_in
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import Placement
from gemma_tune.train.base_weights import BaseWeights
from gemma_tune.train.whole import train_whole
from support.models import make_model

IDS = torch.arange(5, 45).view(2, 20)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def trained(tiny, dtype: torch.dtype = torch.bfloat16, **settings):
    """A model in training whose weights have moved, what the base answered, and the base's weights."""
    base = load_model(tiny, Placement("cpu", dtype, ""))
    answered, config = logits(base), TrainConfig(**settings or {"full": True})
    model = get_peft_model(base, lora_config(config, targets_of(base, config)))
    train_whole(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    return model, answered, BaseWeights(model)


def of_base(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {f"{name}.{last}": p for name, (base, _) in copies_in(model).items() for last, p in base.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("settings", [{"full": True}, {"rank": 4, "modules_to_save": ("embed_tokens", "o_proj", "norm")}], ids=["full", "some"])
def test_it_answers_as_it_did(tiny, dtype, settings):
    model, answered, base = trained(tiny, dtype, **settings)
    before, now = {name: p.detach().clone() for name, p in of_base(model).items()}, logits(model)
    base.rest(tiny)
    assert {name for name, p in of_base(model).items() if p.numel()} == {name for name, p in before.items() if p.ndim == 1}
    assert all(torch.equal(torch.cat([*base.blocks(p)]), before[name]) for name, p in of_base(model).items())
    with model.disable_adapter(), pytest.raises(RuntimeError):
        logits(model)
    for _ in range(2):
        with base.in_memory():
            with model.disable_adapter():
                assert torch.equal(logits(model), answered)
            assert torch.equal(logits(model), now)
        assert not any(p.numel() for p in of_base(model).values() if p.ndim > 1) and torch.equal(logits(model), now)
    base.begin_anew()
    with torch.no_grad():  # of what is beside the modules as well
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.zero_()
    assert torch.equal(logits(model), answered)
    base.stay()
    assert all(torch.equal(p, before[name]) for name, p in of_base(model).items())


def test_what_the_checkpoint_has_otherwise_stays(tiny):
    model, _, base = trained(tiny)
    changed, *_ = (p for name, p in of_base(model).items() if "down_proj" in name)
    with torch.no_grad():
        changed[0, 0] += 1
    base.rest(tiny)
    assert {id(p) for p in of_base(model).values() if p.ndim > 1} == {id(changed)}
    assert torch.equal(torch.cat([*base.blocks(changed)]), changed)


def test_what_another_module_computes_with_stays(tiny):
    model, _, base = trained(tiny, rank=4, modules_to_save=("o_proj",))
    base_of = {name: p for name, p in of_base(model).items()}
    shared = base_of["model.layers.0.self_attn.o_proj.weight"]
    model.get_submodule("base_model.model.model").other = torch.nn.Linear(1, 1)
    model.get_submodule("base_model.model.model").other.weight = shared
    base.rest(tiny)
    assert shared.ndim == 2 and not base_of["model.layers.1.self_attn.o_proj.weight"].numel()


@pytest.mark.parametrize("how", ["gone", "changed"])
def test_a_checkpoint_that_is_no_longer_the_same_is_told_of(tmp_path, how):
    folder = make_model(tmp_path / "model")
    model, _, base = trained(folder)
    base.rest(folder)
    file = folder / "model.safetensors"
    if how == "gone":
        os.remove(file)
    else:
        save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
        os.utime(file, ns=(1, 1))
    with pytest.raises(WorkFailed, match="gone, or was changed") as raised, base.in_memory():
        pass
    assert str(file) in raised.value.message and "last checkpoint" in raised.value.hint
    assert not any(p.numel() for p in of_base(model).values() if p.ndim > 1)


def test_shards_and_names_of_a_model_that_sees(tmp_path):
    from support.models import make_seeing

    folder = make_seeing(tmp_path / "seeing")
    model, answered, base = trained(folder)
    base.rest(folder)
    assert not any(p.numel() for p in of_base(model).values() if p.ndim > 1)
    with base.in_memory(), model.disable_adapter():
        assert torch.equal(logits(model), answered)
