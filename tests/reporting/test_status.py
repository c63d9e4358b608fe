"""The status of a workspace: read from its files alone, nothing written, finished tables never listed."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import report
from synpref_ray.config import Settings
from synpref_ray.errors import InputError
from synpref_ray.pipeline.job import JobConfig, run_verb
from synpref_ray.pipeline.report import describe_status
from synpref_ray.pipeline.steps import Resources, StepInput, run_step
from synpref_ray.pipeline.usage import UsageRecord
from synpref_ray.reporting.run import Run
from synpref_ray.reporting.status import TableStatus, pace, read_status
from synpref_ray.tables.leases import Lease
from synpref_ray.tables.pools import Pool, shard_path
from synpref_ray.tables.sidecars import Sidecar
from synpref_ray.tables.storage import Storage
from tests.pipeline.test_steps import counting_step, make_pool


def snapshot(folder: Path) -> dict[Path, int]:
    """Return every file with its time of writing."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def count(pool: Pool, log: Path, **arguments: float) -> Sidecar:
    return run_step(counting_step(log, Resources(), **arguments), [StepInput(pool, ("chosen",))]).sidecars[0][0]


def reopen(sidecar: Sidecar, *missing: int) -> None:
    """Make a finished table look as a kill leaves it: no seal, some shards missing."""
    sidecar.pool.storage.delete(f"{sidecar.folder}/manifest.json")
    for number in missing:
        sidecar.pool.storage.delete(shard_path(sidecar.folder, number))


def only_table(storage: Storage) -> TableStatus:
    return read_status(storage, max_runs=5).pools[0].tables[0]


def test_a_table_that_a_kill_left_is_stopped_with_what_is_pending(tmp_path: Path) -> None:
    workspace = tmp_path / "ws"
    sidecar = count(make_pool(workspace, "seed", [3, 0, 2, 4]), tmp_path / "log")
    reopen(sidecar, 2, 3)
    before = snapshot(workspace)
    status = read_status(Storage(str(workspace)), max_runs=5)
    assert snapshot(workspace) == before
    table = status.pools[0].tables[0]
    assert (table.num_done, table.num_shards, table.rows_left, table.is_sealed, table.is_held) == (2, 4, 6, False, False)
    text = describe_status(status, "ws", now=0.0, gpu_hour_price=0.0)
    assert "stopped: run its job again" in text
    assert "ingest: done, stage1: not begun, stage2: not begun" in text


def test_a_table_being_written_has_a_pace_and_a_time_left(tmp_path: Path) -> None:
    workspace = tmp_path / "ws"
    storage = Storage(str(workspace))
    sidecar = count(make_pool(workspace, "seed", [3, 2, 4, 5]), tmp_path / "log")
    reopen(sidecar, 3)
    for number, when in enumerate((1000.0, 1010.0, 1020.0)):
        os.utime(storage.local_path(shard_path(sidecar.folder, number)), (when, when))
    with Lease(storage, f"{sidecar.folder}/lease.json"):
        table = only_table(storage)
        text = describe_status(read_status(storage, max_runs=5), "ws", now=0.0, gpu_hour_price=0.0)
    assert table.is_held
    assert table.rows_per_second == pytest.approx((2 + 4) / 20)
    assert table.seconds_left == pytest.approx(5 / 0.3)
    assert "17 s" in text
    assert "being written" in text


def test_a_table_that_is_written_to_no_more_has_no_time_left(tmp_path: Path) -> None:
    workspace = tmp_path / "ws"
    storage = Storage(str(workspace))
    sidecar = count(make_pool(workspace, "seed", [3, 2, 4, 5]), tmp_path / "log")
    reopen(sidecar, 3)
    for number, when in enumerate((1000.0, 1010.0, 1020.0)):
        os.utime(storage.local_path(shard_path(sidecar.folder, number)), (when, when))
    with Lease(storage, f"{sidecar.folder}/lease.json"):
        status = read_status(storage, max_runs=5)
    lively, hung = (describe_status(status, "ws", now=now, gpu_hour_price=0.0) for now in (1080.0, 1020.0 + 7200))
    assert re.search(r"1 min 00 s ago +0\.3 +17 s +being written", lively)
    assert re.search(r"2 h 00 min ago +- +- +its job lives, but no shard comes", hung)
    slow = TableStatus("p", "t", "v", 3, 2, False, True, rows_left=10, rows_per_second=0.01, rows_done=20, last_written=1000.0)  # 1000 s a shard
    assert not slow.is_quiet(1000.0 + 9999.0)
    assert slow.is_quiet(1000.0 + 10_001.0)


