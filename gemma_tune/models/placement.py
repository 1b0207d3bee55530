"""Where a model computes, in which type, and how much memory there is for it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_tune.base.errors import UserError
from gemma_tune.base.machine import control_groups
from gemma_tune.base.words import gigabytes

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Placement:
    """Where and how a model computes, with the reason to print.

    Attributes:
        dtype: of all that is computed.
        stored: the type that large weights have in memory where that is another one, see ``narrow``.
        instead: what is taken where the weights do not fit the memory so.
    """

    device: str
    dtype: torch.dtype
    reason: str
    stored: torch.dtype | None = None
    instead: Placement | None = None

    @property
    def short(self) -> str:
        """The type as ``--dtype`` names it: that of the weights."""
        return {"torch.bfloat16": "bf16", "torch.float32": "fp32", "torch.float16": "fp16"}[str(self.weights)]

    @property
    def weights(self) -> torch.dtype:
        """The type of the weights in memory."""
        return self.stored or self.dtype

    def need(self, parameters: int) -> int:
        """Bytes that so many weights take, and what they are widened in."""
        return parameters * self.weights.itemsize + (4 * min(parameters, PLACE) if self.stored else 0)

    def as_stored(self) -> Placement:
        """The same for work that needs weights as they are: it computes in their type."""
        return replace(self, dtype=self.weights, stored=None, reason=SLOW.format(self.device)) if self.stored else self


def best_device() -> str:
    """``cuda``, ``mps`` or ``cpu``: the fastest there is."""
    import torch

    if torch.cuda.is_available() and not unserved_gpu():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def unserved_gpu() -> str:
    """What this process's GPU is if the installed PyTorch has no code for it, such as a GTX 1080, and what has; else
    empty.

    PyTorch calls such a GPU available, and fails at its first kernel.
    """
    import torch

    if not torch.cuda.is_available() or torch.version.cuda is None:  # AMD's have other names
        return ""
    major, minor = torch.cuda.get_device_capability()
    built = [(kind, int("".join(filter(str.isdigit, number))))
             for kind, _, number in (arch.partition("_") for arch in torch.cuda.get_arch_list())]
    # Code of a generation runs on what came later in it; `compute` is compiled by the driver for whatever came later.
    if not built or any(code <= 10 * major + minor and (kind == "compute" or code // 10 == major)
                        for kind, code in built):
        return ""
    newer = 10 * major + minor > max(code for _, code in built)
    other = "--upgrade torch" if newer else "torch --index-url https://download.pytorch.org/whl/cu126, from 5.0 on"
    return (f"the {torch.cuda.get_device_name()} is not used: PyTorch {torch.__version__} has no code for its compute "
            f"capability, {major}.{minor}; another build does: pip install --force-reinstall {other}")


def wide(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers in fp64: on the CPU instead of Apple's GPU, which does not have it."""
    return (numbers.cpu() if numbers.device.type == "mps" else numbers).double()


# A step of SmolLM2 135M took 36 times as long (AVX2): products of bf16 numbers are then plain loops.
SLOW = "bf16 on {}, as asked, though it has no instructions for it: fp32 is many times as fast"
PLACE = 1 << 26  # numbers that are widened at once, at most, of weights that are stored in another type
_NARROW = "weights in bf16 and products in fp32, as the CPU has no instructions for bf16"


def choose_placement(dtype: str, device: str | None = None) -> Placement:
    """Device and compute type for ``--dtype``: never fp16 by itself, as Gemma 2 and 3 overflow in it.

    Args:
        device: in place of :func:`best_device`.

    Raises:
        UserError: a type that the device does not have.
    """
    found = _placement(dtype, device or best_device())
    unserved = unserved_gpu() if found.device == "cpu" and device is None else ""
    return replace(found, reason=f"{found.reason}; {unserved}") if unserved else found


def _placement(dtype: str, device: str) -> Placement:
    import torch

    # Metal has bf16 since macOS 14.
    lacks_bf16 = device == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0)
    if dtype != "auto":
        wanted = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[dtype]
        if wanted == torch.float16 and device == "cpu":
            raise UserError("fp16 is not for training on a CPU: it is slow there and overflows on Gemma 2 and 3",
                            "use --dtype bf16 or --dtype fp32")
        if wanted == torch.bfloat16 and lacks_bf16:
            raise UserError("Apple's GPU computes in bf16 from macOS 14 on, and this system is older",
                            "leave --dtype out: fp32 is taken then; or update macOS")
        if device == "cpu" and wanted == torch.bfloat16 and bf16_instructions() == "":
            return _narrow(f"{dtype} on {device}, as asked: {_NARROW}")
        return Placement(device, wanted, f"{dtype} on {device}, as asked")
    if device == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return Placement(device, torch.bfloat16 if fast else torch.float32,
                         "bf16, which this GPU computes natively" if fast else "fp32: this GPU has no native bf16")
    if lacks_bf16:
        return Placement(device, torch.float32, "fp32 on Apple's GPU, which has bf16 from macOS 14 on")
    if device == "mps":
        return Placement(device, torch.bfloat16, "bf16 on Apple's GPU: half the memory of fp32")
    return _on_cpu(bf16_instructions())


# Instruction sets that multiply bf16 numbers, by the names that PyTorch has for them.
_BF16_SETS = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16", "avx10_2": "AVX10.2"}
FASTER = 1.5  # from which measured ratio on bf16 is taken where the instructions are not known


