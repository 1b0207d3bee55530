"""Whether a GGUF file holds a checkpoint's weights: read back and compared tensor by tensor, after each export."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.base.strict_json import object_in
from gemma_tune.gguf.architectures.experts import columns_of, in_model
from gemma_tune.gguf.architectures.parts import Architecture, TensorSpec
from gemma_tune.gguf.compensated import Rounded
from gemma_tune.gguf.experts import PACKED, together
from gemma_tune.gguf.reader import GgufFile
from gemma_tune.gguf.types import dequantise, quantise

_ELEMENTS = 4 * 1024 * 1024  # compared at a time: 16 MiB as float32, a few times over
_LEAST_F16 = 2.0 ** -25  # half of the step between the smallest numbers of float16

# What a type may be off by at most: a part of the largest magnitude in the block, and so many halves of float16's
# smallest step, which matter where a block's scale is that small. Plain types: half of the last bit (float32 is not
# rounded, but 1 + weight - 1 is). Blocks of 32: one step (Q4_0, Q5_0, whose last step has no partner on the other side)
# or half of one, and float16's rounding of scale and minimum. K types: their scales are found by a search, without a
# proven bound; measured over twelve distributions, from constant to Cauchy, it was 0.027 in Q6_K, 0.064 in Q5_K, 0.12
# in Q4_K and 0.29 in Q3_K, and twice that is allowed. In Q2_K it was 0.75, where all but a few weights of a block are
# zero. MXFP4 has the steps 4, 6 and no 8, below which a block's largest value may lie. A row in the wrong place is off
# by 1 and more.
LARGEST_ERROR = {
    Type.F32: (2.0 ** -22, 8), Type.BF16: (2.0 ** -8, 0), Type.F16: (2.0 ** -11, 1), Type.Q8_0: (0.0045, 127),
    Type.Q5_1: (0.034, 32), Type.Q5_0: (0.0631, 16), Type.Q4_1: (0.0685, 16), Type.Q4_0: (0.126, 8),
    Type.Q6_K: (0.055, 32 * 128), Type.Q5_K: (0.13, 32 * 63), Type.Q4_K: (0.24, 16 * 63), Type.Q3_K: (0.58, 8 * 32),
    Type.Q2_K: (0.95, 4 * 15), Type.MXFP4: (0.2501, 0),
}  # fmt: skip

# Where a checkpoint holds each tensor: file and name; of experts that are stored apart, of each.
Shards = Mapping[str, Sequence[tuple[Path, str]]]

# Rows of the file as float32, from where rows start that are expected, to these.
Rows = Callable[[int, np.ndarray], np.ndarray]

# Of a calibrated matrix's output, likewise: plain rounding's error of the weights is the most that it leaves, where its
# inputs are even. Where they are not, what plain rounding leaves of that very output is the measure.
MOST_OF_OUTPUT = {Type.Q8_0: 0.02, Type.Q6_K: 0.05, Type.Q5_1: 0.1, Type.Q5_0: 0.1, Type.Q5_K: 0.1, Type.Q4_1: 0.2,
                  Type.Q4_0: 0.2, Type.Q4_K: 0.2, Type.Q3_K: 0.4, Type.Q2_K: 0.8}  # fmt: skip

_ANOTHER = 0.5  # of the square of an expert's output; where another expert stands, twice that square is off


def worst_error(checkpoint: Path, gguf_path: Path, architecture: Architecture,
                calibrated: Mapping[str, Rounded] | None = None) -> tuple[float, str]:
    """Compare all tensors of a GGUF with a checkpoint's.

    A calibrated one may be far from the checkpoint's where nothing is multiplied with it. What is compared is its
    output for some of the inputs that it was calibrated by; and the file has to hold the very bytes that were chosen.

    Args:
        checkpoint: folder with safetensors.
        architecture: says which tensors there are and how their values changed.
        calibrated: tensors that were rounded by what they are multiplied with.

    Returns:
        The largest relative error (RMS of the difference over RMS of the tensor, of a calibrated one over that of its
        output), and the tensor's name.

    Raises:
        UserError: a file that cannot be read.
        WorkFailed: a tensor is missing, unknown or misshapen, or off by more than its type explains.
    """
    file = GgufFile(gguf_path, keys=())
    shards = together({architecture.canonical(name): (path, name) for name, path in shards_of(checkpoint).items()})
    specs = [spec for spec in architecture.tensors if spec.values is not None
             or {spec.source, *(f"{in_model(spec.source or '')[0]}{part}" for part in ("", PACKED[0]))} & shards.keys()]
    held = [(spec, _stored_as(spec, file, architecture)) for spec in specs]
    problems = missing_and_unknown(file, held)
    worst, where = 0.0, ""
    for spec, name in held if not problems else ():
        if rounded := (calibrated or {}).get(name):
            error, wrong = _of_calibrated(spec, file, name, shards, rounded)
        else:
            error, most = _compared(spec, file, name, shards)
            kind = file.tensors[name].type
            wrong = [] if most <= 1 else [f"{name}: off by {error:.2%}, more than {kind.name} explains"]
        problems += wrong
        if not error <= worst:
            worst, where = error, name
    if problems:
        raise WorkFailed(f"{gguf_path.name} does not hold the weights of {checkpoint}", "please report this",
                         problems[:20])
    return worst, where


def _of_calibrated(spec: TensorSpec, file: GgufFile, name: str, shards: Shards, rounded: Rounded
                   ) -> tuple[float, list[str]]:
    """The error of a calibrated tensor's output, and what is wrong with it."""
    kind = file.tensors[name].type
    error = _output_error(spec, shards, rounded, partial(_stored, file, name))
    problems = [] if file.sha256(name) == rounded.sha256 else [f"{name}: not what was written"]
    if (not error <= MOST_OF_OUTPUT[kind]
            and not error <= _output_error(spec, shards, rounded, partial(_plainly_rounded, spec, kind))):
        problems.append(f"{name}: its output is off by {error:.2%}, more than {kind.name} explains")
    return error, problems


