"""When a request to an endpoint may start, what that costs, and when none may start any more. Serves `endpoint.py`; nothing here sends anything.

All of this runs in the engine's one loop; only the budget is asked in threads, since it may block.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NoReturn

from synpref_ray.errors import SynprefError
from synpref_ray.llm.endpoint_config import EndpointConfig
from synpref_ray.llm.pacing import Pacer
from synpref_ray.llm.spending import Budget, LocalBudget
from synpref_ray.llm.wire import Usage, read_usage

if TYPE_CHECKING:
    from synpref_ray.llm.transport import Outcome

logger = logging.getLogger(__name__)

_BUDGET_WAIT_SECONDS = 5.0


class Call:
    """One call of `generate`."""

    def __init__(self) -> None:
        self.is_wanted = True  # until its caller leaves


class EngineEnd:
    """The end of one engine: its first error that cannot pass, which every caller gets.

    Args:
        pause: waits so many seconds in place of `sleep`'s own wait.
    """

    def __init__(self, pause: Callable[[float], Awaitable[None]] | None = None) -> None:
        self._pause = pause
        self._error: SynprefError | None = None
        self._ended = asyncio.Event()

    @property
    def has_come(self) -> bool:
        """Whether nothing more is sent."""
        return self._error is not None

    def check_open(self, call: Call) -> None:
        """Raise the engine's error if it has ended, and `CancelledError` if nobody wants this call any more."""
        if self._error is not None:
            raise type(self._error)(str(self._error))
        if not call.is_wanted:
            raise asyncio.CancelledError

    def finish_with(self, error: SynprefError) -> NoReturn:
        """End the engine with its first such error, and raise that."""
        if self._error is None:
            self._error = error
            self._ended.set()
        raise type(self._error)(str(self._error))

    async def sleep(self, seconds: float) -> None:
        """Wait, but not beyond the end of the engine."""
        if seconds <= 0 or self._error is not None:
            return
        if self._pause is not None:
            await self._pause(seconds)
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), seconds)


class Turns:
    """Lets requests start one after another, within the server's pauses, the provider's rates and the budget; `close` it when done.

    Args:
        budget: shared with other engines; without one, `spending_limit` holds for this engine alone.
        clock: seconds, for pacing.
    """

    def __init__(self, config: EndpointConfig, budget: Budget | None, end: EngineEnd, clock: Callable[[], float]) -> None:
        self._config = config
        self._end = end
        self._pacer = Pacer(config.requests_per_minute, config.tokens_per_minute, clock)
        self._budget = budget if budget is not None else LocalBudget(config.spending_limit) if config.spending_limit else None
        self._askers = ThreadPoolExecutor(config.max_concurrent_requests, thread_name_prefix="endpoint-budget")
        self._turn = asyncio.Lock()  # of the one request that is about to start
        self._warned = False

    async def take(self, tokens: int, worst: float, call: Call) -> str | None:
        """Wait until the server lets requests start, there is money, and the rates allow one more; return what is set aside.

        One request at a time waits here, so none takes its place in the rates before it may start, and money is not set aside for long.
        """
        async with self._turn:
            while True:
                while (held := self._pacer.held_seconds()) > 0 and not self._end.has_come:
                    await self._end.sleep(held)
                reservation = await self._reserve(worst, call)
                try:
                    await self._end.sleep(self._pacer.take(tokens))
                except asyncio.CancelledError:
                    self.settle(reservation, 0.0)
                    raise
                if self._pacer.held_seconds() <= 0 or self._end.has_come:
                    return reservation
                self.settle(reservation, 0.0)  # the server asked for a pause meanwhile
                self._pacer.give_back(tokens, requests=1)

    def cost_of(self, outcome: "Outcome", worst: float) -> float:
        """Return what an attempt cost; the worst where it may have been billed and nothing says how much."""
        from synpref_ray.llm.transport import Answered, Failed

        if isinstance(outcome, Failed):
            return worst if outcome.may_be_billed else 0.0
        if not isinstance(outcome, Answered):
            return 0.0
        usage = read_usage(outcome.body)
        if usage is None:
            return worst
        cost = self._config.cost(usage.prompt_tokens, usage.output_tokens, usage.cached_tokens)
        if cost > worst and not self._warned:
            self._warned = True
            logger.warning(
                "%s: the server bills more tokens than a request can have by our count; the spending limit may be passed", self._config.model
            )
        return cost

    def settle(self, reservation: str | None, actual: float) -> None:
        """Put what an attempt cost in place of what was set aside for it."""
        if self._budget is not None and reservation is not None:
            self._budget.settle(reservation, actual)

    def give_back(self, tokens: int, used: Usage) -> None:
        """Return to the rates what of `tokens` was not used."""
        self._pacer.give_back(tokens - used.prompt_tokens - used.output_tokens)

    def hold(self, seconds: float) -> None:
        """Let nothing start for so long: the server asked for it."""
        self._pacer.hold(seconds)

    def close(self) -> None:
        """Ask the budget nothing more."""
        self._askers.shutdown(wait=False, cancel_futures=True)

    async def _reserve(self, worst: float, call: Call) -> str | None:
        self._end.check_open(call)
        if self._budget is None or worst <= 0:
            return None
        while True:
            self._end.check_open(call)
            asking = self._askers.submit(self._budget.reserve, worst, _BUDGET_WAIT_SECONDS)
            try:
                name = await asyncio.wrap_future(asking)
            except asyncio.CancelledError:
                asking.add_done_callback(self._release)
                raise
            except SynprefError as error:
                self._end.finish_with(error)
            if name is not None:
                return name

    def _release(self, asking: "Future[str | None]") -> None:
        """Return what was set aside for a request that was dropped meanwhile."""
        if not asking.cancelled() and asking.exception() is None:
            self.settle(asking.result(), 0.0)
