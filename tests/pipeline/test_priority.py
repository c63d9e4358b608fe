"""Who gives way on a full machine: tasks before steps' actors and training workers; and what a local Ray leaves to them."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pytest

from synpref_ray.pipeline import steps
from synpref_ray.pipeline.steps import Output, Resources, ShardKey, Step, StepInput, run_step
from synpref_ray.priority import MODEL_ENVIRONMENT
from synpref_ray.reward import ray_trainer
from synpref_ray.reward.training_config import TrainConfig
from tests.pipeline.test_steps import make_pool

NICE = pa.schema([pa.field("pair_id", pa.string(), nullable=False), ("nice", pa.int64())])

IDLE_AFTER_WORK = """
import os, sys, time, psutil, ray
from synpref_ray.pipeline.cluster import RayConfig, ray_session
from synpref_ray.tables.storage import Storage
from tests.processes import children_of

@ray.remote
def work():
    time.sleep(5)
    return os.getpid()

def count_living(workers):
    return sum(child.pid in workers for child in children_of(psutil.Process()))

cores = os.cpu_count() or 1
with ray_session(RayConfig(dashboard=False, num_cpus=cores + 3), Storage(sys.argv[1])):
    workers = set(ray.get([work.remote() for _ in range(cores + 3)]))
    assert len(workers) == cores + 3
    deadline = time.monotonic() + 60
    while count_living(workers) > cores and time.monotonic() < deadline:
        time.sleep(0.5)
    print(count_living(workers))
"""


class Niceness:
    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        return pa.table([shard["pair_id"], pa.array([os.getpriority(os.PRIO_PROCESS, 0)] * shard.num_rows)], schema=NICE), {}


@pytest.mark.parametrize("use_gpu", [False, True])
def test_training_workers_run_at_ordinary_priority(use_gpu: bool) -> None:
    environment = ray_trainer._environment(TrainConfig(backbone="m", use_gpu=use_gpu))
    assert environment.items() >= MODEL_ENVIRONMENT.items()


@pytest.mark.ray
@pytest.mark.usefixtures("ray")
def test_actors_come_before_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "INLINE_ROWS", -1)
    pool, seen = make_pool(tmp_path, "seed", [2]), {}
    for workers in (0, 1):
        step = Step(f"nice{workers}", 1, Niceness, (Output("nice", NICE),), {}, resources=Resources(workers))
        [[sidecar]] = run_step(step, [StepInput(pool, ("chosen",))]).sidecars
        [seen[workers]] = set(sidecar.read(0)["nice"].to_pylist())
    assert seen[1] < seen[0]


@pytest.mark.ray
def test_a_local_ray_keeps_no_more_idle_workers_than_cores(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", IDLE_AFTER_WORK, str(tmp_path)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= (os.cpu_count() or 1)
