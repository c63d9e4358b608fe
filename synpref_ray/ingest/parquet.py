"""Parquet pair files as chunks: streamed by row group, a few thousand rows decoded at a time."""

from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from synpref_ray.errors import InputError, SchemaError
from synpref_ray.ingest.chunk import Chunk, ChunkBuilder, own_id, row_to_json
from synpref_ray.ingest.source import SourceConfig
from synpref_ray.schema import DropReason

_READ_BUFFER_BYTES = 2**20  # ours: column chunks are read in pieces of this size, so a row group never sits in memory whole


def read_parquet_chunks(stream: IO[bytes], file: str, source: SourceConfig, *, max_rows: int, max_bytes: int) -> Iterator[Chunk]:
    """Read an open Parquet file as chunks; `readers.read_pair_file` states the contract."""
    parquet = open_parquet(stream, file)
    _check_columns(parquet.schema_arrow, file, source)
    first_row = 0
    for batch in parquet_batches(parquet, file, max_rows=max_rows, max_bytes=max_bytes):
        yield _read_batch(batch, file, source, first_row)
        first_row += batch.num_rows


def open_parquet(stream: IO[bytes], file: str) -> pq.ParquetFile:
    """Open a Parquet file; one that is not complete is an `InputError`."""
    try:
        return pq.ParquetFile(stream, buffer_size=_READ_BUFFER_BYTES, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file} is not a complete Parquet file: {_one_line(error)}; fetch it again") from None


