"""Gather and scatter as steps: selections become small pools, sidecars follow their pairs, and results go back beside the source pool."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from synpref_ray.pipeline.steps import INLINE_ROWS, Output, ShardKey, Step, StepInput, plan_sidecars, run_step
from synpref_ray.pipeline.tasks import run_tasks
from synpref_ray.tables.leases import Lease
from synpref_ray.tables.parts import PartedSidecar
from synpref_ray.tables.pools import Pool, Shard, commit_pool, list_pools, open_pool, pool_exists, write_pool_shard
from synpref_ray.tables.reading import read_each
from synpref_ray.tables.selection import GATHERED_SHARD_PAIRS, Piece, gather_shards, gather_sidecar, plan_gather, scatter_shard
from synpref_ray.tables.sidecars import Sidecar, fingerprint
from synpref_ray.tables.storage import Storage

GATHER_VERSION = 1
GATHER_POOL_VERSION = 2
SOURCES = "sources"
"""In a gathered pool's provenance: for each of its shards the source pools and shards that it took rows from."""
SHARDS_PER_TASK = 16  # ours: of a gathered pool; neighbours take from the same source shard, which a task reads once


def gather_pool(storage: Storage, name: str, selected: Sequence[Piece], *, inputs: Mapping[str, str], max_pairs: int = GATHERED_SHARD_PAIRS) -> Pool:
    """Make (or reopen) the pool `name` of the selected pairs, in the order of `selected`.

    Args:
        inputs: digests of whatever determined the selection; with the selection itself they name the pool.
        max_pairs: pairs per shard; small, so that an LLM step loses little to a kill.

    Raises:
        RunConflictError: a pool of that name exists and holds another selection.
    """
    rows = [[piece.pool.name, piece.pool.digest, piece.shard, piece.digest] for piece in selected]
    clusters = {f"clusters:{piece.pool.name}": piece.pool.clusters for piece in selected if piece.pool.clusters}
    name_of_content = fingerprint("gather", GATHER_POOL_VERSION, {"rows": rows, "max_pairs": max_pairs}, {**inputs, **clusters})
    name = f"{name}-{name_of_content[:8]}"
    if pool_exists(storage, name):
        return open_pool(storage, name)
    plan = plan_gather(selected, max_pairs)
    with Lease(storage, f"pools/{name}/lease.json") as lease:
        if pool_exists(storage, name):  # made by another driver meanwhile
            return open_pool(storage, name)
        shards = _write_shards(storage, name, plan)
        lease.check()
        sources = [sorted({(piece.pool.name, piece.shard) for piece in pieces}) for pieces in plan]
        return commit_pool(storage, name, name_of_content, shards, {"step": "gather", "inputs": {**inputs, **clusters}, SOURCES: sources})


def _write_shards(storage: Storage, name: str, plan: Sequence[Sequence[Piece]]) -> list[Shard]:
    light = {id(pool): replace(pool, shards=()) for pool in {id(piece.pool): piece.pool for pieces in plan for piece in pieces}.values()}
    plan = [[replace(piece, pool=light[id(piece.pool)]) for piece in pieces] for pieces in plan]  # a task would carry every list of shards
    if sum(len(piece.rows) for pieces in plan for piece in pieces) <= INLINE_ROWS:
        return _write_some((storage, name), 0, plan)
    tasks = [(start, plan[start : start + SHARDS_PER_TASK]) for start in range(0, len(plan), SHARDS_PER_TASK)]
    return [shard for some in run_tasks(_write_some, (storage, name), tasks, title=f"gather {name}") for shard in some]


def _write_some(target: tuple[Storage, str], first: int, plan: Sequence[Sequence[Piece]]) -> list[Shard]:
    return [write_pool_shard(*target, first + number, table) for number, table in enumerate(gather_shards(plan))]


def gathered_from(gathered: Pool, source: Pool) -> dict[int, tuple[Shard, ...]]:
    """Return, for each shard of the source pool from which rows were gathered, the gathered pool's shards that hold some."""
    sources = gathered.provenance()[SOURCES]
    found: dict[int, list[Shard]] = {}
    for shard, places in zip(gathered.shards, sources, strict=True):
        for name, number in places:
            if name == source.name:
                found.setdefault(number, []).append(shard)
    return {number: tuple(shards) for number, shards in found.items()}


