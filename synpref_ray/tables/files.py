"""Files of a local folder, or of any file system that fsspec knows (memory:// in tests), with what tables rely on; and files that users name."""

import glob
import io
import os
import re
import shutil
import uuid
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from synpref_ray.tables.objects import Entry, ObjectFile, S3Objects, find_objects, is_s3
from synpref_ray.tables.s3_requests import PART_BYTES, s3_requests


def filesystem_of(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a URL or local path, and the path there; S3's never answers from a cache and repeats failed requests."""
    if is_s3(url):
        return s3_requests(), url.partition("://")[2].rstrip("/")
    fs, path = fsspec.core.url_to_fs(url)
    return fs, path


def open_file(url: str) -> IO[bytes]:
    """Open a local path or URL for reading, whole or not at all; FileNotFoundError where there is no such file."""
    if is_s3(url):
        return io.BufferedReader(ObjectFile(url), buffer_size=PART_BYTES // 2)
    return cast(IO[bytes], fsspec.open(url, "rb").open())


def is_file(url: str) -> bool:
    """Whether a local path or URL is that of a file. On S3 an answer that does not come is an error (s3fs's own `isfile` would say no)."""
    if is_s3(url):
        return S3Objects.at(url).is_object("")
    fs, path = filesystem_of(url)
    return bool(fs.isfile(path))


def is_folder(url: str) -> bool:
    """Whether a local path or URL is that of a folder; on S3, whether anything lies below it. Errors are errors, as with `is_file`."""
    if is_s3(url):
        return S3Objects.at(url).is_folder("")
    fs, path = filesystem_of(url)
    return bool(fs.isdir(path))


def file_size(url: str) -> int:
    """Return the bytes of a file, 0 where its file system does not say; FileNotFoundError where there is none."""
    if is_s3(url):
        return S3Objects.at(url).size("")
    fs, path = filesystem_of(url)
    return int(fs.size(path) or 0)


class FoundFiles(NamedTuple):
    """What a path or URL means: the files' own paths or URLs; whether it names one file itself; the folder that they are all below, if it is one."""

    files: list[str]
    is_one: bool
    folder: str = ""


def find_files(url: str) -> FoundFiles:
    """Find the files that a path, folder (with all below it) or glob pattern means; a folder that cannot be listed is an OSError."""
    if is_s3(url):
        objects, is_one = find_objects(url)
        return FoundFiles(objects, is_one, "" if is_one or glob.has_magic(url) else url.rstrip("/"))
    fs, path = filesystem_of(url)
    if fs.isfile(path):
        return FoundFiles([_address(fs, path)], True)
    if fs.isdir(path):
        return FoundFiles([_address(fs, file) for file in _walk(fs, path)], False, _address(fs, path))
    return FoundFiles([_address(fs, file) for file in _match(fs, path) if fs.isfile(file)] if glob.has_magic(path) else [], False)


def _walk(fs: fsspec.AbstractFileSystem, folder: str, depth: int | None = None) -> dict[str, dict[str, Any]]:
    """Return the files below a folder by path, sorted, with what the file system says of them; none where there is no such folder.

    fsspec's own `find`, `walk` and `glob` take a folder that cannot be listed for an empty one, and `on_error` holds for their first folder alone.
    """
    found: dict[str, dict[str, Any]] = {}
    waiting = [(folder.rstrip("/") or folder, 1)]
    while waiting:
        here, level = waiting.pop()
        try:
            listing = fs.ls(here, detail=True)
        except (FileNotFoundError, NotADirectoryError):  # none, or removed meanwhile
            continue
        for info in listing:
            name = info["name"].rstrip("/")
            if info["type"] != "directory":
                found[info["name"]] = info
            elif name != here and (depth is None or level < depth):
                waiting.append((name, level + 1))
    return dict(sorted(found.items()))


def _match(fs: fsspec.AbstractFileSystem, pattern: str) -> list[str]:
    """Return the files that a glob pattern means."""
    parts = pattern.split("/")
    plain = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    depth = None if "**" in pattern else len(parts) - plain
    matches = re.compile(glob_translate(pattern)).match
    return [file for file in _walk(fs, "/".join(parts[:plain]) or pattern[: pattern.startswith("/")], depth) if matches(file)]


def _address(fs: fsspec.AbstractFileSystem, file: str) -> str:
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
    return file if "file" in protocols else str(fs.unstrip_protocol(file))


@dataclass(frozen=True)
class Files:
    """The files under a folder; paths are relative to it."""

    fs: fsspec.AbstractFileSystem
    root: str

    @property
    def _is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def full(self, path: str) -> str:
        """Return the path as the file system itself names it."""
        return f"{self.root.rstrip('/')}/{path}" if path else self.root

    def exists(self, path: str) -> bool:
        """Whether a file or folder of that name is there."""
        try:
            self.fs.info(self.full(path))
        except (FileNotFoundError, NotADirectoryError):  # fsspec's own `exists` says no where it may not look
            return False
        return True

    def list_files(self, folder: str, *, deep: bool = True) -> list[str]:
        """Return the paths of the files under a folder, or directly in it; none where there is no such folder."""
        self.fs.invalidate_cache()
        start = len(self.root.rstrip("/")) + 1
        return [name[start:] for name in _walk(self.fs, self.full(folder), None if deep else 1)]

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the bytes of every file under a folder, by path; none where there is no such folder."""
        self.fs.invalidate_cache()
        start = len(self.root.rstrip("/")) + 1
        return {name[start:]: int(info["size"] or 0) for name, info in _walk(self.fs, self.full(folder)).items()}

    def list_folders(self, folder: str) -> list[str]:
        """Return the names of the folders directly in a folder; none where there is no such folder."""
        return [entry.name for entry in self.list_entries(folder) if entry.is_folder]

    def list_entries(self, folder: str) -> list[Entry]:
        """Return what lies directly in a folder; nothing where there is no such folder."""
        full = self.full(folder)
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(full, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [_entry(info) for info in found if info["name"].rstrip("/") != full.rstrip("/")]

    def read(self, path: str) -> bytes:
        """Return a file's content; FileNotFoundError where there is none."""
        content: bytes = self.fs.cat_file(self.full(path))
        return content

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Return the bytes from `start` to `stop`, fewer if the file ends before."""
        content: bytes = self.fs.cat_file(self.full(path), start=start, end=stop)
        return content

    def write(self, path: str, data: bytes) -> None:
        """Write a file whole: on disk under a temporary name, then renamed."""
        full = self.full(path)
        if self._is_local:
            os.replace(_write_temporary(full, data), full)
        else:
            self.fs.pipe_file(full, data)

    def create(self, path: str, data: bytes) -> bool:
        """Write a file whole unless one of that name exists; return whether this call made it."""
        full = self.full(path)
        if not self._is_local:
            try:
                self.fs.pipe_file(full, data, mode="create")
            except FileExistsError:
                return False
            return True
        temporary = _write_temporary(full, data)
        try:
            os.link(temporary, full)
        except FileExistsError:
            return False
        finally:
            os.unlink(temporary)
        return True

    def replace(self, path: str, old: bytes, new: bytes) -> bool:
        """Write a file if it has its old content; whoever calls this keeps others away meanwhile."""
        try:
            if self.read(path) != old:
                return False
        except FileNotFoundError:
            return False
        self.write(path, new)
        return True

    def upload(self, file: str | Path, path: str) -> None:
        """Copy a local file here, whole or not at all."""
        if not self._is_local:
            self.write(path, Path(file).read_bytes())
            return
        full = self.full(path)
        temporary = f"{os.path.dirname(full)}/.{uuid.uuid4().hex}.tmp"
        os.makedirs(os.path.dirname(full), exist_ok=True)
        try:
            shutil.copyfile(file, temporary)
            with open(temporary, "rb+") as copied:
                os.fsync(copied.fileno())
            os.replace(temporary, full)
        finally:
            Path(temporary).unlink(missing_ok=True)

    def download(self, path: str, file: str | Path) -> None:
        """Copy a file into a local file."""
        if self._is_local:
            shutil.copyfile(self.full(path), file)
        else:
            Path(file).write_bytes(self.read(path))

    def delete(self, path: str) -> None:
        """Remove a file; FileNotFoundError where there is none."""
        self.fs.rm_file(self.full(path))

    def delete_folder(self, folder: str) -> None:
        """Remove a folder with all that is in it; FileNotFoundError where there is none."""
        self.fs.rm(self.full(folder), recursive=True)


def _entry(info: dict[str, Any]) -> Entry:
    """Read a listing of fsspec, whose file systems name the time of writing each in its own way."""
    when = next((info[name] for name in ("mtime", "created") if info.get(name) is not None), 0.0)
    is_folder = info["type"] == "directory"
    written = when.timestamp() if isinstance(when, datetime) else float(when)
    return Entry(info["name"].rstrip("/").rpartition("/")[2], is_folder, 0.0 if is_folder else written)


def _write_temporary(full: str, data: bytes) -> str:
    folder, name = os.path.split(full)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return temporary
