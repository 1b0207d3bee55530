"""Reads GGUF files: metadata, a list of tensors, and tensors some rows at a time.

Nothing of a tensor stays in memory or mapped, so what reading takes does not grow with the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import mmap
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUF_MAGIC, GGUFValueType, Keys
from gguf import GGMLQuantizationType as Type

from gemma_tune.base.errors import UserError
from gemma_tune.gguf.types import dequantise, nbytes

_PAIRS_AT = 24  # bytes of the header before the metadata
_MOST_DIMENSIONS = 4
_BROKEN = "Copy or download it again."
_FAULTS = (struct.error, ValueError, KeyError, OverflowError)  # of a file whose bytes are no metadata
_SCALARS = {
    GGUFValueType.UINT8: "u1", GGUFValueType.INT8: "i1", GGUFValueType.UINT16: "<u2", GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4", GGUFValueType.INT32: "<i4", GGUFValueType.FLOAT32: "<f4", GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8", GGUFValueType.INT64: "<i8", GGUFValueType.FLOAT64: "<f8",
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file.

    Args:
        shape: rows first, as in a checkpoint; (length,) for a vector.
        offset: of its first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: Type
    offset: int

    @property
    def rows(self) -> int:
        """A vector is one row."""
        return math.prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        return nbytes(self.type, self.shape)


class GgufFile:
    """A GGUF file's metadata and tensors.

    Args:
        path: a little-endian GGUF of version 2 or 3.
        keys: the metadata to keep; all when None.

    Raises:
        UserError: not a GGUF, another version, cut short, or tensors that lie outside the file.
    """

    def __init__(self, path: Path, keys: Collection[str] | None = None):
        self.path = path
        self.metadata: dict[str, Any]
        self.tensors: dict[str, TensorInfo]
        wanted = None if keys is None else {*keys, Keys.General.ALIGNMENT}
        with _mapped(path) as data:
            tensors, pairs = _counts(path, data)
            self.metadata, at = _read_pairs(data, pairs, wanted)
            self.tensors = _read_infos(data, at, tensors, self.metadata.get(Keys.General.ALIGNMENT))

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows ``start`` to ``stop`` of a tensor as float32 (rows, columns).

        Raises:
            UserError: no such tensor, a type that cannot be decoded, or the file has become shorter.
        """
        info = self.tensors.get(name)
        if info is None:
            raise UserError(f"{self.path} has no tensor {name}.", "Export the model again.")
        stop = info.rows if stop is None else min(stop, info.rows)
        size = nbytes(info.type, info.shape[-1:])
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(info.offset + start * size)
                data = np.fromfile(file, np.uint8, (stop - start) * size)
        except OSError as e:
            raise _unreadable(self.path, e) from e
        if data.size != (stop - start) * size:
            raise UserError(f"{self.path} ends in the middle of {name}.", _BROKEN)
        try:
            return dequantise(data.reshape(stop - start, size), info.type)
        except NotImplementedError as e:
            raise UserError(f"{name} in {self.path} is {info.type.name}, which can't be decoded here.",
                            "pip install libgguf") from e

    def sha256(self, name: str) -> str:
        """Of a tensor's bytes.

        Raises:
            UserError: the file can't be read.
        """
        info, digest = self.tensors[name], hashlib.sha256()
        try:
            with self.path.open("rb") as file:
                file.seek(info.offset)
                left = info.nbytes
                while left and (part := file.read(min(left, 1 << 22))):
                    digest.update(part)
                    left -= len(part)
        except OSError as e:
            raise _unreadable(self.path, e) from e
        return digest.hexdigest()


