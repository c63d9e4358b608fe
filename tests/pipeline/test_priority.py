"""Who gives way on a full machine: tasks before steps' actors and training workers."""

import os
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
