"""Writes a checkpoint's projector as a GGUF file of its own: matrices in float16, all else in float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from gemma_tune.base.errors import UserError
from gemma_tune.base.tensors import READABLE, StoredTensor, open_tensors
from gemma_tune.gguf.planned import (
    GgufSummary,
    OnTensor,
    Planned,
    add_format,
    add_general,
    largest_magnitude,
    write_planned,
)
from gemma_tune.gguf.projectors.parts import ARCHITECTURE, Projector, TowerTensor
from gemma_tune.gguf.types import LARGEST, TypeChoice, quantise

QUANT = "f16"


@dataclass(frozen=True)
class PlannedTower(Planned):
    """One tensor of the projector."""

    spec: TowerTensor
    stored: StoredTensor
    choice: TypeChoice

    def encoded(self) -> Iterator[np.ndarray]:
        yield quantise(_values(self.spec, self.stored), self.choice.type)


def write_projector(
    projector: Projector, checkpoint: Path, path: Path, *, name: str,
    on_progress: OnTensor | None = None,
) -> GgufSummary:
    """Write what ``projector_of`` made of ``checkpoint`` as the GGUF file ``path``.

    Args:
        path: an earlier file is replaced only when the new one is whole.
        name: the model's name for people.
        on_progress: called after each tensor.

    Returns:
        What was written; ``fallbacks`` are matrices in float32, whose values float16 does not hold.

    Raises:
        UserError: the checkpoint's tensors don't fit its config.json, or hold NaN or infinite values.
        WorkFailed: not enough disk space, or writing failed. ``path`` is then as it was.
    """
    plan = [PlannedTower(spec, stored, _choice(spec, stored)) for spec, stored in towers_of(projector, checkpoint)]

    def metadata(writer: gguf.GGUFWriter) -> None:
        add_general(writer, name, gguf.GGUFType.MMPROJ)
        projector.metadata(writer)
        add_format(writer, QUANT)

    return write_planned(path, ARCHITECTURE, plan, QUANT, metadata, on_tensor=on_progress)


def towers_of(projector: Projector, checkpoint: Path) -> list[tuple[TowerTensor, StoredTensor]]:
    """What the file holds, in its order, and where the checkpoint has it.

    Raises:
        UserError: something is missing, unknown or misshapen, or cannot be written; all of it together.
    """
    stored = {source: tensor for name, tensor in open_tensors(checkpoint).items()
              if (source := projector.source_of(name))}
    known = {spec.source: spec for spec in projector.tensors}
    problems = [f"{source} is missing" for source in known if source not in stored]
    for source, tensor in stored.items():
        if source not in known:
            problems.append(f"{tensor.name} is not a tensor of this model")
        elif tensor.shape != known[source].stored:
            problems.append(f"{tensor.name} has shape {tensor.shape}, config.json asks for {known[source].stored}")
        elif tensor.dtype not in READABLE:
            problems.append(f"{tensor.name} is {tensor.dtype}, which can't be exported: merge into a 16-bit base")
    if problems:
        raise UserError(f"The weights in {checkpoint} don't fit its config.json.",
                        "Merge again from the original base model.", sorted(problems))
    return [(spec, stored[spec.source]) for spec in projector.tensors]


def _values(spec: TowerTensor, stored: StoredTensor) -> np.ndarray:
    """A tensor's values as they are in the GGUF, in float32."""
    if spec.row is not None:
        return spec.change(stored.rows(spec.row, spec.row + 1)[0])
    # The shape is () where it is one number.
    return spec.change(replace(stored, shape=stored.shape or (1,)).rows().reshape(stored.shape))


def _choice(spec: TowerTensor, stored: StoredTensor) -> TypeChoice:
    """float16 for matrices, unless they hold more than that does."""
    largest = largest_magnitude(_values(spec, stored), stored.name)
    if spec.exact or len(spec.shape) == 1:
        return TypeChoice(Type.F32)
    if largest > LARGEST[Type.F16]:
        return TypeChoice(Type.F32, f"it holds {largest:g}, too large for F16")
    return TypeChoice(Type.F16)
