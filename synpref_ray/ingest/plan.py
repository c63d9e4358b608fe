"""Which pair goes into which shard of which pool: decided from what is kept and the sizes of the pairs, before any shard is written.

Ingest has four passes, of which only the cuts below run on the driver: files are read into staged chunks (chunk.py), their ids are compared in parts
(partition.py), shards are cut, and every shard is built from the chunks it names. The result depends on the order of sources, files and rows, never
on workers or on the number of parts.

Our choice: pools are filled in the order seed, unverified, wild, so that of several equal pairs the most trusted pool keeps the one copy;
inside a pool the order is the sources' in the config, then by file, then by row. A comparison whose two labels lie in different pools is
marked `contradicted` in both.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from synpref_ray.ingest.chunk import REJECTS_SCHEMA
from synpref_ray.ingest.duplicates import Flags, Positions
from synpref_ray.ingest.partition import Comparison, Gathered, Layout, PairFile
from synpref_ray.ingest.source import Route
from synpref_ray.schema import POOL_SCHEMA, DropReason

MAX_BYTES_PER_SHARD = 64 * 2**20  # ours: the design's default
SHARDS_PER_TASK = 4  # ours: a chunk that several shards share is read once a task


class StagedChunk(NamedTuple):
    """A staged chunk: its piece (counted along the layout), its number in the piece, and its path."""

    piece: int
    number: int
    path: str


class ShardPart(NamedTuple):
    """Pairs of one chunk in one shard: `start` … `end - 1` of those that the chunk keeps; shards count from those that this ingest writes."""

    shard: int
    chunk: StagedChunk
    start: int
    end: int


class DuplicatePart(NamedTuple):
    """A chunk with pairs that repeat an earlier pair, and the number of the file of rejects that they go to."""

    number: int
    chunk: StagedChunk


@dataclass(frozen=True)
class WriteTask:
    """Consecutive shards of a pool, and the chunks whose duplicates are written on the way; both in order."""

    route: Route
    number: int
    parts: tuple[ShardPart, ...]
    duplicates: tuple[DuplicatePart, ...]


@dataclass(frozen=True)
class IngestPlan:
    """Who writes what, and the counts. Some hundred bytes a chunk and shard."""

    tasks: tuple[WriteTask, ...]
    kept: dict[str, int]
    """By source."""
    duplicates: dict[str, int]
    """By the source that repeats a pair."""
    contradicted: dict[Route, int]


class ChunkMarks(NamedTuple):
    """What the marks of a chunk say: P pairs, K of them kept."""

    kept: Positions
    """(K,) places in the chunk."""
    contradicted: Flags
    """(K,)"""
    copies: Positions
    """(P - K,) places in the chunk."""
    firsts: Positions
    """(P - K,) positions of their first copies."""
    first_rows: Positions
    """(P - K,) rows of these in their files."""


def make_plan(
    comparison: Comparison,
    gathered: Sequence[Gathered],
    *,
    max_pairs_per_shard: Mapping[Route, int],
    max_bytes_per_shard: int = MAX_BYTES_PER_SHARD,
) -> IngestPlan:
    """Cut the pairs that are kept into shards, reading one piece's sizes after the other.

    Args:
        comparison: all its parts decided.
        gathered: by piece.
        max_pairs_per_shard: ceiling of pairs in a shard of each pool.
        max_bytes_per_shard: ceiling of a shard's bytes; a single larger pair gets a shard of its own.
    """
    layout = comparison.layout
    kept: Counter[str] = Counter()
    duplicates: Counter[str] = Counter()
    contradicted = dict.fromkeys(Route, 0)
    for piece, found in zip(layout.pieces, gathered, strict=True):
        file = layout.files[piece.file]
        if file.held:
            continue
        kept[file.source] += sum(found.kept)
        duplicates[file.source] += sum(piece.chunks) - sum(found.kept)
        contradicted[file.route] += sum(found.contradicted)
    tasks: list[WriteTask] = []
    num_duplicates = 0
    for route in Route:
        pieces = [number for number, piece in enumerate(layout.pieces) if _feeds(layout.files[piece.file], route)]
        sizes = cut_shards((comparison.kept_sizes(number) for number in pieces), max_pairs_per_shard[route], max_bytes_per_shard)
        chunks, repeated = [], []
        for number in pieces:
            for place, (total, left) in enumerate(zip(layout.pieces[number].chunks, gathered[number].kept, strict=True)):
                chunks.append((chunk_of(layout, number, place), left))
                if left < total:
                    repeated.append(DuplicatePart(num_duplicates, chunks[-1][0]))
                    num_duplicates += 1
        tasks += _assign(route, list(shard_parts(chunks, sizes)), repeated)
    return IngestPlan(tuple(tasks), dict(kept), dict(duplicates), contradicted)


def _feeds(file: PairFile, route: Route) -> bool:
    return file.route is route and not file.held


def chunk_of(layout: Layout, piece: int, number: int) -> StagedChunk:
    """Return chunk `number` of a piece."""
    found = layout.pieces[piece]
    return StagedChunk(piece, number, pairs_path(layout.files[found.file].folder, found.first_chunk + number))


def pairs_path(folder: str, chunk: int) -> str:
    """Return the path of the pairs of a file's staged chunk."""
    return f"{folder}/pairs-{chunk:05d}.arrow"


