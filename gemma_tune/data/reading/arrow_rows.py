"""Rows of Arrow tables, as Parquet files and ``datasets`` give them, become what JSON can hold."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from gemma_tune.base import strict_json
from gemma_tune.base.content import is_picture
from gemma_tune.base.errors import UserError
from gemma_tune.data.reading.arrow_pieces import decoded, pieces
from gemma_tune.data.reading.rows import BLOCK, MAX_ROW, Block, Row, repeated

Plain = Callable[[Any], Any]


@dataclass(frozen=True)
class ArrowBlock(Block):
    """One record batch, as bytes of an Arrow stream; its first row has the number ``first``."""

    first: int
    stream: bytes

    def rows(self) -> Iterator[Row]:
        table = self._table()
        plain = {field.name: convert for field in table.schema if (convert := _plain(field.type))}
        for number, (value, error) in enumerate(_values(table), start=self.first):
            for name, convert in plain.items():
                try:
                    if value[name] is not None:
                        value[name] = convert(value[name])
                except _NotText as e:  # a sound, say; it only matters if the column is one to learn from
                    value[name] = {"not text": f"{e}"}
            yield Row(self.file, number, value, error)

    def count(self) -> int:
        return self._table().num_rows

    def _table(self) -> Any:
        import pyarrow as pa

        with pa.ipc.open_stream(self.stream) as reader:
            return reader.read_all()


def _values(table: Any) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Python's values of each row, and what keeps one from being read: not UTF-8, a date beyond the year 9999."""
    try:
        values = table.to_pylist()
    except (ValueError, OverflowError):  # Arrow's own errors are ValueErrors as well
        yield from (_values_of_one(table.slice(n, 1)) for n in range(table.num_rows))
        return
    yield from ((value, None) for value in values)


def _values_of_one(row: Any) -> tuple[dict[str, Any], str | None]:
    value, error = {}, None
    for name in row.column_names:
        try:
            value[name] = row.column(name)[0].as_py()
        except (ValueError, OverflowError) as e:
            value[name], error = None, f"column {name!r} holds a value that cannot be read: {e}"
    return value, error


class _NotText(Exception):
    pass


def arrow_blocks(name: str, rows: int, batches: Iterable[Any], size: int = BLOCK) -> Iterator[ArrowBlock]:
    """The blocks of a table with ``rows`` rows that comes in record batches: of about ``size`` bytes once what they
    hold in common is written out.

    Raises:
        UserError: no rows, two columns of one name, or a row without end.
    """
    first = 1
    for batch in batches:
        if twice := repeated(batch.schema.names):
            raise UserError(f"{name}: two columns are named {twice!r}", "give each column a name of its own")
        for part, taken in pieces(batch.replace_schema_metadata(None), size):
            if taken > MAX_ROW and part.num_rows == 1:
                raise UserError(f"{name}:{first}: this row is too long ({MAX_ROW >> 20} million characters are the "
                                f"most)", "leave it out, or divide it into several rows")
            done = min(1.0, (first - 1 + part.num_rows) / max(1, rows))
            yield ArrowBlock(name, done, first, _stream(decoded(part)))
            first += part.num_rows
    if first == 1:
        raise UserError(f"{name} is empty", "put at least one row into it")


def _stream(batch: Any) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _plain(kind: Any) -> Plain | None:
    """What makes Python's value of an Arrow type JSON's; None where it is that already."""
    from pyarrow import types

    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_boolean(kind) \
            or types.is_integer(kind) or types.is_null(kind):
        return None
    if types.is_floating(kind):
        return _number
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind) \
            or types.is_binary_view(kind):
        return _text
    if types.is_struct(kind):
        return _struct({field.name: _plain(field.type) for field in kind})
    if types.is_map(kind):
        return lambda pairs, inner=_each(_plain(kind.item_type)): {f"{k}": inner(v) for k, v in pairs}
    if types.is_nested(kind) and hasattr(kind, "value_type"):
        inner = _plain(kind.value_type)
        return (lambda values: [None if v is None else inner(v) for v in values]) if inner else None
    if types.is_dictionary(kind):
        return _plain(kind.value_type)
    if getattr(kind, "extension_name", "") == "arrow.json":
        return _json
    return _written


def _each(convert: Plain | None) -> Plain:
    return lambda value: value if value is None or convert is None else convert(value)


def _struct(members: dict[str, Plain | None]) -> Plain:
    """Arrow gives every struct all keys that any row has: those without a value were not there."""
    convert = {name: _each(plain) for name, plain in members.items()}
    return lambda value: {k: convert[k](v) for k, v in value.items() if v is not None}


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None  # how data frames mark what is missing


def _text(value: bytes) -> str | dict[str, str]:
    """Text, or a picture, as in `datasets`' Image feature: ``{"bytes": …, "path": …}``."""
    if is_picture(value):
        return {"base64": b64encode(value).decode()}
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise _NotText(f"{len(value)} bytes of binary data") from None


def _json(value: str) -> Any:
    try:
        return strict_json.loads(value)
    except ValueError:
        return value


def _written(value: Any) -> str:
    """Dates, decimals and the like as text."""
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
