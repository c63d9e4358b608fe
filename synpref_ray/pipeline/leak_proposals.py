"""Proposals: the pairs of pools that share words with benchmark items, gathered with the items' prompts, to be put to judges.

Paper: App. C (v3). Our choice: a pair is proposed once for every item; the pool of proposals is named by its content, so that no judge is asked
twice. While they are gathered, the driver holds all proposals without their texts, some 200 bytes each (a few times that while they are sorted), the
prompts of the benchmarks, and the texts of one shard of pairs and of one of proposals.
"""

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synpref_ray.errors import InputError
from synpref_ray.ingest.accounts import record_path
from synpref_ray.ingest.benchmark_prompts import DecontaminateConfig, comparison_facts, read_benchmark_texts
from synpref_ray.ingest.decontamination import MATCHES_SCHEMA, MatchKind
from synpref_ray.pipeline.ingest_growth import ingests_of
from synpref_ray.rules.leaks import PROPOSAL_FIELDS
from synpref_ray.schema import GATHERED_FIELDS, GATHERED_SCHEMA, PAIR_FIELDS, canonical_json
from synpref_ray.tables.leases import Lease
from synpref_ray.tables.pools import Pool, commit_pool, open_pool, pool_exists, write_pool_shard
from synpref_ray.tables.storage import Storage

PROPOSE_VERSION = 2
PROPOSAL_NAMES = tuple(field.name for field in PROPOSAL_FIELDS)
PROPOSALS_SCHEMA = pa.schema([*GATHERED_SCHEMA, *PROPOSAL_FIELDS, pa.field("benchmark_prompt", pa.string(), nullable=False)])
"""A pair once for every benchmark item that it shares words with."""
_PLACED_SCHEMA = pa.schema([PROPOSALS_SCHEMA.field("pair_id"), *GATHERED_FIELDS, *PROPOSAL_FIELDS])
_ID_BYTES = 32
_DIGEST_ROWS = 10_000  # ours: some MB of rows as Python values


class Proposals(NamedTuple):
    """The pool of proposals, and which of its shards are about a shard of a source pool: numbers, by the source's name and shard."""

    pool: Pool
    about: Mapping[str, Mapping[int, Sequence[int]]]


def check_compared(pools: Sequence[Pool], benchmarks: DecontaminateConfig) -> None:
    """Refuse benchmarks that ingest did not compare a pool with: no overlap reported would then mean nothing.

    Raises:
        InputError: ingest had other benchmarks, other prompts in one, or looked for other overlaps; or its record does not say.
    """
    for pool in pools:
        for name in ingests_of(pool):
            _check_ingest(pool, record_path(name), comparison_facts(benchmarks))


def _check_ingest(pool: Pool, path: str, given: Mapping[str, Any]) -> None:
    if not pool.storage.exists(path):
        raise InputError(f"pool {pool.name!r} was not made by ingest ({pool.storage.join(path)} does not exist): overlaps were not looked for")
    record = pool.storage.read_json(path)
    if "compared" not in record:
        why = "with none" if "benchmark_items" not in record else "before it recorded them: ingest into another workspace"
        raise InputError(f"pool {pool.name!r}: the record {pool.storage.join(path)} names no benchmarks; ingest ran {why}")
    found = record["compared"]
    absent = sorted(set(given["benchmarks"]) - set(found["benchmarks"]))
    if absent:
        had = ", ".join(found["benchmarks"])
        raise InputError(
            f"pool {pool.name!r}: ingest did not compare with benchmark {', '.join(absent)} (it had {had}): nothing is known of overlaps"
        )
    other = [name for name, digest in given["benchmarks"].items() if found["benchmarks"][name] != digest]
    if other:
        raise InputError(f"pool {pool.name!r}: benchmark {', '.join(other)} has other prompts than ingest compared with; give it as ingest had it")
    if found["candidates"] != given["candidates"]:
        ran, asked = str(found["candidates"]).lower(), str(given["candidates"]).lower()
        raise InputError(f"pool {pool.name!r}: ingest ran with decontaminate.candidates={ran}, this config says {asked}: say the same")
    if found["candidates"] and "max_candidates" not in found:
        raise InputError(f"pool {pool.name!r}: ingest kept one candidate a pair, as earlier versions did; run it again into another workspace")
    bound, says = found.get("max_candidates"), given.get("max_candidates")
    if bound != says:
        raise InputError(f"pool {pool.name!r}: ingest ran with decontaminate.max_candidates={bound}, this config says {says}: say the same")


