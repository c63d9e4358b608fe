"""How far a step is, while it runs: a thread of the driver lists the finished shards now and then, and exports the queue and the time left."""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

from synpref_ray.pipeline.metrics import export
from synpref_ray.reporting.metrics import progress_samples
from synpref_ray.tables.sidecars import Sidecar
from synpref_ray.tables.storage import STORAGE_ERRORS

POLL_SECONDS = 15.0  # ours: Prometheus asks about as often, and a listing of 5,000 shards on object storage is five requests
logger = logging.getLogger(__name__)


class Progress:
    """Context manager around a step's run on the cluster.

    Args:
        step: the title that the metrics get.
        pending: for every table that is written, the shards that this run has to make and their rows.
        clock: seconds.
    """

    def __init__(self, step: str, pending: Sequence[tuple[Sidecar, Mapping[int, int]]], clock: Callable[[], float] = time.monotonic):
        self._step = step
        self._clock = clock
        self._pending = pending
        self._first: tuple[int, float] | None = None  # rows done when some were first, and when that was
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __enter__(self) -> "Progress":
        export(progress_samples(self._step, sum(len(rows) for _, rows in self._pending), None))
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(timeout=POLL_SECONDS)
        if error is None:
            export(progress_samples(self._step, 0, 0.0))

    def _watch(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            try:
                self._export_once()
            except STORAGE_ERRORS as error:
                logger.warning("%s: could not list the finished shards (%s); trying again", self._step, error)

    def _export_once(self) -> None:
        shards = left = done = 0
        for sidecar, rows in self._pending:
            finished = sidecar.finished()
            missing = rows.keys() - finished
            shards += len(missing)
            left += sum(rows[number] for number in missing)
            done += sum(rows[number] for number in rows.keys() & finished)
        export(progress_samples(self._step, shards, self._seconds_left(done, left)))

    def _seconds_left(self, done: int, left: int) -> float | None:
        """Return the time left at the pace since the first shards: what came before was waiting for nodes and models."""
        now = self._clock()
        if self._first is None and done:
            self._first = done, now
        first, when = self._first or (done, now)
        return seconds_left(done - first, left, now - when)


def seconds_left(done: int, left: int, seconds: float) -> float | None:
    """Return how long `left` rows take at the pace of `done` rows in `seconds`; None before there is a pace, 0 when nothing is left."""
    if left == 0:
        return 0.0
    return left * seconds / done if done else None
