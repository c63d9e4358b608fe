"""Processes of engines whose worker was killed are ended, and nobody else's."""

import os
import signal
import subprocess
import sys
import time

import psutil

from synpref_ray.llm.orphans import OWNER, end_orphans, mark_children
from tests.pipeline.small_loop import REPOSITORY

OWNING = """
import subprocess, sys, time
from synpref_ray.llm.orphans import mark_children
mark_children()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


def start_owner() -> tuple["subprocess.Popen[str]", psutil.Process]:
    """Start a worker with an engine process; return both."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    owner = subprocess.Popen([sys.executable, "-c", OWNING], stdout=subprocess.PIPE, text=True, env=environment)
    assert owner.stdout is not None
    child = psutil.Process(int(owner.stdout.readline()))
    while OWNER not in child.environ():  # not yet its own program
        time.sleep(0.01)
    return owner, child


def test_an_engine_goes_when_its_worker_was_killed_and_not_before() -> None:
    owner, child = start_owner()
    try:
        assert child.pid not in end_orphans()
        assert child.is_running()
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        assert child.pid in end_orphans()
        psutil.wait_procs([child], timeout=30)
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    finally:
        owner.kill()
        owner.wait()
        if child.is_running():
            child.kill()


def test_the_mark_is_this_process() -> None:
    before = os.environ.get(OWNER)
    try:
        mark_children()
        assert os.environ[OWNER].split()[1] == str(os.getpid())
        assert os.getpid() not in end_orphans()
    finally:
        os.environ.pop(OWNER, None)
        if before is not None:
            os.environ[OWNER] = before
