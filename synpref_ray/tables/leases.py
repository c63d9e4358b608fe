"""A lease on a table: a second driver is refused, a dead one's place is taken.

The holder rewrites the lease file every few seconds. It counts as dead at once when it ran on this host and its process is gone, and otherwise when
the file has not been renewed for `EXPIRES_SECONDS`. Shard writes are atomic and repeatable, so even a lost race costs work, never correctness.
"""

import json
import os
import socket
import threading
import time
import uuid
from types import TracebackType
from typing import Any

import psutil

from synpref_ray.errors import InputError, RunConflictError
from synpref_ray.tables.storage import Storage, encode_json

RENEW_SECONDS = 10.0
EXPIRES_SECONDS = 60.0


class Lease:
    """Context manager that holds `path`; entering raises `RunConflictError` while another driver holds it."""

    def __init__(self, storage: Storage, path: str):
        self._storage = storage
        self._path = path
        self._owner = uuid.uuid4().hex
        self._stop = threading.Event()
        self._renewer = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        for _ in range(3):
            if self._storage.create_exclusive(self._path, self._content()):
                self._renewer.start()
                return self
            holder = self._read()
            if holder is not None and not _is_dead(holder):
                raise RunConflictError(
                    f"{self._storage.join(self._path)} is held by process {holder.get('pid')} on {holder.get('host')}: another job is writing "
                    f"this table; wait for it, or stop it (a dead holder's lease ends by itself within {EXPIRES_SECONDS:.0f} s)"
                )
            self._storage.delete(self._path)
        raise RunConflictError(f"{self._storage.join(self._path)}: several drivers are racing for this table; start one of them again")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._renewer.join(timeout=RENEW_SECONDS)
        if self._is_ours():
            self._storage.delete(self._path)

    def check(self) -> None:
        """Raise `RunConflictError` if another driver has taken the lease since."""
        if not self._is_ours():
            raise RunConflictError(f"{self._storage.join(self._path)} was taken over by another driver (this one was silent too long)")

    def _is_ours(self) -> bool:
        holder = self._read()
        return holder is not None and holder.get("owner") == self._owner

    def _read(self) -> dict[str, Any] | None:
        try:
            holder = json.loads(self._storage.read_bytes(self._path))
        except (InputError, ValueError):
            return None
        return holder if isinstance(holder, dict) else None

    def _content(self) -> bytes:
        me = psutil.Process()
        return encode_json(
            {"owner": self._owner, "host": socket.gethostname(), "pid": me.pid, "process_started": me.create_time(), "renewed": time.time()}
        )

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_SECONDS):
            if not self._is_ours():
                return
            self._storage.write_bytes(self._path, self._content())


def _is_dead(holder: dict[str, Any]) -> bool:
    if holder.get("host") == socket.gethostname() and holder.get("pid") != os.getpid():
        try:
            return bool(abs(psutil.Process(int(holder["pid"])).create_time() - float(holder["process_started"])) > 1.0)
        except (psutil.NoSuchProcess, KeyError, ValueError):
            return True
    return time.time() - float(holder.get("renewed", 0.0)) > EXPIRES_SECONDS
