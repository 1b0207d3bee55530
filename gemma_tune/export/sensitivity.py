"""What rounding each matrix to each type costs: measured on the merged model, as nats per token.

To second order, rounding that changes an output by e raises KL(model || rounded model) by half the mean of (g · e)²,
where g is the gradient of the negative log-likelihood of tokens that the model itself draws: its mean square is the
Fisher information, the curvature of the divergence (Amari 1998; for rounding, Dong et al. 2019, arXiv 1911.03852).
Errors of different outputs are taken as independent. Gradients are computed layer by layer from the last to the first,
with the states before each layer kept, so that one layer's weights are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

from gemma_tune.base.machine import cores
from gemma_tune.gguf.compensated import by_importance
from gemma_tune.gguf.types import dequantise
from gemma_tune.models.layerwise import LayerwiseModel, Row
from gemma_tune.models.load import after_product

# What error-compensated rounding leaves of what rounding by importance costs. With it, four mixes of Gemma 3 270M were
# expected to cost 0.014, 0.009, 0.012 and 0.023 nats per token, and cost 0.014, 0.006, 0.009 and 0.020 on other rows.
COMPENSATED = 0.7
_ROWS = 64  # of a matrix that are rounded, more often those whose outputs matter more
_HEAD_ROWS = 512
_LOGITS = 1 << 24  # made at a time: 64 MB in fp32
_ELEMENTS = 1 << 22  # of the head that are read at a time

Costs = dict[str, dict[Type, float]]


def costs(model: LayerwiseModel, sequences: Sequence[np.ndarray], types: Mapping[str, Sequence[Type]],
          on_progress: Callable[[int, int], None] | None = None,
          on_head: Callable[[np.ndarray], None] | None = None) -> Costs:
    """Nats per token that rounding costs.

    Args:
        model: the merged model.
        sequences: token ids to measure on.
        types: by what the checkpoint calls a matrix, the types to round it to; no others are measured.
        on_progress: called with how many layers are done, and how many there are; each counts twice.
        on_head: gets what the head was multiplied with: float32 (tokens, columns).

    Returns:
        By matrix and type. A matrix whose output has no influence, or that the model does not multiply with, is left
        out.
    """
    progress = on_progress or (lambda done, total: None)
    draw = np.random.default_rng(0)
    total = sum(map(len, sequences))
    before, rows = _forward(model, sequences, progress)
    found: Costs = {}
    head = _Head(model, total)
    gradients = [head.gradient(row) for row in rows]
    if model.head in types:
        found[model.head] = head.costs(types[model.head], draw)
    importance = head.importance
    if on_head:
        on_head(head.states.cpu().numpy())
    del head
    for n in reversed(range(len(model.layers))):
        notes, gradients = _backward(model, n, rows, before.pop(), gradients)
        for module, note in notes.items():
            name = model.name(module)
            if name in types and (measured := note.costs(model, name, types[name], draw, total)):
                found[name] = measured
        progress(2 * len(model.layers) - n, 2 * len(model.layers))
    if model.embedding in types:
        looked_up = _of_lookups(model, sequences, gradients, types[model.embedding], importance)
        as_head = found.get(model.embedding, {})
        found[model.embedding] = {kind: cost + as_head.get(kind, 0.0) for kind, cost in looked_up.items()}
    return found


def _of_lookups(model: LayerwiseModel, sequences: Sequence[np.ndarray], gradients: Sequence[torch.Tensor],
                types: Sequence[Type], importance: np.ndarray) -> dict[Type, float]:
    """What rounding the embedding costs where its rows are what goes into the first layer.

    Args:
        gradients: of these, for each sequence.
        importance: by which the rows are rounded.
    """
    ids = np.concatenate(sequences)
    known = np.unique(ids)
    values = model.some_rows(model.embedding, known)
    scale = float(getattr(model.model.get_input_embeddings(), "embed_scale", 1.0))
    weight = torch.cat([part.reshape(-1, part.shape[-1]) for part in gradients]).float().square().cpu().numpy()
    found = {}
    for kind, off in _changes(values, types, importance).items():
        e = np.square(off * scale)[np.searchsorted(known, ids)]
        found[kind] = 0.5 * float((weight * e).sum(dtype=np.float64)) / len(ids)
    return found


def _forward(model: LayerwiseModel, sequences: Sequence[np.ndarray],
             progress: Callable[[int, int], None]) -> tuple[list[list[torch.Tensor]], list[Row]]:
    """The rows behind the last layer, and their states before each."""
    before = []
    with torch.no_grad():
        rows = model.start(sequences)
        for n in range(len(model.layers)):
            before.append([row.states for row in rows])
            with model.loaded(n) as layer:
                for row in rows:
                    # A copy: a layer may change what it is given.
                    row.states = model.through(n, layer, Row(row.ids, row.states.clone(), row.arguments))
            progress(n + 1, 2 * len(model.layers))
    return before, rows


def _backward(model: LayerwiseModel, n: int, rows: Sequence[Row], before: Sequence[torch.Tensor],
              gradients: Sequence[torch.Tensor]) -> tuple[dict[torch.nn.Module, _Note], list[torch.Tensor]]:
    """What layer ``n``'s matrices got and what their outputs' gradients are, and the gradients before the layer."""
    notes: dict[torch.nn.Module, _Note] = {}

    def note(module: torch.nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
        if out.requires_grad:
            mine = notes.setdefault(module, _Note())
            x = args[0].detach()
            out.register_hook(lambda gradient: mine.add(x, gradient))

    earlier = []
    with model.loaded(n) as layer:
        handles = [module.register_forward_hook(note) for module in layer.modules()
                   if isinstance(module, torch.nn.Linear)]
        try:
            for row, states, gradient in zip(rows, before, gradients, strict=True):
                leaf = states.detach().requires_grad_()
                # Not the leaf itself: a layer may change what it is given.
                out = model.through(n, layer, Row(row.ids, leaf.clone(), row.arguments))
                torch.autograd.backward(out, gradient)
                earlier.append(leaf.grad)
        finally:
            for handle in handles:
                handle.remove()
    return notes, earlier


class _Note:
    """What a matrix was multiplied with, and the gradients of what came out."""

    def __init__(self) -> None:
        self._x: list[torch.Tensor] = []
        self._gradients: list[torch.Tensor] = []

    def add(self, x: torch.Tensor, gradient: torch.Tensor) -> None:
        self._x.append(x.reshape(-1, x.shape[-1]).float())
        self._gradients.append(gradient.reshape(-1, gradient.shape[-1]).float())

    def costs(self, model: LayerwiseModel, name: str, types: Sequence[Type], draw: np.random.Generator,
              total: int) -> dict[Type, float]:
        stored = model.stored(name)
        x, gradients = torch.cat(self._x), torch.cat(self._gradients)
        weight = gradients.square().sum(0, dtype=torch.float64).cpu().numpy()
        if stored is None or not weight.sum() > 0 or not np.isfinite(weight).all():
            return {}
        rows = draw.choice(len(weight), _ROWS, p=weight / weight.sum())
        values = np.concatenate([stored.rows(row, row + 1) for row in rows])
        importance = x.square().mean(0).cpu().numpy()
        found = {}
        for kind, off in _changes(values, types, importance).items():
            e = x @ torch.from_numpy(off).to(x.device).T
            each = (gradients[:, rows] * e).square().sum(0, dtype=torch.float64).cpu().numpy() / weight[rows]
            found[kind] = COMPENSATED * 0.5 * weight.sum() * float(each.mean()) / total
        return found


def _changes(values: np.ndarray, types: Sequence[Type], importance: np.ndarray) -> dict[Type, np.ndarray]:
    """What rounding by importance to each type changes of float32 rows (rows, columns)."""
    def change(kind: Type) -> np.ndarray:
        return dequantise(by_importance(values, kind, importance), kind) - values

    with ThreadPoolExecutor(cores()) as pool:  # ggml's functions let other threads run
        return dict(zip(types, pool.map(change, types), strict=True))


class _Head:
    """The output head: gradients of what it is given, and what rounding its rows costs.

    Args:
        total: tokens that are measured on.
    """

    def __init__(self, model: LayerwiseModel, total: int):
        self._model, self._total = model, total
        self._stored = model.stored(model.head or "")
        if self._stored is None:
            raise ValueError("a model without an output head")
        step = max(1, _ELEMENTS // self._stored.shape[1])
        self._weight = torch.empty(self._stored.shape, dtype=model.dtype, device=model.device)
        for start in range(0, self._stored.shape[0], step):
            rows = self._stored.rows(start, start + step)
            self._weight[start:start + len(rows)] = torch.from_numpy(rows)
        self._after = after_product(model.model)
        self._generator = torch.Generator(device=self._weight.device).manual_seed(0)
        self._states: list[torch.Tensor] = []
        self._energy = torch.zeros(len(self._weight), dtype=torch.float64, device=self._weight.device)

    def gradient(self, row: Row) -> torch.Tensor:
        """That of a row's states behind the last layer, (1, length, hidden size)."""
        leaf = row.states.detach().requires_grad_()
        with torch.enable_grad():
            out = self._model.finish(Row(row.ids, leaf.clone(), row.arguments))
        states = out.detach()[0]
        step = max(1, _LOGITS // len(self._weight))
        parts = [self._of_logits(states[start:start + step]) @ self._weight for start in range(0, len(states), step)]
        self._states.append(states.float())
        torch.autograd.backward(out, torch.cat(parts)[None].to(out.dtype))
        return leaf.grad

    def _of_logits(self, states: torch.Tensor) -> torch.Tensor:
        """The gradient of −log p(drawn token) by what the head's product gives: (some, vocabulary)."""
        found = (states @ self._weight.T).float().mul_(self._after["scale"])
        slope: torch.Tensor | float = self._after["scale"]
        if cap := self._after["softcap"]:
            found.div_(cap).tanh_()
            slope = (1 - found.square()) * self._after["scale"]
            found.mul_(cap)
        found = found.softmax(1)
        drawn = torch.multinomial(found, 1, generator=self._generator)
        found.scatter_add_(1, drawn, torch.full_like(drawn, -1.0, dtype=found.dtype)).mul_(slope)
        self._energy += found.square().sum(0, dtype=torch.float64)
        return found.to(self._weight.dtype)

    @property
    def states(self) -> torch.Tensor:
        """What it was multiplied with, fp32 (tokens, columns)."""
        return torch.cat(self._states)

    @property
    def importance(self) -> np.ndarray:
        """The mean square of each column of it."""
        return self.states.square().mean(0).cpu().numpy()

    def costs(self, types: Sequence[Type], draw: np.random.Generator) -> dict[Type, float]:
        """As for other matrices, but that gradients and states are taken as independent."""
        weight = self._energy.cpu().numpy()
        x, importance = self.states, self.importance
        rows = draw.choice(len(weight), _HEAD_ROWS, p=weight / weight.sum())
        values = np.concatenate([self._stored.rows(row, row + 1) for row in rows])
        found = {}
        for kind, off in _changes(values, types, importance).items():
            e = (x @ torch.from_numpy(off).to(x.device).T).square().mean(dtype=torch.float64)
            found[kind] = 0.5 * float(weight.sum() * e) / self._total
        return found
