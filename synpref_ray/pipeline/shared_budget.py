"""One budget for all workers of a step: a small Ray actor that every engine asks before it sends (Sec. 3.1 and 3.2 at a provider's prices)."""

import threading
import time
from types import TracebackType
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from synpref_ray.errors import SpendingLimitError
from synpref_ray.llm.spending import DEFAULT_EXPIRES_SECONDS, Ledger, SpendingRecord

_ASK_AGAIN_SECONDS = 0.2  # ours: only near the limit, and one thread per process


class _Keeper:
    """The actor: a ledger, one call at a time."""

    def __init__(self, limit: float, record: SpendingRecord | None, expires_seconds: float) -> None:
        self._ledger = Ledger(limit, record, expires_seconds)

    def reserve(self, worst_cost: float) -> tuple[str | None, str | None]:
        """Return the reservation, or why there will never be one, or neither. No error: Ray would wrap it in a traceback."""
        try:
            return self._ledger.reserve(worst_cost), None
        except SpendingLimitError as error:
            return None, str(error)

    def settle(self, reservation: str, actual_cost: float) -> None:
        """See `Ledger.settle`."""
        self._ledger.settle(reservation, actual_cost)

    def spent(self) -> float:
        """See `Ledger.spent`."""
        return self._ledger.spent

    def save(self) -> None:
        """See `Ledger.save`."""
        self._ledger.save()


class SharedBudget:
    """A `Budget` that may be sent to workers. `start` it in the driver, which keeps it; it is a context manager that saves the record at its end.

    What a dead worker had set aside counts as spent.
    """

    def __init__(self, keeper: Any) -> None:
        self._keeper = keeper
        self._turn = threading.Lock()

    @classmethod
    def start(cls, limit: float, record: SpendingRecord | None = None, expires_seconds: float = DEFAULT_EXPIRES_SECONDS) -> "SharedBudget":
        """Start the actor, on this very node: it should live exactly as long as the driver.

        Raises:
            InputError: the record is damaged.
        """
        if record is not None:
            record.read()  # a damaged one is the driver's error, not an actor's
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        keeper = ray.remote(_Keeper).options(num_cpus=0, scheduling_strategy=here).remote(limit, record, expires_seconds)
        return cls(keeper)

    def __reduce__(self) -> tuple[type["SharedBudget"], tuple[Any]]:
        return SharedBudget, (self._keeper,)

    def __enter__(self) -> "SharedBudget":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.save()

    def reserve(self, worst_cost: float, wait_seconds: float) -> str | None:
        """See `Budget.reserve`. In one process whoever waits goes first."""
        end = time.monotonic() + wait_seconds
        if not self._turn.acquire(timeout=wait_seconds):
            return None
        try:
            while True:
                name, why_never = ray.get(self._keeper.reserve.remote(worst_cost))
                if why_never is not None:
                    raise SpendingLimitError(why_never)
                left = end - time.monotonic()
                if name is not None or left <= 0:
                    return name  # type: ignore[no-any-return]
                time.sleep(min(_ASK_AGAIN_SECONDS, left))
        finally:
            self._turn.release()

    def settle(self, reservation: str, actual_cost: float) -> None:
        """See `Budget.settle`."""
        self._keeper.settle.remote(reservation, actual_cost)

    def spent(self) -> float:
        """See `Ledger.spent`."""
        return float(ray.get(self._keeper.spent.remote()))

    def save(self) -> None:
        """See `Ledger.save`; waits until the record is written."""
        ray.get(self._keeper.save.remote())
