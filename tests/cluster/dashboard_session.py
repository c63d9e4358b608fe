"""A step that takes a while, on a Ray of its own with a dashboard, for whoever looks at that; run by `test_ray_dashboard.py` until it is ended.

Arguments: a folder for the workspace, one for Ray's files, and the dashboard's port.
"""

import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import ray

from synpref_ray.pipeline.cluster import configure_ray_data
from synpref_ray.pipeline.steps import Output, Resources, ShardKey, Step, StepInput, run_step
from tests.pipeline.test_steps import make_pool

SCHEMA = pa.schema([pa.field("pair_id", pa.string(), nullable=False), ("length", pa.int64())])
SHARD_SECONDS, SHARDS = 0.5, 4000


class SlowCounter:
    """Counts characters, slowly."""

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        time.sleep(SHARD_SECONDS)
        lengths = pa.array([len(text) for text in shard["chosen"].to_pylist()])
        return pa.table([shard["pair_id"], lengths], schema=SCHEMA), {"prompt_tokens": 40.0, "output_tokens": 5.0}


def main(folder: Path, session: str, port: int) -> None:
    """Run the step."""
    ray.init(address="local", num_cpus=4, object_store_memory=100_000_000, dashboard_port=port, _temp_dir=session, logging_level="WARNING")
    configure_ray_data()
    pool = make_pool(folder, "seed", [4] * SHARDS)
    step = Step("tag", 1, SlowCounter, (Output("lengths", SCHEMA),), {}, title="tag (tagger)", model="tagger", resources=Resources(2, num_cpus=1.0))
    run_step(step, [StepInput(pool, ("chosen",))])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
