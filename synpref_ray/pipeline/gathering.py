"""Gather and scatter as steps: selections become small pools, sidecars follow their pairs, and results go back beside the source pool."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import ray

from synpref_ray.pipeline.steps import INLINE_ROWS, Output, ShardKey, Step, StepInput, run_step, unwrap
from synpref_ray.tables.leases import Lease
from synpref_ray.tables.parts import PartedSidecar
from synpref_ray.tables.pools import Pool, Shard, commit_pool, open_pool, pool_exists, write_pool_shard
from synpref_ray.tables.selection import GATHERED_SHARD_PAIRS, Piece, gather_pairs, gather_sidecar, plan_gather, scatter_shard
from synpref_ray.tables.sidecars import Sidecar, fingerprint
from synpref_ray.tables.storage import Storage

GATHER_VERSION = 1


def gather_pool(storage: Storage, name: str, selected: Sequence[Piece], *, inputs: Mapping[str, str], max_pairs: int = GATHERED_SHARD_PAIRS) -> Pool:
    """Make (or reopen) the pool `name` of the selected pairs, in the order of `selected`.

    Args:
        inputs: digests of whatever determined the selection; with the selection itself they name the pool.
        max_pairs: pairs per shard; small, so that an LLM step loses little to a kill.

    Raises:
        RunConflictError: a pool of that name exists and holds another selection.
    """
    rows = [[piece.pool.name, piece.pool.digest, piece.shard, list(piece.rows)] for piece in selected]
    clusters = {f"clusters:{piece.pool.name}": piece.pool.clusters for piece in selected if piece.pool.clusters}
    name_of_content = fingerprint("gather", GATHER_VERSION, {"rows": rows, "max_pairs": max_pairs}, {**inputs, **clusters})
    name = f"{name}-{name_of_content[:8]}"
    if pool_exists(storage, name):
        return open_pool(storage, name)
    plan = plan_gather(selected, max_pairs)
    with Lease(storage, f"pools/{name}/lease.json") as lease:
        if pool_exists(storage, name):  # made by another driver meanwhile
            return open_pool(storage, name)
        shards = _write_shards(storage, name, plan)
        lease.check()
        return commit_pool(storage, name, name_of_content, shards, {"step": "gather", "inputs": dict(inputs)})


def _write_shards(storage: Storage, name: str, plan: Sequence[Sequence[Piece]]) -> list[Shard]:
    if sum(len(piece.rows) for pieces in plan for piece in pieces) <= INLINE_ROWS:
        return [write_pool_shard(storage, name, number, gather_pairs(pieces)) for number, pieces in enumerate(plan)]
    try:
        shards: list[Shard] = ray.get([_write_gathered.remote(storage, name, number, pieces) for number, pieces in enumerate(plan)])
    except ray.exceptions.RayError as error:
        raise unwrap(error) from error
    return shards


@ray.remote
def _write_gathered(storage: Storage, name: str, number: int, pieces: Sequence[Piece]) -> Shard:
    return write_pool_shard(storage, name, number, gather_pairs(pieces))


class _GatherWorker:
    def __init__(self, sidecars: list[dict[str, Sidecar | PartedSidecar]], schema: pa.Schema):
        self._sidecars = sidecars
        self._schema = schema

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        return gather_sidecar(shard, self._sidecars[key.table], self._schema), {}


def gather_sidecars(name: str, schema: pa.Schema, pools: Sequence[tuple[Pool, Mapping[str, Sidecar | PartedSidecar]]]) -> list[Sidecar]:
    """Return, for each gathered pool, the sidecar that its source pools' sidecars say about its pairs (no model runs)."""
    made = []
    for pool, sources in pools:
        step = Step(
            name=f"gather {name}",
            version=GATHER_VERSION,
            worker=_GatherWorker,
            outputs=(Output(name, schema),),
            settings={},
            digests={f"source:{source}": sidecar.fingerprint for source, sidecar in sources.items()},
            worker_arguments=lambda _, sources=sources: {"sidecars": [dict(sources)], "schema": schema},  # type: ignore[misc]
            max_failed_fraction=1.0,  # the rejects were counted where they happened
        )
        result = run_step(step, [StepInput(pool, ("source_pool", "source_shard", "source_row"))])
        made.append(result.sidecars[0][0])
    return made


class _ScatterWorker:
    def __init__(self, source: Pool, gathered: Pool, result: Sidecar, schema: pa.Schema):
        self._arguments: tuple[Any, ...] = (gathered, result, schema)
        self._source = source

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        return scatter_shard(self._source, key.number, *self._arguments), {}


def scatter_sidecar(source: Pool, gathered: Pool, result: Sidecar, name: str, schema: pa.Schema) -> Sidecar:
    """Return a sidecar of the source pool with the gathered pool's results; unselected rows are null with reason `not_selected`."""
    step = Step(
        name=f"scatter {name}",
        version=GATHER_VERSION,
        worker=_ScatterWorker,
        outputs=(Output(name, schema),),
        settings={},
        digests={"gathered": gathered.digest, "result": result.fingerprint},
        worker_arguments=lambda _: {"source": source, "gathered": gathered, "result": result, "schema": schema},
        max_failed_fraction=1.0,
    )
    return run_step(step, [StepInput(source, ())]).sidecars[0][0]
