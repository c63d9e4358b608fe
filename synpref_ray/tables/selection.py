"""Gather and scatter: a sparse selection of a pool becomes a small pool, and what is learned there goes back beside the source pool.

A gathered row remembers `source_pool, source_shard, source_row`. The plan is computed from row numbers alone, so each target shard can be written by
an independent task. Paper: Sec. 3.2 and 3.3 select few pairs of many (retrieved neighbours; mismatches of the best RM); how is ours.
"""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    """Rows of one source shard, ascending; given as any sequence, kept as four bytes each (a selection of 40M pairs is millions of them)."""

    pool: Pool
    shard: int
    rows: Sequence[int]

    def __post_init__(self) -> None:
        if not isinstance(self.rows, array):
            object.__setattr__(self, "rows", array("i", self.rows))

    @property
    def digest(self) -> str:
        """32 hex digits over the rows."""
        return hashlib.blake2b(np.asarray(self.rows, dtype="<i4").tobytes(), digest_size=16).hexdigest()


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
    return next(gather_shards([pieces]))


def gather_shards(plan: Iterable[Sequence[Piece]]) -> Iterator[pa.Table]:
    """Yield shards of a gathered pool; a source shard from which several of them take rows in a row is read once."""
    last: tuple[Pool, int] | None = None
    source = GATHERED_SCHEMA.empty_table()
    for pieces in plan:
        tables = []
        for piece in pieces:
            if last != (piece.pool, piece.shard):
                source = piece.pool.read(piece.shard, [field.name for field in PAIR_FIELDS])
                last = (piece.pool, piece.shard)
            rows = source.take(pa.array(np.asarray(piece.rows, dtype=np.int64)))
            places = {
                "source_pool": pa.array([piece.pool.name] * len(piece.rows), pa.string()),
                "source_shard": pa.array(np.full(len(piece.rows), piece.shard, dtype=np.int32)),
                "source_row": pa.array(np.asarray(piece.rows, dtype=np.int32)),
            }
            for name, values in places.items():
                rows = rows.append_column(name, values)
            tables.append(rows.cast(GATHERED_SCHEMA))
        yield pa.concat_tables(tables) if tables else GATHERED_SCHEMA.empty_table()


def gather_sidecar(gathered: pa.Table, sidecars: Mapping[str, Sidecar | PartedSidecar], schema: pa.Schema) -> pa.Table:
    """Return the rows of source sidecars that belong to a gathered shard, in its order.

    Args:
        gathered: a shard with `pair_id, source_pool, source_shard, source_row`.
        sidecars: per source pool, the sidecar to read.
        schema: columns wanted.

    Raises:
        SchemaError: a row of the source sidecar names another pair.
    """
    names, places = gathered["source_pool"].to_pylist(), gathered["source_shard"].to_pylist()
    rows = gathered["source_row"].to_numpy()
    where: dict[tuple[str, int], list[int]] = {}
    for index, key in enumerate(zip(names, places, strict=True)):
        where.setdefault(key, []).append(index)
    parts = [sidecars[name].read(shard, schema.names).take(pa.array(rows[order])) for (name, shard), order in where.items()]
    order = [index for found in where.values() for index in found]
    if not parts:
        return schema.empty_table()
    back = np.argsort(order, kind="stable")
    table = pa.concat_tables(parts).take(pa.array(back)).cast(schema)
    if not table["pair_id"].equals(gathered["pair_id"]):
        raise SchemaError("a gathered pool and the sidecar of its source pool disagree about pair_ids; was the source pool replaced?")
    return table


def scatter_shard(source: Pool, number: int, results: Sequence[tuple[Pool, Sidecar]], schema: pa.Schema) -> pa.Table:
    """Return what sidecars of gathered pools say about shard `number` of the source pool.

    Unselected rows are null with reason `not_selected`; row order is the source shard's.

    Args:
        results: gathered pools, each with its sidecar; where several hold a row, the first one's word counts.
    """
    ids = source.read(number, ["pair_id"])["pair_id"]
    parts = [(np.zeros(0, dtype=np.int64), schema.empty_table())]
    for gathered, result in reversed(results):  # what is written last stays
        for shard in gathered.shards:
            places = gathered.read(shard.number, ["source_pool", "source_shard", "source_row"])
            mine = pc.and_(pc.equal(places["source_pool"], source.name), pc.equal(places["source_shard"], number))
            if pc.any(mine).as_py():
                parts.append((places["source_row"].filter(mine).to_numpy(), result.read(shard.number, schema.names).filter(mine).cast(schema)))
    values = pa.concat_tables([value for _, value in parts])
    found = np.full(len(ids), -1, dtype=np.int64)
    found[np.concatenate([rows for rows, _ in parts])] = np.arange(values.num_rows)
    unselected = found < 0
    indices = pa.array(found, mask=unselected)
    reason = pa.scalar(DropReason.NOT_SELECTED.value, pa.string())
    columns = []
    for field in schema:
        if field.name == "pair_id":
            columns.append(ids)
            continue
        column = values[field.name].take(indices)
        columns.append(pc.if_else(pa.array(unselected), reason, column) if field.name == "drop_reason" else column)
    return pa.table(columns, schema=schema)
