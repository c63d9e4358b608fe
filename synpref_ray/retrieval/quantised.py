"""An approximate index for what no node should hold whole: OPQ + IVF-PQ codes find candidates, their stored embeddings decide. Serves the
error-driven retrieval of Stage 1 (paper: Sec. 3.2, Step 2) from an unverified pool of any size.

Our choice, all of it: the paper names no index. An index is trained on a seeded sample, filled in parts (a part: some shards of the pool), and the
parts are merged in their order. A search takes candidates from the codes and scores them again from the embeddings sidecar, as `index.py` does: in
float64, rounded to float32, equal scores by pair_id. So what is approximate is which pairs become candidates, and nothing else; where a query has too
few, the search goes deeper, in the end through every list.

Rows are numbered through the pool's shards in their order; pair_ids and prompt groups are read where candidates are scored, and not kept in memory.

Shapes: P pairs, Q queries, E embedding size, K neighbours, C candidates a query.
"""

import logging
import tempfile
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from synpref_ray.errors import ConfigError, InputError, SchemaError
from synpref_ray.retrieval.embedder import embedding_matrix
from synpref_ray.retrieval.index import CODEWORDS, IndexConfig, IndexShape, check_gpu
from synpref_ray.retrieval.neighbours import Matrix, Neighbours, check_queries
from synpref_ray.schema import stable_hash
from synpref_ray.tables.pools import Pool
from synpref_ray.tables.sidecars import Sidecar, zip_shard
from synpref_ray.tables.storage import Storage

logger = logging.getLogger(__name__)

Rows = npt.NDArray[np.int64]

_GPU_MAX = 2048  # candidates a query, and lists probed, on a GPU
_ROTATION_ROUNDS, _ROTATION_FIRST_ROUND = 16, 12  # ours, of k-means inside OPQ; FAISS's own 50 and 40 take most of the training
_MIN_CANDIDATES = 256  # ours: of a query; a search for few neighbours costs little more with these
_BATCH_CANDIDATES = 1 << 21  # ours: scored at once; with their ids some 100 MB
_LEAST_SAMPLE_OF_A_SHARD = 1024  # ours: the sample of a large pool comes from some of its shards rather than a few rows of each


def first_rows(pool: Pool) -> Rows:
    """Return the number of each shard's first row, and after the last the number of rows."""
    return np.cumsum([0, *(shard.rows for shard in pool.shards)], dtype=np.int64)


def read_vectors(embeddings: Sidecar, number: int) -> tuple[npt.NDArray[np.int64], Matrix]:
    """Return the rows of a shard that have an embedding, and their vectors.

    Raises:
        SchemaError: an embedding is not finite.
    """
    column = embeddings.read(number, ["embedding"])["embedding"]
    embedded = np.flatnonzero(np.asarray(pc.is_valid(column)))
    vectors = embedding_matrix(column.drop_null())
    if not np.isfinite(vectors).all():
        raise SchemaError(f"shard {number} of {embeddings.pool.storage.join(embeddings.folder)} has embeddings that are not finite")
    return embedded, vectors


def training_sample(embeddings: Sidecar, size: int, seed: int) -> Matrix:
    """Return about `size` vectors of the pool, the same ones for the same seed: all of a small pool, of a large one some rows of some shards."""
    pool = embeddings.pool
    shards = sorted((shard for shard in pool.shards if shard.rows), key=lambda shard: stable_hash(seed, shard.digest, "index sample"))
    share = size / max(1, pool.num_rows)
    parts: list[Matrix] = []
    missing = size
    for shard in shards:
        if missing <= 0:
            break
        _, vectors = read_vectors(embeddings, shard.number)
        wanted = min(len(vectors), missing, max(round(share * shard.rows) + 1, _LEAST_SAMPLE_OF_A_SHARD))
        rng = np.random.default_rng(stable_hash(seed, shard.digest, "index rows"))
        parts.append(vectors[np.sort(rng.choice(len(vectors), wanted, replace=False))])
        missing -= wanted
    return np.concatenate(parts) if parts else np.zeros((0, 1), dtype=np.float32)


