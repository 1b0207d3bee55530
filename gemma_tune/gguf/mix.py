"""Which matrix gets which type, for a file of a given size: those whose rounding costs most get more bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import gguf
from gguf import GGMLQuantizationType as Type

from gemma_tune.gguf.types import nbytes

# From the fewest bits to the most; none is larger and worse than another.
FEW_BITS = (Type.Q2_K, Type.Q3_K)
CANDIDATES = (*FEW_BITS, Type.Q4_0, Type.Q4_K, Type.Q4_1, Type.Q5_0, Type.Q5_K, Type.Q5_1, Type.Q6_K, Type.Q8_0)


@dataclass(frozen=True)
class Matrix:
    """A matrix whose type is to be chosen.

    Args:
        shape: (rows, columns), or of all experts (experts, rows, columns).
        costs: what rounding it to each type costs, in any unit that adds up; a type that is not in it is not taken.
    """

    shape: tuple[int, ...]
    costs: Mapping[Type, float]


def types_for(columns: int) -> tuple[Type, ...]:
    """The types whose blocks fit into rows of so many columns."""
    return tuple(kind for kind in CANDIDATES if columns % gguf.GGML_QUANT_SIZES[kind][0] == 0)


def best_mix(matrices: Mapping[str, Matrix], room: int) -> dict[str, Type] | None:
    """Types with the least sum of costs that take no more than ``room`` bytes; None if even the smallest take more.

    Steps to a larger type are taken in the order of what they save for each byte, as far as they fit.
    """
    steps = {name: _worthwhile(matrix) for name, matrix in matrices.items()}
    chosen = {name: 0 for name in matrices}
    room -= sum(nbytes(steps[name][0], matrix.shape) for name, matrix in matrices.items())
    if room < 0:
        return None
    order = sorted(((_gain(matrices[name], kinds[n], kinds[n + 1]), name, n) for name, kinds in steps.items()
                    for n in range(len(kinds) - 1)), key=lambda step: (-step[0], step[1], step[2]))
    for _, name, n in order:
        kinds, shape = steps[name], matrices[name].shape
        more = nbytes(kinds[n + 1], shape) - nbytes(kinds[chosen[name]], shape)
        if n + 1 > chosen[name] and more <= room:  # also past a step that did not fit
            chosen[name] = n + 1
            room -= more
    return {name: steps[name][n] for name, n in chosen.items()}


def _worthwhile(matrix: Matrix) -> Sequence[Type]:
    """Types by size, without those that cost more, for their size, than others: each step saves less than the last."""
    kinds = sorted(matrix.costs, key=lambda kind: (nbytes(kind, matrix.shape), matrix.costs[kind]))
    kept: list[Type] = []
    for kind in kinds:
        if kept and matrix.costs[kind] >= matrix.costs[kept[-1]]:
            continue
        if kept and nbytes(kind, matrix.shape) == nbytes(kept[-1], matrix.shape):
            continue  # of two of a size the better came first
        while len(kept) > 1 and _gain(matrix, kept[-2], kept[-1]) <= _gain(matrix, kept[-1], kind):
            kept.pop()
        kept.append(kind)
    return kept


def _gain(matrix: Matrix, less: Type, more: Type) -> float:
    """What a byte more saves."""
    return (matrix.costs[less] - matrix.costs[more]) / (nbytes(more, matrix.shape) - nbytes(less, matrix.shape))
