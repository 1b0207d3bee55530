"""A double of Apple's GPU for a process of its own: `python -m support.apple_gpu LIBRARY` runs commands on it.

PyTorch's file of operators says which of them have a kernel for it; the double has those, computed by the CPU, and
refuses whatever would be refused on a Mac: other operators, float64, tensors of two devices. What kernels of Apple's
compute wrongly, or in which types they do not compute, it does not know.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

# What `apple_gpu.cpp` has by itself. Of the last two the CPU has no derivative; there they are made of other operators.
_OWN = {"empty.memory_format", "empty_strided", "resize_", "set_.source_Storage", "set_.source_Storage_storage_offset",
        "_scaled_dot_product_attention_math_for_mps", "linear", "linear.out"}
_BESIDES = ("copy_",)  # which the file does not name: PyTorch's one for all devices calls Apple's


def build(folder: Path) -> Path:
    """Compile the double, which takes a quarter of a minute."""
    from torch.utils.cpp_extension import include_paths, library_paths

    library = folder / "apple_gpu.so"
    subprocess.run([shutil.which("g++"), "-O0", "-std=c++20", "-shared", "-fPIC",
                    f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
                    *(f"-I{path}" for path in include_paths()), str(Path(__file__).with_suffix(".cpp")), "-o", str(library),
                    *(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch_cpu"], check=True)
    return library


def operators() -> set[str]:
    """Names of those that have a kernel of their own for Apple's GPU."""
    import torchgen
    from torchgen.gen import parse_native_yaml
    from torchgen.model import DispatchKey

    folder = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native"
    parsed = parse_native_yaml(str(folder / "native_functions.yaml"), str(folder / "tags.yaml"))
    index, by_name = parsed.backend_indices[DispatchKey.MPS], {f.func.name: f for f in parsed.native_functions}
    return {str(f.func.name) for f in parsed.native_functions
            if index.has_kernel(by_name[f.structured_delegate] if f.structured_delegate else f)}


def install(library: Path) -> None:
    """Make this process one on a Mac, as far as PyTorch knows."""
    double = ctypes.CDLL(str(library))
    torch._C._has_mps = True
    for name in {*operators(), *_BESIDES} - _OWN:
        double.has_kernel(name.encode())


def leave() -> None:
    """End the process, whose thread for the device's derivatives does not end by itself."""
    sys.stdout.flush()
    os._exit(0)


def results(library: Path, commands: Sequence[Sequence[object]]) -> list[dict[str, Any]]:
    """What commands do on it, one after the other: their ``code``, ``out`` and ``err``."""
    said = in_a_process("-m", "support.apple_gpu", library, given=json.dumps([[str(a) for a in c] for c in commands]))
    return json.loads(said.splitlines()[-1])


def in_a_process(*arguments: object, given: str = "") -> str:
    """What Python prints with such arguments, in a process that finds these tests."""
    tests = Path(__file__).parents[1]
    return subprocess.run([sys.executable, *map(str, arguments)], check=True, text=True, stdout=subprocess.PIPE, input=given,
                          env={**os.environ, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}).stdout


if __name__ == "__main__":
    from support.command import invoke

    install(Path(sys.argv[1]))
    print(json.dumps([asdict(invoke(*command)) for command in json.load(sys.stdin)]))
    leave()
