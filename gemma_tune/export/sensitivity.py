"""What rounding each matrix to each type costs: measured on the merged model, as nats per token.

To second order, rounding that changes an output by e raises KL(model || rounded model) by half the mean of (g · e)²,
where g is the gradient of :mod:`gemma_tune.export.gradients`. Errors of different outputs are taken as independent.
That the router of a later layer weighs its experts otherwise is in it, that it chooses others is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

from gemma_tune.base.machine import cores
from gemma_tune.export.expert_inputs import ExpertInputs
from gemma_tune.export.gradients import Head
from gemma_tune.gguf.compensated import by_importance
from gemma_tune.gguf.types import dequantise
from gemma_tune.models.experts import ExpertProduct
from gemma_tune.models.layerwise import LayerwiseModel

# What error-compensated rounding leaves of what rounding by importance costs. With it, four mixes of Gemma 3 270M were
# expected to cost 0.014, 0.009, 0.012 and 0.023 nats per token, and cost 0.014, 0.006, 0.009 and 0.020 on other rows.
COMPENSATED = 0.7
_ROWS = 64  # of a matrix that are rounded, more often those whose outputs matter more
_HEAD_ROWS = 512

Costs = dict[str, dict[Type, float]]


class Sensitivity:
    """Measures, on the way back through a model, what rounding its matrices costs.

    Args:
        model: the merged model.
        sequences: token ids that go through it, (length,) each.
        types: by what the checkpoint calls a matrix, the types to round it to; no others are measured.
        tokens: to measure on, of them.

    Attributes:
        some: of each sequence, on how many of its leading tokens.
        costs: nats per token that rounding costs, by matrix and type; filled on the way. A matrix whose output has no
            influence, or that the model does not multiply with, is left out.
    """

    def __init__(self, model: LayerwiseModel, sequences: Sequence[np.ndarray], types: Mapping[str, Sequence[Type]],
                 tokens: int):
        self.some = _leading(sequences, tokens if types else 0)
        self.costs: Costs = {}
        self._model, self._sequences, self._types = model, sequences, types
        self._draw, self._total = np.random.default_rng(0), sum(self.some)
        self._importance = np.ones(0, np.float32)
        self._notes: dict[torch.nn.Module, _Note | _ExpertNote] = {}

    def of_head(self, head: Head) -> None:
        """Measure the output head, before the layers."""
        if self._total:
            self._importance = _importance(head.states.float())
        if self._model.head in self._types:
            self.costs[self._model.head] = _of_head(head, self._types[self._model.head], self._draw, self._total)

    def note(self, module: torch.nn.Module, sequence: int, args: tuple[torch.Tensor, ...],
             gradient: torch.Tensor) -> None:
        """See :data:`gradients.Note`."""
        some = self.some[sequence]
        if not some or self._model.name(module) not in self._types:
            return
        # Of experts there are rows for each that a token meets.
        leading = [part[:some * len(part) // len(self._sequences[sequence])]
                   for part in (*(arg.detach().flatten(0, -2) for arg in args), gradient.flatten(0, -2))]
        if module not in self._notes:
            self._notes[module] = _ExpertNote(module) if isinstance(module, ExpertProduct) else _Note()
        self._notes[module].add(*leading)

    def of_layer(self) -> None:
        """Measure the matrices of the layer that was gone through last."""
        for module, mine in self._notes.items():
            name = self._model.name(module)
            if measured := mine.costs(self._model, name, self._types[name], self._draw, self._total):
                self.costs[name] = measured
        self._notes.clear()

    def of_embedding(self, gradients: Sequence[torch.Tensor]) -> None:
        """Measure the embedding where rows of it are what goes into the first layer, whose gradients these are."""
        name = self._model.embedding
        if name not in self._types:
            return
        # Of Gemma 3n four streams of states begin with the rows, in one of which they stand as they are. In the others
        # they are multiplied with a matrix and given their old length, so that an error is taken to be as large there.
        squares = [gradient[..., :some, :].float().square().reshape(-1, some, gradient.shape[-1]).sum(0)
                   for gradient, some in zip(gradients, self.some, strict=True) if some]
        scale = float(getattr(self._model.model.get_input_embeddings(), "embed_scale", 1.0))
        looked_up = self._of_lookups(name, scale, squares, self._importance)
        as_head = self.costs.get(name, {})
        self.costs[name] = {kind: cost + as_head.get(kind, 0.0) for kind, cost in looked_up.items()}

    def of_table(self, per_layer: Sequence[Mapping[int, torch.Tensor]]) -> None:
        """Measure the table of which each layer gets a part of a token's row, see :attr:`BackwardPass.per_layer`."""
        table = getattr(self._model.decoder, "embed_tokens_per_layer", None)
        name = table and self._model.name(table)
        if name not in self._types:
            return
        squares = [torch.cat([parts[n] for n in sorted(parts)], 1).square() for parts in per_layer if parts]
        scale = float(table.embed_scale) * float(self._model.decoder.per_layer_input_scale)
        self.costs[name] = self._of_lookups(name, scale, squares, np.ones(squares[0].shape[1], np.float32))

    def _of_lookups(self, name: str, scale: float, squares: Sequence[torch.Tensor], importance: np.ndarray
                    ) -> dict[Type, float]:
        """What rounding a table costs of which rows are looked up.

        Args:
            scale: what a row is multiplied with.
            squares: of the gradients of what is looked up, for each sequence: (leading tokens, columns).
            importance: of each column, by which the rows are rounded.
        """
        ids = np.concatenate([ids[:some] for ids, some in zip(self._sequences, self.some, strict=True)])
        known = np.unique(ids)
        weight, found = torch.cat(list(squares)).cpu().numpy(), {}
        for kind, off in _changes(self._model.some_rows(name, known), self._types[name], importance).items():
            e = np.square(off * scale)[np.searchsorted(known, ids)]
            found[kind] = 0.5 * float((weight * e).sum(dtype=np.float64)) / len(ids)
        return found


