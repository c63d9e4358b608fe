"""Gather and scatter: a sparse selection of a pool becomes a small pool, and what is learned there goes back beside the source pool.

A gathered row remembers `source_pool, source_shard, source_row`. The plan is computed from row numbers alone, so each target shard can be written by
an independent task. Paper: Sec. 3.2 and 3.3 select few pairs of many (retrieved neighbours; mismatches of the best RM); how is ours.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synpref_ray.errors import SchemaError
from synpref_ray.schema import GATHERED_SCHEMA, PAIR_FIELDS, DropReason
from synpref_ray.tables.parts import PartedSidecar
from synpref_ray.tables.pools import Pool
from synpref_ray.tables.sidecars import Sidecar

GATHERED_SHARD_PAIRS = 512  # ours: LLM steps on gathered pools lose at most this many pairs' requests, and two shards fill an engine


@dataclass(frozen=True)
class Piece:
    """Rows of one source shard, ascending."""

    pool: Pool
    shard: int
    rows: tuple[int, ...]


def plan_gather(selected: Iterable[Piece], max_pairs: int = GATHERED_SHARD_PAIRS) -> list[list[Piece]]:
    """Cut a selection, in its order, into target shards of at most `max_pairs` pairs; no selection gives no shard."""
    shards: list[list[Piece]] = []
    room = 0
    for piece in selected:
        start = 0
        while start < len(piece.rows):
            if room == 0:
                shards.append([])
                room = max_pairs
            rows = piece.rows[start : start + room]
            shards[-1].append(Piece(piece.pool, piece.shard, rows))
            room -= len(rows)
            start += len(rows)
    return shards


def gather_pairs(pieces: Sequence[Piece]) -> pa.Table:
    """Return one shard of a gathered pool (schema `GATHERED_SCHEMA`)."""
    tables = []
    for piece in pieces:
        rows = piece.pool.read(piece.shard, [field.name for field in PAIR_FIELDS]).take(pa.array(piece.rows, pa.int64()))
        places = {
            "source_pool": pa.array([piece.pool.name] * len(piece.rows), pa.string()),
            "source_shard": pa.array([piece.shard] * len(piece.rows), pa.int32()),
            "source_row": pa.array(piece.rows, pa.int32()),
        }
        for name, values in places.items():
            rows = rows.append_column(name, values)
        tables.append(rows.cast(GATHERED_SCHEMA))
    return pa.concat_tables(tables) if tables else GATHERED_SCHEMA.empty_table()


def gather_sidecar(gathered: pa.Table, sidecars: Mapping[str, Sidecar | PartedSidecar], schema: pa.Schema) -> pa.Table:
    """Return the rows of source sidecars that belong to a gathered shard, in its order.

    Args:
        gathered: a shard with `pair_id, source_pool, source_shard, source_row`.
        sidecars: per source pool, the sidecar to read.
        schema: columns wanted.

    Raises:
        SchemaError: a row of the source sidecar names another pair.
    """
    keys = list(zip(gathered["source_pool"].to_pylist(), gathered["source_shard"].to_pylist(), strict=True))
    rows = gathered["source_row"].to_numpy()
    parts, order = [], []
    for key in dict.fromkeys(keys):
        where = np.array([index for index, other in enumerate(keys) if other == key])
        parts.append(sidecars[key[0]].read(key[1], schema.names).take(pa.array(rows[where])))
        order.append(where)
    if not parts:
        return schema.empty_table()
    back = np.argsort(np.concatenate(order), kind="stable")
    table = pa.concat_tables(parts).take(pa.array(back)).cast(schema)
    if not table["pair_id"].equals(gathered["pair_id"]):
        raise SchemaError("a gathered pool and the sidecar of its source pool disagree about pair_ids; was the source pool replaced?")
    return table


def scatter_shard(source: Pool, number: int, gathered: Pool, result: Sidecar, schema: pa.Schema) -> pa.Table:
    """Return what `result` (a sidecar of `gathered`) says about shard `number` of the source pool.

    Unselected rows are null with reason `not_selected`; row order is the source shard's.
    """
    ids = source.read(number, ["pair_id"])["pair_id"]
    parts = []
    for shard in gathered.shards:
        places = gathered.read(shard.number, ["pair_id", "source_pool", "source_shard", "source_row"])
        mine = pc.and_(pc.equal(places["source_pool"], source.name), pc.equal(places["source_shard"], number))
        if pc.any(mine).as_py():
            parts.append((places.filter(mine), result.read(shard.number, schema.names).filter(mine)))
    found: dict[int, int] = {}
    if parts:
        places = pa.concat_tables([place for place, _ in parts])
        values = pa.concat_tables([value for _, value in parts])
        found = {row: index for index, row in enumerate(places["source_row"].to_pylist())}
    indices = pa.array([found.get(row) for row in range(len(ids))], pa.int64())
    columns = []
    for field in schema:
        if field.name == "pair_id":
            columns.append(ids)
            continue
        column = values[field.name].take(indices) if found else pa.nulls(len(ids), field.type)
        if field.name == "drop_reason":
            missing = pa.array([None if row in found else DropReason.NOT_SELECTED.value for row in range(len(ids))], pa.string())
            column = pc.coalesce(column, missing)
        columns.append(column)
    return pa.table(columns, schema=schema)
