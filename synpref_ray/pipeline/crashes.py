"""Poison pairs: what kills the process that works on it is narrowed down to the pair, rejected with a reason, and the job goes on.

An engine can die of one pair (a kernel's assertion, an endless template, memory that nobody planned for), and then its process is gone and cannot
say what it was. So a worker writes down what it is about to run, a range of a shard's rows, and strikes it out when it comes back. Ray starts a dead
worker again; what it finds written down by the same run killed its predecessor:
- a whole shard is run once more (its worker may have died of something else: a node that was taken away, a `kill -9`);
- one that has killed two workers is run in halves, and so is every half that kills another one. Halves that came through are kept on storage;
- a single pair that has killed three workers by itself is rejected, reason `engine_crash`.

Our choice throughout. One poison pair among 8,192 costs 2 + 12 + 3 workers' starts; that a healthy pair is rejected takes 17 kills, each while
the very range that it is in is being run. A shard that killed one worker is run alone, not beside others of the same worker, so that those are
not blamed. Halves go to the worker like a shard of their own, so a worker must treat every row by itself, as all that run on actors do; numbers
of a real model may then differ by float error, as after any restart.

What an earlier run of the job wrote down counts for nothing: its workers died with their driver. Every loop here ends: a shard may kill
`MAX_CRASHES` workers, a worker may die `MAX_START_CRASHES` times in a row while it starts, and then the job ends with the reason.
"""

import logging
import os
import socket
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType

import pyarrow as pa

from synpref_ray.errors import InputError, SynprefError
from synpref_ray.llm.engine import EngineDied
from synpref_ray.schema import DropReason
from synpref_ray.tables.storage import Storage

