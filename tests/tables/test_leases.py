"""A lease refuses a living holder, takes over a dead one's place, and notices that it was taken over."""

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from synpref_ray.errors import RunConflictError
from synpref_ray.tables import leases
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


@pytest.mark.usefixtures("no_rival")
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


@pytest.mark.usefixtures("no_rival")
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


@pytest.mark.usefixtures("no_rival")
def test_a_torn_lease_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "lease.json").write_bytes(b"{")
    with Lease(Storage(str(tmp_path)), "lease.json") as lease:
        lease.check()


@pytest.fixture
def no_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else wants the lease: no need to give others time."""
    monkeypatch.setattr(leases, "SETTLE_SECONDS", 0.0)


@pytest.fixture(params=["folder", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(str(tmp_path) if request.param == "folder" else f"memory://leases-{tmp_path.name}")


def dead_holder() -> dict[str, object]:
    return {"owner": "dead", "host": "elsewhere", "pid": 1, "process_started": 0.0, "renewed": 0.0}


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_of_drivers_that_find_the_same_dead_lease_one_gets_in(storage: Storage) -> None:
    storage.write_json("lease.json", dead_holder())
    start, done = threading.Barrier(6), threading.Barrier(6)
    outcomes: list[str] = []

    def drive() -> None:
        start.wait()
        try:
            with Lease(storage, "lease.json") as lease:
                lease.check()
                outcomes.append("held")
                done.wait()
        except RunConflictError:
            outcomes.append("refused")
            done.wait()

    threads = [threading.Thread(target=drive) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held"] + ["refused"] * 5
    assert storage.list_files("") == []


def test_a_slow_driver_that_saw_the_dead_lease_puts_its_successor_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path))
    storage.write_json("lease.json", dead_holder())
    rename = os.rename
    winners: list[Lease] = []

    def rename_late(source: str, target: str) -> None:
        monkeypatch.setattr(os, "rename", rename)
        winners.append(Lease(storage, "lease.json").__enter__())
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_late)
    with pytest.raises(RunConflictError, match="is held by process"), Lease(storage, "lease.json"):
        pass
    winners[0].check()
    winners[0].__exit__(None, None, None)
    assert os.listdir(tmp_path) == []


def test_a_lease_lost_while_it_was_being_taken_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path))
    create = Storage.create_exclusive
    rival = {**dead_holder(), "renewed": time.time()}

    def create_and_lose(self: Storage, path: str, data: bytes) -> bool:
        monkeypatch.setattr(Storage, "create_exclusive", create)
        created = create(self, path, data)
        self.write_json(path, rival)
        return created

    monkeypatch.setattr(Storage, "create_exclusive", create_and_lose)
    with pytest.raises(RunConflictError, match="on elsewhere"), Lease(storage, "lease.json"):
        pass
    assert storage.read_json("lease.json") == rival


def test_renewing_survives_an_error(storage: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.02)
    write = Storage.write_bytes
    calls: list[str] = []

    def fail_twice(self: Storage, path: str, data: bytes) -> None:
        calls.append(path)
        if len(calls) <= 2:
            raise OSError("the network is away")
        write(self, path, data)

    monkeypatch.setattr(Storage, "write_bytes", fail_twice)
    with caplog.at_level(logging.ERROR), Lease(storage, "lease.json") as lease:
        first = storage.read_json("lease.json")["renewed"]
        wait_for(lambda: storage.read_json("lease.json")["renewed"] > first)
        lease.check()
    assert [record.getMessage() for record in caplog.records] == [f"could not renew {storage.join('lease.json')}; trying again in 0 s"] * 2
    assert not storage.exists("lease.json")


@pytest.mark.usefixtures("no_rival")
def test_a_restarted_container_with_the_same_host_and_pid_takes_its_own_place(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    me = psutil.Process()
    before = {"owner": "x", "host": socket.gethostname(), "pid": me.pid, "process_started": me.create_time() - 100, "renewed": time.time()}
    storage.write_json("lease.json", before)
    with Lease(storage, "lease.json") as lease:
        lease.check()
    storage.write_json("lease.json", {**before, "process_started": me.create_time()})
    with pytest.raises(RunConflictError, match=f"held by process {me.pid}"), Lease(storage, "lease.json"):
        pass