def find_gathered(
    storage: Storage, name: str, selected: Sequence[Piece], lacking: Callable[[Pool], int], answers_per_pair: int = 1
) -> tuple[list[Pool], list[Piece]]:
    """Return pools gathered as `name` from the same source pool that hold selected pairs, by name, and the selected pairs that none of them holds.

    Our choice: what costs fewest answers of models. Pools that lack none cost nothing. Of the others, that with the largest saving is taken, as long
    as there is one: finishing it must ask for fewer answers (those about pairs that are not selected too) than asking anew about its pairs that are
    still missing; a pool without any answer is never taken. Of all these as few as will do are returned: that with the most pairs that are still
    missing first, or the smallest that lacks nothing and holds all. Once the missing pairs are gathered and answered, the same pools are found, and
    the new one with them: it shares no selected pair with the others, so it takes nothing from what each of them adds.

    Args:
        lacking: how many answers of models a pool lacks.
        answers_per_pair: how many each pair needs.
    """
    if not selected:
        return [], []
    source, num_wanted = selected[0].pool, sum(len(piece.rows) for piece in selected)
    clusters = {f"clusters:{source.name}": source.clusters} if source.clusters else {}
    opened = [open_pool(storage, other) for other in list_pools(storage) if other.startswith(f"{name}-")]
    pools = {pool.name: pool for pool in opened if pool.num_rows and pool.provenance().get("inputs") == clusters}
    lacks = {other: lacking(pool) for other, pool in pools.items()}
    finished = [pool for pool in pools.values() if not lacks[pool.name]]
    rows = _SourceRows(source)
    wanted = missing = rows.of_pieces(selected)
    held: dict[str, npt.NDArray[np.uint8]] = {}
    for pool in sorted(finished, key=lambda pool: (pool.num_rows < num_wanted, pool.num_rows, pool.name)):  # those that may hold all come first
        held[pool.name] = rows.of_gathered(pool) & wanted
        if np.array_equal(held[pool.name], wanted):
            return [pool], []
        missing = missing & ~held[pool.name]
    begun = [pool for pool in pools.values() if 0 < lacks[pool.name] < answers_per_pair * pool.num_rows and missing.any()]
    partly = {pool.name: rows.of_gathered(pool) & wanted for pool in begun}
    while partly:
        saves = {other: answers_per_pair * _count(bits & missing) - lacks[other] for other, bits in partly.items()}
        best = min(saves, key=lambda other: (-saves[other], other))
        if saves[best] <= 0:
            break
        held[best] = partly.pop(best)
        missing = missing & ~held[best]
    return [pools[other] for other in sorted(_fewest(held, wanted))], rows.among(selected, missing)


def _fewest(held: Mapping[str, npt.NDArray[np.uint8]], wanted: npt.NDArray[np.uint8]) -> list[str]:
    """Return names of sets that hold together what all of them hold of the wanted rows, greedily: that with the most rows still missing first."""
    left, missing, taken = dict(held), wanted, list[str]()
    while left:
        best = min(left, key=lambda name: (-_count(left[name] & missing), name))
        if not _count(left[best] & missing):
            break
        missing = missing & ~left.pop(best)
        taken.append(best)
    return taken


def _count(bits: npt.NDArray[np.uint8]) -> int:
    return int(np.bitwise_count(bits).sum())


class _SourceRows:
    """Sets of rows of a source pool, a bit for each row: 5 MB for 40M pairs."""

    def __init__(self, source: Pool):
        starts = np.cumsum([0, *(shard.rows for shard in source.shards)]).tolist()
        self._first = {shard.number: start for shard, start in zip(source.shards, starts, strict=False)}
        self._num_rows = starts[-1]
        self._name = source.name

    def of_pieces(self, pieces: Sequence[Piece]) -> npt.NDArray[np.uint8]:
        """Return the rows of a selection."""
        flags = np.zeros(self._num_rows, dtype=bool)
        for piece in pieces:
            flags[self._first[piece.shard] + np.asarray(piece.rows, dtype=np.int64)] = True
        return np.packbits(flags)

    def of_gathered(self, pool: Pool) -> npt.NDArray[np.uint8]:
        """Return the rows of the source that a gathered pool holds."""
        flags = np.zeros(self._num_rows, dtype=bool)
        for places in read_each(lambda shard: pool.read(shard.number, ["source_pool", "source_shard", "source_row"]), pool.shards):
            mine = places.filter(pc.equal(places["source_pool"], self._name))
            shards, rows = mine["source_shard"].to_numpy(), mine["source_row"].to_numpy()
            for number in np.unique(shards).tolist():
                if number in self._first:  # a later version of the source may have had more shards
                    flags[self._first[number] + rows[shards == number].astype(np.int64)] = True
        return np.packbits(flags)

    def among(self, pieces: Sequence[Piece], bits: npt.NDArray[np.uint8]) -> list[Piece]:
        """Return the rows of a selection that are in a set, in the selection's order."""
        flags = np.unpackbits(bits, count=self._num_rows).astype(bool)
        kept = []
        for piece in pieces:
            rows = np.asarray(piece.rows, dtype=np.int64)
            rows = rows[flags[self._first[piece.shard] + rows]]
            kept += [replace(piece, rows=rows.tolist())] if len(rows) else []
        return kept


