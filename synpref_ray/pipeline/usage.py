"""What a table has used up so far: busy GPU seconds, and the cost and tokens of its LLM replies, on record while it is in the making.

Every worker writes one object beside the table, `usage/<worker>.json`, after each shard and every `WRITE_SECONDS` while it is at one, so a job that
is stopped and started again loses the last seconds at most. Per shard, GPU seconds of all attempts add up; cost and tokens are those of the shard's
journal, which outlives its workers, so of several attempts the last knows all. When all outputs of the step are sealed, the first one's manifest has
the sums, and the records are removed (`pipeline/steps.py`).
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from synpref_ray.reporting.usage import OF_JOURNAL, USAGE
from synpref_ray.tables.sidecars import Sidecar
from synpref_ray.tables.storage import STORAGE_ERRORS

WRITE_SECONDS = 30.0  # ours: what a kill may lose; a small PUT each
logger = logging.getLogger(__name__)


class UsageRecord:
    """The record of one worker, for all tables that it feeds; several of its threads may work at once.

    Busy is a worker with a shard or more in hand, once, however many; the seconds are shared out evenly among those shards.

    Args:
        tables: the sidecar of each input that the record is kept beside.
        num_gpus: what the worker holds.
        worker: its name, of no other worker of this or any run.
        clock: seconds.
    """

    def __init__(self, tables: Sequence[Sidecar], num_gpus: float, worker: str, clock: Callable[[], float] = time.monotonic):
        self._tables = tables
        self._num_gpus = num_gpus
        self._worker = worker
        self._clock = clock
        self._lock = threading.Lock()
        self._writing = threading.Lock()  # taken before the other: storage that hangs holds up no shard at work, and no older record replaces a newer
        self._shards: list[dict[int, dict[str, float]]] = [{} for _ in tables]
        self._in_hand: list[tuple[int, int]] = []
        self._seen = clock()
        self._thread: threading.Thread | None = None

    @contextmanager
    def working(self, table: int, shard: int) -> Iterator[dict[str, float]]:
        """Count the time until the block ends, however it does, and write the record then, with what of a shard's journal the block puts in the dict.

        Beginning never waits for the storage, and within the block nothing does: there a worker's time is limited.
        """
        with self._lock:
            self._share_out()
            self._in_hand.append((table, shard))
            if self._thread is None:
                self._thread = threading.Thread(target=self._write_now_and_then, name="usage", daemon=True)
                self._thread.start()
        counters: dict[str, float] = {}
        try:
            yield counters
        finally:
            with self._lock:
                self._share_out()
                self._in_hand.remove((table, shard))
                values = self._shards[table].setdefault(shard, {})
                values.update({name: counters[counter] for counter, name in OF_JOURNAL.items() if counter in counters})
            self._write(table)

    def write(self) -> None:
        """Write the record of every table that the worker has a shard of in hand."""
        with self._lock:
            self._share_out()
            tables = sorted({table for table, _ in self._in_hand})
        for table in tables:
            self._write(table, under_way=True)

    def _share_out(self) -> None:
        """Give the seconds since the last look to the shards in hand; the caller has the lock."""
        now = self._clock()
        seconds, self._seen = now - self._seen, now
        for table, shard in self._in_hand:
            values = self._shards[table].setdefault(shard, {})
            values["gpu_seconds"] = values.get("gpu_seconds", 0.0) + seconds * self._num_gpus / len(self._in_hand)

    def _write(self, table: int, *, under_way: bool = False) -> None:
        """Write the record of one table; where the storage fails it is written after the next shard, and no shard fails for it.

        Args:
            under_way: only if the worker still has a shard of it in hand: without one the table may be sealed by now, and its records removed.
        """
        sidecar = self._tables[table]
        with self._writing:
            with self._lock:
                if under_way and all(table != other for other, _ in self._in_hand):
                    return
                shards = {str(number): {name: round(value, 9) for name, value in values.items()} for number, values in self._shards[table].items()}
            data = json.dumps({"shards": shards}, sort_keys=True).encode()
            try:
                sidecar.pool.storage.write_bytes(f"{sidecar.folder}/{USAGE}/{self._worker}.json", data)
            except STORAGE_ERRORS as error:
                logger.warning("what was used for %s could not be written, and is tried again: %s", sidecar.folder, error)

    def _write_now_and_then(self) -> None:
        while True:
            time.sleep(WRITE_SECONDS)
            self.write()
