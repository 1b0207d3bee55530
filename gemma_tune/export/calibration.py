"""What the merged model's matrices are multiplied with on the user's own rows: what rounding them well depends on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

from gemma_tune.base.tensors import open_tensors
from gemma_tune.base.words import gigabytes
from gemma_tune.export.calibration_rows import LONGEST, TOKENS, calibration_rows, not_calibrated, shortened
from gemma_tune.export.expert_inputs import ExpertInputs
from gemma_tune.export.files import ExportSource
from gemma_tune.export.gradients import MATRICES, BackwardPass
from gemma_tune.export.sensitivity import Costs, Sensitivity
from gemma_tune.export.token_weights import TokenWeights
from gemma_tune.gguf.architectures.parts import Architecture
from gemma_tune.gguf.compensated import Inputs, inputs_of
from gemma_tune.gguf.types import COARSE, OF_EXPERTS, QUANTS
from gemma_tune.models.experts import ExpertProduct
from gemma_tune.models.layerwise import LayerwiseModel, Row
from gemma_tune.models.placement import OVERHEAD, USABLE, Placement, available, best_device, choose_placement
from gemma_tune.run.session import Session

# Tokens times parameters on a CPU, where each token goes through the layers five times; the most and fewest
# tokens: 8,192 up to 0.5B parameters, 1,536 from 2.7B. With 4,096 in place of 8,398 the demo's q4_0 lost 6 % more.
_WORK = 4_096_000_000_000
_MOST, _FEWEST = 8192, 1536
KEPT = 1 << 30  # bytes of factors that are kept for the next format; else each format has them computed anew
_HEAD_TOKENS = 512  # where the layers are gone through for the head alone
BY_THEMSELVES = f"{OF_EXPERTS} rounds each weight by itself"
MOST_COLUMNS = 4096  # whose errors are made up for by each other
_COLUMNS = 256  # of the largest blocks of a file
_AT_A_TIME = 2048  # inputs that are multiplied at once
_PROBES = 32  # inputs with which what is written is checked
_BLOCKS = 4  # in which XᵀX is computed, but for the blocks below the diagonal


class Gram:
    """XᵀX of all inputs X (some, columns) that are added, and a few of them; below the diagonal it may be zero.

    Of many columns XᵀX is computed in parts along the diagonal on a CPU, and an error is made up for within a part: a
    model's largest matrices would take half of all time otherwise. With fewer tokens than columns, as then, that costs
    nothing: in thirds the error of the demo's down projections grew by 1 to 2 %.

    Args:
        free: matrices that may be used, and are given back: to get so much memory anew takes as long as a product.
    """

    def __init__(self, columns: int, device: torch.device, free: list[torch.Tensor] | None = None):
        self._free = [] if free is None else free
        self._sums = [self._zeros(size, device) for size in parts(columns, device.type)]
        self._waiting: list[torch.Tensor] = []
        self._probes: list[np.ndarray] = []
        self._narrow = False

    def _zeros(self, size: int, device: torch.device) -> torch.Tensor:
        for n, matrix in enumerate(self._free):
            if len(matrix) == size:
                return self._free.pop(n).zero_()
        return torch.zeros(size, size, device=device)

    def add(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add inputs (…, columns), each as often as its weight (some,) says."""
        # A CPU is asked to compute in bf16 where it has instructions for it.
        self._narrow = x.dtype == torch.bfloat16 and x.device.type == "cpu"
        x = x.reshape(-1, x.shape[-1]).float()
        if len(self._probes) < _PROBES:
            # Where tokens count differently, one that counts: rounding cares little for others.
            self._probes.append(x[len(x) // 2 if weights is None else int(weights.argmax())].cpu().numpy())
        self._waiting.append(x if weights is None else x * weights.sqrt()[:, None])
        if sum(map(len, self._waiting)) >= _AT_A_TIME:  # one product of many inputs, not many of few
            self._multiply()

    def _multiply(self) -> None:
        x, self._waiting = torch.cat(self._waiting), []
        for gram, own in zip(self._sums, x.split([len(gram) for gram in self._sums], dim=1), strict=True):
            step = -(-len(gram) // _BLOCKS)
            for start in range(0, len(gram), step):
                gram[start:start + step, start:].addmm_(own[:, start:start + step].T, own[:, start:])

    def inputs(self, count: int) -> Inputs | None:
        """What rounding depends on, after ``count`` inputs, which are all."""
        if self._waiting:
            self._multiply()
        found = inputs_of(self._sums, count)
        self._free += self._sums
        self._sums = []
        return found and replace(found, probes=np.stack(self._probes), narrow=self._narrow)


def parts(columns: int, device: str) -> list[int]:
    """Sizes of about equal parts of so many columns, on a CPU no larger than :data:`MOST_COLUMNS`, in whole blocks."""
    count = -(-columns // MOST_COLUMNS) if device == "cpu" else 1
    blocks = -(-columns // _COLUMNS)
    found = [len(part) * _COLUMNS for part in np.array_split(np.arange(blocks), count)]
    return [*found[:-1], found[-1] - blocks * _COLUMNS + columns]


class Calibration:
    """Inputs of a model's matrices, layer by layer in the order in which a file is written.

    Args:
        model: the merged model.
        rows: token ids of the sequences to compute on.
    """

    def __init__(self, model: LayerwiseModel, rows: Sequence[np.ndarray]):
        self.model, self.sequences = model, rows
        self.tokens = sum(map(len, rows))
        matrices = [(module, n) for n, layer in enumerate(model.layers) for module in layer.modules()
                    if isinstance(module, MATRICES)]
        self._layer_of = {model.name(module): n for module, n in matrices}
        kept = _factors((module.in_features for module, _ in matrices if isinstance(module, torch.nn.Linear)),
                        model.device.type)
        kept += sum(4 * self.tokens * module.weight.shape[2] * (1 if module.shared else model.experts_used)
                    for module, _ in matrices if isinstance(module, ExpertProduct))
        self._keeps = kept <= KEPT
        self._weights: dict[str, torch.Tensor] = {}
        self._known: dict[str, Inputs | ExpertInputs | None] = {}
        self._head: Inputs | None = None
        self._free: list[torch.Tensor] = []
        self._rows: list[Row] = []
        self._next = len(model.layers)  # the layer whose inputs the rows' states are

    def weigh(self, types: Mapping[str, Sequence[Type]], tokens: int,
              on_progress: Callable[[int, int], None] | None = None) -> Costs:
        """Let each token count by how much depends on it, see :class:`TokenWeights`; it takes about four times as long
        as going through the layers for their inputs does.

        Args:
            types: by what the checkpoint calls a matrix, the types for which to measure on the way what rounding costs.
            tokens: to measure that on.
            on_progress: as for :class:`BackwardPass`.

        Returns:
            What :class:`Sensitivity` measured.
        """
        if self.model.stored(self.model.head or "") is None:
            return {}
        sensitivity = Sensitivity(self.model, self.sequences, types, tokens)
        passing = BackwardPass(self.model, self.sequences, sensitivity.some, on_progress)
        weights = TokenWeights(passing, self.model.name, str(self.model.head))
        sensitivity.of_head(passing.head)
        states = passing.head.states
        del passing.head

        def note(*seen: Any) -> None:
            weights.note(*seen)
            sensitivity.note(*seen)

        for _ in passing.layers(note):
            sensitivity.of_layer()
        sensitivity.of_embedding(passing.gradients)
        sensitivity.of_table(passing.per_layer)
        self._weights = weights.weights()
        gram = Gram(states.shape[1], states.device)
        gram.add(states, self._weights.get(str(self.model.head)))
        self._head = self._of_head(gram, len(states))
        return sensitivity.costs

    def inputs(self, source: str | None) -> Inputs | ExpertInputs | None:
        """Of the matrix that the checkpoint calls ``source``; None where nothing is known of it."""
        if source is not None and source == self.model.head:
            self._head = self._head or self._inputs_of_head()
            return self._head
        n = self._layer_of.get(source or "")
        if n is not None and source not in self._known:
            if self._next > n:
                self._begin(self.sequences)
            while self._next <= n:
                self._one_layer(self._keeps or self._next == n)
        return self._known.get(source or "")

    def _begin(self, rows: Sequence[np.ndarray]) -> None:
        with torch.no_grad():
            self._rows, self._next = self.model.start(rows), 0

    def _one_layer(self, noting: bool) -> None:
        """Take the rows through the next layer, and its inputs into what is known."""
        notes = _Notes(lambda module: self._weights.get(self.model.name(module)), self._free)
        with torch.no_grad(), self.model.loaded(self._next) as layer:
            handles = [module.register_forward_hook(notes) for module in layer.modules()
                       if noting and isinstance(module, MATRICES)]
            try:
                for row in self._rows:
                    row.states = self.model.through(self._next, layer, row)
            finally:
                for handle in handles:
                    handle.remove()
        if not self._keeps:
            self._known = {}
        self._known |= {self.model.name(module): found for module, found in notes.inputs().items()}
        self._next += 1

    def _inputs_of_head(self) -> Inputs | None:
        """Of the output head, which comes behind the last layer."""
        tied = self.model.head == self.model.embedding
        # Of a large model the layers are gone through once more for it, and mean squares need few tokens.
        few = tied and not self._keeps
        if few or self._next < len(self.model.layers) or not self._rows:
            self._begin(shortened(self.sequences, _HEAD_TOKENS) if few else self.sequences)
        while self._next < len(self.model.layers):
            self._one_layer(self._keeps)
        gram = None
        with torch.no_grad():
            for row in self._rows:
                states = self.model.finish(row)
                gram = gram or Gram(states.shape[-1], states.device)
                gram.add(states)
        count = sum(row.ids.numel() for row in self._rows)
        self._rows, self._next = ([], len(self.model.layers)) if few else (self._rows, self._next)
        return self._of_head(gram, count) if gram else None

    def _of_head(self, gram: Gram, count: int) -> Inputs | None:
        found = gram.inputs(count)
        # Rows of an embedding are looked up as well: an error in one column is not made up for by others.
        return replace(found, factors=None) if found and self.model.head == self.model.embedding else found


class _Notes:
    """A hook that notes what comes into the matrices of a layer, and how large what comes out is.

    Args:
        weights: of a matrix, how much each token of all sequences counts; None where all count the same.
        free: see :class:`Gram`.
    """

    def __init__(self, weights: Callable[[torch.nn.Module], torch.Tensor | None], free: list[torch.Tensor]) -> None:
        self._free = free
        self._weights = weights
        self._seen: dict[torch.nn.Module, torch.Tensor] = {}  # the last input of those that lead others
        self._leader: dict[torch.nn.Module, torch.nn.Module] = {}
        self._grams: dict[torch.nn.Module, Gram] = {}
        self._output: dict[torch.nn.Module, float] = {}
        self._count: dict[torch.nn.Module, int] = {}  # of inputs, which are all tokens; for each the experts it met
        self._experts: dict[torch.nn.Module, ExpertInputs] = {}

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
        x, weights = args[0], self._weights(module)
        before, count = self._count.get(module, 0), out.numel() // out.shape[-1]
        self._count[module] = before + count
        if weights is not None:
            weights = weights[before:before + count]
        if isinstance(module, ExpertProduct):
            if module not in self._experts:
                sizes = parts(module.weight.shape[2], x.device.type)
                self._experts[module] = ExpertInputs(module, sizes)
            self._experts[module].add(*args, weights)
            return
        y = out if module.bias is None else out - module.bias
        squares = y.reshape(count, -1).float().square().sum(1)
        if weights is not None:
            squares *= weights
        # The very same input is another's as well, as often as it counts the same.
        leader = next((other for other, known in self._seen.items() if known is x), module)
        if weights is not None or leader is module:
            leader = module
            self._seen[module] = x
            if module not in self._grams:
                self._grams[module] = Gram(module.in_features, x.device, self._free)
            self._grams[module].add(x, weights)
        self._leader[module] = leader
        self._output[module] = self._output.get(module, 0.0) + float(squares.sum())

    def inputs(self) -> dict[torch.nn.Module, Inputs | ExpertInputs | None]:
        """By module; what was noted is given up for it."""
        found = {leader: self._grams.pop(leader).inputs(self._count[leader])
                 for leader in dict.fromkeys(self._leader.values())}
        known: dict[torch.nn.Module, Inputs | ExpertInputs | None] = {
            module: found[leader] and replace(found[leader], output=self._output[module])
            for module, leader in self._leader.items()}
        return known | {module: own if own.known else None for module, own in self._experts.items()}


def calibration_of(session: Session, source: ExportSource, quants: Sequence[str]) -> tuple[Calibration | None, str]:
    """What the files of an export are rounded by, and in words; or None and why not, "" where nothing is to be."""
    if all(quant in QUANTS and quant not in COARSE for quant in quants):
        return None, BY_THEMSELVES if OF_EXPERTS in quants else ""
    if reason := not_calibrated(session, source):
        return None, reason
    assert source.architecture is not None
    checkpoint = open_tensors(source.merged)
    parameters = sum(math.prod(tensor.shape) for tensor in checkpoint.values())
    # In bf16 where it is fast: what rounding depends on is known less exactly than that anyway. Not on Apple's GPU,
    # which has no fp64 to sum in; the CPU has the same memory.
    placement = choose_placement("auto", "cpu" if best_device() == "mps" else None)
    rows, said = calibration_rows(session, source, _most_tokens(parameters, placement))
    if lacking := _lacking(placement, source.architecture, sum(map(len, rows))):
        return None, lacking
    return Calibration(LayerwiseModel(source.merged, placement, source.architecture), rows), said


def _most_tokens(parameters: int, placement: Placement) -> int:
    return TOKENS if placement.device != "cpu" else max(_FEWEST, min(_MOST, _WORK // parameters))


def _factors(columns: Iterable[int], device: str) -> int:
    """How many bytes the factors of matrices take, if no two of them share one."""
    return sum(4 * size ** 2 for count in columns for size in parts(count, device))


def _lacking(placement: Placement, architecture: Architecture, tokens: int) -> str:
    """Why there is not enough memory; empty if there is."""
    matrices = [spec for spec in architecture.tensors if len(spec.shape) == 2]
    inside = [spec for spec in matrices if spec.name.startswith("blk.")]
    experts = [spec for spec in architecture.tensors if spec.of_experts]
    factors = _factors((spec.shape[1] for spec in inside), placement.device)
    # The largest XᵀX, the copy that is factored and the factor; a layer's others, or all that are kept; its weights
    # twice, as they are read; rows that are being rounded.
    weights = sum(math.prod(spec.shape) for spec in inside) // architecture.layers
    layer = 12 * max(max(parts(spec.shape[1], placement.device)) for spec in inside) ** 2 + 8 * weights + (1 << 30)
    used = architecture.experts_used
    inputs = sum(4 * tokens * spec.shape[2] * (used if "down" in spec.name else 1) for spec in experts)
    layer += factors if factors + inputs <= KEPT else factors // architecture.layers
    # Of experts a layer's weights once, as one's are read at a time; its inputs, or all that are kept; an input of each
    # expert, which a file is checked with; and what goes into and comes out of them for one row, with gradients.
    layer += inputs if factors + inputs <= KEPT else inputs // architecture.layers
    layer += sum(placement.dtype.itemsize * math.prod(spec.shape) for spec in experts) // architecture.layers
    layer += sum(4 * spec.shape[0] * spec.shape[2] for spec in experts)
    layer += 12 * min(tokens, LONGEST) * used * sum(sum(spec.shape[1:]) for spec in experts) // architecture.layers
    # Before that, on the way back through the layers: the head's matrix; of each token the states before each layer,
    # and the row of which layers get parts, as it is looked up and as they get it.
    shapes = {spec.name: spec.shape for spec in matrices}
    head, looked_up = shapes["token_embd.weight"], shapes.get("per_layer_token_embd.weight", (0, 0))[1]
    states = tokens * ((architecture.layers + 1) * architecture.streams * head[1] + 2 * looked_up)
    back = placement.dtype.itemsize * (math.prod(head) + states) + (1 << 30)
    need = max(layer, back) + OVERHEAD[placement.device]
    room = min(available(device) for device in {placement.device, "cpu"})
    if need <= USABLE * room:
        return ""
    return f"it takes {gigabytes(need)} of memory, and {gigabytes(room)} are available"