def parquet_batches(parquet: pq.ParquetFile, file: str, *, max_rows: int, max_bytes: int) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a Parquet file in batches of at most `max_rows` rows and about `max_bytes` bytes, none of them empty."""
    for group in range(parquet.num_row_groups):
        yield from _batches(parquet, group, file, max_rows, max_bytes)


def _batches(parquet: pq.ParquetFile, group: int, file: str, max_rows: int, max_bytes: int) -> Iterator[pa.RecordBatch]:
    metadata = parquet.metadata.row_group(group)
    if metadata.num_rows == 0:
        return
    row_bytes = max(1, metadata.total_byte_size // metadata.num_rows)
    batches = parquet.iter_batches(batch_size=max(1, min(max_rows, max_bytes // row_bytes)), row_groups=[group])
    while True:
        try:
            batch = next(batches, None)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{file} is damaged in row group {group}: {_one_line(error)}; fetch it again") from None
        if batch is None:
            return
        if batch.num_rows:
            yield batch


def _read_batch(batch: pa.RecordBatch, file: str, source: SourceConfig, first_row: int) -> Chunk:
    builder = ChunkBuilder(source, file)
    names = source.columns
    try:
        pair_columns = [_values(batch, name) for name in (names.prompt, names.chosen, names.rejected)]
        ids = _own_ids(batch, names.source_id)
    except UnicodeDecodeError:
        _add_one_by_one(builder, batch, source, first_row)
        return builder.finish()
    for place, values in enumerate(zip(*pair_columns, strict=True)):
        reason = builder.add(first_row + place, *values, source_id=ids[place])
        if reason is not None:
            builder.reject(first_row + place, reason, _row_json(batch, place))
    return builder.finish()


def _add_one_by_one(builder: ChunkBuilder, batch: pa.RecordBatch, source: SourceConfig, first_row: int) -> None:
    """Take a batch that holds text which is no UTF-8 somewhere: only the rows it is in are refused."""
    names = source.columns
    for place in range(batch.num_rows):
        row = batch.slice(place, 1)
        reason: DropReason | None
        try:
            values = [_values(row, name)[0] for name in (names.prompt, names.chosen, names.rejected)]
            reason = builder.add(first_row + place, *values, source_id=_own_ids(row, names.source_id)[0])
        except UnicodeDecodeError:
            reason = DropReason.INVALID_UTF8
        if reason is not None:
            builder.reject(first_row + place, reason, _row_json(batch, place))


def _own_ids(batch: pa.RecordBatch, names: tuple[str, ...]) -> list[Any]:
    present = [name for name in names if name in batch.schema.names]
    if not present:
        return [None] * batch.num_rows
    columns: list[list[Any]] = [batch.column(name).to_pylist() for name in present]
    if len(columns) == 1:
        return columns[0]
    return [own_id(dict(zip(present, values, strict=True)), present) for values in zip(*columns, strict=True)]


def _values(batch: pa.RecordBatch, name: str) -> list[Any]:
    """Return a column as Python strings or message lists; all None where the column is absent."""
    if name not in batch.schema.names:
        return [None] * batch.num_rows
    array = batch.column(name)
    is_list = types.is_list(array.type) or types.is_large_list(array.type)
    if is_list and types.is_struct(array.type.value_type):
        return _message_lists(array)
    values: list[Any] = array.to_pylist()
    return values


def _message_lists(array: pa.Array) -> list[Any]:
    """Convert a list<struct> column through its flat children, several times faster than `to_pylist`."""
    structs = array.flatten()
    messages = [
        {"role": role, "content": content} for role, content in zip(*(structs.field(name).to_pylist() for name in ("role", "content")), strict=True)
    ]
    if structs.null_count:
        messages = [message if there else None for message, there in zip(messages, structs.is_valid().to_pylist(), strict=True)]  # type: ignore[misc]
    lists: list[Any] = []
    start = 0
    for length in array.value_lengths().to_pylist():
        if length is None:
            lists.append(None)
        else:
            lists.append(messages[start : start + length])
            start += length
    return lists


def _row_json(batch: pa.RecordBatch, place: int) -> str:
    row = batch.slice(place, 1)
    try:
        return row_to_json(row.to_pylist()[0])
    except ValueError:  # text that is no UTF-8, or a date beyond Python's range
        return row_to_json({name: scalar_to_plain(column[0]) for name, column in zip(row.schema.names, row.columns, strict=True)})


def scalar_to_plain(scalar: pa.Scalar) -> Any:
    """Return a scalar as Python values, text that is no UTF-8 as bytes."""
    if not scalar.is_valid:
        return None
    if isinstance(scalar, pa.StructScalar):
        return {name: scalar_to_plain(scalar[name]) for name in scalar}
    if isinstance(scalar, (pa.ListScalar, pa.LargeListScalar)):
        return [scalar_to_plain(scalar.values[place]) for place in range(len(scalar.values))]
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes()
    except ValueError:
        return str(scalar)


def _check_columns(schema: pa.Schema, file: str, source: SourceConfig) -> None:
    names = source.columns
    present = set(schema.names)
    missing = [name for name in (names.chosen, names.rejected) if name not in present]
    implicit = not missing and all(_is_messages(schema.field(name).type) for name in (names.chosen, names.rejected))
    if names.prompt not in present and not implicit:
        missing.insert(0, names.prompt)
    if missing:
        raise missing_columns(file, missing, present)
    for name in (names.prompt, names.chosen, names.rejected):
        if name not in present:
            continue
        if len(schema.get_all_field_indices(name)) > 1:
            raise SchemaError(f"{file} has more than one column {name}; rename all but one")
        if not _is_text(schema.field(name).type) and not _is_messages(schema.field(name).type):
            found = " ".join(str(schema.field(name).type).split())
            raise SchemaError(f"{file}: column {name} has type {found}; expected a string or a list of role/content messages")


def missing_columns(file: str, missing: list[str], found: set[str]) -> SchemaError:
    """Word the error for a file that lacks columns."""
    shown = ", ".join(sorted(found)[:20]) or "none"
    named = "column" if len(missing) == 1 else "columns"
    remedy = "name the right ones with columns.prompt, columns.chosen, columns.rejected"
    return SchemaError(f"{file} lacks the {named} {', '.join(missing)}; found: {shown}; {remedy}")


def _is_text(kind: pa.DataType) -> bool:
    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind))


def _is_messages(kind: pa.DataType) -> bool:
    if not (types.is_list(kind) or types.is_large_list(kind)):
        return False
    message = kind.value_type
    if not types.is_struct(message):
        return bool(types.is_null(message))
    fields = {message.field(place).name: message.field(place).type for place in range(message.num_fields)}
    return all(name in fields and _is_text(fields[name]) for name in ("role", "content"))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
