"""LLM judges on benchmarks: the generative baseline beside a reward model, over the very comparisons that each metric makes.

Paper: arXiv:2507.01352, Table 1 has rows of generative judges. Our choice: the judge sees the pair alone (no exemplars, no attributes), in both
orders; what counts as a win is JudgeBench's rule (`outcome_of_verdicts`), so a tie between the orders is wrong. Votes are tables of the workspace:
a second run asks for nothing.
"""

from collections.abc import Sequence

import pyarrow as pa

from synpref_ray.evaluation.benchmarks.core import Item, Outcome, outcome_of_verdicts
from synpref_ray.pipeline.benchmark_files import LoadedBenchmark
from synpref_ray.pipeline.judge_steps import JudgeStepConfig, judge_plain_pools
from synpref_ray.reporting.run import Run
from synpref_ray.rules.verdicts import read_votes
from synpref_ray.rules.votes import sum_over_orders
from synpref_ray.schema import PROMPT, pair_id
from synpref_ray.tables.pools import Pool, commit_pool, content_digest, open_pool, pool_exists, write_pool_shard
from synpref_ray.tables.storage import Storage

PAIRS_PER_SHARD = 512  # as for every LLM step: a kill costs seconds of generation, and two shards in flight keep an engine full
_PAIRS_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("prompt", PROMPT, nullable=False),
        pa.field("chosen", pa.string(), nullable=False),
        pa.field("rejected", pa.string(), nullable=False),
    ]
)
_POOL_VERSION = 1


def judge_outcomes(run: Run, storage: Storage, benchmarks: Sequence[LoadedBenchmark], config: JudgeStepConfig) -> dict[str, list[Outcome]]:
    """Return by benchmark the judge's outcomes on its items, in their order."""
    pools = {benchmark.name: _pairs_pool(storage, benchmark) for benchmark in benchmarks}
    sidecars = judge_plain_pools(run, f"judge ({config.judge.judge}) benchmarks", list(pools.values()), config)
    outcomes = {}
    for benchmark, sidecar in zip(benchmarks, sidecars, strict=True):
        sums: dict[str, int | None] = {}
        for shard in sidecar.pool.shards:
            table = sidecar.read(shard.number, ["pair_id", "votes"])
            stored = zip(table["pair_id"].to_pylist(), table["votes"].to_pylist(), strict=True)
            sums |= {name: sum_over_orders(read_votes(votes)) for name, votes in stored}
        outcomes[benchmark.name] = [outcome_of_verdicts(item, [sums.get(name) for name in _pair_ids(item)]) for item in benchmark.read.items]
    return outcomes


def _pair_ids(item: Item) -> list[str]:
    return [pair_id(item.prompt, item.replies[better], item.replies[worse]) for better, worse in item.pairs]


def _pairs_pool(storage: Storage, benchmark: LoadedBenchmark) -> Pool:
    """Return the pool of the comparisons that the benchmark makes, each once; made once per content."""
    rows: dict[str, dict[str, object]] = {}
    for item in benchmark.read.items:
        if item.problem is not None:
            continue
        for name, (better, worse) in zip(_pair_ids(item), item.pairs, strict=True):
            rows[name] = {"pair_id": name, "prompt": item.prompt, "chosen": item.replies[better], "rejected": item.replies[worse]}
    digest = content_digest([_POOL_VERSION, PAIRS_PER_SHARD, list(rows)])
    pool = f"comparisons-{digest[:16]}"
    if pool_exists(storage, pool):
        return open_pool(storage, pool)
    every = list(rows.values())
    starts = range(0, len(every), PAIRS_PER_SHARD)
    shards = [
        write_pool_shard(storage, pool, number, pa.Table.from_pylist(every[start : start + PAIRS_PER_SHARD], schema=_PAIRS_SCHEMA))
        for number, start in enumerate(starts)
    ]
    return commit_pool(storage, pool, digest, shards, {"step": "comparisons", "benchmark": benchmark.name})