def test_the_pace_is_that_of_the_last_half_hour() -> None:
    assert pace([]) is None
    assert pace([(100.0, 8)]) is None
    assert pace([(0.0, 0), (0.0, 0)]) is None  # storage that keeps no times
    assert pace([(0.0, 9999), (5000.0, 10), (5010.0, 30)]) == pytest.approx(3.0)


def test_finished_tables_are_not_listed_and_their_rejects_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(tmp_path, "seed", [4, 4])
    longest = max(len(text) for text in pool.read_all(["chosen"])["chosen"].to_pylist())
    sidecar = count(pool, tmp_path / "log", fail_above=longest - 1)
    listed: list[str] = []
    original = Storage.list_entries

    def spy(self: Storage, prefix: str, *, hidden: bool = False) -> object:
        listed.append(prefix)
        return original(self, prefix, hidden=hidden)

    def deep(*_: object, **__: object) -> None:
        raise AssertionError("a listing without a bound")

    monkeypatch.setattr(Storage, "list_entries", spy)
    monkeypatch.setattr(Storage, "list_files", deep)
    status = read_status(pool.storage, max_runs=5)
    assert sidecar.folder not in listed
    assert status.pools[0].tables[0].rejected == {"too_long": 1}
    assert "too_long 1" in describe_status(status, "ws", now=0.0, gpu_hour_price=0.0)


def test_object_storage_is_read_alike() -> None:
    storage = Storage("memory://status-test/ws")
    storage.write_json("pools/seed/versions/0.json", {"shards": [{"number": 0, "rows": 7}, {"number": 1, "rows": 5}]})
    storage.write_bytes("pools/seed/attributes/0a1b2c3d/shard-00000.parquet", b"")
    storage.write_json("spending/votes.big/spent.json", {"spent": 2.5})
    status = read_status(storage, max_runs=5)
    table = status.pools[0].tables[0]
    assert (status.pools[0].num_rows, table.num_done, table.num_shards, table.rows_left, status.cost) == (12, 1, 2, 5, 2.5)


def test_runs_are_shown_latest_first_with_why_they_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(config: JobConfig, run: Run) -> str:
        raise InputError("the file\nis not there")

    def interrupt(config: JobConfig, run: Run) -> str:
        raise SystemExit(143)

    workspace = f"workspace={tmp_path}"
    assert run_verb("demo", ["go", workspace], JobConfig, {"go": lambda config, run: "done"}) == 0
    assert run_verb("train", ["go", workspace], JobConfig, {"go": fail}) == 2
    with pytest.raises(SystemExit):
        run_verb("score", ["go", workspace], JobConfig, {"go": interrupt})
    capsys.readouterr()
    assert report.main(["status", workspace, "gpu_hour_price=2"]) == 0
    text = capsys.readouterr().out
    lines = text[text.index("run ") :].splitlines()[2:5]
    assert [(line.split("-")[0], "ended early" in line) for line in lines] == [("score", True), ("train", True), ("demo", False)]
    assert "InputError: the file is not there" in text
    assert "SystemExit: the process was asked to stop" in text
    assert "0.00 GPU hours of workers at shards and of finished trainings, 0.00 at 2 an hour" in text


