"""`ray job submit` to a real cluster that asks for a token: what comes from the checkout, logs, exit codes, stopping and going on."""

import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.machines import RAY, free_port
from tests.pipeline.small_loop import REPOSITORY, SmallLoop, environment, finished_shards
from tests.pipeline.test_kills import MOMENTS, check_model_tables, results

UP_SECONDS = 300.0
JOB_SECONDS = 1500.0


@dataclass(frozen=True)
class SubmitCluster:
    """A head with a dashboard on this machine, and the environment of a client that has its token."""

    address: str
    client: dict[str, str]

    def ray_job(self, *words: str, client: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run `ray job …` as a client, by default one with the token."""
        verb, *rest = words
        command = [RAY, "job", verb, "--address", self.address, *rest]
        return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=client or self.client, check=False, timeout=JOB_SECONDS)

    def submit(self, name: str, entrypoint: list[str], *options: str) -> subprocess.CompletedProcess[str]:
        """Submit this checkout with an entry point; follows the log to the job's end unless `--no-wait` is among the options."""
        return self.ray_job("submit", "--submission-id", name, "--working-dir", ".", *options, "--", *entrypoint)

    def status(self, name: str) -> str:
        """Return the job's status."""
        return self.ray_job("status", name).stdout.upper()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SubmitCluster]:
    """Start a head in the foreground that asks for a token of its own; no token of the user's is read or made."""
    folder, session = tmp_path_factory.mktemp("submit"), tempfile.mkdtemp(prefix="ray-")  # short: the path of a socket in it may have 107 bytes
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    plain = {key: value for key, value in environment().items() if not key.startswith("RAY_") and key != "PYTHONPATH"}
    trusted = {**plain, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    dashboard, agent, client = free_port(), free_port(), free_port()
    command = [
        *(RAY, "start", "--head", f"--port={free_port()}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
        *(f"--ray-client-server-port={client}", "--num-cpus=8", "--object-store-memory=500000000", f"--temp-dir={session}"),
        *("--disable-usage-stats", "--block"),
    ]
    log = folder / "head.log"
    with log.open("w") as output:
        head = subprocess.Popen(command, stdout=output, stderr=output, env=trusted)
    up = SubmitCluster(f"http://127.0.0.1:{dashboard}", trusted)
    try:
        deadline = time.monotonic() + UP_SECONDS
        while up.ray_job("list").returncode != 0:
            assert head.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, f"the head did not come up: {log.read_text()[-3000:]}"
            time.sleep(1)
        yield up
    finally:
        head.terminate()
        head.wait(timeout=60)
        shutil.rmtree(session, ignore_errors=True)


def entrypoint(loop: SmallLoop, job: str, workspace: Path, *more: str) -> list[str]:
    """Return the command of a job as it is submitted: its script by its place in the working directory."""
    python, script, *rest = loop.command(job, workspace, *more)
    return [python, str(Path(script).relative_to(REPOSITORY)), *rest]


@pytest.mark.slow
@pytest.mark.ray
def test_a_client_without_the_token_is_refused(cluster: SubmitCluster, tmp_path: Path) -> None:
    stranger = {key: value for key, value in cluster.client.items() if not key.startswith("RAY_")} | {"HOME": str(tmp_path)}
    refused = cluster.ray_job("list", client=stranger)
    assert refused.returncode != 0
    assert "401" in refused.stdout + refused.stderr or "token" in (refused.stdout + refused.stderr).lower()
    assert cluster.ray_job("list").returncode == 0


@pytest.mark.slow
@pytest.mark.ray
def test_the_code_of_a_job_is_that_of_its_working_directory(cluster: SubmitCluster) -> None:
    told = cluster.submit("where", [sys.executable, "-c", "import synpref_ray; print(synpref_ray.__file__)"])
    assert told.returncode == 0, told.stdout[-3000:]
    assert "working_dir_files" in told.stdout


@pytest.mark.slow
@pytest.mark.ray
def test_bad_input_is_one_clear_line_and_a_failed_job(cluster: SubmitCluster, tmp_path: Path) -> None:
    done = cluster.submit("bad", [sys.executable, "jobs/stage2.py", f"workspace={tmp_path / 'nothing'}", "tagers=[]"])
    assert done.returncode == 1
    text = done.stdout + done.stderr
    assert "stage2: bad settings: " in text
    assert "exit code 2" in text
    assert "Traceback" not in text
    assert "FAILED" in cluster.status("bad")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.engine
def test_submitted_stages_give_what_they_give_in_process_though_one_was_stopped(cluster: SubmitCluster, tmp_path: Path) -> None:
    loop = SmallLoop(tmp_path / "loop")
    wanted, workspace = loop.root / "in-process", loop.root / "submitted"
    for job in ("ingest", "stage1", "stage2"):
        loop.run(job, wanted)
    loop.run("ingest", workspace)

    assert cluster.submit("stage1", entrypoint(loop, "stage1", workspace), "--no-wait").returncode == 0
    _, is_tagging = MOMENTS["stage1-tagging"]
    deadline = time.monotonic() + JOB_SECONDS
    while not is_tagging(workspace):
        assert "FAILED" not in cluster.status("stage1"), cluster.ray_job("logs", "stage1").stdout[-3000:]
        assert time.monotonic() < deadline, "tagging never began"
    stopped = cluster.ray_job("stop", "stage1")
    assert stopped.returncode == 0, stopped.stdout
    assert "STOPPED" in cluster.status("stage1")
    finished = finished_shards(workspace)

    again = cluster.submit("stage1-again", entrypoint(loop, "stage1", workspace))  # follows the log
    assert again.returncode == 0, again.stdout[-4000:]
    assert "tag (tagger): " in again.stdout, "the driver's log, a line for every step"
    assert f"run: {workspace}/runs/stage1-" in again.stdout
    assert {path: finished_shards(workspace)[path] for path in finished} == finished, "a finished shard was computed again"
    after = cluster.submit("stage2", entrypoint(loop, "stage2", workspace))
    assert after.returncode == 0, after.stdout[-4000:]

    check_model_tables(workspace, wanted)
    assert results(workspace) == results(wanted)
    status = subprocess.run(
        [sys.executable, "jobs/report.py", "status", f"workspace={workspace}"],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "stage1: done, stage2: done" in status.stdout
