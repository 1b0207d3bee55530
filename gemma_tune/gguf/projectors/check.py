"""Whether a projector's file holds a checkpoint's towers: read back and compared tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gemma_tune.base.errors import WorkFailed
from gemma_tune.gguf.check import excess, missing_and_unknown, relative, shards_of
from gemma_tune.gguf.projectors.parts import Projector, TowerTensor
from gemma_tune.gguf.reader import GgufFile

_SHOWN = 20  # problems


def check_projector(projector: Projector, checkpoint: Path, path: Path) -> tuple[float, str]:
    """Compare all tensors of the file ``path`` with the checkpoint's.

    Returns:
        The largest relative error (RMS of the difference over RMS of the tensor), and the tensor's name.

    Raises:
        UserError: a file that cannot be read.
        WorkFailed: a tensor is missing, unknown or misshapen, or off by more than its type explains.
    """
    file = GgufFile(path, keys=())
    shards = {source: (shard, name) for name, shard in shards_of(checkpoint).items()
              if (source := projector.source_of(name))}
    problems = missing_and_unknown(file, [(spec, spec.name) for spec in projector.tensors])
    worst, where = 0.0, ""
    for spec in projector.tensors if not problems else ():
        error, most = _compared(spec, file, *shards[spec.source])
        if not most <= 1:
            problems.append(f"{spec.name}: off by {error:.2%}, more than {file.tensors[spec.name].type.name} explains")
        if not error <= worst:
            worst, where = error, spec.name
    if problems:
        raise WorkFailed(f"{path.name} does not hold the towers of {checkpoint}", "please report this",
                         problems[:_SHOWN])
    return worst, where


def _compared(spec: TowerTensor, file: GgufFile, shard: Path, name: str) -> tuple[float, float]:
    """Relative error of a tensor, and how its worst value compares to what the type explains (at most 1)."""
    from safetensors import safe_open

    with safe_open(shard, framework="pt") as tensors:  # read by other means than those it was written with
        stored = tensors.get_tensor(name) if spec.row is None else tensors.get_slice(name)[spec.row]
    expected = spec.change(stored.float().numpy())
    got = file.rows(spec.name).reshape(spec.shape)
    off, size = np.abs(got - expected), np.abs(expected)
    error = relative(float(np.vdot(off, off)), float(np.vdot(size, size)))
    return error, excess(off, size, file.tensors[spec.name].type)
