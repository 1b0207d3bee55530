"""Writing the merged model's safetensors files, tensor by tensor and some rows at a time.

LoRA: W' = W + s (B A) with s = alpha / r (Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1), or with
s = alpha / sqrt(r) (rsLoRA: Kalajdzievski 2023, https://arxiv.org/abs/2312.03732). DoRA gives each row of W' the length
m that was learned for it: m W' / ||W'|| (Liu et al. 2024, https://arxiv.org/abs/2402.09353, equation 5). Computed in
fp32 and rounded once to the type on the disk. What the adapter leaves alone is copied as bytes.

Files are read and written, not mapped into memory, so that what is in memory does not grow with the model.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.base.strict_json import object_in
from gemma_tune.base.tensors import INDEX, SINGLE, StoredTensor
from gemma_tune.base.words import gigabytes
from gemma_tune.lora.files import Lora
from gemma_tune.merge.plan import MergePlan, Piece

if TYPE_CHECKING:
    import torch

_BLOCK = 1 << 19  # numbers that are computed at once
_COPIED = 1 << 20  # bytes that are copied at once
_SPARE = 100_000_000  # bytes on the disk for tokenizer, configuration and whatever else writes


@dataclass(frozen=True)
class Layout:
    """Which tensors go to which file, and the index that names them; ``index`` is None for a single file."""

    files: dict[str, list[Piece]]
    index: bytes | None


def lay_out(plan: MergePlan, base: Path, max_shard_size: int | None = None) -> Layout:
    """The base's own files, or as many as it takes to keep each below ``max_shard_size`` bytes.

    A tensor that is larger gets a file of its own.
    """
    files: dict[str, list[Piece]] = {}
    if max_shard_size is None:
        for piece in plan.pieces:
            files.setdefault(piece.file, []).append(piece)
    else:
        shards = list(_shards(plan.pieces, max_shard_size))
        names = ([SINGLE] if len(shards) == 1 else
                 [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))])
        files = dict(zip(names, shards))
    if list(files) == [SINGLE]:
        return Layout(files, None)
    return Layout(files, _index(files, plan, base / INDEX))


def _shards(pieces: Iterable[Piece], largest: int) -> Iterator[list[Piece]]:
    shard: list[Piece] = []
    size = 0
    for piece in pieces:
        if shard and size + piece.bytes > largest:
            yield shard
            shard, size = [], 0
        shard.append(piece)
        size += piece.bytes
    yield shard


def _index(files: Mapping[str, Sequence[Piece]], plan: MergePlan, base: Path) -> bytes:
    """The base's index where it is still right, else a new one with its remarks."""
    old = object_in(base) if base.is_file() else {}
    new = {piece.name: name for name, pieces in files.items() for piece in pieces}
    metadata = dict(old.get("metadata") or {})
    if new == old.get("weight_map") and metadata.get("total_size", plan.bytes) == plan.bytes:
        return base.read_bytes()
    metadata.pop("total_parameters", None)
    content = {"metadata": metadata | {"total_size": plan.bytes}, "weight_map": dict(sorted(new.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()


def require_space(size: int, folder: Path) -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        WorkFailed: with the figures.
    """
    free = shutil.disk_usage(folder).free
    if size + _SPARE > free:
        raise WorkFailed(f"the merged model takes {gigabytes(size)}, and {gigabytes(_SPARE)} more for what lies beside "
                         f"its weights; {gigabytes(free)} are free on the disk of {folder}",
                         "free some space, or work on another disk with --run DIR; nothing was changed")


def write_files(layout: Layout, folder: Path, progress: Any) -> None:
    """Write all files of the merged model's weights.

    Raises:
        WorkFailed: a tensor that is not finite in its type.
        UserError: a file that ends too early.
    """
    import torch

    total, done = sum(map(len, layout.files.values())), 0
    threads = torch.get_num_threads()
    # Blocks are small, and threads that wait for one another spin: on a busy machine that took ten times as long.
    torch.set_num_threads(1)
    try:
        for name, pieces in layout.files.items():
            with open(folder / name, "wb") as out:
                out.write(header(pieces))
                for piece in pieces:
                    progress("merging", done, total)
                    for block in blocks(piece):
                        out.write(block)
                    done += 1
    finally:
        torch.set_num_threads(threads)
        _read_whole.cache_clear()
    if layout.index is not None:
        (folder / INDEX).write_bytes(layout.index)
    progress("merging", total, total)


def header(pieces: Sequence[Piece]) -> bytes:
    """What comes before the numbers in a safetensors file: the header's length, and names, types, shapes and places.

    https://github.com/huggingface/safetensors#format
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for piece in pieces:
        entries[piece.name] = {"dtype": piece.dtype, "shape": list(piece.source.shape),
                               "data_offsets": [at, at + piece.bytes]}
        at += piece.bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def blocks(piece: Piece) -> Iterator[memoryview]:
    """The bytes of a merged tensor, in order; each block is overwritten by the next.

    Raises:
        WorkFailed: numbers that are not finite in the tensor's type.
        UserError: its file ends too early.
    """
    with open(piece.source.path, "rb", buffering=0) as file:
        if piece.copied:
            yield from _read(piece.source, file, 0, piece.source.bytes, _COPIED)
        else:
            yield from _computed(piece, file)


def _read(tensor: StoredTensor, file: BinaryIO, start: int, length: int, step: int) -> Iterator[memoryview]:
    """``length`` bytes of a tensor from its byte ``start`` on, ``step`` at a time."""
    buffer = bytearray(min(step, length))
    file.seek(tensor.offset + start)
    for at in range(0, length, step):
        view = memoryview(buffer)[:min(step, length - at)]
        done = 0
        while done < len(view):
            if not (count := file.readinto(view[done:])):
                raise UserError(f"{tensor.path} ends within {tensor.name}", "download the model again")
            done += count
        yield view


def _computed(piece: Piece, file: BinaryIO) -> Iterator[memoryview]:
    import torch

    target = _torch_type(piece.dtype)
    source, change = piece.source, None if piece.lora is None else _change(piece)
    if piece.lora and piece.lora.experts:  # as one matrix, one expert's rows below another's
        source = replace(source, shape=(math.prod(source.shape[:-1]), source.shape[-1]))
    with torch.inference_mode():
        if change and change.magnitude is not None and piece.transposed:
            change.measure_columns(_numbers(source, file))
        buffer = torch.empty(0, dtype=target)
        for first, numbers in _numbers(source, file):
            if change is not None:
                change.add_to(numbers, first)
            if piece.rows:
                _replace_rows(numbers, first, *piece.rows)
            buffer = buffer if len(buffer) else torch.empty_like(numbers, dtype=target)
            merged = buffer[:len(numbers)].copy_(numbers)
            if not _finite(merged):
                why = (f"its numbers are too large for {piece.dtype}" if target == torch.float16 and
                       _finite(numbers) else "it holds infinities or no numbers")
                raise WorkFailed(f"{piece.name} is not finite after merging: {why}",
                                 "use --dtype bf16" if target == torch.float16 else
                                 "train again with a lower --learning-rate, or download the base model again")
            yield memoryview(merged.view(torch.uint8).numpy()).cast("B")


def _replace_rows(numbers: torch.Tensor, first: int, ids: Sequence[int], tensor: StoredTensor) -> None:
    """Put rows of these numbers in the place of those among some, of which ``first`` is the first."""
    import torch

    for n, row in enumerate(ids):
        if first <= row < first + len(numbers):
            numbers[row - first] = torch.from_numpy(tensor.rows(n, n + 1)[0])


def _numbers(tensor: StoredTensor, file: BinaryIO) -> Iterator[tuple[int, torch.Tensor]]:
    """Rows of a tensor as (first row, numbers (rows, rest)) in fp32, fp64 as it is; the next ones overwrite them.

    A tensor without a second dimension has rows of one number.
    """
    import torch

    rows = tensor.shape[0] if tensor.shape else 1
    width = math.prod(tensor.shape[1:])
    if not rows * width:
        return
    stored = _torch_type(tensor.dtype)
    row = tensor.bytes // rows
    count = max(1, _BLOCK // width)
    # One buffer for all: memory that is asked for anew has to be cleared by the system each time.
    buffer = torch.empty(min(count, rows), width, dtype=torch.promote_types(stored, torch.float32))
    for n, block in enumerate(_read(tensor, file, 0, tensor.bytes, count * row)):
        numbers = torch.frombuffer(block, dtype=stored).view(-1, width)
        yield n * count, buffer[:len(numbers)].copy_(numbers)


def _finite(numbers: torch.Tensor) -> bool:
    """Whether all are; a sum that is finite says so in a tenth of the time."""
    import torch

    return math.isfinite(numbers.sum(dtype=torch.float32)) or bool(torch.isfinite(numbers).all())


def _change(piece: Piece) -> _Change | _ChangeOfExperts:
    return _ChangeOfExperts(piece) if piece.lora.experts else _Change(piece.lora, piece.transposed)


class _ChangeOfExperts:
    """What LoRA does to matrices of experts, one below the other (n, in), or to a part of that of one."""

    magnitude = None

    def __init__(self, piece: Piece):
        lora, part = piece.lora, piece.part
        a, b = (_read_whole(tensor) for tensor in (lora.a, lora.b))
        a, b = a.view(lora.experts, -1, a.shape[1]), b.view(b.shape[0], -1, lora.experts)
        if part is not None:
            rows = b.shape[0] // part.of
            a, b = a[part.expert:part.expert + 1], b[part.number * rows:(part.number + 1) * rows, :, part.expert, None]
        self.a, self.b, self.scale = a, b, lora.scale  # (experts, r, in), (out, r, experts)

    def add_to(self, numbers: torch.Tensor, first: int) -> None:
        """Put the change into rows, of which ``first`` is the first."""
        size, done = self.b.shape[0], 0
        while done < len(numbers):
            expert, row = divmod(first + done, size)
            count = min(size - row, len(numbers) - done)
            numbers[done:done + count].addmm_(self.b[row:row + count, :, expert], self.a[expert], alpha=self.scale)
            done += count


@lru_cache(maxsize=4)  # of a layer's two parameters, whose experts come one after another
def _read_whole(tensor: StoredTensor) -> torch.Tensor:
    import torch

    return torch.from_numpy(tensor.rows())


class _Change:
    """What LoRA does to a stored matrix (n, m): the change is s L R, with L (n, r) and R (r, m)."""

    def __init__(self, lora: Lora, transposed: bool):
        import torch

        a, b, magnitude = (None if t is None else torch.from_numpy(t.rows()) for t in (lora.a, lora.b, lora.magnitude))
        self.left, self.right = (a.T.contiguous(), b.T.contiguous()) if transposed else (b, a)
        self.scale, self.transposed = lora.scale, transposed
        self.magnitude = magnitude
        self._lengths = self._product = None

    def delta(self, first: int, count: int) -> torch.Tensor:
        """Rows ``first`` to ``first + count`` of the change, (count, m), fp32; the next call overwrites them."""
        import torch

        if self._product is None or len(self._product) < count:
            self._product = torch.empty(count, self.right.shape[1])
        return torch.mm(self.left[first:first + count], self.right, out=self._product[:count]).mul_(self.scale)

    def measure_columns(self, rows: Iterable[tuple[int, torch.Tensor]]) -> None:
        """Where an output is a column, DoRA's lengths need all rows before the first can be written."""
        changed = (numbers.add_(self.delta(first, len(numbers))) for first, numbers in rows)
        self._lengths = sum(numbers.double().square_().sum(0) for numbers in changed).sqrt().float()

    def add_to(self, numbers: torch.Tensor, first: int) -> None:
        """Put the change into rows of W, of which ``first`` is the first."""
        import torch

        numbers.add_(self.delta(first, len(numbers)))
        if self.magnitude is None:
            return
        if self.transposed:
            numbers.mul_(self.magnitude / self._lengths)
        else:
            lengths = torch.linalg.norm(numbers, dim=1)
            numbers.mul_((self.magnitude[first:first + len(numbers)] / lengths).view(-1, 1))


def _torch_type(dtype: str) -> torch.dtype:
    import torch

    return {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}[dtype]
