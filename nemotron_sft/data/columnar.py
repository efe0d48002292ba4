"""Records out of Arrow's columns: Parquet, and Arrow files as Hugging Face datasets writes and caches them.

Columns give every record every key, null where it had none; those keys are taken out again. A column of type
arrow.json holds JSON text, at any depth, which is parsed, and there a null is one that the data has. Maps become
objects.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from nemotron_sft.data.jsontext import loads_text

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 1024  # turned into records at a time

Record = dict | ValueError


def parquet_rows(handle: BinaryIO, columns: list[str] | None, start: int, stop: int) -> Iterator[tuple[int, Record]]:
    """(row, record) of row groups [start, stop) of a Parquet file; stop -1 is the end.

    `columns` limits what is decoded, None is all. A ValueError stands for a row that cannot be. Raises ArrowException
    or OSError for a damaged file.
    """
    import pyarrow.parquet as pq

    file = pq.ParquetFile(handle)
    stop = stop if stop >= 0 else file.num_row_groups
    row = sum(file.metadata.row_group(i).num_rows for i in range(start))
    there = None if columns is None else [column for column in columns if column in file.schema_arrow.names]
    groups = list(range(start, stop))
    yield from _numbered(file.iter_batches(batch_size=ROWS, row_groups=groups, columns=there), row)


def parquet_sizes(handle: BinaryIO) -> list[int]:
    """Bytes of every row group. Raises ArrowException or OSError for what is no Parquet file."""
    import pyarrow.parquet as pq

    metadata = pq.ParquetFile(handle).metadata
    return [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]


def arrow_rows(handle: BinaryIO, columns: list[str] | None, start: int, stop: int) -> Iterator[tuple[int, Record]]:
    """`parquet_rows` for record batches [start, stop) of an Arrow file, as a stream or with a footer."""
    row = 0
    for number, batch in enumerate(_batches(handle)):
        if number >= stop >= 0:
            return
        if number >= start:
            there = [name for name in batch.schema.names if columns is None or name in columns]
            parts = (batch.select(there).slice(low, ROWS) for low in range(0, batch.num_rows, ROWS))
            yield from _numbered(parts, row)
        row += batch.num_rows


def arrow_sizes(handle: BinaryIO) -> list[int]:
    """Bytes of every record batch of an Arrow file. Raises as `parquet_sizes`."""
    return [batch.nbytes for batch in _batches(handle)]


def _batches(handle: BinaryIO) -> Iterator[pa.RecordBatch]:
    """The record batches of an Arrow file."""
    import pyarrow as pa

    footed = handle.read(6) == b"ARROW1"
    handle.seek(0)
    # Mapped where it can be: stepping over a batch then reads nothing.
    source = pa.memory_map(handle.name) if isinstance(getattr(handle, "raw", None), io.FileIO) else handle
    if footed:
        reader = pa.ipc.open_file(source)
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        yield from pa.ipc.open_stream(source)


def _numbered(batches: Any, row: int) -> Iterator[tuple[int, Record]]:
    """(row, record) of record batches whose first row has the number `row`."""
    for batch in batches:
        columns = {field.name: _values(batch, i) for i, field in enumerate(batch.schema)}
        convert = {field.name: _converter(field) for field in batch.schema}
        for i in range(batch.num_rows):
            yield row + i, _record({name: values[i] for name, values in columns.items()}, convert)
        row += batch.num_rows


def _values(batch: pa.RecordBatch, column: int) -> list:
    """A column as Python values; a ValueError for each that cannot be one, such as text that is not UTF-8."""
    try:
        return batch.column(column).to_pylist()
    except UnicodeDecodeError:
        return [_one(scalar) for scalar in batch.column(column)]


def _one(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return ValueError("not UTF-8")


def _record(row: dict, convert: dict[str, Callable | None]) -> Record:
    """One row as a record without its null keys."""
    try:
        return {name: _converted(value, convert[name]) for name, value in row.items() if value is not None}
    except UnicodeDecodeError:
        return ValueError("not UTF-8")
    except ValueError as error:
        return error


def _converted(value: Any, convert: Callable | None) -> Any:
    if isinstance(value, ValueError):
        raise value
    return convert(value) if convert else value


def _converter(field: pa.Field) -> Callable | None:
    """What turns a value of a column, as pyarrow gives it and not None, into a record's; None if nothing does."""
    import pyarrow as pa

    kind = field.type
    extension = getattr(kind, "extension_name", None) or (field.metadata or {}).get(b"ARROW:extension:name", b"")
    if extension in ("arrow.json", b"arrow.json"):
        return loads_text
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_struct(kind):
        inner = {kind.field(i).name: _converter(kind.field(i)) for i in range(kind.num_fields)}
        return lambda value: {name: _converted(item, inner[name]) for name, item in value.items() if item is not None}
    if pa.types.is_map(kind):
        convert = _converter(kind.item_field)
        return lambda pairs: {str(key): item if item is None else _converted(item, convert) for key, item in pairs}
    if hasattr(kind, "value_field") and (convert := _converter(kind.value_field)):
        return lambda items: [item if item is None else convert(item) for item in items]
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return lambda value: value.decode()
    return None
