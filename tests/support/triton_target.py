"""Triton's compiler for a GPU that is not there: kernels of it are compiled in full, and cannot be run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class _Named:
    """All that compiling asks a driver for."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextlib.contextmanager
def compiling_for(capability: int, cache: Path) -> Iterator[None]:
    """Compile for CUDA's compute capability, as 90, into a directory of its own; what was compiled is forgotten after."""
    from gemma_tune.train import fused

    before = driver._active
    _forget(fused)
    driver.set_active(_Named(capability))
    try:
        with mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": str(cache)}):
            yield
    finally:
        driver._active = before
        _forget(fused)


def kernels_of(module) -> dict[str, JITFunction]:
    return {name: found for name, found in vars(module).items() if isinstance(found, JITFunction)}


def compiled(module) -> dict[str, list]:
    """What was compiled of a module's kernels, by their names."""
    return {name: [kernel for cache in function.device_caches.values() for kernel in cache[0].values()]
            for name, function in kernels_of(module).items() if function.device_caches}


def _forget(module) -> None:
    for function in kernels_of(module).values():
        function.device_caches.clear()
