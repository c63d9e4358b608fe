"""A local workspace that a second node cannot see: one clear line and exit 2. The second node runs in a mount namespace of its own."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipeline.small_loop import REPOSITORY, SmallLoop, environment

RAY = str(Path(sys.executable).parent / "ray")


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def can_unshare(folder: Path) -> bool:
    """Whether this user may mount over a folder in a namespace of its own."""
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "none", str(folder)]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Start a head and a node whose folder `hidden` is an empty one of its own; return the head's address and the folder."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    if not can_unshare(hidden):
        pytest.skip("this user may not make mount namespaces")
    port, session = free_port(), tempfile.mkdtemp(prefix="ray-")  # short: the path of a socket in it may have 107 bytes
    common = ["--num-cpus=4", "--object-store-memory=100000000", "--disable-usage-stats"]
    head = [RAY, "start", "--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={session}", "--block", *common]
    node = f"mount -t tmpfs none {hidden} && exec {RAY} start --address=127.0.0.1:{port} --block {' '.join(common)}"
    processes = []
    try:
        for command in (head, ["unshare", "-m", "sh", "-c", node]):
            processes.append(
                subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**environment(), "RAY_AUTH_MODE": "token"})
            )
            time.sleep(15)
            assert processes[-1].poll() is None, f"{command} ended at once"
        yield f"127.0.0.1:{port}", hidden
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(timeout=60)
        shutil.rmtree(session, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.ray
def test_a_workspace_that_a_node_cannot_see_is_refused(two_nodes: tuple[str, Path], tmp_path: Path) -> None:
    address, hidden = two_nodes
    loop = SmallLoop(tmp_path / "loop")
    ray_environment = {**environment(), "RAY_ADDRESS": address, "RAY_AUTH_MODE": "token"}
    refused = subprocess.run(
        loop.command("ingest", hidden / "ws"), capture_output=True, text=True, cwd=REPOSITORY, env=ray_environment, check=False, timeout=300
    )
    assert refused.returncode == 2, refused.stderr[-2000:]
    assert "use a shared file system or an s3:// workspace" in refused.stderr
    assert "Traceback" not in refused.stderr
    shared = subprocess.run(
        loop.command("ingest", tmp_path / "shared"), capture_output=True, text=True, cwd=REPOSITORY, env=ray_environment, check=False, timeout=300
    )
    assert shared.returncode == 0, shared.stderr[-2000:]
    assert not list((tmp_path / "shared").glob("probe/*/*"))
    assert os.path.isdir(tmp_path / "shared" / "pools")
