"""Plain Ray tasks over a list of arguments: in order, a bounded number at a time, errors of ours as themselves.

The bound follows the cluster while it grows. It has a lower limit, or a cluster that starts without workers would get few, and an upper one
(`RayConfig.max_cpus`), or Ray would start nodes with GPUs for tasks that need none.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import ray

from synpref_ray.pipeline.cluster import cpu_bound, tell_if_no_room
from synpref_ray.pipeline.steps import unwrap

Result = TypeVar("Result")

PROGRESS_SECONDS = 60.0  # ours: a line a minute tells that a long pass goes on, and short ones say nothing
TASKS_PER_CPU = 4  # ours: enough waiting that no worker stands still, and few enough that the driver holds no list of a million tasks
MIN_CPUS = 64  # ours: asked for where there are no workers yet: four nodes of 16 CPUs, that a later look at the cluster finds at work
MIN_GPUS = 8  # ours: asked for where there is no GPU yet: one node of cluster/'s files
LOOK_SECONDS = 1.0  # ours: between two looks at the cluster, which grows by minutes

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


def max_running(num_cpus: float = 1.0, num_gpus: float = 0.0) -> int:
    """Return how many tasks of such a size a running Ray should have at once, waiting ones included."""
    return window_size(ray.cluster_resources(), cpu_bound(), num_cpus, num_gpus)  # type: ignore[no-untyped-call]


def window_size(present: Mapping[str, float], most_cpus: float, num_cpus: float = 1.0, num_gpus: float = 0.0) -> int:
    """Return how many tasks of such a size a cluster should have at once, waiting ones included.

    A task's CPUs are counted up to a power of two, for so many tasks surely have room on nodes whose CPUs are a power of two.

    Args:
        present: the cluster's CPUs and GPUs by Ray's names.
        most_cpus: what tasks without GPUs may ask for at once (`RayConfig.max_cpus`).
    """
    if num_gpus:
        return max(1, int(max(MIN_GPUS, present.get("GPU", 0)) // num_gpus))
    wanted = min(max(MIN_CPUS, present.get("CPU", 0) * TASKS_PER_CPU), most_cpus)
    return max(1, int(wanted // 2 ** math.ceil(math.log2(max(num_cpus, 1.0)))))


class _Window:
    """How many tasks may be under way, looked up again as the cluster grows."""

    def __init__(self, num_cpus: float = 1.0, num_gpus: float = 0.0):
        self._size_of_task = (num_cpus, num_gpus)
        self._looked, self._size = -math.inf, 0

    def has_room(self, running: int) -> bool:
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            self._looked, self._size = time.monotonic(), max_running(*self._size_of_task)
        return running < self._size


def run_tasks(
    function: Callable[..., Result],
    shared: Any,
    arguments: Sequence[tuple[Any, ...]],
    *,
    inline: bool = False,
    title: str = "",
    options: Mapping[str, float] = MappingProxyType({}),
) -> list[Result]:
    """Return `function(shared, *values)` for all values, in their order; `shared` travels to each worker once.

    Our choice: after an error what runs or waits goes on until the job ends, and is not cancelled: `ray.cancel` of a task that is just done may abort
    the driver, and the error with it (seen with Ray 2.60: "Tried to complete task that was not pending"; akin to ray#54785).

    Args:
        inline: run in this process, as it is also done where no Ray is running: for work that takes less time than a worker's start.
        title: of the lines in the log that say how far a long pass is (empty: none), or that it waits for a node.
        options: of each task, as Ray knows them: num_cpus, num_gpus, max_retries.

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
    size_of_task = options.get("num_cpus", 1.0), options.get("num_gpus", 0.0)
    if arguments:
        tell_if_no_room(title or function.__name__, *size_of_task)
    remote, handle = ray.remote(function), ray.put(shared)
    if options:
        remote = remote.options(**options)
    window = _Window(*size_of_task)
    results: dict[int, Result] = {}
    running: dict[Any, int] = {}
    try:
        for number, values in enumerate(arguments):
            while not window.has_room(len(running)):
                _collect(running, results)
                progress.tell(len(results))
            running[remote.remote(handle, *values)] = number
        while running:
            _collect(running, results)
            progress.tell(len(results))
    except ray.exceptions.RayError as error:
        raise unwrap(error) from error
    return [results[number] for number in range(len(arguments))]


def _collect(running: dict[Any, int], results: dict[int, Any]) -> None:
    for done in ray.wait(list(running), num_returns=1)[0]:
        results[running.pop(done)] = ray.get(done)