def test_a_run_whose_driver_was_killed_has_died(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    killed = Run(storage, "stage1", Settings())
    killed.step("tag, seed", rows=1, computed=1, rejected={}, seconds=1.0)
    alive = Run(storage, "stage2", Settings())
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    with Lease(storage, f"{alive.folder}/lease.json"):
        lease = storage.read_json(f"{alive.folder}/lease.json")
        child.wait()
        storage.write_json(f"{killed.folder}/lease.json", {**lease, "pid": child.pid})  # as kill -9 leaves it
        status = read_status(storage, max_runs=5)
    assert {run.folder: run.has_died for run in status.runs} == {killed.folder: True, alive.folder: False}
    text = describe_status(status, "ws", now=0.0, gpu_hour_price=0.0)
    assert "died, after tag, seed" in text
    assert f"{killed.folder.removeprefix('runs/')}: died without a last word: it was killed, or its machine was lost" in text


def test_gpu_hours_come_from_finished_tables_and_models(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write_json("pools/wild/versions/0.json", {"shards": [{"number": 0, "rows": 7}]})
    storage.write_json(
        "pools/wild/rewards.best/0a1b2c3d/manifest.json", {"rejected": {}, "shards": 1, "gpu_seconds_of_last_run": 3600.0, "share_of_last_run": 0.5}
    )
    record = {"config": {"use_gpu": True}, "num_workers": 8, "seconds": {"total": 675.0}}
    storage.write_json("models/best-r01-0a1b2c3d/training_record.json", record)
    assert read_status(storage, max_runs=5).gpu_seconds == pytest.approx(1800 + 8 * 675)


def test_a_table_under_way_shows_what_its_runs_have_used(tmp_path: Path) -> None:
    workspace = tmp_path / "ws"
    pool = make_pool(workspace, "seed", [3, 2])
    table, now = Sidecar(pool, "votes.big", "a" * 32), [0.0]
    first = UsageRecord([table], 2.0, "first", lambda: now[0])
    with contextlib.suppress(ZeroDivisionError), first.working(0, 0):
        now[0] = 100.0
        raise ZeroDivisionError
    second = UsageRecord([table], 2.0, "second", lambda: now[0])
    with second.working(0, 0) as used:
        with second.working(0, 1) as beside:  # beside the other: the worker is busy once
            now[0] = 160.0
            beside["shard_cost"] = 0.5
        now[0] = 180.0
        second.write()  # as it does now and then
        assert read_status(pool.storage, max_runs=5).gpu_seconds == pytest.approx(2 * 180)
        used.update({"shard_cost": 1.25, "shard_output_tokens": 30.0, "judged": 3.0})
    third = UsageRecord([table], 2.0, "third", lambda: now[0])
    with third.working(0, 0) as used:  # the same shard again, whose journal has all that it cost
        used["shard_cost"] = 1.5
    (workspace / table.folder / "usage" / "torn.json").write_text('{"shards": {"9": 3}}')
    status = read_status(pool.storage, max_runs=5)
    assert (status.cost, status.gpu_seconds) == (pytest.approx(2.0), pytest.approx(2 * 180))
    assert "paid endpoints 2.0000; 0.10 GPU hours of workers at shards" in describe_status(status, "ws", now=0.0, gpu_hour_price=0.0)
    pool.storage.write_json("spending/votes.big/spent.json", {"spent": 1.0})  # of a time when there was a limit
    assert read_status(pool.storage, max_runs=5).cost == pytest.approx(2.0)
    pool.storage.write_json("spending/votes.big/spent.json", {"spent": 3.0})  # attempts that came to nothing are in it
    assert read_status(pool.storage, max_runs=5).cost == pytest.approx(3.0)


def test_what_is_no_workspace_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["status", f"workspace={tmp_path}"]) == 2
    assert "is no workspace" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert report.main([f"workspace={tmp_path}"]) == 2
    assert "name what to do: status, html" in capsys.readouterr().err


def test_a_run_s_record_says_which_versions_and_settings_it_had(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    run = Run(storage, "demo", Settings())
    versions = storage.read_json(f"{run.folder}/versions.json")
    assert {"python", "synpref-ray", "ray", "torch", "transformers", "pyarrow"} <= versions.keys()