def read_proposals(pool: Pool, benchmarks: Iterable[str], min_words: int) -> pa.Table:
    """Return what ingest reported about a pool's pairs and pairs that it left out: pair_id and PROPOSAL_FIELDS, sorted by pair and item.

    Each item comes once a pair.

    Args:
        benchmarks: whose overlaps are wanted; an addition to the pool may have been compared with more.
        min_words: of candidates.
    """
    storage, folders = pool.storage, [f"decontamination/{name[:8]}" for name in ingests_of(pool)]
    names = ["pair_id", *PROPOSAL_NAMES]
    tables = [storage.read_table(path, names) for folder in folders for path in storage.list_files(folder, deep=False)]
    table = pa.concat_tables([MATCHES_SCHEMA.empty_table().select(names), *tables])
    table = table.filter(pc.is_in(table["benchmark"], value_set=pa.array(sorted(benchmarks), pa.string())))
    long_enough = pc.or_(pc.greater_equal(table["n"], min_words), pc.not_equal(table["kind"], MatchKind.CANDIDATE.value))
    keys = [("pair_id", "ascending"), ("benchmark", "ascending"), ("item", "ascending"), ("n", "descending"), ("field", "ascending")]
    table = table.filter(long_enough).sort_by(keys).combine_chunks()
    first = np.ones(table.num_rows, np.bool_)
    if table.num_rows:
        columns = [table[name] for name in ("pair_id", "benchmark", "item")]
        first[1:] = np.logical_or.reduce([pc.not_equal(column[1:], column[:-1]).to_numpy() for column in columns])
    return table.filter(pa.array(first))


def gather_proposals(storage: Storage, pools: Sequence[Pool], benchmarks: DecontaminateConfig, *, min_words: int, max_pairs: int) -> Proposals:
    """Make (or reopen) the pool of proposals: the pairs that share words with benchmark items, in the pools' order, and the items' prompts.

    Args:
        min_words: of candidates; overlaps of 13 words and equal short prompts are proposed whatever their length.
        max_pairs: per shard.

    Raises:
        InputError: the benchmarks are not those that ingest compared with.
    """
    texts, names = _BenchmarkTexts(benchmarks), comparison_facts(benchmarks)["benchmarks"]
    placed = pa.concat_tables([_PLACED_SCHEMA.empty_table(), *(_place_proposals(pool, names, min_words) for pool in pools)])
    digest = _digest(placed, texts, max_pairs)
    name = f"proposals-{digest[:8]}"
    about = _shards_about(placed, max_pairs)
    if pool_exists(storage, name):
        return Proposals(open_pool(storage, name), about)
    with Lease(storage, f"pools/{name}/lease.json") as lease:
        if pool_exists(storage, name):  # made by another driver meanwhile
            return Proposals(open_pool(storage, name), about)
        by_name = {pool.name: pool for pool in pools}
        slices = [placed.slice(start, max_pairs) for start in range(0, placed.num_rows, max_pairs)]
        shards = [write_pool_shard(storage, name, number, _with_texts(rows, by_name, texts)) for number, rows in enumerate(slices)]
        lease.check()
        return Proposals(commit_pool(storage, name, digest, shards, {"step": "propose"}), about)


