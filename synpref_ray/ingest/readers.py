"""Pair files as chunks: Parquet and JSONL (plain or gzip), local or any fsspec URL, streamed so that memory does not grow with the file.

A file that cannot be read to its end, or lacks a column, is an error of one line; a row that cannot be read is a counted reject. Nothing is
lost in between.
"""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import IO

from synpref_ray.errors import InputError
from synpref_ray.ingest.adapt import adapt_rows
from synpref_ray.ingest.chunk import Chunk, ChunkBuilder, bytes_to_json, own_id
from synpref_ray.ingest.lines import JSON_WHITE_SPACE, numbered_lines
from synpref_ray.ingest.parquet import missing_columns, read_parquet_chunks
from synpref_ray.ingest.rows import FileRow, csv_rows, json_rows, jsonl_rows, parquet_rows
from synpref_ray.ingest.source import FileFormat, SourceConfig, file_format, list_source_files
from synpref_ray.schema import DropReason
from synpref_ray.tables.files import open_file

MAX_CHUNK_ROWS = 8192  # ours: a pool shard's default size
MAX_CHUNK_BYTES = 64 * 2**20  # ours: a pool shard's default size
LOOK_ROWS = 200  # ours: enough to see whether a file has the columns and forms that it should
_MAX_NAMED_KEYS = 64  # ours: enough keys to recognise a file by in an error message


def read_source(source: SourceConfig, *, max_rows: int = MAX_CHUNK_ROWS, max_bytes: int = MAX_CHUNK_BYTES) -> Iterator[Chunk]:
    """Read all files of a source, in order."""
    for file in list_source_files(source):
        yield from read_pair_file(file, source, max_rows=max_rows, max_bytes=max_bytes)


def read_pair_file(file: str, source: SourceConfig, *, max_rows: int = MAX_CHUNK_ROWS, max_bytes: int = MAX_CHUNK_BYTES) -> Iterator[Chunk]:
    """Read one pair file as chunks that follow each other in file order; the same file always gives the same chunks.

    Args:
        file: path or fsspec URL.
        source: says how the file is written and which columns hold the pair.
        max_rows: ceiling of rows (refused ones included) in a chunk.
        max_bytes: a chunk ends with the row that reaches this size (an estimate for Parquet).

    Raises:
        InputError: the file is missing, empty, truncated, or not of its format.
        SchemaError: a needed column is missing from the whole file, or has an unusable type.
    """
    form = file_format(file, source.format)
    with open_binary(file) as stream:
        if source.adapter is not None or source.where or form in (FileFormat.JSON, FileFormat.CSV):
            yield from adapt_rows(_file_rows(stream, file, form, max_rows, max_bytes), source, file, max_rows=max_rows, max_bytes=max_bytes)
        elif form is FileFormat.PARQUET:
            yield from read_parquet_chunks(stream, file, source, max_rows=max_rows, max_bytes=max_bytes)
        else:
            yield from _read_jsonl_chunks(stream, file, source, max_rows=max_rows, max_bytes=max_bytes)


def read_first_rows(file: str, source: SourceConfig, *, max_rows: int = LOOK_ROWS) -> list[Chunk]:
    """Read the first rows of a pair file as `read_pair_file` would: a look at it, before anything is ingested.

    Raises:
        InputError: the file is missing, empty, or not of its format as far as it was read.
        SchemaError: a needed column is in none of these rows, or has an unusable type.
    """
    form = file_format(file, source.format)
    limits = {"max_rows": max_rows, "max_bytes": MAX_CHUNK_BYTES}
    with open_binary(file) as stream:
        if source.adapter is not None or source.where or form in (FileFormat.JSON, FileFormat.CSV):
            return list(adapt_rows(itertools.islice(_file_rows(stream, file, form, **limits), max_rows), source, file, **limits))
        if form is FileFormat.PARQUET:
            return list(itertools.islice(read_parquet_chunks(stream, file, source, **limits), 1))
        return list(_read_jsonl_chunks(stream, file, source, **limits, max_lines=max_rows))


