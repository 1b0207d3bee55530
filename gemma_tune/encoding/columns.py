"""Arrow columns of numbers, bytes and lists, none of which is missing.

In place of ``pa.array`` and ``to_numpy``, which import pandas to ask it whether it is meant: a third of a second, and
40 MB, of each process that prepares data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa


def numbers(values: Sequence[int] | np.ndarray, dtype: Any) -> pa.Array:
    """A column of numbers of the given numpy type."""
    data = np.ascontiguousarray(values, dtype)
    return pa.Array.from_buffers(pa.from_numpy_dtype(data.dtype), len(data), [None, pa.py_buffer(data)])


def texts(values: Sequence[bytes]) -> pa.LargeBinaryArray:
    """A column of bytes of any length."""
    return pa.Array.from_buffers(pa.large_binary(), len(values),
                                 [None, pa.py_buffer(_ends(values, np.int64)), pa.py_buffer(b"".join(values))])


def hashes(values: Sequence[bytes], width: int) -> pa.FixedSizeBinaryArray:
    """A column of bytes of one length.

    Args:
        width: bytes of each.
    """
    return pa.Array.from_buffers(pa.binary(width), len(values), [None, pa.py_buffer(b"".join(values))])


def lists(arrays: Sequence[Sequence[int] | np.ndarray], dtype: Any = np.int32) -> pa.ListArray:
    """A column of lists of numbers of the given numpy type, one from each array."""
    values = np.concatenate(arrays) if arrays else np.zeros(0, dtype)
    return pa.ListArray.from_arrays(numbers(_ends(arrays, np.int32), np.int32), numbers(values, dtype))


def array_of(column: pa.Array) -> np.ndarray:
    """The numbers of a column, where they are."""
    data = np.frombuffer(column.buffers()[1], np.dtype(str(column.type)))
    return data[column.offset:column.offset + len(column)]


def _ends(values: Sequence[Any], dtype: Any) -> np.ndarray:
    """Where each begins among all, one behind the other, and where the last ends (values + 1,)."""
    ends = np.zeros(len(values) + 1, dtype)
    np.cumsum([len(value) for value in values], out=ends[1:])
    return ends