def train_index(sample: Matrix, shape: IndexShape, config: IndexConfig) -> Any:
    """Return an empty index that has learned its rotation, its lists and its codes from a sample.

    Raises:
        InputError: there are fewer vectors than a code has words, or than there are lists.
    """
    if len(sample) < max(CODEWORDS, shape.nlist):
        raise InputError(
            f"an index with {shape.nlist} lists and {CODEWORDS} codewords cannot be trained on {len(sample)} embeddings: set index.kind=exact"
        )
    faiss.omp_set_num_threads(config.num_threads)
    index: Any = faiss.index_factory(sample.shape[1], shape.factory, faiss.METRIC_INNER_PRODUCT)
    inner: Any = faiss.downcast_index(faiss.extract_index_ivf(index))
    rotation: Any = faiss.downcast_VectorTransform(index.chain.at(0))
    rotation_codes: Any = faiss.ProductQuantizer(shape.reduced, shape.m, 8)
    rotation.pq, rotation.niter, rotation.niter_pq_0 = rotation_codes, _ROTATION_ROUNDS, _ROTATION_FIRST_ROUND
    for clustering in (inner.cp, inner.pq.cp, rotation_codes.cp):
        clustering.seed = config.seed
        clustering.min_points_per_centroid = 1  # FAISS would warn a hundred times; how large the sample is, the config says
    gpu = _on_gpu(faiss.IndexFlatIP(inner.d)) if config.use_gpu else None
    inner.clustering_index = gpu  # the k-means of the lists is nearly all of the work; None: on the CPU
    index.train(np.ascontiguousarray(sample))
    inner.clustering_index = None
    rotation.pq = None
    return index


def fill_part(trained: Any, embeddings: Sidecar, shards: Sequence[tuple[int, int]], config: IndexConfig) -> Any:
    """Add some shards' vectors to a trained index that has none, in the order given, and return it.

    Args:
        shards: their numbers and their first rows.
    """
    faiss.omp_set_num_threads(config.num_threads)
    index = _on_gpu(trained) if config.use_gpu else trained
    for number, first in shards:
        rows, vectors = read_vectors(embeddings, number)
        if len(rows):
            index.add_with_ids(np.ascontiguousarray(vectors), rows + first)
    return faiss.index_gpu_to_cpu(index) if config.use_gpu else index


def merge_parts(trained: Any, parts: Iterable[Any]) -> Any:
    """Return `trained`, which has no vectors, with those of all parts in their order."""
    for part in parts:
        faiss.merge_into(trained, part, False)
    return trained


def save_index(index: Any, storage: Storage, path: str) -> int:
    """Write an index atomically and return its size in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "index.faiss"
        faiss.write_index(index, str(file))
        storage.upload(file, path)
        return file.stat().st_size


def load_index(storage: Storage, path: str) -> Any:
    """Read an index back."""
    if not storage.exists(path):
        raise InputError(f"{storage.join(path)} does not exist")
    if storage.is_local:
        return faiss.read_index(storage.local_path(path))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "index.faiss"
        storage.download(path, file)
        return faiss.read_index(str(file))


def _on_gpu(index: Any) -> Any:
    """Return an index on the GPU that this process was given; needs FAISS's GPU build."""
    check_gpu()
    options = faiss.GpuClonerOptions()
    options.useFloat16 = True  # lookup tables of 48 bytes a code do not fit a GPU's shared memory in float32
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index, options)


class CandidateSearch(Protocol):
    """Codes that can be searched, wherever they are held."""

    def candidates(self, queries: Matrix, depth: int, nprobe: int) -> Rows:
        """Return (Q, depth) row numbers, -1 where the probed lists hold no more."""
        ...


class Codes:
    """A filled index in this process, on its GPUs if so configured."""

    def __init__(self, index: Any, config: IndexConfig):
        faiss.omp_set_num_threads(config.num_threads)
        self._cpu = index
        self._gpu = _on_gpu(index) if config.use_gpu else None

    def candidates(self, queries: Matrix, depth: int, nprobe: int) -> Rows:
        """Return (Q, depth) row numbers, -1 where the probed lists hold no more."""
        on_gpu = self._gpu is not None and max(depth, nprobe) <= _GPU_MAX
        of_lists: Any = faiss.SearchParametersIVF
        of_rotation: Any = faiss.SearchParametersPreTransform
        parameters = of_rotation(index_params=of_lists(nprobe=nprobe))
        engine: Any = self._gpu if on_gpu else self._cpu
        _, rows = engine.search(np.ascontiguousarray(queries), depth, params=parameters)
        return np.asarray(rows, dtype=np.int64)


