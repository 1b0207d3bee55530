"""What the merged model's matrices are multiplied with on the user's own rows: what rounding them well depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gemma_tune.export.calibration_rows import calibration_rows, not_calibrated
from gemma_tune.export.files import ExportSource, load_merged
from gemma_tune.gguf.architectures.parts import Architecture
from gemma_tune.gguf.compensated import Inputs, inputs_of
from gemma_tune.gguf.types import COARSE
from gemma_tune.run.session import Session

MEMORY = 1 << 30  # bytes of XᵀX at a time: the layers that fit in are gone through together


class Calibration:
    """Inputs of a model's matrices, in the order in which a file is written; some layers' at a time.

    Args:
        model: the merged model; it stays as it is.
        architecture: names the tensors.
        rows: token ids of the sequences to compute on.
    """

    def __init__(self, model: Any, architecture: Architecture, rows: Sequence[np.ndarray]):
        self._model = model
        self._rows = [torch.from_numpy(row.astype(np.int64))[None].to(model.device) for row in rows]
        self.tokens = sum(len(row) for row in rows)
        self._layers = {architecture.canonical(f"{name}.weight"): module for name, module in model.named_modules()
                        if isinstance(module, torch.nn.Linear)}
        self._leader = self._shared()
        self._known: dict[torch.nn.Module, Inputs | None] = {}
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
        self._tied = head is not None and head.weight is embedding
        self._embedding = next(architecture.canonical(name) for name, p in model.named_parameters() if p is embedding)

    def inputs(self, source: str) -> Inputs | None:
        """Of the matrix that the checkpoint calls ``source``; None where nothing is known of it."""
        module = self._layers.get(source)
        if source == self._embedding:  # as an output head; how often each of its rows is looked up does not matter
            module = self._model.get_output_embeddings() if self._tied else None
        if module not in self._leader:
            return None
        leader = self._leader[module]
        if leader not in self._known:
            self._compute(leader)
        return self._known[leader]

    def _shared(self) -> dict[torch.nn.Module, torch.nn.Module]:
        """Each matrix that takes part → the first that gets the very same input, in the order of computation."""
        leader, seen = {}, []

        def note(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            first = next((other for other, x in seen if x is args[0]), module)
            if first is module:
                seen.append((module, args[0]))
            leader[module] = first

        self._run(self._rows[:1], {module: note for module in self._matrices()})
        return leader

    def _matrices(self) -> list[torch.nn.Module]:
        head = self._model.get_output_embeddings()
        return [*self._layers.values(), *([] if head is None or head in self._layers.values() else [head])]

    def _compute(self, first: torch.nn.Module) -> None:
        """XᵀX of ``first`` and those that come after it, as far as the memory goes."""
        head = self._leader.get(self._model.get_output_embeddings())
        order = list(dict.fromkeys([*([head] if head else []), *self._leader.values()]))  # as in a file
        todo, room = [], MEMORY
        for module in order[order.index(first):]:
            size = 4 * module.in_features ** 2
            if todo and size > room:
                break
            todo.append(module)
            room -= size
        grams = {module: torch.zeros(module.in_features, module.in_features, device=self._model.device)
                 for module in todo}

        def add(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).float()
            grams[module].addmm_(x.T, x)

        self._run(self._rows, {module: add for module in todo})
        self._known = {}
        for module in todo:
            found = inputs_of(grams.pop(module), self.tokens)
            # Rows of an embedding are looked up as well: an error in one column is not made up for by others.
            self._known[module] = Inputs(found.importance, None) if found and module is head and self._tied else found

    def _run(self, rows: Iterable[torch.Tensor], hooks: Mapping[torch.nn.Module, Callable]) -> None:
        handles = [module.register_forward_pre_hook(hook) for module, hook in hooks.items()]
        try:
            with torch.inference_mode():
                for row in rows:
                    hidden = self._model.get_decoder()(input_ids=row, use_cache=False).last_hidden_state
                    head = self._model.get_output_embeddings()
                    if head in hooks:
                        hooks[head](head, (hidden,))
        finally:
            for handle in handles:
                handle.remove()


def calibration_of(session: Session, source: ExportSource, quants: Sequence[str]) -> tuple[Calibration | None, str]:
    """What the files of an export are rounded by, and in words; or None and why not, "" where nothing is to be."""
    if not set(COARSE).intersection(quants):
        return None, ""
    if reason := not_calibrated(session, source):
        return None, reason
    rows, said = calibration_rows(session, source)
    model, lacking = load_merged(source.merged, 2 * MEMORY)
    return (Calibration(model, source.architecture, rows), said) if model is not None else (None, lacking)