class _GatherWorker:
    def __init__(self, sidecars: list[dict[str, Sidecar | PartedSidecar]], schema: pa.Schema):
        self._sidecars = sidecars
        self._schema = schema

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        return gather_sidecar(shard, self._sidecars[key.table], self._schema), {}


def gather_sidecars(name: str, schema: pa.Schema, pools: Sequence[tuple[Pool, Mapping[str, Sidecar | PartedSidecar]]]) -> list[Sidecar]:
    """Return, for each gathered pool, the sidecar that its source pools' sidecars say about its pairs (no model runs)."""
    return [run_step(*_gather_step(name, schema, pool, sources)).sidecars[0][0] for pool, sources in pools]


def plan_gathered_sidecar(name: str, schema: pa.Schema, pool: Pool, sources: Mapping[str, Sidecar | PartedSidecar]) -> Sidecar:
    """Return the sidecar that `gather_sidecars` would make of a gathered pool, without making it."""
    return plan_sidecars(*_gather_step(name, schema, pool, sources))[0][0]


def _gather_step(name: str, schema: pa.Schema, pool: Pool, sources: Mapping[str, Sidecar | PartedSidecar]) -> tuple[Step, list[StepInput]]:
    light = {source: replace(sidecar, pool=replace(sidecar.pool, shards=())) for source, sidecar in sources.items()}
    step = Step(
        name=f"gather {name}",
        version=GATHER_VERSION,
        worker=_GatherWorker,
        outputs=(Output(name, schema),),
        settings={},
        digests={f"source:{source}": sidecar.fingerprint for source, sidecar in sources.items()},
        worker_arguments=lambda _: {"sidecars": [light], "schema": schema},
        max_failed_fraction=1.0,  # the rejects were counted where they happened
    )
    return step, [StepInput(pool, ("source_pool", "source_shard", "source_row"))]


@dataclass(frozen=True)
class _Scattered:
    """A gathered pool (without its list of shards) and its sidecar, with the gathered shards that took from each source shard, by its number."""

    pool: Pool
    result: Sidecar
    shards: Mapping[int, tuple[Shard, ...]]


class _ScatterWorker:
    """Puts back what the gathered shards that took from a source shard say."""

    def __init__(self, source: Pool, results: Sequence[_Scattered], schema: pa.Schema):
        self._source, self._results, self._schema = source, results, schema

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        results = [(replace(one.pool, shards=one.shards.get(key.number, ())), one.result) for one in self._results]
        return scatter_shard(self._source, key.number, results, self._schema), {}


def scatter_sidecars(source: Pool, results: Sequence[tuple[Pool, Sidecar]], name: str, schema: pa.Schema) -> Sidecar:
    """Return a sidecar of the source pool with what the gathered pools' sidecars say; unselected rows are null with reason `not_selected`.

    Args:
        results: gathered pools, each with its sidecar; where several hold a pair, the first one's word counts.
    """
    light = []
    for gathered, result in results:
        few = replace(gathered, shards=())
        light.append(_Scattered(few, replace(result, pool=few), gathered_from(gathered, source)))
    arguments = {"source": replace(source, shards=()), "results": light, "schema": schema}
    places = [""] if len(results) == 1 else [f":{place}" for place in range(len(results))]
    digests: dict[str, str] = {}
    for place, (gathered, result) in zip(places, results, strict=True):
        digests |= {f"gathered{place}": gathered.digest, f"result{place}": result.fingerprint}
    step = Step(
        name=f"scatter {name}",
        version=GATHER_VERSION,
        worker=_ScatterWorker,
        outputs=(Output(name, schema),),
        settings={},
        digests=digests,
        worker_arguments=lambda _: arguments,
        max_failed_fraction=1.0,
    )
    return run_step(step, [StepInput(source, ())]).sidecars[0][0]
