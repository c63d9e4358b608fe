"""A hard limit on what endpoints may cost (Sec. 3.1 and 3.2 at a provider's prices).

The most that an attempt can cost is set aside before it is sent, so the limit holds with any number of requests in flight. What is set aside
for an attempt whose fate is unknown (no answer came) stays spent. Money is counted in whole billionths of the price's unit, rounded up.
"""

import json
import logging
import math
import threading
import time
import uuid
from collections.abc import Callable
from typing import Protocol

from synpref_ray.errors import InputError, SpendingLimitError
from synpref_ray.llm.journal import JournalStorage

logger = logging.getLogger(__name__)

_PARTS = 10**9
_STEPS = 200  # ours: the record moves by at least this part of the limit, so a few hundred writes serve a run; see `Ledger`
DEFAULT_EXPIRES_SECONDS = 3600.0


class Budget(Protocol):
    """Money that several engines share; every method may be called by several threads."""

    def reserve(self, worst_cost: float, wait_seconds: float) -> str | None:
        """Set `worst_cost` aside and return the reservation's name; None if that must wait for others in flight, after `wait_seconds`.

        Raises:
            SpendingLimitError: what is spent for good leaves too little.
        """
        ...

    def settle(self, reservation: str, actual_cost: float) -> None:
        """Replace what was set aside by what it came to; returns at once."""
        ...


class SpendingRecord:
    """How much may have been spent on a table, by all runs: one object, raised *before* the money is, so that a killed run is never forgotten."""

    def __init__(self, storage: JournalStorage, folder: str) -> None:
        self._storage = storage
        self._folder = folder.rstrip("/")
        self._path = f"{self._folder}/spent.json"

    def read(self) -> float:
        """Return what earlier runs may have spent.

        Raises:
            InputError: the record is damaged.
        """
        if self._path not in self._storage.list_files(self._folder):
            return 0.0
        try:
            spent = float(json.loads(self._storage.read_bytes(self._path))["spent"])
        except (ValueError, TypeError, KeyError):
            spent = math.nan
        if not (math.isfinite(spent) and spent >= 0):
            raise InputError(f'the spending record {self._path} is damaged: write {{"spent": <amount so far>}} into it, or delete it to count from 0')
        return spent

    def write(self, spent: float) -> None:
        """Replace the record."""
        self._storage.write_bytes(self._path, json.dumps({"spent": spent}).encode() + b"\n")


class Ledger:
    """The arithmetic of a budget, without waiting or locks.

    The record is never behind what is spent and set aside, and at most two steps ahead of it. A step is a 200th of the limit, or the most that was
    ever set aside for one attempt if that is more; every write moves the record by a step or more, but for those near the limit and the last.
    A reservation that nobody settles (its worker is dead) counts as spent after `expires_seconds`; give more than an attempt can take.
    """

    def __init__(
        self,
        limit: float,
        record: SpendingRecord | None = None,
        expires_seconds: float = DEFAULT_EXPIRES_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = math.floor(limit * _PARTS)
        self._record = record
        self._expires_seconds = expires_seconds
        self._clock = clock
        self._before = _parts(record.read()) if record is not None else 0
        self._spent = self._before
        self._held: dict[str, tuple[int, float]] = {}  # in the order in which they expire
        self._held_parts = 0
        self._lost: dict[str, int] = {}
        self._recorded = self._before
        self._step = max(1, self._limit // _STEPS)
        self._has_granted = False

    @property
    def spent(self) -> float:
        """All that counts as spent, by earlier runs and this one, what is set aside included."""
        return (self._spent + self._held_parts) / _PARTS

    def reserve(self, worst_cost: float) -> str | None:
        """See `Budget.reserve`, but None at once."""
        self._expire()
        wanted = _parts(worst_cost)
        if self._spent + wanted > self._limit:
            raise SpendingLimitError(self._why(wanted))
        if self._spent + self._held_parts + wanted > self._limit:
            return None
        self._step = max(self._step, wanted)
        self._record_before_spending(self._spent + self._held_parts + wanted)
        name = uuid.uuid4().hex
        self._held[name] = (wanted, self._clock() + self._expires_seconds)
        self._held_parts += wanted
        self._has_granted = True
        return name

    def settle(self, reservation: str, actual_cost: float) -> None:
        """See `Budget.settle`; an expired reservation is corrected, an unknown one ignored."""
        if reservation in self._lost:
            self._spent += _parts(actual_cost) - self._lost.pop(reservation)
        elif reservation in self._held:
            self._held_parts -= self._held.pop(reservation)[0]
            self._spent += _parts(actual_cost)
        self._lower_record()

    def save(self) -> None:
        """Bring the record down to what is known now; it is raised again if more is spent.

        Who never spent writes nothing: the record may be that of another driver at work (a second one, whom the table's lease sent away).
        """
        if self._has_granted:
            self._write(self._spent + self._held_parts)

    def _expire(self) -> None:
        now = self._clock()
        while self._held:
            name, (parts, end) = next(iter(self._held.items()))
            if end > now:
                return
            del self._held[name]
            self._held_parts -= parts
            self._spent += parts
            self._lost[name] = parts

    def _record_before_spending(self, total: int) -> None:
        if self._record is not None and total > self._recorded:
            self._write(max(total, min(self._limit, total + self._step)))

    def _lower_record(self) -> None:
        """Bring the record down to a step above what is known. Where the storage fails it stays too high: no settlement fails for that."""
        total = self._spent + self._held_parts
        if self._has_granted and self._recorded - total > 2 * self._step:
            try:
                self._write(total + self._step)
            except OSError as error:
                logger.warning("the spending record could not be brought down to what was spent, and is tried again: %s", error)

    def _write(self, total: int) -> None:
        if self._record is not None:
            self._record.write(total / _PARTS)
            self._recorded = total

    def _why(self, wanted: int) -> str:
        earlier = f", {_show(self._before)} of it by earlier runs" if self._before else ""
        return (
            f"the spending limit of {_show(self._limit)} is reached: {_show(self._spent)} counts as spent{earlier}, and the next request may cost "
            f"{_show(wanted)}; finished replies are kept: raise spending_limit and start the job again"
        )


class LocalBudget:
    """A budget for the engines of one process."""

    def __init__(self, limit: float, record: SpendingRecord | None = None, expires_seconds: float = DEFAULT_EXPIRES_SECONDS) -> None:
        self._ledger = Ledger(limit, record, expires_seconds)
        self._changed = threading.Condition()

    @property
    def spent(self) -> float:
        """See `Ledger.spent`."""
        with self._changed:
            return self._ledger.spent

    def reserve(self, worst_cost: float, wait_seconds: float) -> str | None:
        """See `Budget.reserve`."""
        end = time.monotonic() + wait_seconds
        with self._changed:
            while (name := self._ledger.reserve(worst_cost)) is None and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)
            return name

    def settle(self, reservation: str, actual_cost: float) -> None:
        """See `Budget.settle`."""
        with self._changed:
            self._ledger.settle(reservation, actual_cost)
            self._changed.notify_all()

    def save(self) -> None:
        """See `Ledger.save`."""
        with self._changed:
            self._ledger.save()


def _parts(amount: float) -> int:
    return math.ceil(amount * _PARTS)


def _show(parts: int) -> str:
    return f"{parts / _PARTS:.6f}".rstrip("0").rstrip(".")
