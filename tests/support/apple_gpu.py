"""A double of Apple's GPU for a process of its own: `python -m support.apple_gpu LIBRARY` runs commands on it.

PyTorch's file of operators says which of them have a kernel for it; the double has those, computed by the CPU, and
refuses whatever would be refused on a Mac: other operators, float64, tensors of two devices. What kernels of Apple's
compute wrongly, or in which types they do not compute, it does not know.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

# What `apple_gpu.cpp` has by itself. Of the last two the CPU has no derivative; there they are made of other operators.
_OWN = {"empty.memory_format", "empty_strided", "resize_", "set_.source_Storage", "set_.source_Storage_storage_offset",
        "_scaled_dot_product_attention_math_for_mps", "linear", "linear.out"}
_ANSWER = "answer: "
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


class Mac:
    """A process with such a GPU, which does one thing after the other, each time in the working directory and with the
    environment of whoever asks."""

    def __init__(self, library: Path):
        tests = Path(__file__).parents[1]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.apple_gpu", library], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"})

    def results(self, commands: Sequence[Sequence[object]]) -> list[dict[str, Any]]:
        """What commands do on it, one after the other: their ``code``, ``out`` and ``err``."""
        return self._answer(commands=[[str(a) for a in command] for command in commands])

    def prints(self, code: str) -> list[str]:
        """The lines that Python prints there."""
        return self._answer(code=code).splitlines()

    def _answer(self, **asked: Any) -> Any:
        self._process.stdin.write(json.dumps(asked | {"folder": os.getcwd(), "environment": dict(os.environ)}) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(_ANSWER):
                answer, failed = json.loads(line.removeprefix(_ANSWER))
                assert not failed, failed
                return answer
        raise AssertionError(f"it ended: {self._process.wait()}")

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


def _done(asked: dict[str, Any]) -> tuple[Any, str]:
    """The answer, and what failed."""
    from support.command import invoke

    try:
        if "code" not in asked:
            return [asdict(invoke(*command)) for command in asked["commands"]], ""
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(asked["code"], {})
        return said.getvalue(), ""
    except Exception:  # the process has other tests to serve
        return None, traceback.format_exc()


if __name__ == "__main__":
    install(Path(sys.argv[1]))
    for line in sys.stdin:
        asked = json.loads(line)
        os.chdir(asked["folder"])
        os.environ.update({name: value for name, value in asked["environment"].items() if name != "PYTHONPATH"})
        print(f"\n{_ANSWER}{json.dumps(_done(asked))}", flush=True)
    os._exit(0)  # the thread for the device's derivatives does not end by itself
