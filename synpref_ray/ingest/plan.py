"""Which pair goes into which shard of which pool: decided once, from ids and sizes alone, before any shard is written.

Ingest has three passes: files are read into staged chunks (chunk.py), this plan is made over the chunks' ids, and every shard is built from
the chunks it names. The first and last pass run in parallel; the plan depends on the order of sources, files and rows, never on workers.

Our choice: pools are filled in the order seed, unverified, wild, so that of several equal pairs the most trusted pool keeps the one copy;
inside a pool the order is the sources' in the config, then by file, then by row. A comparison whose two labels lie in different pools is
marked `contradicted` in both.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from synpref_ray.ingest.chunk import REJECTS_SCHEMA
from synpref_ray.ingest.duplicates import Duplicates, Flags, Ids, Positions, find_duplicates, parse_ids
from synpref_ray.ingest.source import Route
from synpref_ray.schema import POOL_SCHEMA, DropReason

INDEX_COLUMNS = ("pair_id", "comparison_id", "num_bytes", "row")  # what the plan needs of a staged chunk
MAX_PAIRS_PER_SHARD = 8192  # ours: the design's default
MAX_BYTES_PER_SHARD = 64 * 2**20  # ours: the design's default

ReadPairs = Callable[[int], pa.Table]  # chunk number -> its staged pairs


class ChunkIndex(NamedTuple):
    """A staged chunk as the plan sees it; P pairs."""

    route: Route
    source: str
    file: str
    pair_ids: Ids  # (P, 2)
    comparison_ids: Ids  # (P, 2)
    num_bytes: Positions  # (P,)
    rows: Positions  # (P,) row numbers in the file


class ShardPart(NamedTuple):
    """Pairs of one chunk in one shard."""

    chunk: int
    rows: npt.NDArray[np.int32]  # (P,) places in the chunk's pairs
    contradicted: Flags  # (P,)


@dataclass(frozen=True)
class ShardPlan:
    """One shard of a pool: its parts in order. `num_bytes` bounds its size in memory from above."""

    route: Route
    number: int
    parts: tuple[ShardPart, ...]
    num_pairs: int
    num_bytes: int
    num_contradicted: int


@dataclass(frozen=True)
class DuplicatePart:
    """Pairs of one chunk that repeat an earlier pair, and where that first one stands."""

    chunk: int
    source: str
    rows: npt.NDArray[np.int32]  # (P,) places in the chunk's pairs
    first_sources: tuple[str, ...]
    first_files: tuple[str, ...]
    first_rows: Positions  # (P,)


@dataclass(frozen=True)
class IngestPlan:
    """All shards of all pools, and the duplicates by chunk."""

    shards: dict[Route, tuple[ShardPlan, ...]]
    duplicates: tuple[DuplicatePart, ...]

    def num_duplicates(self) -> dict[str, int]:
        """Count duplicates by the source that repeats a pair."""
        counts: dict[str, int] = {}
        for part in self.duplicates:
            counts[part.source] = counts.get(part.source, 0) + len(part.rows)
        return counts


def index_chunk(pairs: pa.Table, route: Route, source: str, file: str) -> ChunkIndex:
    """Take from a chunk's pairs (at least INDEX_COLUMNS) what the plan needs."""
    return ChunkIndex(
        route,
        source,
        file,
        parse_ids(pairs.column("pair_id")),
        parse_ids(pairs.column("comparison_id")),
        pairs.column("num_bytes").to_numpy(),
        pairs.column("row").to_numpy(),
    )


def ingest_plan(
    chunks: Sequence[ChunkIndex], *, max_pairs_per_shard: int = MAX_PAIRS_PER_SHARD, max_bytes_per_shard: int = MAX_BYTES_PER_SHARD
) -> IngestPlan:
    """Assign every pair to a shard of its pool, or to the duplicates.

    Args:
        chunks: in input order (sources as configured, their files in order, their chunks in order); numbered by their place here.
        max_pairs_per_shard: ceiling of pairs in a shard.
        max_bytes_per_shard: ceiling of a shard's bytes; a single larger pair gets a shard of its own.
    """
    routes = tuple(Route)
    order = sorted(range(len(chunks)), key=lambda number: routes.index(chunks[number].route))
    view = _View(chunks, order)
    shards: dict[Route, tuple[ShardPlan, ...]] = {}
    for route in routes:
        positions = view.kept_positions(route)
        bounds = _cut(view.num_bytes[positions], max_pairs_per_shard, max_bytes_per_shard)
        shards[route] = tuple(view.shard(route, number, positions[start:end]) for number, (start, end) in enumerate(bounds))
    return IngestPlan(shards, view.duplicate_parts())