def _shards_about(placed: pa.Table, max_pairs: int) -> dict[str, dict[int, list[int]]]:
    """Return by source pool and shard the numbers of the shards of `max_pairs` proposals that name it, ascending."""
    names = ["source_pool", "source_shard", "number"]
    numbers = pa.array(np.arange(placed.num_rows) // max_pairs)
    about: dict[str, dict[int, list[int]]] = {}
    for row in placed.select(names[:2]).append_column("number", numbers).group_by(names).aggregate([]).sort_by("number").to_pylist():
        about.setdefault(row["source_pool"], {}).setdefault(row["source_shard"], []).append(row["number"])
    return about


def _place_proposals(pool: Pool, benchmarks: Iterable[str], min_words: int) -> pa.Table:
    """Return the proposals about a pool's pairs and where those stand, in their order (_PLACED_SCHEMA)."""
    proposed = read_proposals(pool, benchmarks, min_words)
    ids = proposed["pair_id"].cast(pa.binary(_ID_BYTES)).combine_chunks()
    keys = np.frombuffer(ids.buffers()[1], f"S{_ID_BYTES}", len(ids), ids.offset * _ID_BYTES) if len(ids) else np.zeros(0, f"S{_ID_BYTES}")
    tables = [_PLACED_SCHEMA.empty_table()]
    for shard in pool.shards if proposed.num_rows else ():
        places, found = _places(keys, pool.read(shard.number, ["pair_id"])["pair_id"].to_pylist())
        mine = proposed.take(pa.array(found, pa.int64()))
        where = [pa.array([pool.name] * len(places), pa.string()), pa.array([shard.number] * len(places), pa.int32()), pa.array(places, pa.int32())]
        columns = [mine["pair_id"], *where, *(mine[name] for name in PROPOSAL_NAMES)]
        tables.append(pa.table(columns, schema=_PLACED_SCHEMA))
    return pa.concat_tables(tables)


def _digest(placed: pa.Table, texts: "_BenchmarkTexts", max_pairs: int) -> str:
    """Return what names the pool of these proposals, 32 hex digits, taken in batch by batch."""
    digest = hashlib.blake2b(canonical_json([PROPOSE_VERSION, max_pairs]).encode(), digest_size=16)
    for batch in placed.to_batches(max_chunksize=_DIGEST_ROWS):
        for row in batch.to_pylist():
            digest.update(canonical_json([row, texts.find(row["benchmark"], row["item"])]).encode())
    return digest.hexdigest()


def _places(keys: Any, pair_ids: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return, for the pairs of a shard that are proposed, their rows and the rows of their proposals (sorted keys, perhaps several a pair)."""
    ids = np.array(pair_ids, f"S{_ID_BYTES}")
    starts, ends = np.searchsorted(keys, ids, "left"), np.searchsorted(keys, ids, "right")
    hits = np.flatnonzero(ends > starts)
    places = [row for row in hits.tolist() for _ in range(int(ends[row] - starts[row]))]
    return places, [number for row in hits.tolist() for number in range(int(starts[row]), int(ends[row]))]


class _BenchmarkTexts:
    """The prompts of benchmark items by name."""

    def __init__(self, config: DecontaminateConfig):
        self._texts = {(item.benchmark, item.item): text for item, text in read_benchmark_texts(config)}

    def find(self, benchmark: str, item: str) -> str:
        if (benchmark, item) not in self._texts:
            raise InputError(f"benchmark {benchmark}: no item {item}, which ingest reported; give decontaminate.benchmarks as ingest had it")
        return self._texts[benchmark, item]


def _with_texts(placed: pa.Table, pools: Mapping[str, Pool], texts: _BenchmarkTexts) -> pa.Table:
    """Return placed proposals with the texts of their pairs and items (PROPOSALS_SCHEMA); one shard of a source is held at a time."""
    tables = []
    names = [field.name for field in PAIR_FIELDS]
    for (pool, shard), rows in itertools.groupby(placed.to_pylist(), key=lambda row: (row["source_pool"], row["source_shard"])):
        mine = list(rows)
        pairs = pools[pool].read(shard, names).take(pa.array([row["source_row"] for row in mine], pa.int64()))
        prompts = [texts.find(row["benchmark"], row["item"]) for row in mine]
        columns: dict[str, pa.Array | pa.ChunkedArray] = {name: pairs[name] for name in names}
        columns |= {field.name: pa.array([row[field.name] for row in mine], field.type) for field in (*GATHERED_FIELDS, *PROPOSAL_FIELDS)}
        columns["benchmark_prompt"] = pa.array(prompts, pa.string())
        tables.append(pa.table(columns).cast(PROPOSALS_SCHEMA))
    return pa.concat_tables(tables)
