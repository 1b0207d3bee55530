"""Which type each matrix of a file gets: by what rounding it was measured to cost, for the size that was asked for."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

from gguf import GGMLQuantizationType as Type

from gemma_tune.base.errors import UserError
from gemma_tune.base.listener import Listener
from gemma_tune.base.words import size_in_bytes, size_text
from gemma_tune.export.calibration import Calibration
from gemma_tune.export.files import ExportSource
from gemma_tune.export.sensitivity import Costs
from gemma_tune.gguf.architectures.parts import TensorSpec
from gemma_tune.gguf.mix import FEW_BITS, Matrix, best_mix, types_for
from gemma_tune.gguf.planned import padded
from gemma_tune.gguf.tensors import tensors_of
from gemma_tune.gguf.types import COARSE, MIXED, choose_types, nbytes
from gemma_tune.gguf.writer import vocabulary_bytes

# Tokens times parameters, as for the calibration itself.
_WORK = 1_000_000_000_000
_FEWEST, _MOST = 256, 1024  # tokens
_FEW_BITS = ("q3_k_l", "q3_k_m", "q2_k")
_METADATA = 8 * 1024  # bytes for what describes the model, besides vocabulary, chat template and tensors
_INFO = 44  # bytes that describe a tensor, at most, besides its name


@dataclass
class Mixes:
    """The mixes of one export.

    Args:
        calibration: of the merged model.
        on_grid: whether the base model was quantised before it was trained. Rounding a matrix to the base's own grid
            then takes the training back, in all matrices alike, while what is measured takes their errors as
            independent: the mix that was expected to be better than llama.cpp's q5_k_m of the demo diverged three times
            as much. So named formats keep llama.cpp's mixes.
    """

    source: ExportSource
    calibration: Calibration
    listener: Listener
    on_grid: bool = False
    _costs: Costs = field(default_factory=dict)

    def require_room(self, labels: Sequence[str]) -> None:
        """What is known before anything is measured.

        Raises:
            UserError: no file of a size can hold the model.
        """
        for size in filter(None, map(size_in_bytes, labels)):
            self._fitting(size, {spec.name: Matrix(spec.shape, dict.fromkeys(types_for(spec.shape[-1]), 0.0))
                                 for spec in self._to_choose})

    def measure(self, labels: Sequence[str]) -> None:
        """Measure how much depends on each token, and what rounding costs where a mix depends on that."""
        sizes = [size for size in map(size_in_bytes, labels) if size]
        if not sizes and not any(label in COARSE[1:] for label in labels):  # q8_0 alone loses hardly anything
            return
        types, parameters = {}, sum(math.prod(spec.shape) for spec in self._to_choose)
        mixed = [size for size in sizes if self._largest_format(size) is None]
        if mixed or any(label in MIXED and not self.on_grid for label in labels):
            few = any(map(self._takes_few_bits, labels))
            types = {spec.source: _some(types_for(spec.shape[-1]), few) for spec in self._to_choose}
        doing = "measuring how much depends on each token" + (", and what rounding each matrix costs" if types else "")
        self._costs = self.calibration.weigh(types, min(_MOST, max(_FEWEST, _WORK // max(1, parameters))),
                                             partial(self.listener.progress, doing))

    def of(self, label: str) -> tuple[str, dict[str, Type]]:
        """The named format that a file's metadata says, and types of matrices in place of those that it gives them.

        Args:
            label: a format, or a size as ``--size`` takes it.

        Raises:
            UserError: no file of the size can hold the model.
        """
        size = size_in_bytes(label)
        return self._of_size(size) if size else (label, self._of_format(label))

    def _of_format(self, quant: str) -> dict[str, Type]:
        """For a format whose name promises a size and no single type; no larger than llama.cpp's mix."""
        if quant not in MIXED or self.on_grid:
            return {}
        chosen, matrices = self._llama_cpp(quant), self._matrices(self._takes_few_bits(quant))
        room = sum(nbytes(chosen[name], matrix.shape) for name, matrix in matrices.items())
        best = best_mix(matrices, room)
        return best if best and _cost(matrices, best) <= _cost(matrices, chosen) else {}

    def _of_size(self, size: int) -> tuple[str, dict[str, Type]]:
        """The best mix for a file of no more than ``size`` bytes: the format that is nearest to it, and its types. Of a
        model that comes from a quantised one, the largest format that fits.

        Raises:
            UserError: even the smallest types take more.
        """
        if quant := self._largest_format(size):
            return quant, {}
        matrices = self._matrices(self._too_small_for_four_bits(size))
        best = self._fitting(size, matrices)
        taken = sum(nbytes(kind, matrices[name].shape) for name, kind in best.items())
        sizes = self._sizes({name: matrix.shape for name, matrix in matrices.items()})
        return min(COARSE, key=lambda quant: abs(sizes[quant] - taken)), best

    def _takes_few_bits(self, label: str) -> bool:
        """Whether matrices may get less than four bits, which a format or a size with room for more does without: what
        they cost is measured less well, as rounding then changes more than the gradients tell of."""
        size = size_in_bytes(label)
        return self._too_small_for_four_bits(size) if size else label in _FEW_BITS

    def _too_small_for_four_bits(self, size: int) -> bool:
        shapes = {spec.name: spec.shape for spec in self._to_choose}
        return size - self._besides(shapes) < self._sizes(shapes)["q4_k_s"]

    def _largest_format(self, size: int) -> str | None:
        """Where the base was quantised, what was measured would choose far worse than the largest format that fits,
        if one does."""
        if not self.on_grid:
            return None
        shapes = {spec.name: spec.shape for spec in self._to_choose}
        room, sizes = size - self._besides(shapes), self._sizes(shapes)
        return max((quant for quant in COARSE if sizes[quant] <= room), key=sizes.__getitem__, default=None)

    def _sizes(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Bytes of these matrices in each format."""
        return {quant: sum(nbytes(kind, shapes[name]) for name, kind in self._llama_cpp(quant).items()
                           if name in shapes) for quant in COARSE}

    def _fitting(self, size: int, matrices: Mapping[str, Matrix]) -> dict[str, Type]:
        """The best types of matrices for a file of no more than ``size`` bytes."""
        besides = self._besides(matrices)
        best = best_mix(matrices, size - besides)
        if best is None:
            least = besides + sum(min(nbytes(kind, matrix.shape) for kind in matrix.costs)
                                  for matrix in matrices.values())
            raise UserError(f"no file of this model fits into {size_text(size)}: the fewest bits take "
                            f"{size_text(least)}",
                            f"ask for more, such as --size {-(-least // 1_000_000)}MB, or train a smaller model")
        return best

    def _matrices(self, few: bool = True) -> dict[str, Matrix]:
        """Those that were measured, by their names in the file.

        Args:
            few: whether they may get less than four bits.
        """
        return {spec.name: Matrix(spec.shape, {kind: costs[kind] for kind in _some(costs, few)})
                for spec in self._to_choose if (costs := self._costs.get(spec.source))}

    @cached_property
    def _to_choose(self) -> list[TensorSpec]:
        """The matrices whose types can be chosen."""
        quantised = {name for name, kind in self._llama_cpp("q8_0").items() if kind == Type.Q8_0}
        return [spec for spec in self._specs if len(spec.shape) > 1 and spec.source and spec.name in quantised]

    @cached_property
    def _specs(self) -> list[TensorSpec]:
        """What the file holds; finding it out can mean reading the head and the embedding."""
        assert self.source.architecture is not None
        return [spec for spec, _ in tensors_of(self.source.architecture, self.source.merged)]

    def _llama_cpp(self, quant: str) -> dict[str, Type]:
        """Every tensor's type in llama.cpp's mix."""
        assert self.source.architecture is not None
        tensors = [(spec.name, spec.shape) for spec in self._specs]
        choices = choose_types(quant, tensors, self.source.architecture)
        return {name: choice.type for (name, _), choice in zip(tensors, choices, strict=True)}

    def _besides(self, matrices: Collection[str]) -> int:
        """Bytes of a file that do not depend on the types of these matrices."""
        assert self.source.parts is not None
        kinds = self._llama_cpp("q8_0")
        # A multiple of 32 elements takes a multiple of 2 bytes, and each tensor is filled up to one of 32.
        rest = sum(padded(nbytes(kinds[spec.name], spec.shape)) if spec.name not in matrices else 32
                   for spec in self._specs)
        rest += sum(_INFO + len(spec.name) for spec in self._specs)
        return rest + vocabulary_bytes(self.source.parts.vocabulary) + len(self.source.template.encode()) + _METADATA


def _some(types: Iterable[Type], few: bool) -> list[Type]:
    return [kind for kind in types if few or kind not in FEW_BITS]


def _cost(matrices: Mapping[str, Matrix], types: Mapping[str, Type]) -> float:
    """Of the matrices that were measured; a type that was not counts as none of them."""
    return sum(matrix.costs.get(types[name], 0.0) for name, matrix in matrices.items())
