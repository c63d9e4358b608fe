"""Swapping the replies of pairs whose label is judged wrong: the "corrected" set of Stage 1, the recycling of Stage 2 (paper: Sec. 3.3)."""

import pyarrow as pa
import pyarrow.compute as pc

from synpref_ray.errors import SchemaError
from synpref_ray.rules.columns import require_columns


def flip_pairs(shard: pa.Table, flips: pa.Array | pa.ChunkedArray) -> pa.Table:
    """Return the shard with chosen and rejected swapped where `flips` is true, and a column `flipped` that says so.

    `pair_id`, `comparison_id` and every other column stay: they name and describe the pair as ingested, and so do its stored rewards and
    verdicts. A shard that has `flipped` already is swapped relative to what it holds, so flipping twice is the identity.

    Args:
        flips: boolean, one per row, no nulls.
    """
    require_columns(shard, ("pair_id", "chosen", "rejected"), rule="flip_pairs")
    if len(flips) != shard.num_rows or flips.type != pa.bool_() or flips.null_count:
        found = f"{len(flips)} of type {flips.type}, {flips.null_count} of them null"
        raise SchemaError(f"flip_pairs needs {shard.num_rows} booleans without nulls, found {found}")
    chosen, rejected = shard.column("chosen"), shard.column("rejected")
    flipped = pc.xor(shard.column("flipped"), flips) if "flipped" in shard.column_names else flips
    swapped = _put(shard, "chosen", pc.if_else(flips, rejected, chosen))
    swapped = _put(swapped, "rejected", pc.if_else(flips, chosen, rejected))
    return _put(swapped, "flipped", flipped)


def _put(table: pa.Table, name: str, values: pa.ChunkedArray) -> pa.Table:
    index = table.schema.get_field_index(name)
    if index < 0:
        return table.append_column(pa.field(name, values.type, nullable=False), values)
    return table.set_column(index, table.schema.field(index), values)
