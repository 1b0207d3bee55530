"""Triton kernels before the first step: compiled for GPUs that are not here, by the compiler that compiles for them there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from gemma_tune.config.stages import TrainConfig
from gemma_tune.train import ahead, products
from gemma_tune.train.ahead import KernelsAhead, step
from gemma_tune.train.shape import shape_of
from gemma_tune.train.startup import Startup

pytest.importorskip("triton")

from support.triton_target import compiled, compiling_for  # noqa: E402 - it needs Triton

LAYERS = {"num_hidden_layers": 2, "vocab_size": 4096}
# Widths of Gemma 3 270M, Gemma 2 2B and SmolLM2 135M.
FAMILIES = {
    "gemma3": {"model_type": "gemma3_text", "hidden_size": 640, "intermediate_size": 2048, "head_dim": 256, "num_attention_heads": 4,
               "num_key_value_heads": 1, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma2": {"model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "head_dim": 256, "num_attention_heads": 8,
               "num_key_value_heads": 4, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
               "layer_types": ["sliding_attention", "full_attention"]},
    "llama": {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
}
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def as_if_there(monkeypatch):
    """A GPU on which kernels run."""
    monkeypatch.setattr(products, "kernels_fault", lambda device: "")


def model_of(family: str, folder: Path, dtype: torch.dtype = torch.bfloat16):
    (folder / "config.json").write_text(json.dumps(FAMILIES[family] | LAYERS))
    return shape_of(folder, TrainConfig(), dtype).model


def count(found: dict[str, list]) -> dict[str, int]:
    return {name: len(kernels) for name, kernels in found.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_any_size_finds_all_its_kernels_compiled(monkeypatch, tmp_path, family):
    from gemma_tune.train import fused

    model, startup = model_of(family, tmp_path), Startup()
    with compiling_for(90, tmp_path / "cache"):
        KernelsAhead(model, "cuda").wait(startup)
        before = count(compiled(fused))
        for rows, length in ((1, 7), (1, 64), (8, 104), (3, 33), (16, 512)):
            monkeypatch.setattr(ahead, "_ROWS", rows)
            monkeypatch.setattr(ahead, "_LENGTH", length)
            step(model, CUDA)
        assert count(compiled(fused)) == before
    assert set(before) == {"_norm_forward", "_norm_backward", "_rotate", "_gate_forward", "_gate_backward", "_cross_entropy"}
    assert sum(before.values()) < 12 and list(startup.seconds) == ["kernels"]


@pytest.mark.parametrize(("capability", "dtype"), [(75, torch.float16), (80, torch.bfloat16), (100, torch.bfloat16),
                                                   (120, torch.float32)])
def test_kernels_compile_for_every_generation_of_gpus(tmp_path, capability, dtype):
    from gemma_tune.train import fused

    model = model_of("gemma3", tmp_path, dtype)
    with compiling_for(capability, tmp_path / "cache"):
        step(model, CUDA)
        found = [kernel for kernels in compiled(fused).values() for kernel in kernels]
        assert len(found) > 6 and all(len(kernel.asm["cubin"]) > 1000 for kernel in found)
        assert all(f".target sm_{capability}" in kernel.asm["ptx"] for kernel in found)


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_read_and_written_16_bytes_at_a_time(tmp_path, family):
    from gemma_tune.train import fused

    model = model_of(family, tmp_path)
    with compiling_for(90, tmp_path / "cache"):
        step(model, CUDA)
        for name, kernels in compiled(fused).items():
            for kernel in kernels:
                moved = re.findall(r"\b(ld|st)\.global\.(\S+)", kernel.asm["ptx"])
                assert {("ld", "v4.b32"), ("st", "v4.b32")} <= set(moved) or name == "_cross_entropy", name
                # One number at a time: only what there is one of for each row, and the logit of a target.
                single = [kind for _, kind in moved if kind == "b16"]
                assert len(single) <= (name == "_cross_entropy"), (name, moved)


def test_without_kernels_nothing_is_done_and_nothing_said(tmp_path):
    startup = Startup()
    KernelsAhead(None, "cpu").wait(startup)
    assert not startup.seconds


def test_what_cannot_be_compiled_ahead_is_left_to_the_step(monkeypatch, tmp_path):
    from gemma_tune.train import fused

    def broken(*_, **__):
        raise RuntimeError("no compiler")

    model, startup = model_of("llama", tmp_path), Startup()
    with compiling_for(90, tmp_path / "cache"):
        monkeypatch.setattr(fused._norm_forward, "_do_compile", broken)
        KernelsAhead(model, "cuda").wait(startup)
        KernelsAhead(None, "cuda").wait(startup)  # no model of which a step could be made


def test_what_failed_in_a_thread_is_compiled_again_when_it_is_launched(monkeypatch, tmp_path):
    from gemma_tune.train import fused

    model = model_of("llama", tmp_path)
    with compiling_for(90, tmp_path / "cache"):
        with monkeypatch.context() as broken:
            broken.setattr(fused._norm_forward, "compile", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
            KernelsAhead(model, "cuda").wait(Startup())
        step(model, CUDA)
        assert all(hasattr(kernel, "asm") for kernels in compiled(fused).values() for kernel in kernels)
