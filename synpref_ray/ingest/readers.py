"""Pair files as chunks: Parquet and JSONL (plain or gzip), local or any fsspec URL, streamed so that memory does not grow with the file.

A file that cannot be read to its end, or lacks a column, is an error of one line; a row that cannot be read is a counted reject. Nothing is
lost in between.
"""

import codecs
import contextlib
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from typing import IO, cast

import fsspec

from synpref_ray.errors import InputError
from synpref_ray.ingest.chunk import Chunk, ChunkBuilder, bytes_to_json, own_id
from synpref_ray.ingest.parquet import missing_columns, read_parquet_chunks
from synpref_ray.ingest.source import FileFormat, SourceConfig, file_format, list_source_files
from synpref_ray.schema import DropReason

MAX_CHUNK_ROWS = 8192  # ours: a pool shard's default size
MAX_CHUNK_BYTES = 64 * 2**20  # ours: a pool shard's default size
MAX_LINE_BYTES = 256 * 2**20  # ours: a longer line is some other format, and would not fit the memory of a small worker
_MAX_NAMED_KEYS = 64  # ours: enough keys to recognise a file by in an error message
_GZIP_MAGIC = b"\x1f\x8b"
_JSON_WHITE_SPACE = b" \t\r\n"


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
    if file_format(file, source.format) is FileFormat.PARQUET:
        with open_binary(file) as stream:
            yield from read_parquet_chunks(stream, file, source, max_rows=max_rows, max_bytes=max_bytes)
    else:
        with open_binary(file) as stream:
            yield from _read_jsonl_chunks(stream, file, source, max_rows=max_rows, max_bytes=max_bytes)


@contextlib.contextmanager
def open_binary(file: str) -> Iterator[IO[bytes]]:
    """Open a local path or fsspec URL for reading.

    Raises:
        InputError: there is no such file, or it cannot be opened.
    """
    try:
        stream = fsspec.open(file, "rb").open()
    except FileNotFoundError:
        raise InputError(f"there is no file {file}") from None
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"cannot open {file}: {' '.join(str(error).split())}") from None
    with stream:
        yield cast(IO[bytes], stream)


def digest_file(file: str) -> str:
    """Return 32 hex digits of a file's bytes, read in pieces."""
    digest = hashlib.blake2b(digest_size=16)
    with open_binary(file) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_jsonl_chunks(stream: IO[bytes], file: str, source: SourceConfig, *, max_rows: int, max_bytes: int) -> Iterator[Chunk]:
    columns = _SeenColumns(source, file)
    builder = ChunkBuilder(source, file)
    num_lines = num_bytes = 0
    for number, line in _numbered_lines(stream, file):
        num_lines += 1
        if not line.strip(_JSON_WHITE_SPACE):
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


def _numbered_lines(stream: IO[bytes], file: str) -> Iterator[tuple[int, bytes]]:
    """Yield every line without its line break, numbered from 0; gzip is recognised by its first bytes, whatever the name."""
    is_gzip = stream.read(2) == _GZIP_MAGIC
    stream.seek(0)
    lines = cast(IO[bytes], gzip.GzipFile(fileobj=stream)) if is_gzip else stream
    number = 0
    while True:
        try:
            line = lines.readline(MAX_LINE_BYTES + 1)
        except (EOFError, OSError, zlib.error) as error:
            found = " ".join(str(error).split())
            raise InputError(f"{file} is truncated or damaged after line {number}: {found}; fetch it again") from None
        if not line:
            return
        if len(line) > MAX_LINE_BYTES:
            raise InputError(f"{file}: line {number + 1} is longer than {MAX_LINE_BYTES >> 20} MiB; expected one JSON object per line")
        if number == 0:
            line = line.removeprefix(codecs.BOM_UTF8)
        yield number, line.removesuffix(b"\n")
        number += 1


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
