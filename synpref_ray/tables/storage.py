"""One workspace root, local or on object storage, with the guarantees every table relies on.

A write is seen whole or not at all (temporary name then rename; on S3 one PUT, or an upload in parts that is completed last), a file is read whole or
not at all, `create_exclusive` has exactly one winner, and a listing is never stale. A folder, `s3://…` and `memory://…` behave the same
(docs/storage.md).
"""

import io
import json
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from botocore.exceptions import BotoCoreError, ClientError
from fsspec.core import url_to_fs

from synpref_ray.credentials import refuse_credentials
from synpref_ray.errors import InputError, SchemaError, SynprefError
from synpref_ray.tables.files import Files
from synpref_ray.tables.objects import Entry, S3Objects, is_s3

OBJECT_STORAGE_ERRORS = (BotoCoreError, ClientError)  # no credentials, no network: what s3fs does not turn into an OSError
STORAGE_ERRORS = (OSError, SynprefError, *OBJECT_STORAGE_ERRORS)


@dataclass(frozen=True)
class Storage:
    """A root URL under which paths are relative, with `/` between parts; small enough to travel to every worker.

    Raises:
        ConfigError: the URL holds a credential.
    """

    url: str

    def __post_init__(self) -> None:
        if "://" not in self.url:
            object.__setattr__(self, "url", os.path.abspath(os.path.expanduser(self.url)))
        refuse_credentials(self.url, "the workspace")

    @property
    def _root(self) -> Files | S3Objects:
        if is_s3(self.url):
            return S3Objects.at(self.url)
        try:
            return Files(*url_to_fs(self.url, **({"auto_mkdir": True} if self.is_local else {})))
        except (ValueError, ImportError) as error:
            raise InputError(f"cannot use {self.url} as a workspace: {error}") from None

    @property
    def is_local(self) -> bool:
        """Whether paths are on this machine's own file system (which other nodes may not see)."""
        return "://" not in self.url or self.url.startswith(("file://", "local://"))

    def join(self, path: str) -> str:
        """Return the full URL of `path`, for messages and for libraries that open files themselves."""
        return f"{self.url.rstrip('/')}/{path}"

    def local_path(self, path: str) -> str:
        """Return `path` as a name for `open`; only a local workspace has one."""
        root = self._root
        if not self.is_local or not isinstance(root, Files):
            raise InputError(f"{self.join(path)} is not on a local file system")
        return root.full(path)

    def exists(self, path: str) -> bool:
        """Whether a file or folder of that name is there."""
        return self._root.exists(path)

    def list_files(self, prefix: str, *, deep: bool = True) -> list[str]:
        """Return the paths of all files under the folder `prefix`, sorted; temporary files excluded, a missing folder is empty.

        Args:
            deep: False lists the folder itself and nothing below the folders in it (a table's journals may be millions of objects).
        """
        return sorted(path for path in self._root.list_files(prefix, deep=deep) if not PurePosixPath(path).name.startswith("."))

    def list_entries(self, prefix: str, *, hidden: bool = False) -> list[Entry]:
        """Return what lies directly in the folder `prefix`, sorted by name, by one listing however much lies deeper; a missing folder is empty.

        Args:
            hidden: with names that begin with a dot (leases, temporary files).
        """
        found = (entry for entry in self._root.list_entries(prefix) if hidden or not entry.name.startswith("."))
        return sorted(found, key=lambda entry: entry.name)

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return the bytes of every file under the folder `prefix`, by path, temporary ones included; a missing folder is empty."""
        return self._root.sizes(prefix)

    def list_folders(self, prefix: str) -> list[str]:
        """Return the names of the folders directly under `prefix`, sorted; what is in them is not listed."""
        return sorted(name for name in self._root.list_folders(prefix) if not name.startswith("."))

    def read_bytes(self, path: str) -> bytes:
        """Return a file's content; a missing file is an `InputError`."""
        try:
            return self._root.read(path)
        except FileNotFoundError:
            raise InputError(f"{self.join(path)} does not exist") from None

    def read_range(self, path: str, start: int, length: int) -> bytes:
        """Return `length` bytes of a file from `start` on; a missing or shorter file is an `InputError`."""
        try:
            content = self._root.read_range(path, start, start + length)
        except FileNotFoundError:
            raise InputError(f"{self.join(path)} does not exist") from None
        if len(content) != length:
            raise InputError(f"{self.join(path)} ends before byte {start + length}: it was cut off")
        return content

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write a file atomically: readers see the old content or the new, never a part."""
        self._root.write(path, data)

    def create_exclusive(self, path: str, data: bytes) -> bool:
        """Create a file whole, unless one of that name exists; return whether this caller made it."""
        return self._root.create(path, data)

    def replace(self, path: str, old: bytes, new: bytes) -> bool:
        """Write a file if it still has its old content; return whether it had. On S3 that is one act, elsewhere the caller must be alone."""
        return self._root.replace(path, old, new)

    def upload(self, file: str | Path, path: str) -> None:
        """Write a local file of any size atomically, as `write_bytes` does."""
        self._root.upload(file, path)

    def download(self, path: str, file: str | Path) -> None:
        """Bring a file of any size into a local file; a missing one is an `InputError`. A failure may leave the local file in part."""
        try:
            self._root.download(path, file)
        except FileNotFoundError:
            raise InputError(f"{self.join(path)} does not exist") from None

    def delete(self, path: str) -> None:
        """Remove a file; one that is gone already is fine."""
        try:
            self._root.delete(path)
        except FileNotFoundError:
            return

    def delete_folder(self, prefix: str) -> None:
        """Remove a folder with all that is in it; one that is gone already is fine."""
        try:
            self._root.delete_folder(prefix)
        except FileNotFoundError:
            return

    def read_json(self, path: str) -> Any:
        """Return the value of a JSON file."""
        try:
            return json.loads(self.read_bytes(path))
        except ValueError as error:
            raise InputError(f"{self.join(path)} is not valid JSON: {error}") from None

    def write_json(self, path: str, value: Any) -> None:
        """Write a value as readable JSON, atomically."""
        self.write_bytes(path, encode_json(value))

    def read_table(self, path: str, columns: list[str] | None = None) -> pa.Table:
        """Return a Parquet file (or some of its columns) as one table; of a local file, only the bytes of these columns are read."""
        try:
            with pq.ParquetFile(self._parquet_source(path, columns)) as file:
                missing = sorted(set(columns or ()) - set(file.schema_arrow.names))
                if missing:
                    raise SchemaError(f"{self.join(path)} has no column {', '.join(missing)}; it has {', '.join(file.schema_arrow.names)}")
                return file.read(columns=columns)
        except pa.ArrowInvalid as error:
            raise InputError(f"{self.join(path)} is not a readable Parquet file: {' '.join(str(error).split())}") from None

    def _parquet_source(self, path: str, columns: list[str] | None) -> Any:
        """Return what a Parquet file is read from: a file is never changed in place, so an open one stays what it was."""
        if columns is None or not self.is_local:
            return pa.BufferReader(self.read_bytes(path))
        try:
            return pa.OSFile(self.local_path(path))
        except FileNotFoundError:
            raise InputError(f"{self.join(path)} does not exist") from None

    def write_table(self, path: str, table: pa.Table) -> bytes:
        """Write a table as zstd Parquet, atomically, and return the bytes written; equal tables give equal bytes."""
        data = encode_table(table)
        self.write_bytes(path, data)
        return data


def encode_table(table: pa.Table) -> bytes:
    """Return a table as zstd Parquet; equal tables give equal bytes."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def encode_json(value: Any) -> bytes:
    """Return `value` as indented UTF-8 JSON with a final line break, keys in the order given."""
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode("utf-8")
