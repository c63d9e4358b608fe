"""Many shards read at once, for what a driver derives from narrow columns of a whole table.

Our choice: threads, since a read is waiting (on object storage) or decompression, which lets other threads go on; and a bounded number, so that a
table of any size is never held whole.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

READS_AT_ONCE = 16  # ours: object storage answers in tens of milliseconds; on a local disk two would do
_WAITING = 2 * READS_AT_ONCE


def read_each(read: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield `read(item)` for every item, in order; at most `_WAITING` results are held. The first error ends it."""
    with ThreadPoolExecutor(READS_AT_ONCE) as threads:
        running: deque[Future[Result]] = deque()
        try:
            for item in items:
                if len(running) >= _WAITING:
                    yield running.popleft().result()
                running.append(threads.submit(read, item))
            while running:
                yield running.popleft().result()
        finally:
            for waiting in running:
                waiting.cancel()