def _on_cpu(instructions: str | None) -> Placement:
    """The type by what the processor has, as that is the same each time; it is measured only where that is unknown.

    Args:
        instructions: what :func:`bf16_instructions` found.
    """
    import torch

    if instructions:
        return Placement("cpu", torch.bfloat16, f"bf16 on the CPU, which has instructions for it ({instructions})")
    if instructions == "":
        return Placement("cpu", torch.float32, "fp32 on the CPU, which has no instructions for bf16",
                         instead=_narrow(f"bf16 on the CPU, as fp32 does not fit the memory: {_NARROW}"))
    ratio = bf16_speed()
    measured = f"bf16 products measured {ratio:.1f}x as fast as fp32, and {FASTER:g}x is needed"
    if ratio >= FASTER:
        return Placement("cpu", torch.bfloat16, f"bf16 on the CPU: its products measured {ratio:.1f}x as fast as fp32")
    return Placement("cpu", torch.float32, f"fp32 on the CPU: {measured}")


def _narrow(reason: str) -> Placement:
    import torch

    return Placement("cpu", torch.float32, reason, stored=torch.bfloat16)


def bf16_instructions() -> str | None:
    """Names of the instructions for bf16 that PyTorch's products use on this CPU: empty if there are none, None where
    it cannot say."""
    import torch

    known = torch.cpu.get_capabilities()
    # Elsewhere than on x86 it depends on how PyTorch was built whether its products use what the processor has.
    if known.get("architecture") not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return None
    return ", ".join(name for key, name in _BF16_SETS.items() if known.get(key))


def bf16_speed(rounds: int = 7) -> float:
    """How many times as fast bf16 matrix products are as fp32 ones on this CPU.

    Products of the sizes of a small model's layers, in both types by turns, so that whatever else the machine does hits
    both; the fastest of each counts, as others only make one slower.
    """
    import torch

    rows, width, inner = 512, 640, 2048
    pairs = {dtype: (torch.ones(rows, width, dtype=dtype), torch.ones(width, inner, dtype=dtype))
             for dtype in (torch.float32, torch.bfloat16)}
    best = dict.fromkeys(pairs, float("inf"))
    for number in range(rounds + 1):
        for dtype, (a, b) in pairs.items():
            start = time.perf_counter()
            for _ in range(4):
                a @ b
            if number:  # the first round includes choosing and preparing the kernels
                best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.float32] / best[torch.bfloat16]


# What is left for the system and for what estimates miss.
USABLE = 0.9
LARGEST_FP32 = 1_500_000_000  # parameters up to which models that are compared compute in fp32
# On a CPU, Python with its libraries and threads (resident set before the weights). On a GPU, the libraries' workspaces
# and captured graphs beside the context, which is there when its free memory is asked for: so much that the plan for
# the smallest model that was measured covers what it took, see train.memory. Apple's is a guess.
OVERHEAD = {"cpu": 700_000_000, "cuda": 450_000_000, "mps": 300_000_000}


def available(device: str) -> int:
    """Bytes that this process can have on the device, with those that it already holds.

    On a CPU the least of what the system calls available and what is left of every control group's limit. Apple's GPU
    shares the computer's memory with all programs, and has a limit of its own.
    """
    import psutil
    import torch

    if device == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    if device == "mps":
        return min(torch.mps.recommended_max_memory(),
                   psutil.virtual_memory().available + torch.mps.driver_allocated_memory())
    return min(psutil.virtual_memory().available, *_left_by_groups()) + psutil.Process().memory_info().rss


def place(parameters: int, extra: int = 0) -> tuple[Placement | None, str]:
    """Where and how a model computes that is loaded to be compared; None and the reason if it does not fit the memory.

    In fp32 what is left to differ is the rounding of the weights, so small models compute in it.

    Args:
        parameters: of the model.
        extra: bytes that are needed besides.
    """
    first = "fp32" if parameters < LARGEST_FP32 else "auto"
    for dtype in dict.fromkeys((first, "auto", "bf16")):
        placement = choose_placement(dtype)
        need, room = _need(placement, parameters, extra), available(placement.device)  # weights go straight to a GPU
        if need <= USABLE * room:
            return placement, ""
    return None, f"it takes {gigabytes(need)} of memory, and {gigabytes(room)} are available"


def placed(dtype: str, checkpoint: Path) -> Placement:
    """:func:`choose_placement` for a checkpoint that answers, with what is taken instead where that would not fit."""
    from gemma_tune.base.checkpoint import read_config
    from gemma_tune.base.tensors import open_tensors
    from gemma_tune.lora.layers import TOWERS
    from gemma_tune.models.quantised import parameter_count, quantisation

    found = choose_placement(dtype)
    if found.instead is None or quantisation(read_config(checkpoint)):
        return found
    try:
        tensors = open_tensors(checkpoint)
    except UserError:  # of which loading them tells, with what mends it
        return found
    parameters = parameter_count(t for name, t in tensors.items() if not TOWERS.search(name))
    return found if _need(found, parameters) <= USABLE * available(found.device) else found.instead


def _need(placement: Placement, parameters: int, extra: int = 0) -> int:
    return placement.need(parameters) + extra + OVERHEAD[placement.device]


def _left_by_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What each limit on the memory of this process's control groups leaves, version 1 and 2; infinity, if none."""
    found = [_left_in(folder, version_1) for folder, version_1 in control_groups("memory", root, own).items()]
    return [2**63, *(left for left in found if left is not None)]


def _left_in(folder: Path, version_1: bool) -> int | None:
    limit, usage, pages = (("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ") if version_1
                           else ("memory.max", "memory.current", "inactive_file "))
    try:
        bound = (folder / limit).read_text(encoding="ascii").strip()
        if bound == "max":
            return None
        used = int((folder / usage).read_text(encoding="ascii"))
        stat = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    # The cache of files that nobody reads at the moment is given up before anything is refused.
    reclaimable = sum(int(line.split()[1]) for line in stat if line.startswith(pages))
    return max(0, int(bound) - used + reclaimable)