def build_shard(shard: ShardPlan, read_pairs: ReadPairs) -> pa.Table:
    """Collect a shard's pairs from its staged chunks (POOL_SCHEMA)."""
    tables = []
    for part in shard.parts:
        pairs = read_pairs(part.chunk).select(POOL_SCHEMA.names).take(pa.array(part.rows))
        place = POOL_SCHEMA.get_field_index("contradicted")
        tables.append(pairs.set_column(place, POOL_SCHEMA.field(place), pa.array(part.contradicted)).cast(POOL_SCHEMA))
    return pa.concat_tables(tables).combine_chunks() if tables else POOL_SCHEMA.empty_table()


def duplicate_rejects(part: DuplicatePart, read_pairs: ReadPairs) -> pa.Table:
    """Write a chunk's duplicates as rejects (REJECTS_SCHEMA): the pair, and under `first` where its first copy stands."""
    pairs = read_pairs(part.chunk).take(pa.array(part.rows))
    whole = pairs.select(["prompt", "chosen", "rejected", "source_id"]).to_pylist()
    firsts = zip(part.first_sources, part.first_files, part.first_rows.tolist(), strict=True)
    texts = [
        json.dumps({**row, "first": {"source": source, "file": file, "row": number}}, ensure_ascii=False)
        for row, (source, file, number) in zip(whole, firsts, strict=True)
    ]
    columns = {
        "source": pairs.column("source"),
        "file": pairs.column("file"),
        "row": pairs.column("row"),
        "reason": pa.repeat(pa.scalar(DropReason.DUPLICATE.value), len(texts)),
        "row_json": pa.array(texts, pa.string()),
    }
    return pa.table(columns).cast(REJECTS_SCHEMA)


def _cut(num_bytes: Positions, max_pairs: int, max_bytes: int) -> list[tuple[int, int]]:
    """Cut a row of sizes into runs that keep both ceilings, each as long as it may be."""
    totals = np.cumsum(num_bytes)
    bounds = []
    start = 0
    while start < len(totals):
        before = int(totals[start - 1]) if start else 0
        within_bytes = int(np.searchsorted(totals, before + max_bytes, side="right"))
        end = max(start + 1, min(start + max_pairs, within_bytes))
        bounds.append((start, end))
        start = end
    return bounds


class _View:
    """All chunks' pairs in one row: `order` says which chunk follows which; positions count along it."""

    def __init__(self, chunks: Sequence[ChunkIndex], order: Sequence[int]):
        self._chunks = chunks
        self._order = order
        ordered = [chunks[number] for number in order]
        self._starts = np.cumsum([0, *(len(chunk.rows) for chunk in ordered)])
        self.num_bytes = np.concatenate([np.empty(0, np.int64), *(chunk.num_bytes for chunk in ordered)])
        self._rows = np.concatenate([np.empty(0, np.int64), *(chunk.rows for chunk in ordered)])
        no_ids = np.empty((0, 2), np.uint64)
        self._found: Duplicates = find_duplicates(
            np.concatenate([no_ids, *(chunk.pair_ids for chunk in ordered)]),
            np.concatenate([no_ids, *(chunk.comparison_ids for chunk in ordered)]),
        )

    def kept_positions(self, route: Route) -> Positions:
        places = [place for place, number in enumerate(self._order) if self._chunks[number].route is route]
        if not places:
            return np.empty(0, np.int64)
        start, end = int(self._starts[places[0]]), int(self._starts[places[-1] + 1])
        return np.flatnonzero(self._found.keep[start:end]) + start

    def shard(self, route: Route, number: int, positions: Positions) -> ShardPlan:
        parts = []
        for place, members in self._by_chunk(positions):
            rows = (members - self._starts[place]).astype(np.int32)
            parts.append(ShardPart(self._order[place], rows, self._found.contradicted[members]))
        num_bytes, num_contradicted = int(self.num_bytes[positions].sum()), int(self._found.contradicted[positions].sum())
        return ShardPlan(route, number, tuple(parts), len(positions), num_bytes, num_contradicted)

    def duplicate_parts(self) -> tuple[DuplicatePart, ...]:
        parts = []
        for place, members in self._by_chunk(np.flatnonzero(~self._found.keep)):
            firsts = self._found.first[members]
            homes = [self._chunks[self._order[home]] for home in self._places(firsts)]
            part = DuplicatePart(
                chunk=self._order[place],
                source=self._chunks[self._order[place]].source,
                rows=(members - self._starts[place]).astype(np.int32),
                first_sources=tuple(home.source for home in homes),
                first_files=tuple(home.file for home in homes),
                first_rows=self._rows[firsts],
            )
            parts.append(part)
        return tuple(parts)

    def _places(self, positions: Positions) -> Positions:
        """Return for each position the place of its chunk in the order."""
        places: Positions = np.searchsorted(self._starts, positions, side="right").astype(np.int64) - 1
        return places

    def _by_chunk(self, positions: Positions) -> list[tuple[int, Positions]]:
        """Split ascending positions by chunk."""
        if len(positions) == 0:
            return []
        places = self._places(positions)
        borders = np.flatnonzero(np.diff(places)) + 1
        return [(int(run[0]), members) for run, members in zip(np.split(places, borders), np.split(positions, borders), strict=True)]
