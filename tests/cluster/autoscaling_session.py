"""One step on a head that takes no work, with workers that Ray's fake provider starts and ends; run by `test_autoscaling.py` in a network of its own.

A network of its own, because the fake provider's workers look for their head on port 6379 and nowhere else. Prints what happened as one line of JSON.
Arguments: a folder for workspaces, one for Ray's files.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import ray

from synpref_ray.pipeline.cluster import configure_ray_data, probe_workspace
from synpref_ray.pipeline.steps import Output, Resources, ShardKey, Step, StepInput, run_step
from synpref_ray.tables.storage import Storage
from tests.pipeline.test_steps import make_pool

WORKER_CPUS = 2
ACTORS, MAX_WORKERS = 2, 5  # an actor takes a node, other tasks one more; one to spare, as the provider counts a lost node for half a minute
SHARDS = 120
SHARD_SECONDS = 1.5
"""What a shard's work takes here: all of them take long enough for a lost node to be noticed (half a minute) and replaced."""
UP_SECONDS, GONE_SECONDS = 120.0, 180.0
SCHEMA = pa.schema([pa.field("pair_id", pa.string(), nullable=False), ("length", pa.int64())])
LAUNCHER: dict[str, Any] = {
    "cluster_name": "fake",
    "max_workers": MAX_WORKERS,
    "idle_timeout_minutes": 0.1,
    "provider": {"type": "fake_multinode", "use_node_id_as_ip": True, "disable_node_updaters": True, "disable_launch_config_check": True},
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": WORKER_CPUS}, "node_config": {}, "min_workers": 0, "max_workers": MAX_WORKERS},
    },
    "head_node_type": "ray.head.default",
    "auth": {},
    "file_mounts": {},
    "cluster_synced_files": [],
    **{f"{kind}_commands": [] for kind in ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")},
}


class SlowCounter:
    """Counts characters, slowly."""

    def __init__(self, seconds: float):
        self._seconds = seconds

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        time.sleep(self._seconds)
        return pa.table([shard["pair_id"], pa.array([len(text) for text in shard["chosen"].to_pylist()])], schema=SCHEMA), {"busy": self._seconds}


def count(folder: Path, *, workers: int, seconds: float) -> tuple[list[bytes], float]:
    """Run the step in a workspace of its own; return the bytes of its shards and the busy seconds that it counted."""
    pool = make_pool(folder, "seed", [3] * SHARDS)
    resources = Resources(workers, num_cpus=float(WORKER_CPUS))
    step = Step("count", 1, SlowCounter, (Output("lengths", SCHEMA),), {}, resources=resources, worker_arguments=lambda _: {"seconds": seconds})
    result = run_step(step, [StepInput(pool, ("chosen",))])
    sidecar = result.sidecars[0][0]
    return [pool.storage.read_bytes(f"{sidecar.folder}/shard-{number:05d}.parquet") for number in range(SHARDS)], result.counters["busy"]


def worker_nodes() -> list[dict[str, Any]]:
    """Return the living nodes that take work."""
    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]


class Watch(threading.Thread):
    """Notes how many worker nodes live, and kills one as soon as shards are done."""

    def __init__(self, workspace: Path) -> None:
        super().__init__(daemon=True)
        self._workspace = workspace
        self._stop_asked = threading.Event()
        self.node_seconds = 0.0
        self.most = 0
        self.killed = ""
        self.known: set[str] = set()
        self.replaced = False

    def run(self) -> None:
        before = time.monotonic()
        while not self._stop_asked.wait(0.2):
            nodes, now = worker_nodes(), time.monotonic()
            self.node_seconds += len(nodes) * (now - before)
            before, self.most = now, max(self.most, len(nodes))
            if self.killed:
                self.replaced = self.replaced or any(node["NodeID"] not in self.known for node in nodes)
            elif len(nodes) > ACTORS and len(list(self._workspace.glob("pools/seed/lengths/*/shard-*.parquet"))) >= 4:
                self._kill(nodes[0])

    def stop(self) -> None:
        self._stop_asked.set()
        self.join()

    def _kill(self, node: dict[str, Any]) -> None:
        """Take a node down as a lost machine goes: its raylet and all its workers at once, without a word."""
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if any(node["RayletSocketName"] in word for word in words) and "raylet" in words[0]:
                for victim in [*process.children(recursive=True), process]:
                    victim.send_signal(signal.SIGKILL)
                self.killed = node["NodeID"]
                self.known = {known["NodeID"] for known in ray.nodes()}
                return
        raise RuntimeError(f"no raylet of node {node['NodeID']} was found")


@contextmanager
def autoscaling_head(session: str) -> Iterator[None]:
    """Run a head with the autoscaler until the block ends."""
    file = Path(session) / "autoscaling.json"
    file.write_text(json.dumps(LAUNCHER))
    command = [
        *(str(Path(sys.executable).parent / "ray"), "start", "--head", "--num-cpus=0", "--port=6379", f"--temp-dir={session}/ray", "--block"),
        *(f"--autoscaling-config={file}", "--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=100000000"),
    ]
    environment = {**os.environ, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    with (Path(session) / "head.log").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        yield
    finally:
        children = psutil.Process(head.pid).children(recursive=True)
        head.terminate()
        head.wait(timeout=60)
        for child in children:
            if child.is_running():
                child.kill()


def connect(session: str) -> None:
    """Connect to the head as soon as it is there."""
    deadline = time.monotonic() + UP_SECONDS
    while True:
        try:
            ray.init(address="127.0.0.1:6379", logging_level="WARNING")
            return
        except ConnectionError:
            if time.monotonic() > deadline:
                raise RuntimeError((Path(session) / "head.log").read_text()[-3000:]) from None
            time.sleep(1)


def cpu_use(worker_cpu_seconds: float, busy_cpu_seconds: float) -> dict[str, float]:
    """Return what the workers' CPUs cost and how much of it was work: the rest is starting, waiting for shards, a lost node's work, and going."""
    return {
        "worker_cpu_seconds": round(worker_cpu_seconds, 1),
        "busy_cpu_seconds": round(busy_cpu_seconds, 1),
        "idle_cpu_seconds": round(worker_cpu_seconds - busy_cpu_seconds, 1),
        "worker_cpu_hours": round(worker_cpu_seconds / 3600, 4),
        "idle_share": round(1 - busy_cpu_seconds / worker_cpu_seconds, 3) if worker_cpu_seconds else 0.0,
    }


def main(folder: Path, session: str) -> dict[str, Any]:
    """Return what happened."""
    wanted, _ = count(folder / "inline", workers=0, seconds=0.0)
    with autoscaling_head(session):
        connect(session)
        try:
            configure_ray_data()
            at_start = len(worker_nodes())
            watch = Watch(folder / "cluster")
            watch.start()
            found, busy = count(folder / "cluster", workers=ACTORS, seconds=SHARD_SECONDS)
            probe_workspace(Storage(str(folder / "cluster")))
            deadline = time.monotonic() + GONE_SECONDS
            while worker_nodes() and time.monotonic() < deadline:
                time.sleep(0.5)
            watch.stop()
            at_end = len(worker_nodes())
        finally:
            ray.shutdown()
    return {
        "same_result": found == wanted,
        "workers": {"at_start": at_start, "most": watch.most, "at_end": at_end},
        "killed": bool(watch.killed),
        "replaced": watch.replaced,
        **cpu_use(watch.node_seconds * WORKER_CPUS, busy * WORKER_CPUS),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2])))  # noqa: T201  # read by the test