@dataclass(frozen=True)
class LeftOut:
    """What no query may find: all pairs of some prompt groups, and some pairs (an array of strings, since these may be a million)."""

    groups: frozenset[str] = frozenset()
    pairs: pa.Array = field(default_factory=lambda: pa.array([], pa.string()))

    @classmethod
    def of(cls, groups: Set[str] = frozenset(), pairs: Set[str] = frozenset()) -> "LeftOut":
        """Return both, given as sets."""
        return cls(frozenset(groups), pa.array(sorted(pairs), pa.string()))

    def allows(self, rows: pa.Table) -> npt.NDArray[np.bool_]:
        """Return which rows (pair_id, prompt_group) may be found."""
        allowed = np.ones(rows.num_rows, dtype=bool)
        if self.groups:
            allowed &= ~np.asarray(pc.is_in(rows["prompt_group"], value_set=pa.array(sorted(self.groups), pa.string())))
        if len(self.pairs):
            here = self.pairs.filter(pc.is_in(self.pairs, value_set=rows["pair_id"].combine_chunks()))  # few: the smaller of the two is hashed
            allowed &= ~np.asarray(pc.is_in(rows["pair_id"], value_set=here))
        return allowed


@dataclass(frozen=True)
class Asked:
    """Queries whose candidates are scored together: (Q, E), the prompt group that each may not find (None: any), and what none may."""

    queries: Matrix
    excluded: tuple[str | None, ...]
    left_out: LeftOut


@dataclass(frozen=True)
class ShardCandidates:
    """Candidates of one shard: (C,) rows within it, and for each the query it is a candidate of."""

    number: int
    rows: Rows
    owners: Rows


@dataclass(frozen=True)
class Scored:
    """(C,) candidates that may be found: the queries they belong to, their pair_ids and exact float32 scores."""

    owners: Rows
    pair_ids: pa.Array
    scores: Matrix


class CandidateScorer(Protocol):
    """Scores candidates from the stored embeddings, wherever that runs."""

    def score(self, asked: Asked, candidates: Sequence[ShardCandidates]) -> Iterable[Scored]: ...


def score_candidates(pool: Pool, embeddings: Sidecar, asked: Asked, candidates: ShardCandidates) -> Scored:
    """Score one shard's candidates exactly, without those that their query may not find."""
    shard = zip_shard(pool, candidates.number, ["prompt_group"], [(embeddings, {"embedding": "embedding"})])
    needed, places = np.unique(candidates.rows, return_inverse=True)
    rows = shard.take(pa.array(needed))
    groups = rows["prompt_group"].combine_chunks()
    allowed = asked.left_out.allows(rows)
    theirs = pa.array(asked.excluded, pa.string()).take(pa.array(candidates.owners))
    same = np.asarray(pc.fill_null(pc.equal(groups.take(pa.array(places)), theirs), False))
    kept = allowed[places] & ~same
    places, owners = places[kept], candidates.owners[kept]
    vectors = embedding_matrix(rows["embedding"])
    scores = np.empty(len(owners), dtype=np.float32)
    for start in range(0, len(owners), 4096):
        part = slice(start, start + 4096)
        left, right = vectors[places[part]].astype(np.float64), asked.queries[owners[part]].astype(np.float64)
        scores[part] = (left * right).sum(axis=1)
    return Scored(owners, rows["pair_id"].combine_chunks().take(pa.array(places)), scores)


@dataclass(frozen=True)
class LocalScorer:
    """Scores candidates in this process, one shard after another."""

    pool: Pool
    embeddings: Sidecar

    def score(self, asked: Asked, candidates: Sequence[ShardCandidates]) -> Iterable[Scored]:
        """Return each shard's candidates, scored."""
        return (score_candidates(self.pool, self.embeddings, asked, one) for one in candidates)


