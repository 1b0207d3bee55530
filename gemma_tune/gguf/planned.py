"""What every GGUF file is written by: tensors with their types, and a summary of what became of them."""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np

from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.base.files import replacing
from gemma_tune.base.words import gigabytes
from gemma_tune.gguf.compensated import Rounded
from gemma_tune.gguf.types import FILE_TYPES, TypeChoice, nbytes

METADATA_MARGIN = 1024 * 1024  # bytes allowed for metadata besides the vocabulary

OnTensor = Callable[[int, int, str], None]  # how many are done, how many there are, the name of the last


@dataclass(frozen=True)
class GgufSummary:
    """What was written.

    Args:
        path: the finished file.
        size_bytes: its size.
        quant: the name from `QUANTS` that was asked for.
        tensor_types: GGML type name → number of tensors.
        fallbacks: (tensor, reason) for each matrix whose rows do not fit the type that was asked for.
        calibrated: tensor → what became of it, for those that were rounded by what they are multiplied with.
    """

    path: Path
    size_bytes: int
    quant: str
    tensor_types: dict[str, int]
    fallbacks: tuple[tuple[str, str], ...]
    calibrated: Mapping[str, Rounded] = field(default_factory=dict)


class Planned:
    """A tensor on its way into a file. `GGUFWriter.write_tensor_data` wants no more of an array than its size and
    ``tofile``, which the package's own lazy arrays have as well."""

    spec: Any  # with a name, and the shape in the file
    choice: TypeChoice

    @property
    def nbytes(self) -> int:
        """Size in the GGUF, in bytes."""
        return nbytes(self.choice.type, self.spec.shape)

    def tofile(self, file: BinaryIO) -> None:
        """Write the tensor's bytes."""
        for data in self.encoded():
            # Not the array's own tofile(): that doesn't say why writing failed.
            file.write(np.ascontiguousarray(data).data)

    def encoded(self) -> Iterator[np.ndarray]:
        """The bytes in the type that was chosen, one or several rows at a time."""
        raise NotImplementedError


def write_planned(out: Path, architecture: str, plan: Sequence[Planned], quant: str,
                  metadata: Callable[[gguf.GGUFWriter], None], *, room: int = 0, on_tensor: OnTensor | None = None,
                  calibrated: Mapping[str, Rounded] | None = None) -> GgufSummary:
    """Write tensors and what describes them as the GGUF file ``out``, beside which it is made.

    Args:
        plan: the tensors, in the order of the file.
        quant: the name from `QUANTS` that the summary has.
        metadata: adds the keys, when the writer knows all tensors.
        room: bytes that these take, besides a usual number.
        on_tensor: called after each tensor.
        calibrated: filled by the tensors while they are written.

    Raises:
        UserError: a tensor's values can't be written.
        WorkFailed: not enough disk space, or writing failed. ``out`` is then as it was.
    """
    with replacing(out) as partial, ExitStack() as stack:
        require_space(out.parent, sum(padded(tensor.nbytes) for tensor in plan) + room + METADATA_MARGIN)
        writer = gguf.GGUFWriter(partial, architecture)
        stack.callback(writer.close)
        _add_tensor_infos(writer, plan)  # before the metadata, which counts parameters
        metadata(writer)
        _write_file(writer, plan, on_tensor)
    types = dict(Counter(tensor.choice.type.name for tensor in plan))
    fallbacks = tuple((tensor.spec.name, tensor.choice.fallback) for tensor in plan if tensor.choice.fallback)
    return GgufSummary(out, out.stat().st_size, quant, types, fallbacks, calibrated or {})


def add_general(writer: gguf.GGUFWriter, name: str, kind: str = gguf.GGUFType.MODEL) -> None:
    """Add the `general.*` keys that follow from the name and the number of parameters."""
    counts = writer.get_total_parameter_count()
    _, _, basename, finetune, version, size = gguf.Metadata.get_model_id_components(name, counts[0])
    writer.add_type(kind)
    writer.add_name(name)
    for value, add in ((basename, writer.add_basename), (finetune, writer.add_finetune), (version, writer.add_version)):
        if value:
            add(value)
    writer.add_size_label(size or gguf.size_label(*counts))


def add_format(writer: gguf.GGUFWriter, quant: str) -> None:
    """Add the `general.*` keys that follow from the number format."""
    writer.add_file_type(FILE_TYPES[quant])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def largest_magnitude(values: np.ndarray, source: str | None) -> float:
    """Of a tensor's values, or of some of them.

    Raises:
        UserError: a value is NaN or infinite; ``source`` names the tensor.
    """
    largest = float(max(values.max(), -values.min()))  # NaN wins both
    if not math.isfinite(largest):
        hint = "Training diverged or the merge went wrong: train again with a lower learning rate."
        raise UserError(f"The checkpoint's {source} holds NaN or infinite values.", hint)
    return largest


def require_space(folder: Path, needed: int) -> None:
    """Refuse to start what can't be finished. An earlier file stays until the end, so its space doesn't count.

    Raises:
        WorkFailed: less than ``needed`` bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        hint = "Free some space, choose a smaller --quant, or another folder."
        raise WorkFailed(f"{folder} has {gigabytes(free)} free; the GGUF file takes {gigabytes(needed)}.", hint)


def padded(nbytes: int) -> int:
    """Bytes that a tensor of so many takes in a file."""
    return gguf.GGUFWriter.ggml_pad(nbytes, gguf.GGUF_DEFAULT_ALIGNMENT)


def _add_tensor_infos(writer: gguf.GGUFWriter, plan: Sequence[Planned]) -> None:
    """Tell a writer which tensors there will be."""
    for tensor in plan:
        # The number type is a formality: with `raw_dtype` given it only says that the shape counts elements.
        writer.add_tensor_info(tensor.spec.name, tensor.spec.shape, np.dtype(np.float32), tensor.nbytes,
                               tensor.choice.type)


def _write_file(writer: gguf.GGUFWriter, plan: Sequence[Planned], on_tensor: OnTensor | None) -> None:
    """Write header, metadata and tensors to the writer's file, and make sure that they are on the disk."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, tensor in enumerate(plan, start=1):
        writer.write_tensor_data(tensor)  # type: ignore[arg-type]  # see Planned
        if on_tensor:
            on_tensor(done, len(plan), tensor.spec.name)
    writer.flush()
    for file in writer.fout or ():
        os.fsync(file.fileno())
