"""From staged chunks to pools: the passes of ingest after reading. Ids are compared in parts, decisions gathered, shards cut and written.

Paper: Sec. 3.1 (exact dedup over all sources). Our choice: see `ingest/partition.py` and `ingest/plan.py`, whose functions run here as Ray tasks.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import pyarrow as pa

from synpref_ray.ingest.chunk import read_staged
from synpref_ray.ingest.partition import Comparison, Gathered
from synpref_ray.ingest.plan import IngestPlan, StagedChunk, WriteTask, chunk_marks, duplicate_rejects, make_plan, take_part
from synpref_ray.ingest.source import Route
from synpref_ray.pipeline.tasks import run_tasks
from synpref_ray.tables.leases import Hold
from synpref_ray.tables.pools import Pool, Shard, commit_pool, open_pool, pool_exists, write_pool_shard

INLINE_PAIRS = 20_000  # ours: so few pairs are done before Ray has started its workers


@dataclass(frozen=True)
class MadePool:
    """A pool, and how many of its pairs this ingest wrote."""

    pool: Pool
    num_written: int


def make_pools(
    comparison: Comparison,
    name: str,
    hold: Hold,
    phases: dict[str, float],
    *,
    grown: Mapping[Route, Pool],
    max_pairs_per_shard: Mapping[Route, int],
    max_bytes_per_shard: int,
) -> tuple[IngestPlan, dict[Route, MadePool]]:
    """Write the pools seed, unverified and wild (none without pairs) and the rejects of duplicates; what was done before is not done again.

    Args:
        comparison: of all staged files.
        name: fingerprint of the pools.
        hold: the lease under which they are made, checked before each shard and each pool that comes into being.
        phases: gets the seconds of each pass.
        grown: the versions of pools that new shards join; the others are made.
        max_pairs_per_shard: ceiling of pairs in a shard of each pool.
        max_bytes_per_shard: ceiling of a shard's bytes; a single larger pair gets a shard of its own.

    Raises:
        RunConflictError: another driver has taken the lease.
    """
    layout = comparison.layout
    inline = layout.num_pairs <= INLINE_PAIRS
    with timed(phases, "compare"):
        run_tasks(_decide_part, comparison, [(part,) for part in range(comparison.num_parts)], inline=inline, title="compare")
    with timed(phases, "gather"):
        gathered = run_tasks(_gather_piece, comparison, [(piece,) for piece in range(len(layout.pieces))], inline=inline, title="gather")
    with timed(phases, "cut"):
        plan = make_plan(comparison, gathered, max_pairs_per_shard=max_pairs_per_shard, max_bytes_per_shard=max_bytes_per_shard)
    with timed(phases, "write"):
        made = {route: _make_pool(comparison, name, hold, route, grown.get(route), plan, inline=inline) for route in Route}
    return plan, {route: pool for route, pool in made.items() if pool is not None}


@contextmanager
def timed(phases: dict[str, float], phase: str) -> Iterator[None]:
    """Note how many seconds a phase takes."""
    started = time.monotonic()
    yield
    phases[phase] = time.monotonic() - started


def _decide_part(comparison: Comparison, part: int) -> None:
    comparison.decide_part(part)


def _gather_piece(comparison: Comparison, piece: int) -> Gathered:
    return comparison.gather_piece(piece)


def _make_pool(comparison: Comparison, name: str, hold: Hold, route: Route, base: Pool | None, plan: IngestPlan, *, inline: bool) -> MadePool | None:
    storage = comparison.storage
    latest = open_pool(storage, route.value) if pool_exists(storage, route.value) else None
    is_there = latest is not None and latest.fingerprint == name
    first = max((shard.number + 1 for shard in base.shards), default=0) if base else 0
    tasks = [(name[:8], hold, first, replace(task, parts=()) if is_there else task) for task in plan.tasks if task.route is route]
    shards = [shard for written in run_tasks(_write_shards, comparison, tasks, inline=inline, title=f"write {route.value}") for shard in written]
    if latest is not None and is_there:
        return MadePool(latest, latest.num_rows - (base.num_rows if base else 0))
    if not shards:
        return MadePool(base, 0) if base else None
    provenance = {"step": "ingest", **({"grown_from": base.version} if base else {})}
    hold.check()
    pool = commit_pool(storage, route.value, name, [*(base.shards if base else ()), *shards], provenance)
    return MadePool(pool, sum(shard.rows for shard in shards))


def _write_shards(comparison: Comparison, name: str, hold: Hold, first: int, task: WriteTask) -> list[Shard]:
    """Write consecutive shards, numbered from `first` on, and the rejects of some chunks, every chunk read once; done when its record is there."""
    storage = comparison.storage
    record = f"{comparison.folder}/written-{task.route.value}-{task.number:05d}.json"
    if storage.exists(record):
        return [Shard(**shard) for shard in storage.read_json(record)]
    duplicates = {part.chunk: part.number for part in task.duplicates}
    parts: dict[StagedChunk, list[int]] = {chunk: [] for chunk in duplicates}
    for place, part in enumerate(task.parts):
        parts.setdefault(part.chunk, []).append(place)
    shards: list[Shard] = []
    tables: list[pa.Table] = []
    for chunk in sorted(parts):
        pairs, marks = read_staged(storage, chunk.path), chunk_marks(comparison, chunk)
        if chunk in duplicates:
            rejects = duplicate_rejects(pairs, marks, comparison.layout)
            storage.write_table(f"rejects/ingest/{name}/duplicates-{duplicates[chunk]:05d}.parquet", rejects)
        for place in parts[chunk]:
            part = task.parts[place]
            tables.append(take_part(part, pairs, marks))
            if place + 1 == len(task.parts) or task.parts[place + 1].shard != part.shard:
                hold.check()
                shards.append(write_pool_shard(storage, task.route.value, first + part.shard, pa.concat_tables(tables).combine_chunks()))
                tables = []
    storage.write_json(record, [asdict(shard) for shard in shards])
    return shards