class QuantisedIndex:
    """The pairs of a pool, found by their codes and ordered by their embeddings: a `NeighbourSearch`.

    Args:
        pool: whose rows the codes number.
        codes: over every embedded pair of the pool.
        left_out: what may not be found.
    """

    def __init__(self, pool: Pool, codes: CandidateSearch, scorer: CandidateScorer, shape: IndexShape, left_out: LeftOut):
        self._pool = pool
        self._codes = codes
        self._scorer = scorer
        self._shape = shape
        self._left_out = left_out
        self._first_rows = first_rows(pool)

    def search(self, queries: Matrix, k: int, *, exclude_groups: Sequence[str] | None = None) -> Neighbours:
        """Return about the `k` pairs with the largest inner product for each query, with exact scores; fewer if the pool has no more.

        Args:
            queries: (Q, E), finite.
            exclude_groups: one prompt group per query, none of whose pairs may be returned.
        """
        excluded = check_queries(queries, self._shape.dimension, exclude_groups)
        found: dict[int, tuple[list[str], Matrix]] = {}
        pending = list(range(len(queries))) if k > 0 and self._first_rows[-1] else []
        depth, nprobe = max(_MIN_CANDIDATES, k * self._shape.candidates_per_neighbour), self._shape.nprobe
        while pending:
            depth, nprobe = int(min(depth, self._first_rows[-1])), min(nprobe, self._shape.nlist)
            at_once = max(1, _BATCH_CANDIDATES // depth)
            for start in range(0, len(pending), at_once):
                found |= self._search_once(queries, pending[start : start + at_once], k, depth, nprobe, excluded)
            pending = [row for row in pending if row not in found]
            depth, nprobe = 4 * depth, 4 * nprobe
        nothing: tuple[list[str], Matrix] = ([], np.zeros(0, dtype=np.float32))
        results = [found.get(row, nothing) for row in range(len(queries))]
        return Neighbours([ids for ids, _ in results], [scores for _, scores in results])

    def _search_once(
        self, queries: Matrix, asked_rows: list[int], k: int, depth: int, nprobe: int, excluded: list[str | None]
    ) -> dict[int, tuple[list[str], Matrix]]:
        """Return the results of the queries that have `k` of them, or can have no more."""
        asked = Asked(np.ascontiguousarray(queries[asked_rows], dtype=np.float32), tuple(excluded[row] for row in asked_rows), self._left_out)
        rows = self._codes.candidates(asked.queries, depth, nprobe)
        scored = list(self._scorer.score(asked, self._by_shard(rows)))
        owners = np.concatenate([one.owners for one in scored]) if scored else np.zeros(0, dtype=np.int64)
        scores = np.concatenate([one.scores for one in scored]) if scored else np.zeros(0, dtype=np.float32)
        ids = pa.chunked_array([one.pair_ids for one in scored], pa.string()).combine_chunks()
        table = pa.table({"owner": owners, "score": scores, "pair_id": ids})
        order = np.asarray(pc.sort_indices(table, sort_keys=[("owner", "ascending"), ("score", "descending"), ("pair_id", "ascending")]))
        bounds = np.searchsorted(owners[order], np.arange(len(asked_rows) + 1))
        exhausted = nprobe == self._shape.nlist and depth == self._first_rows[-1]
        settled = {}
        for position, row in enumerate(asked_rows):
            best = order[bounds[position] : bounds[position + 1]][:k]
            no_more = exhausted or (nprobe == self._shape.nlist and (rows[position] < 0).any())
            if len(best) == k or no_more:
                settled[row] = (ids.take(pa.array(best)).to_pylist(), scores[best])
        return settled

    def _by_shard(self, rows: Rows) -> list[ShardCandidates]:
        """Cut (Q, C) row numbers into the shards that hold them."""
        owners, columns = np.nonzero(rows >= 0)
        flat = rows[owners, columns]
        order = np.argsort(flat, kind="stable")
        flat, owners = flat[order], owners[order]
        bounds = np.searchsorted(flat, self._first_rows)
        return [
            ShardCandidates(shard.number, flat[start:stop] - first, owners[start:stop])
            for shard, first, start, stop in zip(self._pool.shards, self._first_rows[:-1], bounds[:-1], bounds[1:], strict=True)
            if stop > start
        ]


def check_shape(shape: IndexShape) -> None:
    """Refuse settings that FAISS cannot build."""
    if shape.reduced % shape.m or shape.reduced > shape.dimension:
        raise ConfigError(f"index.m={shape.m} does not divide the {shape.reduced} dimensions that it codes (embeddings have {shape.dimension})")
