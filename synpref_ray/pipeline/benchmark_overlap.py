"""Which benchmark items share their prompt with pairs of a pool: the contamination check beside an evaluation.

Paper: arXiv:2507.01352, App. C: a shared 13-gram with the first-turn prompt. The matching is ingest's (`ingest/decontamination.py`); here it runs
the other way round: pairs stay, and benchmark items are named. Our choice: metrics are given again without those items (`clean/…`), since a number
over seen prompts says little.
"""

from collections.abc import Mapping, Sequence

import pyarrow as pa
from pydantic import Field

from synpref_ray.config import Settings
from synpref_ray.ingest.benchmark_prompts import MATCHER_VERSION, BenchmarkItem, first_turn, split_words
from synpref_ray.ingest.decontamination import BenchmarkIndex, is_contaminated
from synpref_ray.pipeline.benchmark_files import LoadedBenchmark
from synpref_ray.pipeline.steps import INLINE_ROWS, Output, Resources, ShardKey, Step, StepInput, run_step
from synpref_ray.reporting.run import Run
from synpref_ray.tables.pools import Pool, content_digest, open_pool
from synpref_ray.tables.storage import Storage

OVERLAP_SCHEMA = pa.schema([pa.field("pair_id", pa.string(), nullable=False), pa.field("items", pa.list_(pa.string()), nullable=False)])
_SEPARATOR = "\x1f"


class ContaminationConfig(Settings):
    """Which pools of the workspace are looked through for the benchmarks' prompts."""

    pools: tuple[str, ...] = ()
    """Names of pools; none named: nothing is checked, and the metrics say so."""
    num_workers: int = Field(default=2, ge=1)  # ours: beyond some ten thousand pairs the search runs on Ray


class OverlapWorker:
    """Holds the benchmarks' n-grams."""

    def __init__(self, items: Sequence[BenchmarkItem]):
        self._index = BenchmarkIndex(items, candidates=False)

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        columns = (shard[name].to_pylist() for name in ("prompt", "chosen", "rejected"))
        found = [self._index.find(*values) for values in zip(*columns, strict=True)]
        names = [sorted({_join(match.benchmark, match.item) for match in matches}) if is_contaminated(matches) else [] for matches in found]
        table = pa.table([shard["pair_id"].combine_chunks(), pa.array(names, pa.list_(pa.string()))], schema=OVERLAP_SCHEMA)
        return table, {"overlapping_pairs": float(sum(bool(name) for name in names))}


def shared_items(run: Run, storage: Storage, benchmarks: Sequence[LoadedBenchmark], config: ContaminationConfig) -> dict[str, set[str]]:
    """Return by benchmark the names of the items whose first-turn prompt some pair of the pools holds; empty without pools.

    Raises:
        InputError: a pool does not exist.
    """
    shared: dict[str, set[str]] = {benchmark.name: set() for benchmark in benchmarks}
    pools = [open_pool(storage, name) for name in config.pools]
    if not pools:
        return shared
    items = [
        BenchmarkItem(benchmark.name, item.name, words)
        for benchmark in benchmarks
        for item in benchmark.read.items
        if (words := split_words(first_turn([dict(turn) for turn in item.prompt]) or ""))
    ]
    step = Step(
        name="benchmark overlap",
        version=MATCHER_VERSION,
        worker=OverlapWorker,
        outputs=(Output("benchmark-overlap", OVERLAP_SCHEMA),),
        settings={},
        digests={"items": content_digest([list(item) for item in items])},
        worker_arguments=lambda _: {"items": items},
        resources=Resources(0 if sum(pool.num_rows for pool in pools) <= INLINE_ROWS else config.num_workers),
    )
    result = run_step(step, [StepInput(pool, ("prompt", "chosen", "rejected")) for pool in pools])
    run.step("benchmark overlap", rows=result.rows, computed=result.rows_computed, rejected={}, seconds=result.seconds)
    for pool, (sidecar,) in zip(pools, result.sidecars, strict=True):
        for names in _names(pool, sidecar.read_all(["items"]) if pool.shards else None):
            benchmark, _, item = names.partition(_SEPARATOR)
            shared[benchmark].add(item)
    return shared


def _names(pool: Pool, table: pa.Table | None) -> set[str]:
    return {name for names in (table["items"].to_pylist() if table is not None else []) for name in names}


def _join(benchmark: str, item: str) -> str:
    return f"{benchmark}{_SEPARATOR}{item}"
