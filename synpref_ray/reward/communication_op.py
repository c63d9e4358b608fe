"""DeepSpeed's shared-memory communication op, which it compiles at its first use on a CPU: built once, at set-up, and never waited for in vain.

A build takes half a minute and is guarded by a file `lock`. Whoever is killed in it leaves the lock behind, and every later process would wait for it
without end. So a lock that no living process has open is removed before DeepSpeed looks at it. The op is kept beside the interpreter that it was
built for: another checkout's interpreter has other paths, which would make each build it anew. GPUs need none of this.

`python -m synpref_ray.reward.communication_op` builds it; `make setup` does.
"""

import logging
import os
import sys
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "TORCH_EXTENSIONS_DIR"  # torch's own: where compiled extensions are kept


def extensions_environment() -> dict[str, str]:
    """Return what to add to the environment of a process that will load the op; nothing where the user has decided, or nothing can be written."""
    if FOLDER_VARIABLE in os.environ or not os.access(sys.prefix, os.W_OK):
        return {}
    return {FOLDER_VARIABLE: str(Path(sys.prefix) / "torch_extensions")}


def drop_stale_locks() -> None:
    """Remove the locks of builds that died: those which no process of this machine has open."""
    folder = Path(os.environ.get(FOLDER_VARIABLE) or "~/.cache/torch_extensions").expanduser()
    for lock in folder.glob("*/deepspeed_shm_comm/lock"):
        if not _is_open(lock):
            logger.warning("removing %s: the process that was building there is gone", lock)
            lock.unlink(missing_ok=True)


def _is_open(file: Path) -> bool:
    path = str(file.resolve())
    for process in psutil.process_iter():
        try:
            if any(opened.path == path for opened in process.open_files()):
                return True
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return False


def build() -> None:
    """Build the op, or find it built."""
    os.environ.update(extensions_environment())
    drop_stale_locks()
    from deepspeed.accelerator import get_accelerator  # here, after the environment is set

    get_accelerator().create_op_builder("ShareMemCommBuilder").load()


if __name__ == "__main__":
    build()
