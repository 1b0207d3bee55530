"""Types for a size: held against every possible choice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from gemma_tune.gguf.mix import Matrix, best_mix, types_for
from gemma_tune.gguf.types import nbytes


def test_types_whose_blocks_fit():
    assert types_for(256) == (Type.Q2_K, Type.Q3_K, Type.Q4_0, Type.Q4_K, Type.Q4_1, Type.Q5_0, Type.Q5_K,
                              Type.Q5_1, Type.Q6_K, Type.Q8_0)
    assert types_for(640) == (Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0)
    assert types_for(100) == ()


@pytest.fixture
def matrices() -> dict[str, Matrix]:
    rng = np.random.default_rng(0)
    found = {}
    for n, shape in enumerate([(64, 256), (64, 256), (32, 640), (512, 256), (8, 64)]):
        scale = 10 ** rng.uniform(-3, 0)
        bits = {kind: 8 * nbytes(kind, (1, shape[1])) / shape[1] for kind in types_for(shape[1])}
        found[str(n)] = Matrix(shape, {kind: scale * 4 ** -b * rng.uniform(0.5, 2) for kind, b in bits.items()})
    return found


def cost(matrices, types) -> float:
    return sum(matrix.costs[types[name]] for name, matrix in matrices.items())


def size(matrices, types) -> int:
    return sum(nbytes(kind, matrices[name].shape) for name, kind in types.items())


def test_no_other_choice_of_that_size_is_much_better(matrices):
    everything = [dict(zip(matrices, kinds)) for kinds in itertools.product(*(m.costs for m in matrices.values()))]
    least, most = (f(size(matrices, types) for types in everything) for f in (min, max))
    step = nbytes(Type.Q8_0, (512, 256)) - nbytes(Type.Q4_0, (512, 256))  # the largest that may not fit
    for room in np.linspace(least, most, 25):
        found = best_mix(matrices, int(room))
        assert size(matrices, found) <= room
        best = min(cost(matrices, types) for types in everything if size(matrices, types) <= room)
        assert cost(matrices, found) <= 1.5 * best or room - size(matrices, found) < step
    assert cost(matrices, best_mix(matrices, most)) == best


def test_ends(matrices):
    least = sum(min(nbytes(kind, m.shape) for kind in m.costs) for m in matrices.values())
    assert best_mix(matrices, least - 1) is None
    assert set(best_mix(matrices, least).values()) == {Type.Q4_0} or size(matrices, best_mix(matrices, least)) == least
    whole = best_mix(matrices, 1 << 40)
    assert all(m.costs[whole[name]] == min(m.costs.values()) for name, m in matrices.items())


def test_a_type_that_costs_more_than_a_smaller_one_is_never_taken():
    odd = {"a": Matrix((64, 256), {Type.Q4_0: 1.0, Type.Q4_1: 2.0, Type.Q8_0: 1.5})}
    assert best_mix(odd, 1 << 40) == {"a": Type.Q4_0}


def test_a_matrix_that_matters_more_gets_more_bits():
    costs = {Type.Q4_0: 1.0, Type.Q8_0: 0.01}
    two = {"matters": Matrix((64, 256), {kind: 10 * c for kind, c in costs.items()}), "hardly": Matrix((64, 256), costs)}
    room = nbytes(Type.Q4_0, (64, 256)) + nbytes(Type.Q8_0, (64, 256))
    assert best_mix(two, room) == {"matters": Type.Q8_0, "hardly": Type.Q4_0}
