"""Writes a checkpoint's projector as a GGUF file of its own: matrices in float16, all else in float32."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from gemma_tune.base.errors import UserError
from gemma_tune.base.files import replacing
from gemma_tune.base.tensors import READABLE, StoredTensor, open_tensors
from gemma_tune.gguf.projectors.parts import ARCHITECTURE, Projector, TowerTensor
from gemma_tune.gguf.types import FILE_TYPES, LARGEST, TypeChoice, nbytes, quantise
from gemma_tune.gguf.writer import (
    METADATA_MARGIN,
    GgufSummary,
    add_general,
    add_tensor_infos,
    largest_magnitude,
    padded,
    require_space,
    write_file,
)

QUANT = "f16"


@dataclass(frozen=True)
class PlannedTower:
    """One tensor on its way into the file, as ``gguf.writer.Planned`` asks for it."""

    spec: TowerTensor
    stored: StoredTensor
    choice: TypeChoice

    @property
    def nbytes(self) -> int:
        return nbytes(self.choice.type, self.spec.shape)

    def tofile(self, file: BinaryIO) -> None:
        file.write(np.ascontiguousarray(quantise(_values(self.spec, self.stored), self.choice.type)).data)


def write_projector(
    projector: Projector, checkpoint: Path, path: Path, *, name: str,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> GgufSummary:
    """Write what ``projector_of`` made of ``checkpoint`` as the GGUF file ``path``.

    Args:
        path: an earlier file is replaced only when the new one is whole.
        name: the model's name for people.
        on_progress: called after each tensor with how many are done, how many there are, and its name.

    Returns:
        What was written; ``fallbacks`` are matrices in float32, whose values float16 does not hold.

    Raises:
        UserError: the checkpoint's tensors don't fit its config.json, or hold NaN or infinite values.
        WorkFailed: not enough disk space, or writing failed. ``path`` is then as it was.
    """
    plan = [PlannedTower(spec, stored, _choice(spec, stored)) for spec, stored in towers_of(projector, checkpoint)]
    with replacing(path) as partial, ExitStack() as stack:
        require_space(path.parent, sum(padded(tensor.nbytes) for tensor in plan) + METADATA_MARGIN)
        writer = gguf.GGUFWriter(partial, ARCHITECTURE)
        stack.callback(writer.close)
        add_tensor_infos(writer, plan)
        add_general(writer, name, gguf.GGUFType.MMPROJ)
        projector.metadata(writer)
        writer.add_file_type(FILE_TYPES[QUANT])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        write_file(writer, plan, on_progress)
    types = dict(Counter(tensor.choice.type.name for tensor in plan))
    fallbacks = tuple((tensor.spec.name, tensor.choice.fallback) for tensor in plan if tensor.choice.fallback)
    return GgufSummary(path, path.stat().st_size, QUANT, types, fallbacks)


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
