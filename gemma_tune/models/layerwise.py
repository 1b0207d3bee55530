"""A model that computes one decoder layer at a time, on all rows: its weights need not fit into memory together."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gemma_tune.base.machine import keeping_garbage
from gemma_tune.base.tensors import StoredTensor, open_tensors
from gemma_tune.gguf.architectures.experts import in_model
from gemma_tune.gguf.architectures.parts import Architecture
from gemma_tune.gguf.experts import Stack, matrices_of, together
from gemma_tune.models.experts import ExpertProduct, watch
from gemma_tune.models.load import attention_of
from gemma_tune.models.placement import Placement
from gemma_tune.models.towers import auto_class, without_towers

_ELEMENTS = 1 << 22  # of an embedding that are read at a time


@dataclass
class Row:
    """One sequence on its way through the layers.

    Args:
        ids: (1, length), as numbers of the embedding's rows that are in memory.
        states: (1, length, hidden size), what the next layer gets.
        arguments: for each layer, what it is called with besides.
    """

    ids: torch.Tensor
    states: torch.Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]


class LayerwiseModel:
    """The decoder of a causal language model; only what lies outside its layers stays in memory.

    Args:
        checkpoint: folder with config.json and safetensors.
        placement: where and in which type it computes.
        architecture: says which tensors it has, and what they go by.
    """

    def __init__(self, checkpoint: Path, placement: Placement, architecture: Architecture):
        with keeping_garbage():
            from accelerate import init_empty_weights
            from transformers import AutoConfig
        self.device, self.dtype = torch.device(placement.device), placement.dtype
        canonical = architecture.canonical
        found = {canonical(name): tensor for name, tensor in open_tensors(checkpoint).items()}
        experts = _experts(found, architecture)
        # Transformers calls some otherwise than their checkpoints do.
        self._stored: dict[str, StoredTensor | Stack] = {in_model(name)[0]: tensor for name, tensor in found.items()}
        self._stored |= {source: Stack(each) for source, each in experts.items()}
        self._canonical = canonical
        self.experts_used = architecture.experts_used
        config = AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
        attention = attention_of(config.model_type, towers=config.get_text_config() is not config)
        with without_towers(config), init_empty_weights(include_buffers=False):
            self.model = auto_class(config.model_type).from_config(
                config, dtype=placement.dtype, attn_implementation=attention,
                trust_remote_code=False)
        watch(self.model, experts, canonical)
        self.model.eval().requires_grad_(False)
        self.decoder = self.model.get_decoder()
        self.layers: Sequence[torch.nn.Module] = self.decoder.layers
        self._names = {module: name for name, module in self.model.named_modules()}
        self._embeddings = [module for module in self.decoder.modules() if isinstance(module, torch.nn.Embedding)]
        inside = {module for layer in self.layers for module in layer.modules()}
        for module in self.decoder.modules():
            if module not in inside and module not in self._embeddings:
                self._fill(module)
        for name, buffer in self.decoder.named_buffers():  # the layers' own come with their weights
            if buffer.device.type != "meta":
                owner, _, leaf = name.rpartition(".")
                self.decoder.get_submodule(owner)._buffers[leaf] = buffer.to(self.device)

    def name(self, module: torch.nn.Module) -> str:
        """What the checkpoint calls a module's weight; of experts all of them together."""
        if isinstance(module, ExpertProduct):
            return module.source
        return self._canonical(f"{self._names[module]}.weight")

    def stored(self, name: str) -> StoredTensor | Stack | None:
        """A tensor of the checkpoint, by the name that it goes by here; of experts one's rows below the other's."""
        return self._stored.get(name)

    @property
    def head(self) -> str | None:
        """The name of the output head's weight; the embedding's where they are one."""
        head = self.model.get_output_embeddings()
        if head is None:
            return None
        tied = getattr(self.model.config, "tie_word_embeddings", False)
        name = self.name(head)
        return self.embedding if tied or name not in self._stored else name

    @property
    def embedding(self) -> str:
        """The name of the embedding's weight."""
        return self.name(self.model.get_input_embeddings())

    def some_rows(self, name: str, numbers: np.ndarray) -> np.ndarray:
        """Rows of a matrix, by their numbers in ascending order: float32 (numbers, columns); zeros for one it lacks."""
        stored = self._stored[name]
        found = np.zeros((len(numbers), *stored.shape[1:]), np.float32)
        step = max(1, _ELEMENTS // max(1, stored.shape[1]))
        for start in range(0, stored.shape[0], step):
            first, last = np.searchsorted(numbers, (start, start + step))
            if first < last:
                found[first:last] = stored.rows(start, start + step)[numbers[first:last] - start]
        return found

    # --- rows -------------------------------------------------------------------------------------------------------

    def start(self, rows: Sequence[np.ndarray]) -> list[Row]:
        """Sequences of token ids, before the first layer."""
        known = np.unique(np.concatenate(rows))
        for module in self._embeddings:
            name = self.name(module)
            module.padding_idx = None  # a row's number is another one here; what matters for gradients alone
            module._parameters["weight"] = self._parameter(
                self.some_rows(name, known[known < self._stored[name].shape[0]]))
        return [self._before(torch.from_numpy(np.searchsorted(known, row))[None].to(self.device))
                for row in rows]

    def _before(self, ids: torch.Tensor) -> Row:
        """What the decoder calls its layers with; it does not depend on what they make of their states."""
        first: list[torch.Tensor] = []
        arguments = []

        def note(n: int, states: torch.Tensor, args: tuple[Any, ...], more: dict[str, Any]) -> torch.Tensor:
            first.append(states)
            arguments.append((args, more))
            return states

        self._through(ids, note)
        return Row(ids, first[0], arguments)

    def finish(self, row: Row) -> torch.Tensor:
        """The decoder's output for a row behind its last layer, (1, length, hidden size): what the head gets."""
        return self._through(row.ids, lambda n, *_: row.states)

    def _through(self, ids: torch.Tensor, layer: Callable[..., torch.Tensor]) -> torch.Tensor:
        """The decoder with other layers: functions of a number, states, and further arguments."""
        for n, module in enumerate(self.layers):
            module.forward = lambda states, *args, n=n, **more: layer(n, states, args, more)
        try:
            return self.decoder(input_ids=ids, use_cache=False).last_hidden_state
        finally:
            for module in self.layers:
                del module.forward

    # --- layers -----------------------------------------------------------------------------------------------------

    @contextmanager
    def loaded(self, n: int) -> Iterator[torch.nn.Module]:
        """A layer with its weights, for as long as the block runs."""
        layer = self.layers[n]
        own = {module: dict(module._buffers) for module in layer.modules()}  # constants, which no checkpoint has
        try:
            for module in layer.modules():
                self._fill(module)
            yield layer
        finally:
            layer.to("meta")
            for module, buffers in own.items():
                module._buffers.update(buffers)

    def through(self, n: int, layer: torch.nn.Module, row: Row) -> torch.Tensor:
        """What layer ``n`` makes of a row's states."""
        args, more = row.arguments[n]
        return layer(row.states, *args, **more)

    def _fill(self, module: torch.nn.Module) -> None:
        if isinstance(module, ExpertProduct):
            module.fill(self.device, self.dtype, _values)
            return
        prefix = self._names[module]
        for leaf in module._parameters:
            if module._parameters[leaf] is not None:
                stored = self._stored[self._canonical(f"{prefix}.{leaf}" if prefix else leaf)]
                module._parameters[leaf] = self._parameter(_values(stored))
        for leaf, buffer in module._buffers.items():
            stored = self._stored.get(self._canonical(f"{prefix}.{leaf}"))
            if buffer is not None and stored is not None:
                module._buffers[leaf] = torch.from_numpy(stored.rows()).to(self.device, buffer.dtype)

    def _parameter(self, values: np.ndarray | torch.Tensor) -> torch.nn.Parameter:
        tensor = torch.as_tensor(values).to(self.device, self.dtype)
        return torch.nn.Parameter(tensor, requires_grad=False)


def _experts(found: Mapping[str, StoredTensor], architecture: Architecture) -> dict[str, Sequence[StoredTensor]]:
    """The matrices of each expert, by what the checkpoint calls them all."""
    stored = together(found)
    return {spec.source: matrices_of(stored, spec) for spec in architecture.tensors
            if spec.source and spec.of_experts}


def _values(stored: StoredTensor) -> torch.Tensor:
    """A tensor's numbers; those in bf16 as they are, in less than half the time that making fp32 of them takes."""
    if stored.dtype == "BF16" and sys.byteorder == "little" and all(stored.shape):
        return torch.frombuffer(stored.raw(), dtype=torch.bfloat16).reshape(stored.shape)
    return torch.from_numpy(stored.rows())
