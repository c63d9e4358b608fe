"""Rows of a file as plain Python values, whatever the format: what adapters read. Streamed, but for JSON arrays.

A row that cannot be read is told from the others by its reason; a file that cannot be read to its end is an error of one line.
"""

import csv
import gzip
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, NamedTuple, cast

import pyarrow as pa

from synpref_ray.errors import InputError
from synpref_ray.ingest.chunk import bytes_to_json, row_to_json
from synpref_ray.ingest.lines import GZIP_MAGIC, JSON_WHITE_SPACE, numbered_lines
from synpref_ray.ingest.parquet import open_parquet, parquet_batches, scalar_to_plain
from synpref_ray.schema import DropReason

MAX_ARRAY_BYTES = 2 * 2**30  # ours: a JSON array is held in memory, several times its size; longer ones should be JSON lines
_MAX_CSV_FIELD = 256 * 2**20  # ours: the longest line of a JSONL file


class FileRow(NamedTuple):
    """A numbered row; one that cannot be read has a reason and its text instead of values."""

    number: int
    values: Mapping[str, object]
    reason: DropReason | None = None
    text: str = ""


def jsonl_rows(stream: IO[bytes], file: str) -> Iterator[FileRow]:
    """Read JSON lines, plain or gzip; blank lines are passed over."""
    number = -1
    for number, line in numbered_lines(stream, file):
        if line.strip(JSON_WHITE_SPACE):
            yield _json_row(number, line)
    if number < 0:
        raise InputError(f"{file} is empty (0 bytes); expected JSON lines")


def _json_row(number: int, line: bytes) -> FileRow:
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return FileRow(number, {}, DropReason.INVALID_UTF8, bytes_to_json(line))
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):  # ValueError: bad syntax, or a number of more digits than Python converts
        return FileRow(number, {}, DropReason.INVALID_JSON, text)
    return FileRow(number, row) if isinstance(row, Mapping) else FileRow(number, {}, DropReason.WRONG_TYPE, text)


def json_rows(stream: IO[bytes], file: str) -> Iterator[FileRow]:
    """Read one JSON array of objects, plain or gzip."""
    try:
        with _plain(stream) as plain:
            data = plain.read(MAX_ARRAY_BYTES + 1)
        if len(data) > MAX_ARRAY_BYTES:
            raise InputError(f"{file} is a JSON array of more than {MAX_ARRAY_BYTES >> 30} GiB; write it as JSON lines")
        rows = json.loads(data)
    except (EOFError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is not a complete JSON array: {_one_line(error)}; for JSON lines say format: jsonl") from None
    if not isinstance(rows, list):
        raise InputError(f"{file} holds {type(rows).__name__} where a JSON array of objects is expected; for JSON lines say format: jsonl")
    yield from plain_rows(rows)


def plain_rows(rows: Iterable[object]) -> Iterator[FileRow]:
    """Number rows that are Python values already."""
    for number, row in enumerate(rows):
        if isinstance(row, Mapping):
            yield FileRow(number, row)
        else:
            yield FileRow(number, {}, DropReason.WRONG_TYPE, json.dumps(row, ensure_ascii=True, default=str))


def csv_rows(stream: IO[bytes], file: str) -> Iterator[FileRow]:
    """Read CSV with a header line, plain or gzip; every value is text, and a row with too many or too few values is refused."""
    csv.field_size_limit(_MAX_CSV_FIELD)
    try:
        with _plain(stream) as plain, io.TextIOWrapper(plain, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            reader = csv.reader(lines, strict=True)
            header = next(reader, None)
            if not header:
                raise InputError(f"{file} is empty; expected CSV with a header line")
            for number, values in enumerate(reader):
                yield _csv_row(number, header, values)
    except (csv.Error, EOFError, OSError) as error:
        raise InputError(f"{file} is truncated or no CSV: {_one_line(error)}; fetch it again") from None


def _csv_row(number: int, header: list[str], values: list[str]) -> FileRow:
    row = dict(zip(header, values, strict=False))
    if len(values) != len(header):
        return FileRow(number, {}, DropReason.MISSING_FIELD if len(values) < len(header) else DropReason.WRONG_TYPE, row_to_json(row))
    return FileRow(number, row)


def parquet_rows(stream: IO[bytes], file: str, *, max_rows: int, max_bytes: int) -> Iterator[FileRow]:
    """Read a Parquet file, a few thousand rows at a time."""
    first_row = 0
    for batch in parquet_batches(open_parquet(stream, file), file, max_rows=max_rows, max_bytes=max_bytes):
        try:
            rows = batch.to_pylist()
        except ValueError:  # text that is no UTF-8, or a date beyond Python's range
            yield from (_row_of_batch(batch, place, first_row) for place in range(batch.num_rows))
        else:
            yield from (FileRow(first_row + place, row) for place, row in enumerate(rows))
        first_row += batch.num_rows


def _row_of_batch(batch: pa.RecordBatch, place: int, first_row: int) -> FileRow:
    row = batch.slice(place, 1)
    try:
        return FileRow(first_row + place, row.to_pylist()[0])
    except ValueError:
        values = {name: scalar_to_plain(column[0]) for name, column in zip(row.schema.names, row.columns, strict=True)}
        return FileRow(first_row + place, {}, DropReason.INVALID_UTF8, row_to_json(values))


def _plain(stream: IO[bytes]) -> IO[bytes]:
    is_gzip = stream.read(2) == GZIP_MAGIC
    stream.seek(0)
    return cast(IO[bytes], gzip.GzipFile(fileobj=stream)) if is_gzip else stream


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
