"""Keeps a provider's limits of requests and tokens per minute, for endpoints (Sec. 3.1 and 3.2).

Our choice: a token bucket that holds one second's worth, so that no minute sees more than 61 seconds' worth, and nothing waits by polling: who
takes is told at once how long to wait.
"""

import time
from collections.abc import Callable

_BURST_SECONDS = 1.0


class _Bucket:
    """Something of which `per_minute` may be taken (0: without limit)."""

    def __init__(self, per_minute: float, now: float) -> None:
        self._per_second = per_minute / 60.0
        self._free_from = now - _BURST_SECONDS  # when all that was taken will have flowed in again

    def take(self, amount: float, now: float) -> float:
        """Take `amount`; return from when on it may be used."""
        if not self._per_second:
            return now
        start = max(self._free_from, now - _BURST_SECONDS)
        self._free_from = start + amount / self._per_second
        return max(start, now)

    def give_back(self, amount: float) -> None:
        if self._per_second:
            self._free_from -= amount / self._per_second


class Pacer:
    """Both limits of one endpoint. Its owner's one thread uses it."""

    def __init__(self, requests_per_minute: float, tokens_per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        now = clock()
        self._requests = _Bucket(requests_per_minute, now)
        self._tokens = _Bucket(tokens_per_minute, now)
        self._held_until = now

    def take(self, tokens: int) -> float:
        """Take one request of so many tokens; return the seconds to wait before sending it."""
        now = self._clock()
        return max(self._requests.take(1, now), self._tokens.take(tokens, now)) - now

    def give_back(self, tokens: int, requests: int = 0) -> None:
        """Return tokens, and requests, that were taken and not used; a negative number takes what was used beyond."""
        self._tokens.give_back(tokens)
        self._requests.give_back(requests)

    def hold(self, seconds: float) -> None:
        """Let nothing start for so long: the server asked for it."""
        self._held_until = max(self._held_until, self._clock() + seconds)

    def held_seconds(self) -> float:
        """Return for how long nothing may start, 0 or below when it may."""
        return self._held_until - self._clock()
