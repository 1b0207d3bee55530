"""Whether our own kernels run on a device: one is tried, and what stands against it is told."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from gemma_tune.doctor import compute
from gemma_tune.doctor.finding import LOOK, OK
from gemma_tune.train import first_batch, products
from gemma_tune.train.elementwise import RMSNorm
from support.triton_cpu import interpreted

HERE = torch.device("cpu")


@pytest.fixture(autouse=True)
def tried_anew():
    probe = products.kernels_fault
    probe.cache_clear()
    yield
    probe.cache_clear()


def with_kernels(monkeypatch, module) -> str:
    import gemma_tune.train

    monkeypatch.setitem(sys.modules, "gemma_tune.train.fused", module)
    monkeypatch.setattr(gemma_tune.train, "fused", module, raising=False)
    return products.kernels_fault(HERE)


def test_kernels_that_run_are_taken(monkeypatch):
    pytest.importorskip("triton")
    assert with_kernels(monkeypatch, interpreted("gemma_tune.train.fused")) == ""


def test_a_compiler_that_is_missing_is_told(monkeypatch):
    def no_compiler(*_):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable\nor set backend.")

    fault = with_kernels(monkeypatch, SimpleNamespace(RMSNorm=SimpleNamespace(apply=no_compiler)))
    assert fault.startswith("RuntimeError: Failed to find C compiler. Please specify via CC environment variable (")
    assert "gcc python3-dev" in fault


def test_kernels_that_compute_something_else_are_not_taken(monkeypatch):
    wrong = SimpleNamespace(RMSNorm=SimpleNamespace(apply=lambda x, weight, eps: RMSNorm.apply(x, weight, eps) + 0.01))
    assert with_kernels(monkeypatch, wrong) == "a norm is off by 1.0e-02"


def test_memory_that_runs_out_says_nothing_of_the_next_time(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        with_kernels(monkeypatch, SimpleNamespace(RMSNorm=SimpleNamespace(apply=full)))
    assert products.kernels_fault.cache_info().currsize == 0


@pytest.mark.parametrize(("platform", "mend"), [("linux", "pip install --upgrade torch"), ("win32", "pip install triton-windows")])
def test_without_triton(monkeypatch, platform, mend):
    monkeypatch.setattr(products, "find_spec", lambda name: None)
    monkeypatch.setattr(products.sys, "platform", platform)
    assert products.kernels_fault(HERE).startswith(f"Triton is not installed ({mend}")
    assert not products.has_kernels(torch.device("cuda"))


@pytest.mark.parametrize(("fault", "state"), [("", OK), ("RuntimeError: no gcc", LOOK)])
def test_doctor_and_training_say_so_on_a_gpu(monkeypatch, fault, state):
    monkeypatch.setattr(products, "kernels_fault", lambda device: fault)
    monkeypatch.setattr(first_batch, "kernels_fault", lambda device: fault)
    assert [*compute.kernels()] == [], "there is nothing to say of a CPU"
    monkeypatch.setattr(compute, "best_device", lambda: "cuda")
    [finding] = compute.kernels()
    assert finding.state == state and fault in finding.found
    told = []
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("cuda")), listener=SimpleNamespace(note=told.append))
    first_batch.FirstBatch._tell_without_kernels(trainer)
    assert len(told) == bool(fault) and all(fault in note for note in told)
