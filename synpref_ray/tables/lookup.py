"""Where a pair stands: every pool of a workspace is looked through for its name, by the names alone.

Our choice: no index of 40 million names is kept. Of each shard the column of names is read by byte ranges, many shards at once: a look-up is rare,
and a second copy of the names would have to be kept true.
"""

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from synpref_ray.errors import InputError
from synpref_ray.tables.pools import Pool, Shard, list_pools, open_pool, shard_path
from synpref_ray.tables.storage import Storage

REQUESTS_AT_ONCE = 16  # ours: object storage answers in tens of milliseconds
MIN_HEAD = 8
"""Digits that a shortened name must have at least."""
PAIR_ID_DIGITS = 32
INGESTED = ("seed", "unverified", "wild")
_MAX_SHOWN = 3


@dataclass(frozen=True)
class Place:
    """One row of one pool; `source` is the (pool, shard, row) that a gathered pool took it from."""

    pool: Pool
    shard: int
    row: int
    source: tuple[str, int, int] | None = None


def find_pair(storage: Storage, name: str) -> tuple[str, list[Place]]:
    """Return a pair's whole name and every place where it stands, ingested pools first.

    Args:
        name: a pair_id, or at least `MIN_HEAD` of its first digits.

    Raises:
        InputError: no pool holds it, or several pairs begin like that.
    """
    if not MIN_HEAD <= len(name) <= PAIR_ID_DIGITS or set(name) - set("0123456789abcdef"):
        raise InputError(f"{name!r} is no pair_id: give {PAIR_ID_DIGITS} hex digits, or the first {MIN_HEAD} of them or more")
    pools = [open_pool(storage, pool) for pool in list_pools(storage)]
    shards = [(pool, shard) for pool in pools for shard in pool.shards]
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as threads:
        found = [hit for hits in threads.map(lambda place: _find_in_shard(place[0], place[1], name), shards) for hit in hits]
    names = sorted({pair_id for pair_id, _ in found})
    if not names:
        raise InputError(
            f"no pool of {storage.url} holds a pair {name} ({len(pools)} pools, {sum(pool.num_rows for pool in pools)} rows looked through); "
            "rows that a step refused are under rejects/"
        )
    if len(names) > 1:
        raise InputError(f"{len(names)} pairs begin with {name} ({', '.join(names[:_MAX_SHOWN])}): give more digits")
    return names[0], sorted((_with_source(place) for _, place in found), key=_order)


def _order(place: Place) -> tuple[bool, bool, str]:
    """Ingested pools come first, then files that were scored, then what was gathered."""
    return place.source is not None, place.pool.name not in INGESTED, place.pool.name


def _find_in_shard(pool: Pool, shard: Shard, name: str) -> list[tuple[str, Place]]:
    ids = _read_names(pool, shard)
    rows = pc.indices_nonzero(pc.starts_with(ids, name)).to_pylist()
    return [(ids[row].as_py(), Place(pool, shard.number, row)) for row in rows]


def _read_names(pool: Pool, shard: Shard) -> pa.ChunkedArray:
    file = _Ranges(pool.storage, shard_path(f"pools/{pool.name}", shard.number), shard.num_bytes)
    try:
        return pq.ParquetFile(pa.PythonFile(file, mode="r")).read(columns=["pair_id"])["pair_id"]
    except pa.ArrowInvalid as error:
        raise InputError(f"shard {shard.number} of pool {pool.name!r} is not a readable Parquet file: {' '.join(str(error).split())}") from None


def _with_source(place: Place) -> Place:
    row = place.pool.read(place.shard).slice(place.row, 1)
    if "source_pool" not in row.column_names:
        return place
    source = tuple(row[name][0].as_py() for name in ("source_pool", "source_shard", "source_row"))
    return Place(place.pool, place.shard, place.row, source)


class _Ranges(io.RawIOBase):
    """A file of known size in a workspace, read by ranges."""

    def __init__(self, storage: Storage, path: str, size: int):
        self._storage = storage
        self._path = path
        self._size = size
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int = -1) -> bytes:
        length = max(0, self._size - self._place if size < 0 else min(size, self._size - self._place))
        content = self._storage.read_range(self._path, self._place, length) if length else b""
        self._place += length
        return content
