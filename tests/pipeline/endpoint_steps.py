"""A pool that endpoints tag, and the driver that does it: run as a script, so that a test can kill it."""

import json
import sys
from pathlib import Path

import pyarrow as pa

from synpref_ray.config import Settings
from synpref_ray.llm.tagger import TaggerConfig, tag_requests
from synpref_ray.pipeline.cluster import configure_ray_data
from synpref_ray.pipeline.tag_steps import TaggedPools, Taggers, tag_pools
from synpref_ray.reporting.run import Run
from synpref_ray.tables.pools import Pool, commit_pool, open_pool, write_pool_shard
from synpref_ray.tables.storage import Storage
from tests.builders import make_pairs

TAGGER = TaggerConfig(max_input_tokens=4000)


class DriverConfig(Settings):
    """What the driver is told."""

    taggers: Taggers


def endpoint(url: str, name: str = "tagger", **settings: object) -> dict[str, object]:
    """Return the settings of a tagger behind the server at `url`."""
    engine = {"base_url": url, "model": name, "api": "chat", "guidance": "none", "max_concurrent_requests": 4, "backoff_seconds": 0.01, **settings}
    return {"engine": engine, "tagger": {**TAGGER.model_dump(), "name": name}}


def make_pool(root: Path, num_shards: int, shard_pairs: int) -> Pool:
    """Write a pool whose pairs all have prompts of their own."""
    storage, pairs = Storage(str(root)), make_pairs(num_shards * shard_pairs)
    shards = [write_pool_shard(storage, "seed", n, pairs.slice(n * shard_pairs, shard_pairs)) for n in range(num_shards)]
    return commit_pool(storage, "seed", "f" * 32, shards, {})


def request_keys(pairs: pa.Table) -> dict[str, str]:
    """Return the key of each pair's request by the prompt's own text, which every body that a server sees contains."""
    requests = tag_requests(pairs.select(["pair_id", "prompt", "chosen", "rejected"]).to_pylist(), TAGGER)
    return {row["prompt"][0]["content"]: request.key for row, request in zip(pairs.to_pylist(), requests, strict=True)}


def tag(root: Path, config: DriverConfig) -> tuple[TaggedPools, Run]:
    """Tag the pool in this process, which has a Ray session."""
    storage = Storage(str(root))
    run = Run(storage, "tag", config)
    return tag_pools(run, "tag", [open_pool(storage, "seed")], config.taggers), run


def main() -> None:
    """Tag the pool under `argv[1]` as `argv[2]` says, with a Ray of its own."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=256 << 20)
    configure_ray_data()
    tag(Path(sys.argv[1]), DriverConfig.model_validate(json.loads(sys.argv[2])))


if __name__ == "__main__":
    main()
