"""Each device and number type: a matrix product and training steps are really computed, and compared."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from gemma_tune.base.words import first_line, gigabytes
from gemma_tune.doctor.finding import BROKEN, LOOK, OK, Finding
from gemma_tune.models.placement import available, best_device, choose_placement, unserved_gpu

if TYPE_CHECKING:
    import torch

_SIDE = {"cpu": 512, "cuda": 2048, "mps": 1024}  # of the matrices whose product is timed
_STEPS = 20
# Largest error of a product of numbers around 1, as a share of its standard deviation: half a unit in the last place
# of the result, 2^-9 for bf16 and 2^-12 for fp16 of up to four deviations, and room for sums in another order.
_TOLERANCE = {"fp32": 2e-3, "bf16": 4e-2, "fp16": 1e-2}  # fp32 with TF32's ten bits, which CUDA may use
_REINSTALL = "pip install --force-reinstall torch"
# What PyPI has for Windows computes on the CPU alone.
_FOR_WINDOWS = (f"{_REINSTALL} --index-url https://download.pytorch.org/whl/cu130, or the build that "
                "https://pytorch.org/get-started/locally/ names for the driver")


def devices() -> Iterator[Finding]:
    """Which devices PyTorch has, and which one is taken."""
    import torch

    cuda = torch.cuda.is_available()
    names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if cuda else []
    if not names and shutil.which("nvidia-smi"):
        without = not torch.version.cuda
        yield Finding("device", LOOK, f"an NVIDIA driver is installed, and PyTorch {torch.__version__} does not use it"
                                      f"{': it was built without CUDA' if without else ''}",
                      _FOR_WINDOWS if without and sys.platform == "win32" else _REINSTALL)
    placement = choose_placement("auto")
    chosen = names[0] if placement.device == "cuda" else {"mps": "Apple's GPU", "cpu": "the CPU"}[placement.device]
    others = (f"; {len(names)} GPUs, `--num-processes {len(names)}` trains on all"
              if len(names) > 1 and placement.device == "cuda" else "")
    yield Finding("device", LOOK if unserved_gpu() else OK, f"{chosen}; {placement.reason}{others}")


def arithmetic() -> Iterator[Finding]:
    """A matrix product and training steps per device and type. What the chosen one cannot do is broken."""
    import torch

    chosen = choose_placement("auto")
    places = [f"cuda:{n}" for n in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    places += ["mps"] if best_device() == "mps" else []
    for place in ["cpu", *places]:
        types = {"fp32": torch.float32, "bf16": torch.bfloat16} | ({"fp16": torch.float16} if place != "cpu" else {})
        for name, dtype in types.items():
            needed = place.split(":")[0] == chosen.device and dtype == chosen.dtype
            yield _computed(place, name, dtype, needed)


def _computed(place: str, name: str, dtype: torch.dtype, needed: bool) -> Finding:
    check = f"{place} {name}"
    fault = BROKEN if needed else LOOK
    other = next(kind for kind in ("fp32", "bf16") if kind != name)
    mend = (f"update the driver, or {_REINSTALL}; until then: gemma-tune train --dtype {other}"
            if place != "cpu" else f"{_REINSTALL}; until then: gemma-tune train --dtype {other}")
    try:
        error, speed = product(place, dtype)
        if not error <= _TOLERANCE[name]:
            return Finding(check, fault, f"a matrix product is wrong by {error:.1e} of its size", mend)
        before, after = training_steps(place, dtype)
        if not after < before:
            return Finding(check, fault, _learned(before, after), mend)
    except Exception as e:  # noqa: BLE001 - a driver that is broken raises whatever it likes
        return Finding(check, fault, f"cannot compute: {type(e).__name__}: {first_line(e)}", mend)
    return Finding(check, OK, f"matrix product {speed / 1e9:,.0f} GFLOP/s, right to {error:.0e}; "
                              f"{_learned(before, after)}")


def _learned(before: float, after: float) -> str:
    return f"{_STEPS} training steps took the loss from {before:.2f} to {after:.2f}"


def product(place: str, dtype: torch.dtype) -> tuple[float, float]:
    """Multiply two random matrices on a device.

    Returns:
        The largest error against fp64 on the CPU, as a share of the result's standard deviation, and operations per
        second (two for each multiplication with its addition).
    """
    import torch

    side, generator = _SIDE[place.split(":")[0]], torch.Generator().manual_seed(1)
    a, b = (torch.randn(side, side, generator=generator).to(dtype) for _ in range(2))
    on_a, on_b = a.to(place), b.to(place)
    result = (on_a @ on_b).cpu()
    best = min(_timed(lambda: on_a @ on_b, place) for _ in range(3))
    part = slice(0, 128)  # rows of the reference, which takes the CPU longer
    right = a[part].double() @ b.double()
    return float((result[part].double() - right).abs().max() / right.std()), 2 * side ** 3 / best


def _timed(work: Callable[[], object], place: str) -> float:
    import torch

    began = time.perf_counter()
    work()
    if place.startswith("cuda"):
        torch.cuda.synchronize(place)
    elif place == "mps":
        torch.mps.synchronize()
    return max(time.perf_counter() - began, 1e-9)


def training_steps(place: str, dtype: torch.dtype, layer: torch.nn.Module | None = None) -> tuple[float, float]:
    """Learn an adapter of rank 4 on a frozen layer, with AdamW, as `train` does: products in ``dtype``, weights of the
    adapter in fp32.

    Args:
        layer: the frozen one, from 64 to 64 numbers; by default a plain one.

    Returns:
        The loss before the first step and after the last.

    Raises:
        ValueError: a loss or gradient that is not finite.
    """
    import torch

    generator = torch.Generator().manual_seed(2)
    weight, x, away = (torch.randn(*shape, generator=generator) for shape in ((64, 64), (256, 64), (64, 64)))
    if layer is None:
        layer = torch.nn.Linear(64, 64, bias=False)
        layer.weight = torch.nn.Parameter(weight / 8, requires_grad=False)
        layer = layer.to(place, dtype)
    x = x.to(place, dtype)
    with torch.no_grad():
        target = layer(x).float() + (x.float() @ away.to(place)) / 8
    a = torch.nn.Parameter(torch.randn(64, 4, generator=generator).to(place) / 8)
    b = torch.nn.Parameter(torch.zeros(4, 64, device=place))
    optimizer, losses = torch.optim.AdamW([a, b], lr=0.05, weight_decay=0.0), []
    for _ in range(_STEPS + 1):
        loss = (layer(x).float() + ((x @ a.to(dtype)) @ b.to(dtype)).float() - target).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        if not all(bool(torch.isfinite(t).all()) for t in (loss, a.grad, b.grad)):
            raise ValueError("a loss or gradient is not finite")
        optimizer.step()
        optimizer.zero_grad()
    return losses[0], losses[-1]


def kernels() -> Iterator[Finding]:
    """On an NVIDIA GPU: one of the training's own kernels is compiled and run."""
    import torch

    from gemma_tune.train.products import how_to_get_triton, kernels_fault

    if best_device() != "cuda":
        return
    if fault := kernels_fault(torch.device("cuda")):
        yield Finding("kernels (Triton)", LOOK, f"do not run, so that training is slower: {fault}",
                      how_to_get_triton())
    else:
        yield Finding("kernels (Triton)", OK, "compiled and run")


