"""Duplicates and contradictions among any number of pairs, in bounded memory: ids are compared in parts of the hash, then sorted back to their files.

Three passes over small files, none of which holds more than some 300,000 pairs:

- `IdWriter`, in the tasks that read pair files, writes the ids of consecutive chunks (a *piece*) sorted into buckets by the first bits of the
  comparison id. Equal pairs, and the two labels of a comparison, have one comparison id: whatever must meet meets in one bucket.
- `decide_part` reads some buckets of all pieces and writes what is not plainly kept (`MARK`), sorted into buckets by piece.
- `gather_piece` reads its own bucket of every part and writes the marks of each of its chunks, and the sizes of the pairs that are kept.

Which of several equal pairs is the first depends on positions alone (`Layout`): pools that are there already; then seed, unverified, wild; then
sources as configured, files, rows.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from synpref_ray.ingest.duplicates import Positions, find_duplicates, parse_ids
from synpref_ray.ingest.source import Route
from synpref_ray.tables.buckets import Records, read_buckets, write_buckets
from synpref_ray.tables.pools import content_digest
from synpref_ray.tables.storage import Storage

PAIRS_PER_PIECE = 262_144  # ours: 12 MB of ids; a task of the second or third pass holds about as many pairs
NUM_ID_BUCKETS = 4096  # ours: so many parts at most, which stay small up to a thousand million pairs
_ID_BITS = NUM_ID_BUCKETS.bit_length() - 1
_NUM_READERS = 8  # ours: an object store answers after some 10 ms, and takes as many requests at a time as one likes

ID = np.dtype([("comparison", "<u8", 2), ("pair", "<u8", 2), ("place", "<i8"), ("row", "<i8")])
"""A pair's ids, its number among the staged pairs of its file, and its row in the file."""
MARK = np.dtype([("position", "<i8"), ("first", "<i8"), ("first_row", "<i8")])
"""A duplicate's position, that of its first copy, and the first copy's row in its file; with equal positions, a kept pair that is contradicted."""
SIZE = np.dtype("<i8")


class IdWriter:
    """Writes the ids and sizes of a file's staged chunks, piece by piece."""

    def __init__(self, storage: Storage, folder: str, pairs_per_piece: int = PAIRS_PER_PIECE):
        self._storage = storage
        self._folder = folder
        self._pairs_per_piece = pairs_per_piece
        self._chunks: list[tuple[Records, npt.NDArray[Any]]] = []
        self._num_pairs = 0
        self.pieces: list[list[int]] = []
        """Pairs of each chunk, by piece."""

    def add(self, pairs: pa.Table) -> None:
        """Take the next chunk's pairs (at least pair_id, comparison_id, row, num_bytes)."""
        ids = np.empty(pairs.num_rows, ID)
        ids["comparison"] = parse_ids(pairs["comparison_id"])
        ids["pair"] = parse_ids(pairs["pair_id"])
        ids["place"] = np.arange(self._num_pairs, self._num_pairs + pairs.num_rows)
        ids["row"] = pairs["row"].to_numpy()
        self._chunks.append((ids, pairs["num_bytes"].to_numpy().astype(SIZE)))
        self._num_pairs += pairs.num_rows
        if sum(len(chunk) for chunk, _ in self._chunks) >= self._pairs_per_piece:
            self.flush()

    def flush(self) -> None:
        """Write what was taken since the last piece."""
        if not self._chunks:
            return
        number = len(self.pieces)
        ids = np.concatenate([chunk for chunk, _ in self._chunks])
        buckets = (ids["comparison"][:, 0] >> np.uint64(64 - _ID_BITS)).astype(np.int16)
        write_buckets(self._storage, ids_path(self._folder, number), ids, buckets, NUM_ID_BUCKETS)
        self._storage.write_bytes(sizes_path(self._folder, number), np.concatenate([sizes for _, sizes in self._chunks]).tobytes())
        self.pieces.append([len(chunk) for chunk, _ in self._chunks])
        self._chunks = []