MAX_SHARD_CRASHES = 2  # ours: once is chance (a node that was taken away), twice is a pattern
MAX_PAIR_CRASHES = 3  # ours: a pair is rejected for good, so it gets one more chance than a shard
MAX_CRASHES = 200  # ours: about ten poison pairs in one shard; more is not poison but a broken engine
MAX_START_CRASHES = 3  # ours, in a row: a model that did not fit three times will not fit the fourth
MAX_RESTARTS = 1000  # ours: of one worker over a step of days; Ray's own default is without end
MAX_TASK_RETRIES = 20  # ours: of a stateless task whose process or node is lost; Ray Data's own default is without end
EXIT_CODE = 70  # EX_SOFTWARE: this process ended itself, so that Ray starts another
Rows = tuple[int, int]
"""The rows of a shard from the first number up to, not including, the second."""
Run = Callable[[pa.Table], tuple[pa.Table, Mapping[str, float]]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RangePlan:
    """What to run of a shard, range by range in order, and which rows to reject; together they are all its rows."""

    run: tuple[Rows, ...]
    reject: tuple[int, ...]


def plan_ranges(num_rows: int, crashes: Mapping[Rows, int]) -> RangePlan:
    """Return what to run of a shard, given how many workers each range has killed."""
    run: list[Rows] = []
    reject: list[int] = []
    open_ranges = [(0, num_rows)]
    while open_ranges:
        start, stop = open_ranges.pop()
        count = crashes.get((start, stop), 0)
        of_many = MAX_SHARD_CRASHES if (start, stop) == (0, num_rows) else 1
        allowed = MAX_PAIR_CRASHES if stop - start == 1 else of_many
        if count < allowed:
            run.append((start, stop))
        elif stop - start == 1:
            reject.append(start)
        else:
            middle = (start + stop) // 2
            open_ranges += [(middle, stop), (start, middle)]
    return RangePlan(tuple(run), tuple(reject))


@dataclass
class CrashJournal:
    """What the workers of one run of a step have in hand, in one folder of a table: `<shard>/<run>.<start>-<stop>.<number>`."""

    storage: Storage
    folder: str
    run: str
    _ours: set[str] = field(default_factory=set)

    def crashes(self, shard: int) -> Counter[Rows]:
        """Return how many workers of this run each range of a shard has killed; what other runs left is removed."""
        found: Counter[Rows] = Counter()
        for path in self.storage.list_files(self._folder_of(shard), deep=False):
            run, _, rest = path.rpartition("/")[2].partition(".")
            if rest.endswith(".parquet"):
                continue
            if run != self.run:
                self.storage.delete(path)
            elif path not in self._ours:
                start, stop = rest.partition(".")[0].split("-")
                found[int(start), int(stop)] += 1
        return found

    def in_hand(self, shard: int, rows: Rows) -> "_InHand":
        """Have a range written down until the block ends, by itself or by an error that somebody can catch."""
        return _InHand(self, f"{self._folder_of(shard)}/{self.run}.{rows[0]}-{rows[1]}.{uuid.uuid4().hex[:8]}")

    def write_down(self, path: str) -> None:
        """Leave a mark of this worker."""
        self._ours.add(path)
        self.storage.write_bytes(path, _who())

    def strike(self, path: str) -> None:
        """Take a mark back."""
        self.storage.delete(path)
        self._ours.discard(path)

    def read_part(self, shard: int, rows: Rows) -> pa.Table | None:
        """Return what a worker made of a range before the shard came to its end, of this run or an earlier one."""
        try:
            return self.storage.read_table(self._part(shard, rows))
        except InputError:
            return None

    def write_part(self, shard: int, rows: Rows, part: pa.Table) -> None:
        """Keep what a worker made of a range."""
        self.storage.write_table(self._part(shard, rows), part)

    def forget(self, shard: int) -> None:
        """Remove all that was written down about a shard that has come to its end."""
        self.storage.delete_folder(self._folder_of(shard))

    @contextmanager
    def starting(self, worker: str) -> Iterator[None]:
        """Have it written down that a worker is starting; once it has started, its earlier deaths at that count for nothing.

        Raises:
            SynprefError: it has died too often in a row while it did.
        """
        folder = f"{self.folder}/starts"
        before = [path for path in self.storage.list_files(folder, deep=False) if path.rpartition("/")[2].startswith(f"{self.run}.{worker}.")]
        if len(before) >= MAX_START_CRASHES:
            raise SynprefError(
                f"a worker died {len(before)} times in a row while it started, without a word: mostly the system kills it for lack of memory; give "
                "it a smaller model or more memory (Ray's log of the node tells), then run the job again"
            )
        path = f"{folder}/{self.run}.{worker}.{uuid.uuid4().hex[:8]}"
        self.storage.write_bytes(path, _who())
        over = [path]
        try:
            yield
            over += before
        finally:
            for mark in over:
                self.storage.delete(mark)

    def _folder_of(self, shard: int) -> str:
        return f"{self.folder}/{shard:05d}"

    def _part(self, shard: int, rows: Rows) -> str:
        return f"{self._folder_of(shard)}/part.{rows[0]}-{rows[1]}.parquet"


class _InHand:
    """A range that a worker has in hand. Its mark stays where the process ends, or its engine is as good as dead."""

    def __init__(self, journal: CrashJournal, path: str):
        self._journal, self._path = journal, path

    def __enter__(self) -> None:
        self._journal.write_down(self._path)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is None or (issubclass(kind, Exception) and not issubclass(kind, EngineDied)):
            self._journal.strike(self._path)


class Lane:
    """Lets shards run side by side, and a suspect alone; who asks to be alone is let in before those who come later."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._waiting_alone = 0

    @contextmanager
    def enter(self, *, alone: bool) -> Iterator[None]:
        """Wait for the turn, and hold it until the block ends."""
        with self._changed:
            self._waiting_alone += alone
            self._changed.wait_for(lambda: self._running == 0 if alone else self._running >= 0 and not self._waiting_alone)
            self._waiting_alone -= alone
            self._running += -1 if alone else 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._running -= -1 if alone else 1
                self._changed.notify_all()


class ShardGuard:
    """Runs a worker over shards as the module's text says.

    Args:
        step: its name, for messages.
        outputs: the prefix of the columns and the schema of each table that the step makes.
        max_shard_seconds: a worker that takes longer over one range is ended as if it had died of it; 0: it may take for ever.
    """

    def __init__(self, step: str, outputs: Sequence[tuple[str, pa.Schema]], max_shard_seconds: float = 0.0):
        self._step = step
        self._outputs = outputs
        self._max_shard_seconds = max_shard_seconds
        self._lane = Lane()

    def __call__(self, shard: pa.Table, number: int, journal: CrashJournal, run: Run) -> tuple[pa.Table, Mapping[str, float]]:
        """Return what `run` makes of a shard, rows that kill it rejected, and its counters (`worker_crashes` among them)."""
        crashes = journal.crashes(number)
        with self._lane.enter(alone=bool(crashes)):
            if not crashes:
                with journal.in_hand(number, (0, shard.num_rows)), self._time_limit(number):
                    result = run(shard)
            else:
                result = self._run_parts(shard, number, journal, run, crashes)
        if crashes:
            journal.forget(number)
        return result

    def _run_parts(
        self, shard: pa.Table, number: int, journal: CrashJournal, run: Run, crashes: Counter[Rows]
    ) -> tuple[pa.Table, Mapping[str, float]]:
        if crashes.total() > MAX_CRASHES:
            raise SynprefError(
                f"step {self._step!r}: shard {number} has killed {crashes.total()} workers, too many for poison pairs; the engine itself is broken "
                "(the workers' logs tell), and the job would go on for ever"
            )
        plan = plan_ranges(shard.num_rows, crashes)
        ranges = ", ".join(f"{start}-{stop}" for start, stop in plan.run[:3])
        logger.warning("step %s: shard %d has killed %d workers; trying rows %s …", self._step, number, crashes.total(), ranges)
        parts: dict[int, pa.Table] = {row: self._rejected(shard, row) for row in plan.reject}
        counters: Counter[str] = Counter({"worker_crashes": float(crashes.total())})
        whole = plan.run == ((0, shard.num_rows),)
        for rows in plan.run:
            part = None if whole else journal.read_part(number, rows)
            if part is None:
                with journal.in_hand(number, rows), self._time_limit(number):
                    part, counted = run(shard.slice(rows[0], rows[1] - rows[0]).combine_chunks())
                counters.update(counted)
                if not whole:
                    journal.write_part(number, rows, part)
            parts[rows[0]] = part
        table = pa.concat_tables([parts[start] for start in sorted(parts)], promote_options="default").combine_chunks()
        return table, {**counters, **({"crashed_pairs": float(len(plan.reject))} if plan.reject else {})}

    def _rejected(self, shard: pa.Table, row: int) -> pa.Table:
        """Return the row of a rejected pair in all the step's tables."""
        pair_id = shard["pair_id"][row].as_py()
        columns = {"pair_id": pa.array([pair_id])}
        for prefix, schema in self._outputs:
            values = {name: DropReason.ENGINE_CRASH.value if name == "drop_reason" else None for name in schema.names if name != "pair_id"}
            if "drop_reason" not in values or any(value is None and not schema.field(name).nullable for name, value in values.items()):
                raise SynprefError(f"step {self._step!r}: pair {pair_id} kills every worker, and the step's table has no place for a reason")
            columns |= {prefix + name: pa.array([value], schema.field(name).type) for name, value in values.items()}
        logger.error("step %s: pair %s killed every worker that tried it alone: rejected (%s)", self._step, pair_id, DropReason.ENGINE_CRASH.value)
        return pa.table(columns)

    @contextmanager
    def _time_limit(self, number: int) -> Iterator[None]:
        if not self._max_shard_seconds:
            yield
            return
        timer = threading.Timer(self._max_shard_seconds, self._end, [number])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _end(self, number: int) -> None:
        end_process(f"step {self._step}: shard {number} took more than {self._max_shard_seconds:.0f} s")


def _who() -> bytes:
    return f"process {os.getpid()} on {socket.gethostname()}".encode()


def end_process(why: str) -> None:
    """End this worker's process at once, so that Ray starts another in its place."""
    logger.error("%s; this worker ends, and another takes its place", why)
    logging.shutdown()
    os._exit(EXIT_CODE)