def cut_shards(sizes: Iterable[Positions], max_pairs: int, max_bytes: int) -> Iterator[int]:
    """Yield how many pairs each shard takes: as many as both ceilings allow, at least one.

    Args:
        sizes: bytes of the pairs in order, in arrays of any length; one of them and one shard are held.
    """
    rest = np.empty(0, np.int64)
    for part in sizes:
        rest = np.concatenate([rest, part])
        bounds = _cut(rest, max_pairs, max_bytes)
        yield from (end - start for start, end in bounds[:-1])
        rest = rest[bounds[-1][0] :] if bounds else rest
    if len(rest):
        yield len(rest)


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


def shard_parts(chunks: Sequence[tuple[StagedChunk, int]], sizes: Iterable[int]) -> Iterator[ShardPart]:
    """Yield the parts of shards that take so many pairs each from chunks that keep so many."""
    shards = enumerate(sizes)
    shard, wanted = next(shards, (0, 0))
    for chunk, left in chunks:
        start = 0
        while start < left:
            end = min(left, start + wanted)
            yield ShardPart(shard, chunk, start, end)
            wanted -= end - start
            start = end
            if wanted == 0:
                shard, wanted = next(shards, (shard + 1, 0))


def _assign(route: Route, parts: Sequence[ShardPart], repeated: Sequence[DuplicatePart]) -> Iterator[WriteTask]:
    """Give every task some shards, and the duplicates of the chunks from its own first one to the next task's."""
    by_task: list[list[ShardPart]] = []
    for part in parts:
        if part.shard // SHARDS_PER_TASK == len(by_task):
            by_task.append([])
        by_task[-1].append(part)
    if repeated and not by_task:
        by_task.append([])
    firsts = [task[0].chunk[:2] for task in by_task[1:]]
    place = 0
    for number, task in enumerate(by_task):
        until = firsts[number] if number < len(firsts) else None
        begin = place
        while place < len(repeated) and (until is None or repeated[place].chunk[:2] < until):
            place += 1
        yield WriteTask(route, number, tuple(task), tuple(repeated[begin:place]))


def chunk_marks(comparison: Comparison, chunk: StagedChunk) -> ChunkMarks:
    """Read what becomes of a chunk's pairs."""
    piece = comparison.layout.pieces[chunk.piece]
    start = piece.start + sum(piece.chunks[: chunk.number])
    marks = comparison.marks(chunk.piece, chunk.number)
    places = marks["position"] - start
    is_copy = marks["first"] != marks["position"]
    kept = np.ones(piece.chunks[chunk.number], np.bool_)
    contradicted = np.zeros(len(kept), np.bool_)
    kept[places[is_copy]] = False
    contradicted[places[~is_copy]] = True
    return ChunkMarks(np.flatnonzero(kept), contradicted[kept], places[is_copy], marks["first"][is_copy], marks["first_row"][is_copy])


def take_part(part: ShardPart, pairs: pa.Table, marks: ChunkMarks) -> pa.Table:
    """Return a part's pairs (POOL_SCHEMA) from those of its chunk."""
    taken = pairs.select(POOL_SCHEMA.names).take(pa.array(marks.kept[part.start : part.end]))
    place = POOL_SCHEMA.get_field_index("contradicted")
    return taken.set_column(place, POOL_SCHEMA.field(place), pa.array(marks.contradicted[part.start : part.end])).cast(POOL_SCHEMA)


def duplicate_rejects(pairs: pa.Table, marks: ChunkMarks, layout: Layout) -> pa.Table:
    """Write a chunk's duplicates as rejects (REJECTS_SCHEMA): the pair, and under `first` where its first copy stands."""
    copies = pairs.take(pa.array(marks.copies))
    whole = copies.select(["prompt", "chosen", "rejected", "source_id"]).to_pylist()
    homes = [layout.file_at(first) for first in marks.firsts.tolist()]
    texts = [
        json.dumps({**row, "first": {"source": home.source, "file": home.file, "row": number}}, ensure_ascii=False)
        for row, home, number in zip(whole, homes, marks.first_rows.tolist(), strict=True)
    ]
    columns = {
        "source": copies.column("source"),
        "file": copies.column("file"),
        "row": copies.column("row"),
        "reason": pa.repeat(pa.scalar(DropReason.DUPLICATE.value), len(texts)),
        "row_json": pa.array(texts, pa.string()),
    }
    return pa.table(columns).cast(REJECTS_SCHEMA)