def _leading(sequences: Sequence[np.ndarray], tokens: int) -> list[int]:
    """Of sequences from all over, how many leading tokens are taken: ``tokens`` together, if there are so many."""
    found = [0] * len(sequences)
    for n in np.random.default_rng(0).permutation(len(sequences)):
        found[n] = min(len(sequences[n]), tokens - sum(found))
    return found


def _importance(x: torch.Tensor) -> np.ndarray:
    """The mean square of each column."""
    return x.square().mean(0).cpu().numpy()


def _of_head(head: Head, types: Sequence[Type], draw: np.random.Generator, total: int) -> dict[Type, float]:
    """What rounding the output head costs; gradients and what it is multiplied with are taken as independent."""
    weight, x = head.energy.double().cpu().numpy(), head.states.float()
    rows = draw.choice(len(weight), _HEAD_ROWS, p=weight / weight.sum())
    found = {}
    for kind, off in _changes(head.rows(rows), types, _importance(x)).items():
        e = (x @ torch.from_numpy(off).to(x.device).T).square().mean(dtype=torch.float64)
        found[kind] = 0.5 * float(weight.sum() * e) / total
    return found


class _Note:
    """What a matrix was multiplied with, and the gradients of what came out."""

    def __init__(self) -> None:
        self._x: list[torch.Tensor] = []
        self._gradients: list[torch.Tensor] = []

    def add(self, x: torch.Tensor, gradient: torch.Tensor) -> None:
        self._x.append(x.float())
        self._gradients.append(gradient.float())

    def costs(self, model: LayerwiseModel, name: str, types: Sequence[Type], draw: np.random.Generator,
              total: int) -> dict[Type, float]:
        stored = model.stored(name)
        x, gradients = torch.cat(self._x), torch.cat(self._gradients)
        weight = gradients.square().sum(0, dtype=torch.float64).cpu().numpy()
        if stored is None or not weight.sum() > 0 or not np.isfinite(weight).all():
            return {}
        rows = draw.choice(len(weight), _ROWS, p=weight / weight.sum())
        values = np.concatenate([stored.rows(row, row + 1) for row in rows])
        found = {}
        for kind, off in _changes(values, types, _importance(x)).items():
            e = x @ torch.from_numpy(off).to(x.device).T
            each = (gradients[:, rows] * e).square().sum(0, dtype=torch.float64).cpu().numpy() / weight[rows]
            found[kind] = COMPENSATED * 0.5 * weight.sum() * float(each.mean()) / total
        return found


class _ExpertNote:
    """The same of a tensor of all experts."""

    def __init__(self, product: ExpertProduct) -> None:
        self._inputs = ExpertInputs(product)
        self._seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def add(self, x: torch.Tensor, experts: torch.Tensor, gradient: torch.Tensor) -> None:
        self._inputs.add(x, experts)
        self._seen.append((x.float().repeat_interleave(experts.shape[1], 0), experts.flatten(), gradient.float()))

    def costs(self, model: LayerwiseModel, name: str, types: Sequence[Type], draw: np.random.Generator,
              total: int) -> dict[Type, float]:
        x, experts, gradients = (torch.cat(part) for part in zip(*self._seen, strict=True))
        stored, importance = model.stored(name), self._inputs.importance.cpu().numpy()
        weight = torch.zeros(len(importance), gradients.shape[1], dtype=torch.float64, device=x.device)
        weight = weight.index_add_(0, experts, gradients.double().square()).cpu().numpy()
        if not weight.sum() > 0 or not np.isfinite(weight).all():
            return {}
        drawn = np.divmod(draw.choice(weight.size, _ROWS, p=weight.ravel() / weight.sum()), weight.shape[1])
        found = dict.fromkeys(types, 0.0)
        for expert in np.unique(drawn[0]):
            rows, own = drawn[1][drawn[0] == expert], experts == int(expert)
            first = expert * weight.shape[1]
            values = np.concatenate([stored.rows(first + row, first + row + 1) for row in rows])
            for kind, off in _changes(values, types, importance[expert]).items():
                e = x[own] @ torch.from_numpy(off).to(x.device).T
                each = (gradients[own][:, rows] * e).square().sum(0, dtype=torch.float64).cpu().numpy()
                found[kind] += float((each / weight[expert, rows]).sum())
        return {kind: COMPENSATED * 0.5 * weight.sum() * sum_of / _ROWS / total for kind, sum_of in found.items()}


def _changes(values: np.ndarray, types: Sequence[Type], importance: np.ndarray) -> dict[Type, np.ndarray]:
    """What rounding by importance to each type changes of float32 rows (rows, columns)."""
    def change(kind: Type) -> np.ndarray:
        return dequantise(by_importance(values, kind, importance), kind) - values

    with ThreadPoolExecutor(cores()) as pool:  # ggml's functions let other threads run
        return dict(zip(types, pool.map(change, types), strict=True))