def four_bit(needed: bool) -> Iterator[Finding]:
    """A layer is packed into 4 bits, multiplied with, and trained beside, as `--qlora` does it.

    Args:
        needed: the model is one that only loads so.
    """
    check, state = "4 bits (--qlora)", BROKEN if needed else LOOK
    device = best_device()
    if device == "mps":
        yield Finding(check, state, "not on Apple's GPU, where bitsandbytes' layers are put on the CPU",
                      "leave --qlora out; a smaller model, or --activation-checkpointing, saves memory")
        return
    import torch

    mend = "pip install --upgrade bitsandbytes; until then leave --qlora out"
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit

        dtype = choose_placement("auto").dtype
        generator = torch.Generator().manual_seed(3)
        weight, x = (torch.randn(*shape, generator=generator) for shape in ((64, 64), (256, 64)))
        layer = Linear4bit(64, 64, bias=False, compute_dtype=dtype, quant_type="nf4")
        layer.weight = Params4bit(weight / 8, requires_grad=False, quant_type="nf4")
        layer = layer.to(device)
        right = x @ (weight / 8).T
        error = float((layer(x.to(device, dtype)).float().cpu() - right).std() / right.std())
        before, after = training_steps(device, dtype, layer)
    except ImportError as e:
        yield Finding(check, state, f"bitsandbytes cannot be imported: {first_line(e)}", "pip install bitsandbytes")
        return
    except Exception as e:  # noqa: BLE001 - its native part raises whatever it likes
        yield Finding(check, state, f"cannot compute: {type(e).__name__}: {first_line(e)}", mend)
        return
    # NF4 loses about 9 % of a normal distribution's deviation (Dettmers et al. 2023).
    if not (error < 0.2 and after < before):
        yield Finding(check, state, f"a layer is off by {error:.0%}; {_learned(before, after)}", mend)
        return
    yield Finding(check, OK, f"on {device}: a layer is off by {error:.0%}, which is NF4's rounding; "
                             f"{_learned(before, after)}")


def memory() -> Iterator[Finding]:
    """What there is on the device that is taken."""
    device = best_device()
    yield Finding("memory", OK, f"{gigabytes(available(device))} available on {device}")
