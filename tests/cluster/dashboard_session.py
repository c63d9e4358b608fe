"""A step that takes a while, on the cluster of RAY_ADDRESS, for whoever looks at its dashboard; run by `test_ray_dashboard.py`.

Arguments: a folder for the workspace, and how many shards to work through.
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
SHARD_SECONDS = 0.5


class SlowCounter:
    """Counts characters, slowly."""

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        time.sleep(SHARD_SECONDS)
        lengths = pa.array([len(text) for text in shard["chosen"].to_pylist()])
        return pa.table([shard["pair_id"], lengths], schema=SCHEMA), {"prompt_tokens": 40.0, "output_tokens": 5.0}


def main(folder: Path, shards: int) -> None:
    """Run the step."""
    ray.init(logging_level="WARNING")
    configure_ray_data()
    pool = make_pool(folder, "seed", [4] * shards)
    step = Step("tag", 1, SlowCounter, (Output("lengths", SCHEMA),), {}, title="tag (tagger)", model="tagger", resources=Resources(2, num_cpus=1.0))
    run_step(step, [StepInput(pool, ("chosen",))])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
