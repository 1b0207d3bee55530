"""The base's own weights of modules that are trained as a whole, which no step reads: on the disk, where they came
from, and in memory only while the base itself computes.

That is before the first step and after the last, when there are no moments, which take more room than they do.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from gemma_tune.base.errors import WorkFailed
from gemma_tune.base.tensors import READABLE, StoredTensor, open_tensors
from gemma_tune.lora.names import found_among, running_name
from gemma_tune.lora.whole import copies_in, each_once

BLOCK = 8192  # rows of a weight that are read, or compared, at once
_OF_BASE = ".original_module."  # in the name that PEFT gives a weight of the base's module beside the copy


class BaseWeights:
    """Those of a PEFT model, all in memory until :meth:`rest`. While they rest, computing with them is an error."""

    def __init__(self, model: Any):
        self._model = model
        self._resting: dict[torch.nn.Parameter, StoredTensor] = {}
        self._looked: dict[Path, tuple[int, int]] = {}  # sizes and times of the files

    @torch.no_grad()
    def rest(self, checkpoint: Path) -> None:
        """Leave the memory from now on, as far as the checkpoint has the same bit for bit: vectors, of which there are
        few numbers, stay, and what another module computes with as well.

        Args:
            checkpoint: directory that the base was loaded from.

        Raises:
            UserError: its files cannot be read.
        """
        stored = {running_name(name): tensor for name, tensor in open_tensors(checkpoint).items()}
        elsewhere = {id(p) for name, p in self._model.named_parameters(remove_duplicate=False) if _OF_BASE not in name}
        for module, (base, _) in each_once(copies_in(self._model)).items():
            for name, weight in base.named_parameters(recurse=False):
                there = stored.get(found_among(stored, f"{module}.{name}") or "")
                if weight.ndim == 1:
                    weight.data = weight.data.clone()  # what it was loaded from may be a file that is mapped
                elif there is not None and id(weight) not in elsewhere and self._same(weight, there):
                    self._resting[weight] = there
        self._looked = {path: _seen(path) for path in {there.path for there in self._resting.values()}}
        self._leave()

    def _same(self, weight: torch.Tensor, there: StoredTensor) -> bool:
        return (there.dtype in READABLE and there.shape == tuple(weight.shape)
                and all(map(torch.equal, weight.split(BLOCK), _read(there, weight))))

    def _leave(self) -> None:
        for weight in self._resting:
            weight.data = weight.data.new_empty(0)

    @contextlib.contextmanager
    def in_memory(self) -> Iterator[None]:
        """Be there while the context lasts.

        Raises:
            WorkFailed: a file is gone, or is not what it was.
        """
        try:
            self._come_back()
            yield
        finally:
            self._leave()

    @torch.no_grad()
    def _come_back(self) -> None:
        for weight, there in self._resting.items():
            whole = weight.data.new_empty(there.shape)
            for place, block in zip(whole.split(BLOCK), self.blocks(weight)):
                place.copy_(block)
            weight.data = whole

    @torch.no_grad()
    def begin_anew(self) -> None:
        """Give the modules that are trained the base's weights again.

        Raises:
            WorkFailed: as of :meth:`in_memory`.
        """
        for base, module in each_once(copies_in(self._model)).values():
            for name, weight in module.named_parameters(recurse=False):
                for place, block in zip(weight.split(BLOCK), self.blocks(base.get_parameter(name))):
                    place.copy_(block)

    def stay(self) -> None:
        """Be there from now on.

        Raises:
            WorkFailed: as of :meth:`in_memory`.
        """
        self._come_back()
        self._resting.clear()

    def blocks(self, weight: torch.nn.Parameter) -> Iterator[torch.Tensor]:
        """A weight of the base, wherever it is, some rows at a time (rows, …), in its type and on its device.

        Raises:
            WorkFailed: as of :meth:`in_memory`.
        """
        if weight.numel() or weight not in self._resting:
            yield from weight.detach().split(BLOCK)
            return
        there = self._resting[weight]
        if _seen(there.path) != self._looked[there.path]:
            raise WorkFailed(f"the base model's {there.path} is gone, or was changed, while it was trained on",
                             "put it back as it was, and run the same command again: it goes on from the last "
                             "checkpoint")
        yield from _read(there, weight)


def _seen(path: Path) -> tuple[int, int] | None:
    """Size in bytes and time of the last change in nanoseconds; None of a file that is gone."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _read(there: StoredTensor, like: torch.Tensor) -> Iterator[torch.Tensor]:
    """Some rows at a time, in the type and on the device of another; the file is mapped for no longer than that."""
    with safe_open(there.path, framework="pt") as file:
        for rows in file.get_tensor(there.name).split(BLOCK):
            yield rows.to(like.device, like.dtype)