def _stored_as(spec: TensorSpec, file: GgufFile, architecture: Architecture) -> str:
    """The name of the tensor that has a spec's values; a head that equals the embedding is not stored."""
    if spec.name in file.tensors or spec.tied_to is None:
        return spec.name
    return next(other.name for other in architecture.tensors if other.source == spec.tied_to)


def missing_and_unknown(file: GgufFile, held: Sequence[tuple[Any, str]]) -> list[str]:
    """What is wrong with a file's tensors, without a look at their values.

    Args:
        held: what it is to hold, each with a ``name`` and a ``shape``, and the name of the tensor that has its values.
    """
    problems = [f"{name}: unknown" for name in sorted(file.tensors.keys() - {spec.name for spec, _ in held})]
    for spec, name in held:
        stored = file.tensors.get(name)
        if stored is None:
            problems.append(f"{spec.name}: missing")
        elif stored.shape != spec.shape:
            problems.append(f"{spec.name}: {stored.shape} instead of {spec.shape}")
        elif stored.type not in LARGEST_ERROR:
            problems.append(f"{spec.name}: unexpected type {stored.type.name}")
    return problems


def _compared(
    spec: TensorSpec, file: GgufFile, name: str, shards: Shards
) -> tuple[float, float]:
    """Relative error of a tensor, and how its worst block compares to what the type explains (at most 1)."""
    kind = file.tensors[name].type
    difference = total = most = 0.0
    one_way = spec.change is not None and spec.change.one_way
    for start, expected in _expected(spec, shards):
        expected = spec.change.forward(expected) if one_way else expected
        got = file.rows(name, start, start + len(expected)).reshape(expected.shape)
        got = spec.change.backward(got) if spec.change and not one_way else got
        off, size = np.abs(got - expected), np.abs(expected)
        difference += float(np.vdot(off, off))
        total += float(np.vdot(size, size))
        most = np.maximum(most, excess(off, size, kind))
    return relative(difference, total), float(most)


def relative(difference: float, total: float) -> float:
    """Root of the mean square of what is off, of that of the values; both are sums of squares."""
    return (difference / total) ** 0.5 if total else difference ** 0.5


def excess(off: np.ndarray, size: np.ndarray, kind: Type) -> float:
    """What values are off by at most, of what their type explains.

    Args:
        off, size: magnitudes of differences and of the values, whole blocks of the type.
    """
    part, floor = LARGEST_ERROR[kind]
    block = gguf.GGML_QUANT_SIZES[kind][0]
    off, size = (a.reshape(-1, block).max(1) if block > 1 else a for a in (off, size))
    return float((off / (size * np.float32(part) + np.float32(floor * _LEAST_F16 + 1e-30))).max())


def _stored(file: GgufFile, name: str, start: int, expected: np.ndarray) -> np.ndarray:
    return file.rows(name, start, start + len(expected)).reshape(expected.shape)


def _plainly_rounded(spec: TensorSpec, kind: Type, start: int, expected: np.ndarray) -> np.ndarray:
    return dequantise(quantise(spec.change.forward(expected) if spec.change else expected, kind), kind)