def ids_path(folder: str, piece: int) -> str:
    """Return the path of the ids of a file's piece."""
    return f"{folder}/ids-{piece:05d}.bin"


def sizes_path(folder: str, piece: int) -> str:
    """Return the path of the sizes of a file's piece."""
    return f"{folder}/sizes-{piece:05d}.bin"


class PairFile(NamedTuple):
    """A staged file: where it came from, where its chunks lie, and the pairs of each chunk by piece.

    `held`: shards of a pool that is there already. Their pairs come first of all, whatever their pool, so that a later copy is the duplicate; only
    their ids are staged, and they are written nowhere.
    """

    route: Route
    source: str
    file: str
    folder: str
    pieces: tuple[tuple[int, ...], ...]
    held: bool = False

    @property
    def num_pairs(self) -> int:
        """Staged pairs."""
        return sum(map(sum, self.pieces))


class Piece(NamedTuple):
    """Consecutive chunks of one file: `file` counts along the layout, `number` and `first_chunk` along the file, `start` is a position."""

    file: int
    number: int
    first_chunk: int
    start: int
    chunks: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """All staged files in the order in which pairs are kept; a pair's position counts along it. Some hundred bytes a piece."""

    files: tuple[PairFile, ...]

    @classmethod
    def of(cls, files: Iterable[PairFile]) -> "Layout":
        """Return the layout of files given in input order: pools that are there first, then the more trusted pool, else as given."""
        routes = tuple(Route)
        return cls(tuple(sorted(files, key=lambda file: (not file.held, routes.index(file.route)))))

    @cached_property
    def starts(self) -> Positions:
        """Position of the first pair of every file, and the number of pairs."""
        return np.cumsum([0, *(file.num_pairs for file in self.files)], dtype=np.int64)

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """All pieces, by position."""
        found = []
        for number, file in enumerate(self.files):
            chunk, start = 0, int(self.starts[number])
            for place, chunks in enumerate(file.pieces):
                found.append(Piece(number, place, chunk, start, chunks))
                chunk, start = chunk + len(chunks), start + sum(chunks)
        return tuple(found)

    @property
    def digest(self) -> str:
        """32 hex digits over folders and pieces, so that what was compared under another cut is never taken for this one's."""
        return content_digest([[file.folder, file.pieces] for file in self.files])

    @property
    def num_pairs(self) -> int:
        """Staged pairs of all files."""
        return int(self.starts[-1])

    def file_at(self, position: int) -> PairFile:
        """Return the file of the pair at a position."""
        return self.files[int(np.searchsorted(self.starts, position, side="right")) - 1]


class Gathered(NamedTuple):
    """What became of a piece's pairs, chunk by chunk."""

    kept: tuple[int, ...]
    contradicted: tuple[int, ...]