def read_gguf_metadata(path: Path, keys: Collection[str] | None = None) -> dict[str, Any]:
    """Read a GGUF's key-value metadata; a hundred times faster than `gguf.GGUFReader` on a vocabulary of 262144.

    Args:
        path: a little-endian GGUF of version 2 or 3; its tensors aren't looked at.
        keys: what to return; all when None.

    Returns:
        key → str, bool, int or float; numeric arrays as numpy arrays, string arrays as list[bytes].

    Raises:
        UserError: not a GGUF, another version, or cut short.
    """
    with _mapped(path) as data:
        return _read_pairs(data, _counts(path, data)[1], keys)[0]


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    """A file's bytes, to read its metadata from."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data
    except OSError as error:
        raise _unreadable(path, error) from error
    except _FAULTS as error:
        why = "it ends in the middle of its metadata" if isinstance(error, struct.error) else error
        raise UserError(f"{path} is not a whole GGUF file: {why}.", _BROKEN) from error


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} can't be read: {error.strerror or error}.", "Check the path.")


def _counts(path: Path, data: mmap.mmap) -> tuple[int, int]:
    """Numbers of tensors and of key-value pairs."""
    magic, version, tensors, pairs = struct.unpack_from("<IIQQ", data, 0)
    if magic != GGUF_MAGIC or version not in (2, 3):
        raise UserError(f"{path} is not a little-endian GGUF file of version 2 or 3.",
                        f"{_BROKEN} Older files are made anew with llama.cpp's converter.")
    return tensors, pairs


def _read_infos(data: mmap.mmap, at: int, count: int, alignment: Any) -> dict[str, TensorInfo]:
    """The list of tensors, which begins at byte offset `at`; raise ValueError where it makes no sense."""
    found = []
    for _ in range(count):
        raw, at = _read_string(data, at)
        name = raw.decode("utf-8")
        (dimensions,) = struct.unpack_from("<I", data, at)
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"its tensor {name} has {dimensions} dimensions")
        *columns_first, kind, offset = struct.unpack_from(f"<{dimensions}QIQ", data, at + 4)
        at += 4 + 8 * dimensions + 12
        found.append(TensorInfo(name, tuple(columns_first[::-1]), Type(kind), offset))
    alignment = gguf.GGUF_DEFAULT_ALIGNMENT if alignment is None else alignment
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"its {Keys.General.ALIGNMENT} is {alignment!r}")
    start = gguf.GGUFWriter.ggml_pad(at, alignment)
    tensors = {info.name: TensorInfo(info.name, info.shape, info.type, start + info.offset) for info in found}
    if len(tensors) < count:
        raise ValueError("two of its tensors have the same name")
    for info in tensors.values():
        if info.shape[-1] % gguf.GGML_QUANT_SIZES[info.type][0]:
            raise ValueError(f"rows of its tensor {info.name} are no whole blocks of {info.type.name}")
        if info.offset + info.nbytes > len(data):
            raise ValueError(f"it ends before its tensor {info.name} does")
        if (info.offset - start) % alignment:
            raise ValueError(f"its tensor {info.name} does not begin at a multiple of {alignment} bytes")
    in_order = sorted(tensors.values(), key=lambda info: info.offset)
    for info, following in pairwise(in_order):
        if info.offset + info.nbytes > following.offset:
            raise ValueError(f"its tensors {info.name} and {following.name} overlap")
    return tensors


def _read_pairs(data: mmap.mmap, count: int, keys: Collection[str] | None) -> tuple[dict[str, Any], int]:
    """Walk the `count` key-value pairs: the pairs and the offset behind them; raise ValueError where the file ends too
    early."""
    pairs, at = {}, _PAIRS_AT
    for _ in range(count):
        key, at = _read_string(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        value, at = _read_value(data, at + 4, GGUFValueType(kind))
        name = key.decode("utf-8")
        if keys is None or name in keys:
            pairs[name] = value
    return pairs, at


def _read_value(data: mmap.mmap, at: int, kind: GGUFValueType) -> tuple[Any, int]:
    """Read one value of type `kind` at byte offset `at`: the value and the offset behind it."""
    if kind == GGUFValueType.STRING:
        raw, at = _read_string(data, at)
        return raw.decode("utf-8"), at
    if kind != GGUFValueType.ARRAY:
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(_slice(data, at, dtype.itemsize), dtype)[0].item(), at + dtype.itemsize
    item_kind, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if item_kind == GGUFValueType.STRING:
        return _read_strings(data, at, count)
    dtype = np.dtype(_SCALARS[GGUFValueType(item_kind)])  # an array of arrays is a KeyError: no tokenizer has one
    return np.frombuffer(_slice(data, at, count * dtype.itemsize), dtype), at + count * dtype.itemsize


def _read_string(data: mmap.mmap, at: int) -> tuple[bytes, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    return _slice(data, at + 8, length), at + 8 + length


def _read_strings(data: mmap.mmap, at: int, count: int) -> tuple[list[bytes], int]:
    """Read an array of strings; a loop of its own because it runs once per token."""
    length_at, size, strings = struct.Struct("<Q").unpack_from, len(data), []
    for _ in range(count):
        start = at + 8
        at = start + length_at(data, at)[0]
        if at > size:
            raise ValueError("it ends in the middle of its metadata")
        strings.append(data[start:at])
    return strings, at


def _slice(data: mmap.mmap, at: int, length: int) -> bytes:
    if at + length > len(data):
        raise ValueError("it ends in the middle of its metadata")
    return data[at : at + length]
