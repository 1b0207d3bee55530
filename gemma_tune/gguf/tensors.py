"""The tensors of a language model's GGUF file: where the checkpoint has them, and how their values get into the file.

They are read, changed and quantised some rows at a time, so that memory use doesn't grow with the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type

from gemma_tune.base.errors import UserError
from gemma_tune.base.tensors import READABLE, StoredTensor, open_tensors
from gemma_tune.gguf.architectures.experts import in_model
from gemma_tune.gguf.architectures.parts import Architecture, TensorSpec
from gemma_tune.gguf.compensated import Rounding
from gemma_tune.gguf.experts import PACKED, Member, Source, by_rows, experts_of, together
from gemma_tune.gguf.planned import Planned, largest_magnitude
from gemma_tune.gguf.types import LARGEST, TypeChoice, choose_types, quantise

CHUNK_ELEMENTS = 4 * 1024 * 1024  # rows read at a time: 16 MiB as float32, and a few times that while quantising
CALIBRATED_ELEMENTS = 4 * CHUNK_ELEMENTS  # column by column, so that many rows at a time save most of the steps


@dataclass(frozen=True)
class PlannedTensor(Planned):
    """One tensor of a language model.

    Args:
        spec: its names, shape, and what happens to its values.
        stored: where the checkpoint holds it; None where the values are in ``spec``.
        choice: GGML type to write.
        rounding: by what its matrix is multiplied with, where that is known; else every weight to the nearest value.
    """

    spec: TensorSpec
    stored: Source | None
    choice: TypeChoice
    rounding: Rounding | None = None

    def encoded(self) -> Iterator[np.ndarray]:
        kind = self.choice.type
        changed = self.spec.change and self.spec.change.one_way
        if self.rounding and not changed and (inputs := self.rounding.knows(self.spec.source, kind)):
            each = self.spec.shape[-2]
            return self.rounding.rounded(self.spec.name, self.chunks(CALIBRATED_ELEMENTS), kind, inputs, each)
        return (quantise(rows, kind) for rows in self.chunks())

    def chunks(self, elements: int | None = None) -> Iterator[np.ndarray]:
        """Yield the values as float32 arrays, one of shape (length,) or several of (some rows, columns).

        Args:
            elements: about how many of a matrix at a time; None for ``CHUNK_ELEMENTS``.

        Raises:
            UserError: a value is NaN, infinite, or too large for the type.
        """
        spec = self.spec
        if self.stored is None:
            assert spec.values is not None
            yield spec.values
            return
        step = spec.rows_at_a_time(elements or CHUNK_ELEMENTS)
        for start in range(0, spec.rows, step):
            rows = self.stored.rows(start, start + step)
            rows = spec.change.forward(rows) if spec.change else rows
            self._check_values(rows)
            yield rows

    def _check_values(self, rows: np.ndarray) -> None:
        largest, type = largest_magnitude(rows, self.spec.source), self.choice.type
        if largest > LARGEST[type]:
            hint = "Export with --quant bf16."
            raise UserError(f"The checkpoint's {self.spec.source} holds {largest:g}, too large for {type.name}.", hint)


def planned_tensors(model: Architecture, checkpoint: Path, quant: str, types: Mapping[str, Type],
                    rounding: Rounding | None) -> list[PlannedTensor]:
    """Every tensor of a checkpoint with its type.

    Args:
        types: of some of them, by their names in the file, in place of what ``quant`` gives them.
        rounding: of matrices of few bits, if not each weight by itself.

    Raises:
        UserError: as :func:`tensors_of`.
    """
    wanted = tensors_of(model, checkpoint)
    choices = choose_types(quant, [(spec.name, spec.shape) for spec, _ in wanted], model)
    return [PlannedTensor(spec, stored, TypeChoice(types[spec.name]) if spec.name in types else choice, rounding)
            for (spec, stored), choice in zip(wanted, choices, strict=True)]


def tensors_of(model: Architecture, checkpoint: Path) -> list[tuple[TensorSpec, Source | None]]:
    """What a file of a checkpoint holds, in its order, and where the checkpoint has it.

    Raises:
        UserError: something is missing, unknown or misshapen, or cannot be written; all of it together.
    """
    stored = together({model.canonical(name): tensor for name, tensor in open_tensors(checkpoint).items()
                       if not model.left_out(name)})
    in_one = {spec.source: experts for spec in model.tensors if spec.source and spec.source not in stored
              and (experts := experts_of(stored, spec))}
    used = {f"{in_model(source)[0]}{part}" for source in in_one for part in ("", *PACKED)}
    stored = {name: members for name, members in stored.items() if name not in used} | in_one
    wanted = [spec for spec in model.tensors if spec.source in stored or spec.values is not None
              or not (spec.optional or (spec.tied_to and model.tied))]
    known = {spec.source: spec for spec in wanted if spec.source in stored or spec.values is None}
    problems = [f"{name} is missing" for name in known if name not in stored]
    problems += [f"{stored[name][0].name} is not a tensor of this model" for name in stored if name not in known]
    for name in known.keys() & stored.keys():
        problems += _unfit(stored[name], known[name])
    if problems:
        hint = "Merge again from the original base model."
        raise UserError(f"The weights in {checkpoint} don't fit its config.json.", hint, sorted(problems))
    # Tied: llama.cpp uses the embedding when the file has no output.weight.
    wanted = [spec for spec in wanted if not (spec.tied_to and _same(spec, stored))]
    if not model.own_head and (own := [spec.source for spec in wanted if spec.tied_to]):
        raise UserError(f"{checkpoint}: {own[0]} differs from the embedding, and for {model.name} llama.cpp knows no "
                        "other output head.", "Train without the output head, or with tied embeddings.")
    return [(spec, by_rows(stored[spec.source], spec) if spec.source in stored else None) for spec in wanted]


def _unfit(members: Sequence[Member], spec: TensorSpec) -> list[str]:
    """What is wrong with a tensor in a checkpoint, which can have one for each expert."""
    problems, shape = [], (spec.shape[0] - spec.zero_rows, *spec.shape[1:])
    apart = len(shape) == 3 and len(members[0].shape) < 3
    if apart and len(members) != shape[0]:
        problems.append(f"{members[0].name} is one of {len(members)}, config.json asks for {shape[0]}")
    for found in members:
        expected = shape[1:] if apart else shape
        if _as_matrix(found.shape) != expected:
            problems.append(f"{found.name} has shape {found.shape}, config.json asks for {expected}")
        if found.dtype not in READABLE:
            problems.append(f"{found.name} is {found.dtype}, which can't be exported: merge into a 16-bit base")
    return problems


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without what is 1 between rows and columns, as a convolution's over one channel."""
    return (shape[0], *(n for n in shape[1:-1] if n != 1), *shape[-1:]) if len(shape) > 2 else shape


def _same(spec: TensorSpec, stored: Mapping[str, Sequence[StoredTensor]]) -> bool:
    """Whether an explicit output head equals the embedding, bit for bit after conversion; some rows at a time."""
    one, two = (stored[name][0] for name in (spec.source or "", spec.tied_to or ""))
    rows, step = spec.shape[0], spec.rows_at_a_time(CHUNK_ELEMENTS)
    return all(np.array_equal(one.rows(i, i + step), two.rows(i, i + step)) for i in range(0, rows, step))
