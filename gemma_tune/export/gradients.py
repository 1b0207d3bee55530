"""What a model's predictions depend on: gradients of its own, layer by layer from the last to the first.

They are those of the negative log-likelihood of tokens that the model itself draws: their mean square is the Fisher
information, the curvature of the divergence from the model (Amari 1998; for rounding, Dong et al. 2019, arXiv
1911.03852). The states before each layer are kept, so that one layer's weights are in memory at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from gemma_tune.models.experts import ExpertProduct
from gemma_tune.models.layerwise import LayerwiseModel, Row
from gemma_tune.models.load import after_product

_LOGITS = 1 << 26  # made at a time: 256 MB in fp32; the head's matrix is read anew each time
_ELEMENTS = 1 << 22  # of the head that are read at a time
_LOOKED_UP = "per_layer_input"  # what layers call what they get of a table besides

MATRICES = (torch.nn.Linear, ExpertProduct)
# Gets a matrix, a sequence's number, what the matrix is called with, which may be part of a graph: its input (…, in);
# and the gradient of its output (…, out), of all tokens of the sequence: for each sequence each matrix of a layer once,
# the last first. Of experts there is a row for each that a token meets, and these experts come behind the input.
Note = Callable[[torch.nn.Module, int, tuple[torch.Tensor, ...], torch.Tensor], None]


class BackwardPass:
    """The way back through a model, whose way forward is done.

    Args:
        model: the model.
        sequences: token ids, (length,) each.
        energy_of: of each sequence, how many leading tokens count for the head's ``energy`` and for ``per_layer``.
        on_progress: called with how many layers are done, and how many there are; each counts twice.

    Attributes:
        head: the output head; ``del`` it to free its weights.
        gradients: of the states before the layer that was gone through last, (1, length, hidden size) for each
            sequence.
        per_layer: of what layers get of a table of their own besides, as those of Gemma 3n and 4 do: for each sequence,
            by layer, (leading tokens, width).

    Raises:
        ValueError: the model has no output head.
    """

    def __init__(self, model: LayerwiseModel, sequences: Sequence[np.ndarray],
                 energy_of: Sequence[int], on_progress: Callable[[int, int], None] | None = None):
        self._model, self._progress = model, on_progress or (lambda done, total: None)
        self.head = Head(model)
        self._before: list[list[torch.Tensor]] = []
        self._rows = self._forward(sequences)
        self._shared, self._some = [SharedKeys(row) for row in self._rows], energy_of
        self.per_layer: list[dict[int, torch.Tensor]] = [{} for _ in sequences]
        self.gradients = [self.head.gradient(row, some) for row, some in zip(self._rows, energy_of, strict=True)]

    def _forward(self, sequences: Sequence[np.ndarray]) -> list[Row]:
        """The rows behind the last layer."""
        model = self._model
        with torch.no_grad():
            rows = model.start(sequences)
            for n in range(len(model.layers)):
                self._before.append([row.states for row in rows])
                with model.loaded(n) as layer:
                    for row in rows:
                        # A copy: a layer may change what it is given.
                        row.states = model.through(n, layer, Row(row.ids, row.states.clone(), row.arguments))
                self._progress(n + 1, 2 * len(model.layers))
        return rows

    def layers(self, note: Note) -> Iterator[int]:
        """Go through the layers from the last to the first, with the number of each when it is done; once."""
        count = len(self._model.layers)
        for n in reversed(range(count)):
            self._layer(n, note, self._before.pop())
            self._progress(2 * count - n, 2 * count)
            yield n

    def _layer(self, n: int, note: Note, before: Sequence[torch.Tensor]) -> None:
        model = self._model

        def noted(module: torch.nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
            if out.requires_grad:
                out.register_hook(lambda gradient, i=i: note(module, i, args, gradient))

        with model.loaded(n) as layer:
            handles = [module.register_forward_hook(noted) for module in layer.modules()
                       if isinstance(module, MATRICES)]
            try:
                for i, (row, states) in enumerate(zip(self._rows, before, strict=True)):
                    leaf = states.detach().requires_grad_()
                    args, more, looked_up = _with_leaf(layer, *row.arguments[n])
                    with self._shared[i].lent() as shared:
                        # Not the leaf itself: a layer may change what it is given.
                        out = layer(leaf.clone(), *args, **more)
                        made, gradients = shared.made()
                        torch.autograd.backward([out, *made], [self.gradients[i], *gradients])
                    self.gradients[i] = leaf.grad
                    if looked_up is not None and self._some[i]:
                        self.per_layer[i][n] = looked_up.grad[0, :self._some[i]].float()
            finally:
                for handle in handles:
                    handle.remove()


def _with_leaf(layer: torch.nn.Module, args: tuple[Any, ...], more: dict[str, Any]
               ) -> tuple[tuple[Any, ...], dict[str, Any], torch.Tensor | None]:
    """What a layer is called with besides its states, with a leaf in place of what it gets of a table of its own."""
    names = list(inspect.signature(type(layer).forward).parameters)[2:]
    given = dict(zip(names, args, strict=False)) | more
    if given.get(_LOOKED_UP) is None:
        return args, more, None
    leaf = given[_LOOKED_UP].detach().requires_grad_()
    return tuple(leaf if name == _LOOKED_UP else value for name, value in zip(names, args, strict=False)), {
        name: leaf if name == _LOOKED_UP else value for name, value in more.items()}, leaf


class SharedKeys:
    """Keys and values that later layers of Gemma 3n and 4 take from an earlier one, and what depends on them: of one
    sequence, from the last layer to the first.

    Args:
        row: the sequence behind the last layer.
    """

    def __init__(self, row: Row):
        # One mapping for all layers, which are called with it: kind of layer → (keys, values).
        self._held: MutableMapping[str, tuple[torch.Tensor, ...]] = row.arguments[-1][1].get("shared_kv_states") or {}
        self._lent: dict[str, tuple[torch.Tensor, ...]] = {}
        self._gradients: dict[str, tuple[torch.Tensor | None, ...]] = {}

    @contextmanager
    def lent(self) -> Iterator[SharedKeys]:
        """While a layer is gone through, and back: it takes parts of a graph, or puts its own in their place."""
        values = dict(self._held)
        self._lent = {kind: tuple(value.detach().requires_grad_() for value in pair) for kind, pair in values.items()}
        self._held.update(self._lent)
        try:
            yield self
        finally:
            self._held.update(values)
        for kind, leaves in self._lent.items():
            before = self._gradients.get(kind, (None,) * len(leaves))
            self._gradients[kind] = tuple(_sum(sum_of, leaf.grad) for sum_of, leaf in zip(before, leaves, strict=True))

    def made(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What the layer put there itself, and the gradients of it that later layers left; these are all."""
        pairs = [pair for kind, own in self._held.items() if own is not self._lent[kind]
                 for pair in zip(own, self._gradients.pop(kind, ()), strict=False) if pair[1] is not None]
        return [value for value, _ in pairs], [gradient for _, gradient in pairs]


