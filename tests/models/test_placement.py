"""The compute type on a CPU: by what the processor has, the same each time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gemma_tune.base.errors import UserError
from gemma_tune.models import placement


@pytest.fixture
def processor(monkeypatch):
    """Another processor, as PyTorch describes it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    return lambda **has: monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)


@pytest.mark.parametrize(("has", "dtype", "named"), [
    ({"avx512_bf16": True}, torch.bfloat16, "AVX512-BF16"), ({"amx_bf16": True}, torch.bfloat16, "AMX-BF16"),
    ({"avx2": True, "amx_bf16": False}, torch.float32, "no instructions for bf16")])
def test_known_instructions_decide_and_nothing_is_measured(processor, monkeypatch, has, dtype, named):
    monkeypatch.setattr(placement, "bf16_speed", lambda: pytest.fail("measured"))
    processor(architecture="x86_64", **has)
    chosen = placement.choose_placement("auto")
    assert chosen.dtype == dtype and named in chosen.reason


@pytest.mark.parametrize(("has", "dtype", "apart"), [
    ({"avx2": True}, "bf16", True), ({"avx2": True}, "fp32", False), ({"avx512_bf16": True}, "bf16", False)])
def test_bf16_without_instructions_is_the_type_of_the_weights_alone(processor, has, dtype, apart):
    processor(architecture="x86_64", **has)
    chosen = placement.choose_placement(dtype)
    assert chosen.short == dtype and ("products in fp32" in chosen.reason) is apart
    assert chosen.dtype == (torch.float32 if apart else chosen.weights)
    slow = chosen.as_stored()
    assert slow.dtype == chosen.weights and slow.stored is None and ("fp32 is many times as fast" in slow.reason) is apart


@pytest.mark.parametrize(("ratio", "dtype"), [(1.1, torch.float32), (1.4, torch.float32), (3.3, torch.bfloat16)])
def test_where_they_are_not_known_only_a_wide_lead_counts(processor, monkeypatch, ratio, dtype):
    monkeypatch.setattr(placement, "bf16_speed", lambda: ratio)
    processor(architecture="aarch64")
    assert placement.choose_placement("auto").dtype == dtype


def test_the_measurement_is_a_ratio():
    assert 1e-4 < placement.bf16_speed(rounds=1) < 100, "plain loops were a hundredth as fast"


@pytest.mark.parametrize(("device", "fits"), [("cuda", True), ("cpu", False)])
def test_what_goes_straight_to_a_gpu_needs_no_room_beside_it(monkeypatch, device, fits):
    chosen = placement.Placement(device, torch.bfloat16, "test")
    monkeypatch.setattr(placement, "choose_placement", lambda dtype: chosen)
    monkeypatch.setattr(placement, "available", {"cuda": 40e9, "cpu": 4e9}.__getitem__)
    found, lacking = placement.place(8_000_000_000)
    assert (found == chosen) is fits
    assert bool(lacking) is not fits


@pytest.mark.parametrize(("free", "held", "room"), [(30, 0, 12), (5, 0, 5), (5, 4, 9), (11, 4, 12)])
def test_apples_gpu_has_what_other_programs_leave_up_to_its_own_limit(monkeypatch, free, held, room):
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: held)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free))
    assert placement.available("mps") == room


@pytest.mark.parametrize(("new", "dtype", "named"), [(True, torch.bfloat16, "half the memory"),
                                                     (False, torch.float32, "from macOS 14 on")])
def test_apples_gpu_computes_in_bf16_where_its_system_does(monkeypatch, new, dtype, named):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: new)
    chosen = placement.choose_placement("auto")
    assert (chosen.device, chosen.dtype) == ("mps", dtype) and named in chosen.reason
    assert placement.choose_placement("auto", "cpu").device == "cpu"
    assert placement.choose_placement("fp32").dtype == torch.float32
    if new:
        assert placement.choose_placement("bf16").dtype == torch.bfloat16
    else:
        with pytest.raises(UserError, match="older"):
            placement.choose_placement("bf16")


# Compute capabilities, and what PyTorch 2.13 is built for: with CUDA 13.0, with 12.6, and for what was compiled by hand.
NEW, OLD, BY_HAND = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120", "sm_50 sm_60 sm_70 sm_75 sm_80 sm_86 sm_90", "sm_80 compute_80"


@pytest.mark.parametrize(("capability", "built", "served"), [
    ((6, 1), NEW, False), ((7, 0), NEW, False), ((6, 1), OLD, True), ((7, 5), NEW, True), ((8, 9), NEW, True), ((9, 0), NEW, True),
    ((12, 0), NEW, True), ((12, 0), OLD, False), ((12, 0), BY_HAND, True), ((7, 5), BY_HAND, False), ((10, 3), "sm_100a", True)], ids=str)
def test_a_gpu_for_which_pytorch_has_no_code_is_not_taken(monkeypatch, capability, built, served):
    """PyTorch calls it available."""
    for name, value in {"is_available": True, "get_device_capability": capability, "get_device_name": "GTX 1080",
                        "get_arch_list": built.split(), "device_count": 1, "is_bf16_supported": False}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **how: value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    from gemma_tune.doctor import compute

    for dtype in ("auto", "fp32"):
        chosen = placement.choose_placement(dtype)
        assert chosen.device == ("cuda" if served else "cpu")
        assert ("the GTX 1080 is not used" in chosen.reason) == (not served)
        assert served or ("whl/cu126" in chosen.reason) == (capability < (12, 0))
    [finding] = compute.devices()
    assert finding.state == ("ok" if served else "look") and finding.found.startswith("GTX 1080" if served else "the CPU")