def read_file_rows(file: str, declared: FileFormat) -> Iterator[FileRow]:
    """Read the rows of one file of any format as plain values."""
    with open_binary(file) as stream:
        yield from _file_rows(stream, file, file_format(file, declared), MAX_CHUNK_ROWS, MAX_CHUNK_BYTES)


def _file_rows(stream: IO[bytes], file: str, form: FileFormat, max_rows: int, max_bytes: int) -> Iterator[FileRow]:
    if form is FileFormat.PARQUET:
        return parquet_rows(stream, file, max_rows=max_rows, max_bytes=max_bytes)
    if form is FileFormat.JSON:
        return json_rows(stream, file)
    return csv_rows(stream, file) if form is FileFormat.CSV else jsonl_rows(stream, file)


@contextlib.contextmanager
def open_binary(file: str) -> Iterator[IO[bytes]]:
    """Open a local path or fsspec URL for reading.

    Raises:
        InputError: there is no such file, or it cannot be opened.
    """
    try:
        stream = open_file(file)
    except FileNotFoundError:
        raise InputError(f"there is no file {file}") from None
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"cannot open {file}: {' '.join(str(error).split())}") from None
    with stream:
        yield stream


def digest_file(file: str) -> str:
    """Return 32 hex digits of a file's bytes, read in pieces."""
    digest = hashlib.blake2b(digest_size=16)
    with open_binary(file) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_jsonl_chunks(
    stream: IO[bytes], file: str, source: SourceConfig, *, max_rows: int, max_bytes: int, max_lines: int | None = None
) -> Iterator[Chunk]:
    columns = _SeenColumns(source, file)
    builder = ChunkBuilder(source, file)
    num_lines = num_bytes = 0
    for number, line in itertools.islice(numbered_lines(stream, file), max_lines):
        num_lines += 1
        if not line.strip(JSON_WHITE_SPACE):
            continue
        _add_line(builder, columns, source, number, line)
        num_bytes += len(line)
        if builder.num_rows >= max_rows or num_bytes >= max_bytes:
            yield builder.finish()
            builder, num_bytes = ChunkBuilder(source, file), 0
    if num_lines == 0:
        raise InputError(f"{file} is empty (0 bytes); expected JSON lines")
    columns.check()
    if builder.num_rows:
        yield builder.finish()


def _add_line(builder: ChunkBuilder, columns: "_SeenColumns", source: SourceConfig, number: int, line: bytes) -> None:
    try:
        text = line.decode()
    except UnicodeDecodeError:
        builder.reject(number, DropReason.INVALID_UTF8, bytes_to_json(line))
        return
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):  # ValueError: bad syntax, or a number of more digits than Python converts
        builder.reject(number, DropReason.INVALID_JSON, text)
        return
    if not isinstance(row, Mapping):
        builder.reject(number, DropReason.WRONG_TYPE, text)
        return
    names = source.columns
    values = (row.get(names.prompt), row.get(names.chosen), row.get(names.rejected))
    reason = builder.add(number, *values, source_id=own_id(row, names.source_id))
    columns.note(row, reason)
    if reason is not None:
        builder.reject(number, reason, text)


class _SeenColumns:
    """Remembers whether a JSONL file ever shows the columns it must have: a misnamed column is one error, not a million rejects."""

    def __init__(self, source: SourceConfig, file: str):
        self._source = source
        self._file = file
        self._keys: set[str] = set()
        self._num_rows = 0
        self._num_incomplete = 0

    def note(self, row: Mapping[str, object], reason: DropReason | None) -> None:
        self._num_rows += 1
        self._num_incomplete += reason is DropReason.MISSING_FIELD
        if self._num_incomplete == self._num_rows and len(self._keys) < _MAX_NAMED_KEYS:
            self._keys.update(row)

    def check(self) -> None:
        """Raise SchemaError when every row was refused for a missing field and a needed column was never there."""
        if self._num_rows == 0 or self._num_incomplete < self._num_rows:
            return
        names = self._source.columns
        missing = [name for name in (names.prompt, names.chosen, names.rejected) if name not in self._keys]
        if missing:
            raise missing_columns(self._file, missing, self._keys)
