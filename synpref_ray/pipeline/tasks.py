"""Plain Ray tasks over a list of arguments: in order, a bounded number at a time, errors of ours as themselves."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray

from synpref_ray.pipeline.steps import unwrap

Result = TypeVar("Result")

PROGRESS_SECONDS = 60.0  # ours: a line a minute tells that a long pass goes on, and short ones say nothing
TASKS_PER_CPU = 4  # ours: enough waiting that no worker stands still, and few enough that the driver holds no list of a million tasks

logger = logging.getLogger(__name__)


class _Progress:
    """Says now and then how many tasks are done."""

    def __init__(self, title: str, total: int):
        self._title, self._total = title, total
        self._told = time.monotonic()

    def tell(self, done: int) -> None:
        if self._title and done < self._total and time.monotonic() - self._told >= PROGRESS_SECONDS:
            self._told = time.monotonic()
            logger.info("%s: %d of %d tasks done", self._title, done, self._total)


def run_tasks(
    function: Callable[..., Result], shared: Any, arguments: Sequence[tuple[Any, ...]], *, inline: bool = False, title: str = ""
) -> list[Result]:
    """Return `function(shared, *values)` for all values, in their order; `shared` travels to each worker once.

    Args:
        inline: run in this process, as it is also done where no Ray is running: for work that takes less time than a worker's start.
        title: of the lines in the log that say how far a long pass is; empty: none.

    Raises:
        SynprefError: a task raised it; the others are not waited for.
    """
    progress = _Progress(title, len(arguments))
    if inline or not ray.is_initialized():
        done: list[Result] = []
        for values in arguments:
            done.append(function(shared, *values))
            progress.tell(len(done))
        return done
    remote, handle = ray.remote(function), ray.put(shared)
    window = max(1, int(ray.cluster_resources().get("CPU", 1))) * TASKS_PER_CPU  # type: ignore[no-untyped-call]
    results: dict[int, Result] = {}
    running: dict[Any, int] = {}
    try:
        for number, values in enumerate(arguments):
            if len(running) >= window:
                _collect(running, results)
                progress.tell(len(results))
            running[remote.remote(handle, *values)] = number
        while running:
            _collect(running, results)
            progress.tell(len(results))
    except ray.exceptions.RayError as error:
        for waiting in running:
            ray.cancel(waiting, force=False)
        raise unwrap(error) from error
    return [results[number] for number in range(len(arguments))]


def _collect(running: dict[Any, int], results: dict[int, Any]) -> None:
    for done in ray.wait(list(running), num_returns=1)[0]:
        results[running.pop(done)] = ray.get(done)
