"""Triton's interpreter beside its compiler in one process: a module's kernels on CPU tensors."""

from __future__ import annotations

import functools
import importlib.util
import sys
from importlib.metadata import version
from types import ModuleType
from unittest import mock

import pytest


@functools.cache
def interpreted(name: str) -> ModuleType:
    """A second copy of the module ``name`` whose kernels run on a CPU.

    Triton decides when it is imported, so it is imported once more as well; both copies of it are hidden afterwards, so
    that others find what they found before.

    Skips the test where that is Triton before 3.7, which no NumPy from 2.4 on lets count in a loop.
    """
    if tuple(map(int, version("triton").split(".")[:2])) < (3, 7):
        pytest.skip("Triton's interpreter needs Triton 3.7")
    found = importlib.util.find_spec(name)
    spec = importlib.util.spec_from_file_location(f"{name}_interpreted", found.origin)
    module = importlib.util.module_from_spec(spec)
    before = _of_triton()
    with mock.patch.dict("os.environ", {"TRITON_INTERPRET": "1"}):
        _forget(before)
        try:
            spec.loader.exec_module(module)
        finally:
            _forget(_of_triton())
            sys.modules.update(before)
    return module


def _of_triton() -> dict[str, ModuleType]:
    # The compiled part can be loaded only once.
    return {name: module for name, module in sys.modules.items()
            if name.split(".")[0] == "triton" and not name.startswith("triton._C")}


def _forget(modules: dict[str, ModuleType]) -> None:
    for name in modules:
        del sys.modules[name]