@dataclass(frozen=True)
class Comparison:
    """The second and third pass: `layout` compared in `num_parts` parts, files under `folder`; results do not depend on the number."""

    storage: Storage
    folder: str
    layout: Layout
    num_parts: int

    @classmethod
    def of(cls, storage: Storage, folder: str, layout: Layout, pairs_per_part: int = PAIRS_PER_PIECE) -> "Comparison":
        """Return a comparison in parts of about `pairs_per_part` pairs."""
        return cls(storage, folder, layout, min(NUM_ID_BUCKETS, -(-layout.num_pairs // pairs_per_part)))

    def decide_part(self, part: int) -> None:
        """Compare the ids of one part and write its marks; nothing to do where that was done before."""
        if self.storage.exists(self._marks_of_part(part)):
            return
        start, end = (NUM_ID_BUCKETS * number // self.num_parts for number in (part, part + 1))
        wanted = [(ids_path(self.layout.files[piece.file].folder, piece.number), ID, NUM_ID_BUCKETS, start, end) for piece in self.layout.pieces]
        found = self._read(wanted)
        positions = np.concatenate([ids["place"] + self.layout.starts[piece.file] for ids, piece in zip(found, self.layout.pieces, strict=True)])
        order = np.argsort(positions)
        positions, ids = positions[order], np.concatenate(found)[order]
        duplicates = find_duplicates(ids["pair"], ids["comparison"])
        marked = np.flatnonzero(~duplicates.keep | duplicates.contradicted)
        marks = np.empty(len(marked), MARK)
        marks["position"] = positions[marked]
        marks["first"] = positions[duplicates.first[marked]]
        marks["first_row"] = ids["row"][duplicates.first[marked]]
        pieces = np.searchsorted([piece.start for piece in self.layout.pieces], marks["position"], side="right") - 1
        write_buckets(self.storage, self._marks_of_part(part), marks, pieces, len(self.layout.pieces))

    def gather_piece(self, number: int) -> Gathered:
        """Collect one piece's marks from all parts, write them by chunk beside the sizes of the pairs that are kept, and count.

        Of pairs in a pool that is there already all are kept, and what they are marked with stays.
        """
        piece = self.layout.pieces[number]
        if self.layout.files[piece.file].held:
            return Gathered(piece.chunks, (0,) * len(piece.chunks))
        done = f"{self.folder}/gathered-{number:05d}.json"
        if self.storage.exists(done):
            counts = self.storage.read_json(done)
            return Gathered(tuple(counts["kept"]), tuple(counts["contradicted"]))
        wanted = [(self._marks_of_part(part), MARK, len(self.layout.pieces), number, number + 1) for part in range(self.num_parts)]
        marks = np.concatenate([np.empty(0, MARK), *self._read(wanted)])
        marks = marks[np.argsort(marks["position"])]
        places = marks["position"] - piece.start
        is_copy = marks["first"] != marks["position"]
        chunks = np.repeat(np.arange(len(piece.chunks)), piece.chunks)[places]
        write_buckets(self.storage, self._marks_of_piece(number), marks, chunks, len(piece.chunks))
        kept = np.ones(sum(piece.chunks), np.bool_)
        kept[places[is_copy]] = False
        sizes = np.frombuffer(self.storage.read_bytes(sizes_path(self.layout.files[piece.file].folder, piece.number)), SIZE)
        self.storage.write_bytes(self._kept_sizes(number), sizes[kept].tobytes())
        copies, contradicted = (np.bincount(chunks[which], minlength=len(piece.chunks)) for which in (is_copy, ~is_copy))
        gathered = Gathered(tuple((np.array(piece.chunks) - copies).tolist()), tuple(contradicted.tolist()))
        self.storage.write_json(done, gathered._asdict())
        return gathered

    def kept_sizes(self, number: int) -> Positions:
        """Return the sizes of the pairs of a piece that are kept, in order."""
        return np.frombuffer(self.storage.read_bytes(self._kept_sizes(number)), SIZE)

    def marks(self, number: int, chunk: int) -> Records:
        """Return the marks of a chunk (counted along its piece), by position."""
        return read_buckets(self.storage, self._marks_of_piece(number), MARK, len(self.layout.pieces[number].chunks), chunk, chunk + 1)

    def _read(self, wanted: Sequence[tuple[Any, ...]]) -> list[Records]:
        with ThreadPoolExecutor(_NUM_READERS) as readers:
            return list(readers.map(lambda values: read_buckets(self.storage, *values), wanted))

    def _marks_of_part(self, part: int) -> str:
        return f"{self.folder}/part-{part:05d}-of-{self.num_parts:05d}.bin"

    def _marks_of_piece(self, number: int) -> str:
        return f"{self.folder}/marks-{number:05d}.bin"

    def _kept_sizes(self, number: int) -> str:
        return f"{self.folder}/kept-{number:05d}.bin"
