"""A lease refuses a living holder, takes over a dead one's place, and notices that it was taken over."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from synpref_ray.errors import RunConflictError
from synpref_ray.tables.leases import EXPIRES_SECONDS, Lease
from synpref_ray.tables.storage import Storage

HOLD = """
import os, sys, time
sys.path.insert(0, {root!r})
from synpref_ray.tables.leases import Lease
from synpref_ray.tables.storage import Storage
with Lease(Storage({folder!r}), "lease.json"):
    print("held", flush=True)
    time.sleep(60)
"""


def hold_in_another_process(folder: Path) -> subprocess.Popen[str]:
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen([sys.executable, "-c", HOLD.format(root=root, folder=str(folder))], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_living_holder_is_respected_and_a_killed_one_replaced(tmp_path: Path) -> None:
    process = hold_in_another_process(tmp_path)
    try:
        with pytest.raises(RunConflictError, match=f"held by process {process.pid}"), Lease(Storage(str(tmp_path)), "lease.json"):
            pass
    finally:
        process.kill()
        process.wait()
    with Lease(Storage(str(tmp_path)), "lease.json") as lease:
        lease.check()
    assert not (tmp_path / "lease.json").exists()


def test_a_silent_holder_on_another_host_expires(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    holder = {"owner": "x", "host": "elsewhere", "pid": 1, "process_started": 0.0}
    storage.write_json("lease.json", {**holder, "renewed": time.time() - EXPIRES_SECONDS / 2})
    with pytest.raises(RunConflictError, match="on elsewhere"), Lease(storage, "lease.json"):
        pass
    storage.write_json("lease.json", {**holder, "renewed": time.time() - EXPIRES_SECONDS - 1})
    with Lease(storage, "lease.json") as lease:
        storage.write_json("lease.json", {**holder, "renewed": time.time()})
        with pytest.raises(RunConflictError, match="taken over"):
            lease.check()
    assert json.loads((tmp_path / "lease.json").read_text())["owner"] == "x", "another's lease is not removed"


def test_a_torn_lease_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "lease.json").write_bytes(b"{")
    with Lease(Storage(str(tmp_path)), "lease.json") as lease:
        lease.check()
