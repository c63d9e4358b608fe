"""Engine processes that outlived the worker that started them: found by a mark in their environment, and ended before another engine starts.

vLLM's child processes (`in_process=false`, needed for tensor parallelism) survive a parent that dies of SIGKILL, and hold the GPU's memory: the
worker that Ray starts in its place would find no room, and die three times while it starts (`pipeline/crashes.py`).
"""

import logging
import os
import signal
import socket

import psutil

OWNER = "SYNPREF_ENGINE_OWNER"
"""Environment variable of an engine's processes: host, process and start time of the worker that holds it."""

logger = logging.getLogger(__name__)


def mark_children() -> None:
    """Let all processes that this one starts from now on carry its name."""
    me = psutil.Process()
    os.environ[OWNER] = f"{socket.gethostname()} {me.pid} {me.create_time()}"


def end_orphans() -> list[int]:
    """Kill the engine processes of this user on this host whose owner is dead; return their numbers."""
    ended = []
    for process in psutil.process_iter():
        try:
            owner = process.environ().get(OWNER, "")
            if owner and process.pid != os.getpid() and not _is_alive(owner):
                os.kill(process.pid, signal.SIGKILL)
                ended.append(process.pid)
        except (psutil.Error, OSError):  # another user's, or gone meanwhile
            continue
    if ended:
        logger.warning("ended %d processes of engines whose workers are dead: %s", len(ended), ended)
    return ended


def _is_alive(owner: str) -> bool:
    host, pid, started = owner.rsplit(" ", 2)
    if host != socket.gethostname():
        return True  # another container's, seen through a shared process table: not ours to judge
    try:
        return abs(psutil.Process(int(pid)).create_time() - float(started)) < 1.0
    except psutil.NoSuchProcess:
        return False
