"""A lease on a table: a second driver is refused, a dead one's place is taken.

The holder rewrites the lease file every few seconds. It counts as dead at once when it ran on this host and its process is gone, and otherwise when
the file has not been renewed for `EXPIRES_SECONDS`. The file names one owner at any moment, and nobody enters without having read its own name there.

Two drivers may find the same dead lease, and the slower one must not remove the lease that the faster one has taken since. So reading a lease again
and removing it is one act:
- in a local folder under an flock on that folder, which keeps apart the drivers of one host. Where drivers of several hosts share a file system, or
  it has no such locks (NFS has none on folders), the file is moved aside by an atomic rename, looked at, and put back if it was another's;
- on object storage, where nothing can be removed on condition of its content, by whoever creates a claim, an object that is named after that one
  lease's content (a conditional put, If-None-Match: it has one winner). Who does not get the claim removes nothing.

On S3 a renewal is conditional too (If-Match), so that a holder that slept cannot write over the lease of its successor.

That keeps honest drivers apart; it is not a fence. A holder that was silent for too long (suspended, cut off from storage) loses its place without
being stopped, and on object storage a driver that stalls in the middle of a removal, for so long that its claim expires, can still remove a younger
lease. So holders call `check` before they seal what they made, and where a rival could write other content under the same name, before each such
write, in workers too (`Hold`): it narrows such a race to the moment between the check and the write, and there writes are atomic and repeatable.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import psutil

from synpref_ray.errors import InputError, RunConflictError
from synpref_ray.tables.storage import STORAGE_ERRORS, Storage, encode_json

RENEW_SECONDS = 10.0
EXPIRES_SECONDS = 60.0
SETTLE_SECONDS = 1.0  # ours: many times what a rival on another host needs between reading a dead lease and removing it
NO_LOCKS = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""What flock says on file systems that cannot lock a folder."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hold:
    """A lease that was taken, as a worker gets it to check it; small enough to travel."""

    storage: Storage
    path: str
    owner: str

    def check(self) -> None:
        """Raise `RunConflictError` if another driver has taken the lease since, or it is gone."""
        try:
            holder = _parse(self.storage.read_bytes(self.path))
        except InputError:
            holder = None
        if holder is None or holder.get("owner") != self.owner:
            raise RunConflictError(f"{self.storage.join(self.path)} was taken over by another driver (this one was silent too long)")


class Lease:
    """Context manager that holds `path`; entering raises `RunConflictError` while another driver holds it."""

    def __init__(self, storage: Storage, path: str):
        self._storage = storage
        self._path = path
        self._owner = uuid.uuid4().hex
        self._stop = threading.Event()
        self._renewer = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        took_over = False
        for _ in range(3):
            if self._storage.create_exclusive(self._path, self._content()):
                if took_over:
                    time.sleep(SETTLE_SECONDS)  # a rival that saw the same dead lease may be about to remove ours in its stead
                if self._is_ours():
                    self._renewer.start()
                    return self
                continue
            content = self._read()
            if content is None:
                continue
            holder = _parse(content)
            if holder is not None and not _is_dead(holder):
                raise RunConflictError(
                    f"{self._storage.join(self._path)} is held by process {holder.get('pid')} on {holder.get('host')}: another job is writing "
                    f"this table; wait for it, or stop it (a dead holder's lease ends by itself within {EXPIRES_SECONDS:.0f} s)"
                )
            self._remove(content)
            took_over = True
        raise RunConflictError(f"{self._storage.join(self._path)}: several drivers are racing for this table; start one of them again")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._renewer.join(timeout=RENEW_SECONDS)
        content = self._read()
        if content is not None and self._owns(content):
            self._remove(content)

    @property
    def hold(self) -> Hold:
        """What workers check."""
        return Hold(self._storage, self._path, self._owner)

    def check(self) -> None:
        """Raise `RunConflictError` if another driver has taken the lease since."""
        self.hold.check()

    def _is_ours(self) -> bool:
        content = self._read()
        return content is not None and self._owns(content)

    def _owns(self, content: bytes) -> bool:
        holder = _parse(content)
        return holder is not None and holder.get("owner") == self._owner

    def _read(self) -> bytes | None:
        try:
            return self._storage.read_bytes(self._path)
        except InputError:
            return None

    def _remove(self, content: bytes) -> None:
        """Remove the lease file if it still holds `content`; see the module's text."""
        if not self._storage.is_local:
            self._remove_object(content)
            return
        with self._alone():
            if self._read() == content:
                self._move_away(content)

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        return _locked(os.path.dirname(self._storage.local_path(self._path))) if self._storage.is_local else contextlib.nullcontext()

    def _move_away(self, content: bytes) -> None:
        """A rename settles which host removes the file; another's lease is put back."""
        path = self._storage.local_path(self._path)
        folder, name = os.path.split(path)
        aside = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
        try:
            os.rename(path, aside)
        except FileNotFoundError:  # a rival was first
            return
        with open(aside, "rb") as file:
            moved = file.read()
        if moved != content:
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        os.unlink(aside)

    def _remove_object(self, content: bytes) -> None:
        folder, _, name = self._path.rpartition("/")
        claim = f"{folder}/" * bool(folder) + f".{name.lstrip('.')}.{hashlib.sha256(content).hexdigest()[:16]}.claim"
        if self._storage.create_exclusive(claim, self._content()):
            try:
                if self._read() == content:
                    self._storage.delete(self._path)
            finally:
                self._storage.delete(claim)
            return
        with contextlib.suppress(InputError):  # the rival is done
            claimant = _parse(self._storage.read_bytes(claim))
            if claimant is None or _is_dead(claimant):
                self._storage.delete(claim)

    def _content(self) -> bytes:
        me = psutil.Process()
        return encode_json(
            {"owner": self._owner, "host": socket.gethostname(), "pid": me.pid, "process_started": me.create_time(), "renewed": time.time()}
        )

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_SECONDS):
            try:
                with self._alone():
                    content = self._read()
                    if content is None:  # put aside by a rival for a moment, or gone for good: `check` will tell
                        continue
                    if not self._owns(content):
                        return
                    self._storage.replace(self._path, content, self._content())
            except STORAGE_ERRORS:
                logger.exception("could not renew %s; trying again in %.0f s", self._storage.join(self._path), RENEW_SECONDS)


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Keep this host's other drivers from changing leases in a folder meanwhile; does nothing where the file system cannot, or there is no folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        yield
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            yield
            return
        try:
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing alone would leave it to a child that was forked meanwhile
    finally:
        os.close(descriptor)


def is_held(storage: Storage, path: str) -> bool:
    """Whether a living driver holds the lease at `path`, as far as this host can tell; nothing is changed.

    A driver on another host counts as living until its lease expires.
    """
    try:
        holder = _parse(storage.read_bytes(path))
    except InputError:
        return False
    return holder is not None and not _is_dead(holder)


def _parse(content: bytes) -> dict[str, Any] | None:
    try:
        holder = json.loads(content)
    except ValueError:
        return None
    return holder if isinstance(holder, dict) else None


def _is_dead(holder: dict[str, Any]) -> bool:
    if holder.get("host") == socket.gethostname():
        try:
            if abs(psutil.Process(int(holder["pid"])).create_time() - float(holder["process_started"])) > 1.0:
                return True  # the pid was given out again, perhaps to us: a restarted container counts its processes from the same number
        except (psutil.NoSuchProcess, KeyError, ValueError, TypeError):
            return True
        if holder["pid"] != os.getpid():
            return False
    return time.time() - float(holder.get("renewed", 0.0)) > EXPIRES_SECONDS
