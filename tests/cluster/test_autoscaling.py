"""Workers come for a step, one is lost in the middle, another comes, the result is that of one process, and all go when the step has ended."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.cluster.machines import can_make_machines, in_own_network, with_token
from tests.pipeline.small_loop import REPOSITORY, environment

SESSION_SECONDS = 3600.0


@pytest.mark.slow
@pytest.mark.ray
def test_workers_come_are_lost_come_again_and_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not can_make_machines():
        pytest.skip("this user may not make network namespaces, and port 6379 may be another's")
    session = tempfile.mkdtemp(prefix="ray-")  # short: the path of a socket in it may have 107 bytes
    try:
        done = subprocess.run(
            in_own_network([sys.executable, "-m", "tests.cluster.autoscaling_session", str(tmp_path), session]),
            cwd=REPOSITORY,
            env=with_token(environment(), tmp_path / "token"),
            capture_output=True,
            text=True,
            timeout=SESSION_SECONDS,
            check=False,
        )
    finally:
        shutil.rmtree(session, ignore_errors=True)
    assert done.returncode == 0, done.stderr[-4000:]
    happened = json.loads(done.stdout.strip().splitlines()[-1])
    with capsys.disabled():
        sys.stdout.write(f"\nautoscaling: {happened}\n")
    assert happened["same_result"]
    assert happened["killed"]
    workers = happened["workers"]
    assert (workers["at_start"], workers["at_end"]) == (0, 0)
    assert workers["most"] >= 2
    assert happened["replaced"], "no node came for the one that was lost"
    assert happened["worker_cpu_seconds"] > happened["busy_cpu_seconds"]
    assert happened["idle_cpu_seconds"] > 0
    assert 0 < happened["idle_share"] < 1
    assert happened["worker_cpu_hours"] > 0