def _output_error(spec: TensorSpec, shards: Shards, rounded: Rounded, rows: Rows) -> float:
    """How much of a calibrated matrix's output is off; for the inputs that are known one by one, the worse of both.

    Where a matrix makes almost nothing of an input, as values of the tokens that attention rests on, what is off is
    compared with the usual output: rounding leaves as much there as elsewhere.
    """
    if rounded.probes is None:
        return rounded.error
    if len(spec.shape) == 3:
        return max(rounded.error, _of_experts_output(spec, shards, rounded.probes, rows))
    off, size = (np.zeros(len(rounded.probes)) for _ in range(2))
    for start, expected in _expected(spec, shards):
        got = spec.change.backward(rows(start, expected)) if spec.change else rows(start, expected)
        off += np.square((got - expected) @ rounded.probes.T).sum(0)
        size += np.square(expected @ rounded.probes.T).sum(0)
    usual = np.maximum(size, np.median(size))
    each = np.divide(off, usual, out=np.zeros_like(off), where=usual > 0)
    return max(rounded.error, float(each.mean()) ** 0.5)


def _of_experts_output(spec: TensorSpec, shards: Shards, probes: np.ndarray, rows: Rows) -> float:
    """How much of the experts' outputs is off, for one input each; of one where that is far more than rounding does."""
    each = []
    for (start, expected), x in zip(_expected(spec, shards), probes, strict=True):
        size = np.square(expected @ x).sum()
        each.append(float(np.square((rows(start, expected) - expected) @ x).sum() / size) if size else 0.0)
    return (float(np.mean(each)) if max(each) < _ANOTHER else max(each)) ** 0.5


def _expected(spec: TensorSpec, shards: Shards) -> Iterator[tuple[int, np.ndarray]]:
    """A tensor's values as they should be: the row that a part begins at, and the part in float32."""
    if spec.values is not None and spec.source not in shards:
        yield 0, spec.values
        return
    from safetensors import safe_open

    if len(spec.shape) == 3 or spec.turned:
        yield from _of_experts(spec, shards)
        return
    [(path, name)] = shards[spec.source]
    step, own = spec.rows_at_a_time(_ELEMENTS), spec.shape[0] - spec.zero_rows
    for start in range(0, own, step):
        # Opened anew each time: what was read of a mapped file counts as memory for as long as it is open.
        with safe_open(path, framework="pt") as f:
            yield start, f.get_slice(name)[start:start + step].float().numpy()
    if spec.zero_rows:
        yield own, np.zeros((spec.zero_rows, spec.shape[1]), np.float32)


def _of_experts(spec: TensorSpec, shards: Shards) -> Iterator[tuple[int, np.ndarray]]:
    """One expert at a time, of one tensor of all or of one for each; or half of one that holds two matrices. Of vectors
    those of all experts."""
    from safetensors import safe_open

    joined, half = (spec.source, None) if spec.source in shards else in_model(str(spec.source))
    if joined not in shards:
        yield from _of_packed([shards[f"{joined}{part}"] for part in PACKED], spec.shape, half)
        return
    members, rows = shards[joined], spec.shape[1]
    if len(spec.shape) == 2:
        [(path, name)] = members
        with safe_open(path, framework="pt") as f:
            yield 0, f.get_tensor(name).float().numpy()[:, columns_of(half)]
        return
    for n in range(spec.shape[0]):
        path, name = members[n % len(members)]
        with safe_open(path, framework="pt") as f:
            stored = f.get_slice(name)
            matrix = stored[n if len(stored.get_shape()) == 3 else slice(None)].float().numpy()
        if spec.turned:
            yield n * rows, matrix[:, columns_of(half)].T
            continue
        yield n * rows, matrix if half is None else matrix[half * rows:][:rows]


def _of_packed(parts: Sequence[Sequence[tuple[Path, str]]], shape: tuple[int, ...], half: int | None
               ) -> Iterator[tuple[int, np.ndarray]]:
    """As :func:`_of_experts`: of experts in MXFP4, as Transformers reads it."""
    import torch
    from safetensors import safe_open
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    for n in range(shape[0]):
        of_one = []
        for [(path, name)] in parts:
            with safe_open(path, framework="pt") as f:
                of_one.append(f.get_slice(name)[n:n + 1])
        [matrix] = convert_moe_packed_tensors(*of_one, dtype=torch.float32)
        yield n * shape[1], matrix.numpy()[:, columns_of(half)].T


def shards_of(checkpoint: Path) -> dict[str, Path]:
    """Name of each tensor of a checkpoint → the file that holds it."""
    from safetensors import SafetensorError, safe_open

    index = checkpoint / "model.safetensors.index.json"
    try:
        if not (checkpoint / "model.safetensors").is_file():
            names = object_in(index)["weight_map"]
            return {name: checkpoint / Path(file).name for name, file in names.items()}
        with safe_open(checkpoint / "model.safetensors", framework="pt") as f:
            return dict.fromkeys(f.keys(), checkpoint / "model.safetensors")
    except (OSError, ValueError, KeyError, SafetensorError) as e:
        raise UserError(f"the weights in {checkpoint} can't be read: {e}", "merge again") from e
