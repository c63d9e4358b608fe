"""`kill -9` of the driver at any moment loses shards in flight and nothing else: six moments, then the same result as without a kill."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from synpref_ray.tables.pools import list_pools, open_pool
from synpref_ray.tables.storage import Storage
from tests.pipeline.small_loop import SmallLoop, environment, finished_shards

TIMEOUT_SECONDS = 1200


def files(workspace: Path, pattern: str) -> list[Path]:
    """Return the files of a workspace that match, by name."""
    return sorted(workspace.glob(pattern))


MOMENTS: dict[str, tuple[str, Callable[[Path], bool]]] = {
    "stage1-tagging": ("stage1", lambda ws: len(files(ws, "pools/*/attributes.tagger/*/shard-*.parquet")) >= 2),
    "stage1-training": ("stage1", lambda ws: bool(files(ws, "models/.lease-best-r01*.json"))),
    "stage1-judging": ("stage1", lambda ws: bool(files(ws, "pools/round-01-selected-*/votes.small/*/journal/*/*.jsonl"))),
    "stage2-scoring": ("stage2", lambda ws: bool(files(ws, "pools/wild/rewards.best/*/shard-*.parquet"))),
    "stage2-tagging": ("stage2", lambda ws: bool(files(ws, "pools/wild-mismatches-*/attributes.tagger/*/journal/*/*.jsonl"))),
    "stage2-judging": ("stage2", lambda ws: bool(files(ws, "pools/wild-mismatches-*/votes.small/*/journal/*/*.jsonl"))),
}


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> SmallLoop:
    return SmallLoop(tmp_path_factory.mktemp("loop"))


@pytest.fixture(scope="module")
def uninterrupted(loop: SmallLoop) -> dict[str, Path]:
    """Return copies of one workspace as each job of a run without a kill left it."""
    workspace, copies = loop.root / "uninterrupted", {}
    for job in ("ingest", "stage1", "stage2"):
        loop.run(job, workspace)
        copies[job] = loop.root / f"after-{job}"
        shutil.copytree(workspace, copies[job])
    return copies


def results(workspace: Path) -> dict[str, bytes]:
    """Return ids of every pool, the bytes of every table that rules derive, and every record, by path."""
    storage = Storage(str(workspace))
    found: dict[str, bytes] = {}
    for name in list_pools(storage):
        pool = open_pool(storage, name)
        found[f"pool {name}"] = pool.digest.encode()
        for path in storage.list_files(f"pools/{name}"):
            if path.endswith(".parquet") and path.split("/")[2] in ("human", "verdict", "label", "selected", "decision", "exemplars"):
                found[path] = storage.read_bytes(path)
    for path in [*storage.list_files("sets"), *storage.list_files("rounds")]:  # the records hold the digests of the reward models
        found[path] = storage.read_bytes(path)
    return found


def check_model_tables(workspace: Path, wanted: Path) -> None:
    """Compare what models made: same tables, rows and failures, numbers up to float error, since batches differ after a kill.

    Texts show in what rules make of them.
    """
    tables = [f"pools/*/{name}/*/shard-*.parquet" for name in ("attributes", "attributes.*", "embeddings", "rewards.*", "votes.*")]
    paths = [path.relative_to(wanted) for pattern in tables for path in files(wanted, pattern)]
    assert paths == [path.relative_to(workspace) for pattern in tables for path in files(workspace, pattern)]
    for path in paths:
        ours, theirs = pq.read_table(workspace / path), pq.read_table(wanted / path)
        assert ours.schema.equals(theirs.schema)
        for name in ("pair_id", "drop_reason"):
            assert ours[name].to_pylist() == theirs[name].to_pylist(), path
        for name in set(ours.column_names) & {"reward_chosen", "reward_rejected", "margin", "p_chosen", "embedding"}:
            pairs = zip(ours[name].to_pylist(), theirs[name].to_pylist(), strict=True)
            assert all(a == b or a == pytest.approx(b, rel=1e-4, abs=1e-4) for a, b in pairs), path


def kill_when(loop: SmallLoop, job: str, workspace: Path, is_now: Callable[[Path], bool]) -> None:
    """Start a job and kill its driver with SIGKILL as soon as the moment has come."""
    process = subprocess.Popen(loop.command(job, workspace), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=loop.root, env=environment())
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        while not is_now(workspace):
            assert process.poll() is None, f"{job} ended with {process.returncode} before the moment came"
            assert time.monotonic() < deadline, "the moment never came"
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def journaled_requests(workspace: Path) -> int:
    """Return the replies in journals of shards that are not written yet."""
    count = 0
    for path in files(workspace, "pools/*/*/*/journal/*/*.jsonl"):
        shard = path.parents[2] / f"shard-{path.parent.name}.parquet"
        count += 0 if shard.exists() else len(path.read_text().splitlines())
    return count


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.engine
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_driver_costs_only_unfinished_shards(loop: SmallLoop, uninterrupted: dict[str, Path], moment: str) -> None:
    job, is_now = MOMENTS[moment]
    workspace = loop.root / moment
    shutil.copytree(uninterrupted["ingest" if job == "stage1" else "stage1"], workspace)
    kill_when(loop, job, workspace, is_now)
    time.sleep(3)  # Ray's reaper ends the workers
    finished, journaled = finished_shards(workspace), journaled_requests(workspace)
    rerun: dict[str, Any] = loop.run(job, workspace)
    assert {path: finished_shards(workspace)[path] for path in finished} == finished, "a finished shard was computed again"
    assert sum(event.get("from_journal", 0) for event in rerun["events"]) >= journaled
    check_model_tables(workspace, uninterrupted[job])
    found, wanted = results(workspace), results(uninterrupted[job])
    assert found.keys() == wanted.keys()
    different = [path for path in found if found[path] != wanted[path]]
    assert not different, f"{len(different)} results differ from the uninterrupted run: {different[:5]}"
