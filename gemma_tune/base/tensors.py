"""The tensors of a checkpoint's safetensors files, read some rows at a time.

Read with plain reads instead of mapped into memory: pages of a mapped file count as the process's memory once they were
touched, so that a whole model would pile up. Every header is checked before anything is read.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tune.base.errors import UserError
from gemma_tune.base.refusals import require_readable, unreadable
from gemma_tune.base.strict_json import object_in, whole_object
from gemma_tune.base.words import counted

if TYPE_CHECKING:
    import numpy as np

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# Bytes of one number. Only the first four can be read as numbers, the others are sized for the check of headers.
READABLE = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
_SIZES = {**READABLE, "BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8,
          "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}  # fmt: skip
_LARGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors library
_LARGEST_FILE = 1 << 63  # bytes; and no dimension is larger
_SHOWN = 20  # problems
_NUMPY = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a safetensors file.

    Args:
        path: the file.
        name: in the file.
        dtype: the file's name of the number type, such as ``BF16``.
        shape: as stored.
        offset: where its bytes begin in the file.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        """Length of its numbers in the file.

        Raises:
            UserError: a number type whose size isn't known here.
        """
        if self.dtype not in _SIZES:
            raise UserError(f"{self.path}: {self.name} is {self.dtype}, a number type that isn't known here.",
                            "Use the model's 16-bit checkpoint.")
        return math.prod(self.shape) * _SIZES[self.dtype]

    def rows(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows (of a vector: numbers) ``start`` to ``stop`` as float32 of shape (stop - start, *rest).

        Raises:
            UserError: the file ends too early, or the numbers are of a type that isn't read here.
        """
        if self.dtype not in READABLE:
            raise UserError(f"{self.path}: {self.name} is {self.dtype}, which can't be read as numbers.")
        count = (self.shape[0] if stop is None else min(stop, self.shape[0])) - start
        return _as_float32(self.raw(start, stop), self.dtype).reshape(count, *self.shape[1:])

    def raw(self, start: int = 0, stop: int | None = None) -> bytearray:
        """The bytes of such rows, as they are stored: little-endian.

        Raises:
            UserError: the file ends too early, or the size of the numbers isn't known here.
        """
        stop = self.shape[0] if stop is None else min(stop, self.shape[0])
        row = math.prod(self.shape[1:])
        size = self.bytes // max(1, math.prod(self.shape))
        length = (stop - start) * row * size
        with self.path.open("rb", buffering=0) as file:
            data = _read(file, self.offset + start * row * size, length)
        if len(data) != length:
            raise UserError(f"{self.path} ends within {self.name}.", "Download or merge the model again.")
        return data


def _read(file: Any, offset: int, length: int) -> bytearray:
    """Up to ``length`` bytes from ``offset``: one read call may return fewer."""
    data = bytearray(length)
    view, done = memoryview(data), 0
    file.seek(offset)
    while done < length and (count := file.readinto(view[done:])):
        done += count
    view.release()
    return data if done == length else data[:done]


def _as_float32(data: bytearray, dtype: str) -> np.ndarray:
    import numpy as np  # not at the top: every command knows what an adapter is, and few read one

    if dtype == "BF16":  # the upper half of a float32; numpy has no such type
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, _NUMPY[dtype]).astype(np.float32, copy=False)


def open_tensors(checkpoint: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder ``checkpoint``, in one ``model.safetensors`` or in shards with their index.

    Raises:
        UserError: files that may not be read, are missing, cut short, don't hold what the index lists, or have a header
            that doesn't fit the file; all of them together.
    """
    require_readable(checkpoint)
    single, index = checkpoint / SINGLE, checkpoint / INDEX
    listed = {} if single.is_file() else _read_index(index)
    tensors: dict[str, StoredTensor] = {}
    problems: list[str] = []
    shards = sorted(set(listed.values())) or [SINGLE]
    for shard in sorted(shards, key=lambda name: (checkpoint / name).exists()):  # what is missing is told first
        try:
            held = {tensor.name: tensor for tensor in read_header(checkpoint / shard)}
        except UserError as error:
            problems.append(error.message)
            continue
        path, found = checkpoint / shard, held.keys()
        expected = {name for name, home in listed.items() if home == shard} if listed else found
        problems += [f"{path} lacks {name}, which {INDEX} says it holds" for name in sorted(expected - found)]
        problems += [f"{path} holds {name}, which {INDEX} doesn't list there" for name in sorted(found - expected)]
        tensors |= held
    if problems:
        more = [f"… and {len(problems) - _SHOWN:,} more"] if problems[_SHOWN:] else []
        raise UserError(f"The weights in {checkpoint} are not whole.", "Merge or download the model again.",
                        problems[:_SHOWN] + more)
    return tensors


def _read_index(index: Path) -> dict[str, str]:
    """Read the list of a sharded checkpoint: tensor name → file name."""
    if not index.is_file():
        raise UserError(f"{index.parent} holds neither {SINGLE} nor {INDEX}.",
                        "Merge or download the model again: shards are read with the index that belongs to them.")
    again = "Merge or download the model again."
    try:
        listed = dict(object_in(index)["weight_map"])
        if any(not isinstance(name, str) for name in listed.values()):
            raise ValueError("it names no files")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is not a list of weights: {error}.", again) from error
    if elsewhere := sorted({str(name) for name in listed.values() if name != os.path.basename(str(name))}):
        raise UserError(f"{index} names files outside its folder: {', '.join(elsewhere)}.", again)
    return listed


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, in the order of its header.

    Raises:
        UserError: the file can't be read, or its header doesn't describe it: bytes beyond its end, sizes that don't
            fit shapes, tensors that overlap.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8:
                raise ValueError(f"it has only {counted(size, 'byte')}")
            if length > min(size - 8, _LARGEST_HEADER):
                raise ValueError(f"its header of {length} bytes is longer than the file")
            entries = whole_object(file.read(length))
        tensors = sorted(((*_span(name, entry), name) for name, entry in entries.items() if name != "__metadata__"))
        _check_spans(tensors, size - 8 - length)
        return [StoredTensor(path, name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
                for name, entry in entries.items() if name != "__metadata__"]
    except PermissionError as error:
        raise unreadable(path) from error
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing", "Merge or download the model again.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {error}", "Merge or download the model again.") from error


def _span(name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor's bytes begin and end behind the header; ValueError if its entry makes no sense."""
    try:
        (begin, end), shape, width = entry["data_offsets"], entry["shape"], _SIZES.get(entry["dtype"])
        sound = all(isinstance(n, int) and 0 <= n < _LARGEST_FILE for n in (begin, end, *shape))
    except (TypeError, ValueError, KeyError):
        sound = False
    if not sound:
        raise ValueError(f"its header describes no tensor at {name}")
    if width is not None and end - begin != math.prod(shape) * width:
        raise ValueError(f"its header gives {name} {end - begin} bytes for {entry['dtype']} of shape {tuple(shape)}")
    return begin, end


def _check_spans(spans: list[tuple[int, int, str]], available: int) -> None:
    """Tensors follow one another without gaps up to the end of the file, as the format demands."""
    at = 0
    for begin, end, name in spans:
        if begin != at or end < begin:
            raise ValueError(f"its header puts {name} at bytes {begin} to {end}, after what ends at {at}")
        if end > available:
            raise ValueError(f"its header puts {name} at bytes {begin} to {end}, but only {available} are there")
        at = end
    if at != available:
        raise ValueError(f"{available - at} bytes follow the last tensor of its header")