def _sum(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    return other if one is None else one if other is None else one + other


class Head:
    """The output head: gradients of what it is given, and of what it gives.

    Attributes:
        energy: of each entry of the vocabulary, the sum of squares of the gradients there, of the tokens for which it
            was asked so far: fp32 (vocabulary,). It takes as long as a product.
    """

    def __init__(self, model: LayerwiseModel):
        self._model = model
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
        self.energy = torch.zeros(len(self._weight), device=self._weight.device)

    def gradient(self, row: Row, energy_of: int = 0) -> torch.Tensor:
        """That of a row's states behind the last layer, (1, length, hidden size).

        Args:
            energy_of: so many leading tokens count for the energy.
        """
        leaf = row.states.detach().requires_grad_()
        with torch.enable_grad():
            out = self._model.finish(Row(row.ids, leaf.clone(), row.arguments))
        states = out.detach()[0]
        step = max(1, _LOGITS // len(self._weight))
        parts = []
        for start in range(0, len(states), step):
            found = self._of_logits(states[start:start + step])
            if (some := found[:max(0, energy_of - start)]).numel():
                self.energy += torch.linalg.vector_norm(some, dim=0).square_()
            parts.append(found.to(self._weight.dtype) @ self._weight)
        self._states.append(states)
        torch.autograd.backward(out, torch.cat(parts)[None].to(out.dtype))
        return leaf.grad

    def _of_logits(self, states: torch.Tensor) -> torch.Tensor:
        """The gradient of −log p(drawn token) by what the head's product gives: fp32 (some, vocabulary)."""
        found = (states @ self._weight.T).float()
        slope: torch.Tensor | None = None
        if (scale := self._after["scale"]) != 1:
            found *= scale
        if cap := self._after["softcap"]:
            found.div_(cap).tanh_()
            slope = 1 - found.square()
            found *= cap
        found.sub_(found.amax(1, keepdim=True)).exp_()
        # By where a random part of the sum is reached: torch.multinomial takes a random number for every entry.
        reached = found.cumsum(1)
        whole = reached[:, -1:]
        part = torch.rand(whole.shape, generator=self._generator, device=whole.device) * whole
        drawn = torch.searchsorted(reached, part).clamp_(max=found.shape[1] - 1)
        found.div_(whole).scatter_add_(1, drawn, torch.full_like(whole, -1.0))
        if slope is not None:
            found *= slope
        if scale != 1:
            found *= scale
        return found

    @property
    def states(self) -> torch.Tensor:
        """What it was multiplied with, in the model's type (tokens, columns)."""
        return torch.cat(self._states)

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Rows of its matrix: float32 (numbers, columns)."""
        return np.concatenate([self._stored.rows(row, row + 1) for row in numbers])
