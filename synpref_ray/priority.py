"""Which processes of a node give way: models before Ray's own housekeeping, which otherwise runs above them.

Ray starts its workers at nice 15 and everything else that a node runs (raylet, agents, dashboard, GCS) at nice 0. With as many busy threads as cores,
each wake-up of those then halts an engine (docs/llm.md).
"""

import logging
import os

import psutil

logger = logging.getLogger(__name__)

MODEL_ENVIRONMENT = {"RAY_worker_niceness": "0"}
"""Environment (`runtime_env`) of actors and training workers, which hold models: at the priority of an ordinary process, as Ray's own job manager
starts drivers. Tasks keep Ray's 15. Our choice: the paper does not say how its jobs run."""

HOUSEKEEPING_NICE = 10
"""Of a local Ray's own processes; ours: below models (0), above tasks (15), so that a full machine starves none of them."""


def lower_housekeeping() -> None:
    """Lower the priority of what the local Ray that this process has just started keeps running beside its workers.

    The raylet keeps its own: workers inherit it, and could not return to nice 0 without being root. No error: where a process is gone or the system
    refuses, things stay as they were.
    """
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name() == "raylet" or process.nice() >= HOUSEKEEPING_NICE:
                continue
            for thread in process.threads():  # to Linux a priority is each thread's own
                os.setpriority(os.PRIO_PROCESS, thread.id, HOUSEKEEPING_NICE)
        except (psutil.Error, OSError) as error:
            logger.debug("the priority of process %d stays: %s", process.pid, error)
