"""Objects under a prefix of a bucket, with what tables rely on: an object is seen whole or not at all, read whole or not at all, listed as it is.

A large object is uploaded in parts and comes into being when S3 is told that the upload is complete; until then no listing and no read shows any of
it, and what a killed process leaves of it can only be seen (and cleared) as an incomplete multipart upload. A large object is read in ranges, all
of one version (If-Match). Creation on condition is one PUT with If-None-Match. Listings go page by page, and skip placeholders of folders.
"""

import io
import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fsspec.utils import glob_translate

from synpref_ray.tables.s3_requests import PART_BYTES, PARTS_AT_ONCE, Content, S3Requests, error_code, s3_requests

WRITER_KEY = "synpref-ray-writer"
PAGE_KEYS = 1000  # S3's own limit of a page, and of a request that deletes
_MAGIC = re.compile(r"[*?\[]")
T = TypeVar("T")


def is_s3(url: str) -> bool:
    """Whether a URL names a place on S3."""
    return url.startswith(("s3://", "s3a://"))


class Entry(NamedTuple):
    """A file or folder in a listing; `written` is when a file was last written (seconds since 1970), 0 for folders and where no time is kept."""

    name: str
    is_folder: bool
    written: float


@dataclass(frozen=True)
class S3Objects:
    """The objects under `bucket`/`prefix`; paths are relative to it."""

    bucket: str
    prefix: str

    @classmethod
    def at(cls, url: str) -> "S3Objects":
        """Return the objects under an s3:// URL."""
        bucket, _, prefix = url.partition("://")[2].partition("/")
        return cls(bucket, prefix.strip("/"))

    @property
    def _requests(self) -> S3Requests:
        return s3_requests()

    def _key(self, path: str) -> str:
        return "/".join(part for part in (self.prefix, path.rstrip("/")) if part)

    def _place(self, path: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self._key(path)}

    def _full(self, path: str) -> str:
        return f"{self.bucket}/{self._key(path)}"

    def _head(self, path: str) -> dict[str, Any] | None:
        try:
            answer: dict[str, Any] = self._requests.call_s3("head_object", **self._place(path))
        except FileNotFoundError:
            return None
        return answer

    def is_object(self, path: str) -> bool:
        """Whether there is an object of that very name."""
        return bool(self._key(path)) and self._head(path) is not None

    def is_folder(self, path: str) -> bool:
        """Whether there is an object below that name."""
        return bool(next(self._pages(path, "", max_keys=1)).get("Contents"))

    def exists(self, path: str) -> bool:
        """Whether there is an object of that name, or one below it."""
        return self.is_object(path) or self.is_folder(path)

    def size(self, path: str) -> int:
        """Return the bytes of an object; FileNotFoundError where there is none."""
        return int(self._requests.call_s3("head_object", **self._place(path))["ContentLength"])

    def _pages(self, folder: str, delimiter: str, max_keys: int = 0) -> Iterator[dict[str, Any]]:
        key = self._key(folder)
        wanted = {"Bucket": self.bucket, "Prefix": f"{key}/" if key else "", "Delimiter": delimiter, "MaxKeys": max_keys or PAGE_KEYS}
        while True:
            page = self._requests.call_s3("list_objects_v2", **wanted)
            yield page
            if not page.get("IsTruncated"):
                return
            wanted["ContinuationToken"] = page["NextContinuationToken"]

    def list_files(self, folder: str, *, deep: bool = True) -> list[str]:
        """Return the paths of the objects under a folder, or directly in it."""
        return [path for path, _, _ in self.contents(folder, deep=deep)]

    def contents(self, folder: str, *, deep: bool = True) -> list[tuple[str, int, str]]:
        """Return (path, bytes, tag of the version) of the objects under a folder, or directly in it."""
        start = len(f"{self.prefix}/") if self.prefix else 0
        entries = (entry for page in self._pages(folder, "" if deep else "/") for entry in page.get("Contents", ()))
        found = [(entry["Key"][start:], int(entry["Size"]), str(entry["ETag"])) for entry in entries]
        return [entry for entry in found if not entry[0].endswith("/")]  # consoles make "folder/" objects

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the bytes of every object under a folder, by path."""
        return {path: size for path, size, _ in self.contents(folder)}

    def list_folders(self, folder: str) -> list[str]:
        """Return the names of the folders directly in a folder, by listings of that level alone."""
        return [entry.name for entry in self.list_entries(folder) if entry.is_folder]

    def list_entries(self, folder: str) -> list[Entry]:
        """Return what lies directly in a folder, by listings of that level alone."""
        entries = []
        for page in self._pages(folder, "/"):
            entries += [Entry(_name(found["Prefix"]), True, 0.0) for found in page.get("CommonPrefixes", ())]
            files = (found for found in page.get("Contents", ()) if not found["Key"].endswith("/"))
            entries += [Entry(_name(found["Key"]), False, found["LastModified"].timestamp()) for found in files]
        return entries

    def read(self, path: str) -> bytes:
        """Return an object's content; FileNotFoundError where there is none."""
        place = self._place(path)
        whole: Content = self._requests.get_content(*place.values())
        return whole.data if whole.data is not None else b"".join(self._parts(path, whole))

    def _parts(self, path: str, whole: Content) -> Iterator[bytes]:
        starts = range(0, whole.total, PART_BYTES)
        for first in range(0, len(starts), PARTS_AT_ONCE):
            yield from self._requests.get_parts(*self._place(path).values(), list(starts[first : first + PARTS_AT_ONCE]), whole)

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Return the bytes from `start` to `stop`, fewer if the object ends before; FileNotFoundError where there is none."""
        if start >= stop:
            return b""
        try:
            content: Content = self._requests.get_content(*self._place(path).values(), start, stop)
        except OSError as error:
            if error_code(error) in ("InvalidRange", "416"):
                return b""
            raise
        return content.data or b""

    def write(self, path: str, data: bytes) -> None:
        """Write an object whole: one PUT, or an upload in parts."""
        _upload(lambda: self._requests.pipe_file(self._full(path), data, chunksize=PART_BYTES, max_concurrency=PARTS_AT_ONCE))

    def upload(self, file: str | Path, path: str) -> None:
        """Write a local file as an object, without holding it in memory."""
        _upload(lambda: self._requests.put_file(str(file), self._full(path), chunksize=PART_BYTES, max_concurrency=PARTS_AT_ONCE))

    def download(self, path: str, file: str | Path) -> None:
        """Write an object into a local file, without holding it in memory; FileNotFoundError where there is none."""
        whole: Content = self._requests.get_content(*self._place(path).values())
        with open(file, "wb") as stream:
            for part in [whole.data] if whole.data is not None else self._parts(path, whole):
                stream.write(part)

    def create(self, path: str, data: bytes) -> bool:
        """Write an object on condition that there is none of that name; return whether this call made it."""
        return self._put_if(path, data, IfNoneMatch="*")

    def replace(self, path: str, old: bytes, new: bytes) -> bool:
        """Write an object on condition that it still has its old content; return whether this call did."""
        try:
            there: Content = self._requests.get_content(*self._place(path).values())
            return there.data == old and self._put_if(path, new, IfMatch=there.etag)
        except FileNotFoundError:
            return False

    def _put_if(self, path: str, data: bytes, **condition: str) -> bool:
        """Where the answer to a PUT is lost, the next attempt finds the object made. So it carries a mark of the call that made it."""
        mark = uuid.uuid4().hex
        try:
            self._requests.call_s3("put_object", **self._place(path), Body=data, Metadata={WRITER_KEY: mark}, **condition)
        except OSError as error:
            if error_code(error) != "PreconditionFailed":
                raise
            there = self._head(path)
            return there is not None and there.get("Metadata", {}).get(WRITER_KEY) == mark
        return True

    def delete(self, path: str) -> None:
        """Remove an object, if it is there."""
        self._requests.call_s3("delete_object", **self._place(path))

    def delete_folder(self, folder: str) -> None:
        """Remove every object under a folder, placeholders and hidden ones too."""
        for page in self._pages(folder, ""):
            keys = [entry["Key"] for entry in page.get("Contents", ())]
            if not keys:
                continue
            wanted = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
            answer = self._requests.call_s3("delete_objects", Bucket=self.bucket, Delete=wanted)
            for refused in answer.get("Errors", ()):  # some of many: by itself it is repeated, or its error told
                self._requests.call_s3("delete_object", Bucket=self.bucket, Key=refused["Key"])


def _name(key: str) -> str:
    return key.rstrip("/").rpartition("/")[2]


def _upload(action: Callable[[], T]) -> T:
    """Do it again, once, where completing the upload succeeded but its answer was lost: the next attempt finds no such upload."""
    try:
        return action()
    except FileNotFoundError as error:
        if error_code(error) != "NoSuchUpload":
            raise
    return action()


class ObjectFile(io.RawIOBase):
    """A readable, seekable file over one version of an object. Every read gets what it asks for, or fails: an end is only where the object ends."""

    def __init__(self, url: str):
        """Open it; FileNotFoundError where there is no such object."""
        bucket, _, key = url.partition("://")[2].partition("/")
        self._place = (bucket, key)
        head = s3_requests().call_s3("head_object", Bucket=bucket, Key=key)
        self._total, self._etag = int(head["ContentLength"]), str(head["ETag"])
        self._at = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Return the place of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._total}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer from here on, with no more than a part."""
        view = memoryview(buffer).cast("B")
        stop = min(self._at + min(len(view), PART_BYTES), self._total)
        if stop <= self._at:
            return 0
        content: Content = s3_requests().get_content(*self._place, self._at, stop, self._etag)
        data = content.data or b""
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


def find_objects(url: str) -> tuple[list[str], bool]:
    """Return the URLs of the objects that a URL, folder or glob pattern means, and whether it names one object itself.

    Pages that fail after all attempts are an error; fsspec's own `glob` leaves them out in silence.
    """
    there = S3Objects.at(url)
    root = f"{url.partition('://')[0]}://{there.bucket}"
    if there.is_object(""):
        return [url], True
    if not _MAGIC.search(there.prefix):
        return [f"{root}/{there.prefix}{'/' * bool(there.prefix)}{name}" for name in there.list_files("")], False
    parts = there.prefix.split("/")
    plain = next(number for number, part in enumerate(parts) if _MAGIC.search(part))
    above = S3Objects(there.bucket, "/".join(parts[:plain]))
    names = above.list_files("", deep=plain < len(parts) - 1 or "**" in parts[-1])
    keys = ("/".join([*parts[:plain], name]) for name in names)
    matches = re.compile(glob_translate(there.prefix)).match
    return [f"{root}/{key}" for key in keys if matches(key)], False
