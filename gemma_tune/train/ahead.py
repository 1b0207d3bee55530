"""The Triton kernels of a training's steps, compiled in threads while its weights are loaded.

A kernel is compiled when it is launched for the first time: a Gemma's nine, one after the other, in tenths of a second
each or more on a slow processor. So a model on the meta device, which has shapes and no numbers, does a step first:
what is launched there is compiled and nothing else. The step finds them done, and so do captures of other shapes, as no
kernel depends on how many rows it gets (:mod:`gemma_tune.train.fused`).
"""

from __future__ import annotations

import contextlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from gemma_tune.models.load import after_product
from gemma_tune.train.kernels import fast_layers
from gemma_tune.train.loss import by_kernel
from gemma_tune.train.products import has_kernels
from gemma_tune.train.shape import last_hidden
from gemma_tune.train.startup import Startup

_LOG = logging.getLogger(__name__)
_ROWS, _LENGTH = 2, 64  # of the step; any would do
_MOST_THREADS = 8


class KernelsAhead:
    """Kernels that are being compiled.

    Args:
        model: with its adapter, on the meta device, see :class:`gemma_tune.train.shape.ModelShape`.
        device: where it will be trained. Without kernels for it there is nothing to do.
    """

    def __init__(self, model: Any, device: str):
        self._compiling = contextlib.ExitStack()
        self._begun = False
        if not has_kernels(torch.device(device)):
            return
        try:
            self._begin(model, torch.device(device))
        except Exception as e:  # noqa: BLE001 - whatever it is: each is compiled when it is launched, and says so then
            _LOG.debug("kernels are not compiled ahead: %s: %s", type(e).__name__, e)

    def _begin(self, model: Any, device: torch.device) -> None:
        from triton import AsyncCompileMode

        threads = ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1))
        mode = AsyncCompileMode(threads, ignore_errors=True)
        self._compiling.callback(threads.shutdown)
        self._compiling.callback(_forget_failed, mode)
        self._compiling.enter_context(mode)
        self._begun = True
        step(model, device)

    def close(self) -> None:
        """Wait until all are compiled."""
        self._compiling.close()

    def wait(self, startup: Startup) -> None:
        """The same, as a part of a training's start."""
        self.close()
        if self._begun:
            startup.done("kernels")


def _forget_failed(mode: Any) -> None:
    """Have kernels compiled again that could not be: what failed would be remembered, and fail again when launched."""
    if any(future.exception() for future in mode.raw_futures):
        from gemma_tune.train import fused

        for kernel in vars(fused).values():
            getattr(kernel, "device_caches", {}).clear()


def step(model: Any, device: torch.device) -> None:
    """What a step and an evaluation launch, on the meta device, with the layers of ``device``."""
    from gemma_tune.train.fused import compiling, cross_entropy_

    base = model.get_base_model()
    weight, way = base.get_output_embeddings().weight, by_kernel(cross_entropy_)
    after = after_product(base)
    targets = torch.zeros(_LENGTH, dtype=torch.long, device="meta")
    with compiling(), fast_layers(model, device):
        hidden = last_hidden(model, _ROWS, _LENGTH)
        hidden.backward(torch.empty_like(hidden))
    with compiling(), torch.no_grad():
        rows = hidden[0].to(weight.dtype)
        for with_grad in (True, False):
            way(rows, weight, targets, after["softcap"], after["scale"], with_grad)
