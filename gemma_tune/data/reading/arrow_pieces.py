"""Rows of Arrow batches some at a time, by what they take once they are decoded.

A dictionary, a run or a view holds a text once for however many rows: a file of some kilobytes can stand for gigabytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

_VALUE = 4  # bytes that are counted for a value beside its text


def pieces(batch: Any, size: int) -> Iterator[tuple[Any, int]]:
    """The rows of a record batch in parts of about ``size`` decoded bytes, and at least one row, without dictionaries;
    with each part its size."""
    ends = np.cumsum(row_sizes(batch))
    start = taken = 0
    while start < batch.num_rows:
        end = max(start + 1, int(np.searchsorted(ends, taken + size, "right")))
        yield batch.slice(start, end - start), int(ends[end - 1]) - taken
        start, taken = end, int(ends[end - 1])


def decoded(batch: Any) -> Any:
    """The batch without dictionaries and views, where Arrow can write their values out."""
    import pyarrow as pa
    from pyarrow import types

    columns, fields = [], []
    for field, column in zip(batch.schema, batch.columns):
        kind = _plain(field.type)
        if kind != field.type:
            try:
                if types.is_nested(field.type):  # a cast would work on what lies outside the slice as well
                    column = column.take(pa.array(range(len(column))))
                column = column.cast(kind)
            except pa.ArrowException:  # what cannot be written out, Python's values are made of
                kind = field.type
        columns.append(column)
        fields.append(field.with_type(kind))
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields))


def row_sizes(batch: Any) -> np.ndarray:
    """Bytes of each row (rows,) int64 once it is decoded."""
    return sum((_sizes(column) for column in batch.columns), np.zeros(batch.num_rows, np.int64))


def _sizes(array: Any) -> np.ndarray:
    """Bytes of each value (length,) int64 once it is decoded."""
    from pyarrow import compute, types

    kind = array.type
    if hasattr(array, "storage"):  # of an extension
        return _sizes(array.storage)
    if types.is_dictionary(kind):
        return _taken(_sizes(array.dictionary), array.indices.fill_null(-1))
    if types.is_run_end_encoded(kind):
        ends = array.run_ends.to_numpy()
        return _sizes(array.values)[np.searchsorted(ends, np.arange(len(array)) + array.offset, "right")]
    if types.is_struct(kind):
        members = (_sizes(array.field(n)) for n in range(kind.num_fields))  # these are cut as the struct is
        return sum(members, np.full(len(array), _VALUE, np.int64))
    if types.is_fixed_size_list(kind):
        inner = _sizes(array.values.slice(array.offset * kind.list_size, len(array) * kind.list_size))
        return inner.reshape(len(array), kind.list_size).sum(1) + _VALUE
    if types.is_nested(kind) and hasattr(array, "offsets"):
        return _of_lists(array) + _VALUE
    if types.is_string_view(kind) or types.is_binary_view(kind):  # each begins with its length
        views = np.frombuffer(array.buffers()[1], np.int32)[::4] if len(array) else np.zeros(0, np.int32)
        return np.maximum(views[array.offset:array.offset + len(array)], 0).astype(np.int64) + _VALUE
    if types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind):
        return compute.binary_length(array).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64) + _VALUE
    return np.full(len(array), max(_VALUE, array.nbytes // max(1, len(array))), np.int64)


def _taken(sizes: np.ndarray, indices: Any) -> np.ndarray:
    at = indices.to_numpy(zero_copy_only=False).astype(np.int64)
    return np.append(sizes, _VALUE)[np.where((at >= 0) & (at < len(sizes)), at, len(sizes))]


def _of_lists(array: Any) -> np.ndarray:
    from pyarrow import types

    inner = sum(map(_sizes, (array.keys, array.items))) if types.is_map(array.type) else _sizes(array.values)
    before = np.concatenate([[0], np.cumsum(inner)])
    offsets = array.offsets.to_numpy().astype(np.int64)
    if not hasattr(array, "sizes"):
        return before[offsets[1:]] - before[offsets[:-1]]
    return before[offsets + array.sizes.to_numpy()] - before[offsets]  # of views, whose values may overlap


def _plain(kind: Any) -> Any:
    """The type without dictionaries and views of text."""
    import pyarrow as pa
    from pyarrow import types

    if types.is_dictionary(kind):
        return _plain(kind.value_type)
    if types.is_string_view(kind) or types.is_binary_view(kind):
        return pa.large_string() if types.is_string_view(kind) else pa.large_binary()
    if types.is_struct(kind):
        return pa.struct([kind.field(n).with_type(_plain(kind.field(n).type)) for n in range(kind.num_fields)])
    if types.is_map(kind):
        return pa.map_(_plain(kind.key_type), kind.item_field.with_type(_plain(kind.item_type)), kind.keys_sorted)
    for is_list, make in ((types.is_list, pa.list_), (types.is_large_list, pa.large_list)):
        if is_list(kind):
            return make(kind.value_field.with_type(_plain(kind.value_type)))
    if types.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(_plain(kind.value_type)), kind.list_size)
    return kind
