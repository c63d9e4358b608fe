"""An exact inner-product index over embedded pairs, with reproducible results. Serves both retrievals of Stage 1 (paper: Sec. 3.2, Steps 2
and 3).

FAISS finds candidates; their scores are then computed again one by one in float64 and rounded to float32, and equal scores are ordered by
pair_id. So a result depends on the vectors alone, not on how FAISS batches queries, on threads, or on the order in which pairs were added.

Our choice: exact search wherever one node holds the vectors, exemplars above all. The paper names no index. Over larger pools `quantised.py` searches
codes; `IndexConfig.kind` says where which is used.

Shapes: P pairs, Q queries, E embedding size, K neighbours.
"""

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Self

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from synpref_ray.config import Settings
from synpref_ray.errors import ConfigError, RunConflictError, SchemaError
from synpref_ray.retrieval.embedder import embedding_matrix
from synpref_ray.retrieval.neighbours import Matrix, Neighbours, check_queries
from synpref_ray.tables.pools import require_columns
from synpref_ray.tables.storage import Storage

logger = logging.getLogger(__name__)

CODEWORDS = 256  # of a sub-quantiser of codes: one byte
INDEX_COLUMNS = ("pair_id", "prompt_group", "embedding")
_LEAST_PER_WORD = 4  # ours: fewer vectors for a list or a codeword make codes that are hardly worth a search's second pass
_SLACK = 8  # candidates beyond those asked for, so that a tie at the border seldom needs a second search
_GPU_MAX_DEPTH = 2048  # FAISS on GPU returns no more candidates per query
_MAX_CANDIDATES = 1 << 22  # per FAISS call: 4 M scores and row numbers are 48 MiB


INDEX_RESOURCES = {"use_gpu", "num_threads"}
"""What a config says about the machine and not about the result: where codes are made and searched changes which pairs become candidates by float
error only, and exact scores decide."""


class IndexConfig(Settings):
    """Which index is built over a pool, and where it searches. Exemplars are always searched exactly; zeros stand for the rules of `shape`."""

    kind: Literal["auto", "exact", "ivf_pq"] = "auto"
    exact_below: int = Field(default=300_000, ge=1)  # ours: auto is exact below so many pairs of a pool: 0.5 GB of 384 floats, 1.2 GB of 1,024
    nlist: int = Field(default=0, ge=0)  # inverted lists; 0: the power of two nearest to 4 √P, as FAISS's guide has it
    nprobe: int = Field(default=0, ge=0)  # lists searched for a query; 0: a 32nd of them, at least 8
    m: int = Field(default=48, ge=1)  # ours: bytes of a code; with its row number 56 a vector, with lists and rotation of a million pairs 63
    candidates_per_neighbour: int = Field(default=16, ge=1)  # ours: scored exactly for every neighbour wanted; benchmarks/retrieval.py
    train_per_list: int = Field(default=64, ge=1)  # ours: vectors of the training sample for every list; FAISS warns below 39
    shards_per_part: int = Field(default=32, ge=1)  # ours: 262,144 pairs are minutes of work, lost where a node is
    seed: int = 0
    """Seed of the training sample."""
    use_gpu: bool = False  # ours: exact search over a million pairs is seconds on a CPU
    num_threads: int = Field(default=2, ge=1)
    """Threads of a search."""

    def search_exactly(self, sizes: Sequence[int]) -> list[bool]:
        """Return which parts of a pool are searched exactly, given the pairs of each; the others get an index of codes.

        What counts is the pool, not the part: under `auto` the smallest parts are exact as long as they have fewer than `exact_below` pairs
        together. A part that is too small to train codes on is exact whatever `kind` says.
        """
        least, held = _LEAST_PER_WORD * max(CODEWORDS, self.nlist), 0
        exact = [False] * len(sizes)
        for part in sorted(range(len(sizes)), key=lambda part: (sizes[part], part)):
            fits = self.kind == "auto" and held + sizes[part] < self.exact_below
            if self.kind == "exact" or fits or sizes[part] < least:
                exact[part] = True
                held += sizes[part]
        return exact

    def shape(self, num_pairs: int, dimension: int) -> "IndexShape":
        """Return the shape of an index over so many pairs.

        Codes are of at most 8 dimensions a byte: embeddings of more than 8 `m` dimensions are reduced by the rotation, and exact scores make
        up for it.

        Raises:
            ConfigError: embeddings are smaller than codes.
        """
        if dimension < self.m:
            raise ConfigError(f"index.m is {self.m}, but embeddings have {dimension} dimensions: set index.m to a divisor of these")
        nlist = self.nlist or 2 ** max(0, round(math.log2(4 * math.sqrt(max(1, num_pairs)))))
        nprobe = self.nprobe or max(8, nlist // 32)
        reduced = min(dimension, 8 * self.m) // self.m * self.m
        return IndexShape(dimension, reduced, nlist, min(nprobe, nlist), self.m, self.candidates_per_neighbour)


@dataclass(frozen=True)
class IndexShape:
    """What a quantised index is made of: `reduced` dimensions after the rotation, in `m` bytes; lists, and how a search goes through them."""

    dimension: int
    reduced: int
    nlist: int
    nprobe: int
    m: int
    candidates_per_neighbour: int

    @property
    def factory(self) -> str:
        """FAISS's name of it."""
        return f"OPQ{self.m}_{self.reduced},IVF{self.nlist},PQ{self.m}x8np"  # np: polysemous codes take minutes to train, and are not searched


class PairIndex:
    """Embedded pairs that can be searched. Build it with `build` or `load`."""

    def __init__(self, pair_ids: Sequence[str], groups: Sequence[str], vectors: Matrix, config: IndexConfig) -> None:
        faiss.omp_set_num_threads(config.num_threads)
        self._pair_ids = list(pair_ids)
        self._groups = np.array(groups, dtype=object)
        names, counts = np.unique(self._groups.astype(str), return_counts=True)
        self._group_sizes = dict(zip(names.tolist(), counts.tolist(), strict=True))
        self._cpu = faiss.IndexFlatIP(vectors.shape[1])
        self._cpu.add(np.ascontiguousarray(vectors))
        self._vectors = _view(self._cpu)
        self._max_norm = float(np.linalg.norm(self._vectors, axis=1).max(initial=0.0))
        self._gpu = _on_gpu(self._cpu) if config.use_gpu else None

    @classmethod
    def build(cls, pairs: pa.Table, config: IndexConfig) -> Self:
        """Index the pairs that have an embedding; the others cannot be found, and are counted in the log.

        Args:
            pairs: with `INDEX_COLUMNS`, each pair once, in any order.

        Raises:
            SchemaError: a pair comes twice, or an embedding is not finite.
        """
        require_columns(pairs, INDEX_COLUMNS, step="index")
        found = pairs.select(list(INDEX_COLUMNS)).filter(pc.is_valid(pairs.column("embedding"))).sort_by("pair_id")
        ids, vectors = found.column("pair_id").to_pylist(), embedding_matrix(found.column("embedding"))
        twice = [first for first, second in pairwise(ids) if first == second]
        if twice:
            raise SchemaError(f"a pair can be indexed once; {len(twice)} come again ({', '.join(twice[:3])})")
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(bad):
            raise SchemaError(f"{len(bad)} embeddings are not finite ({', '.join(ids[row] for row in bad[:3])})")
        logger.info("indexed %d pairs; %d without an embedding", len(ids), pairs.num_rows - len(ids))
        return cls(ids, found.column("prompt_group").to_pylist(), vectors, config)

    def __len__(self) -> int:
        return len(self._pair_ids)

    @property
    def fingerprint(self) -> str:
        """32 hex digits over the pairs, their groups and vectors, whatever the order they came in."""
        digest = hashlib.blake2b(b"exact-inner-product-1", digest_size=16)
        digest.update("\n".join(f"{pair} {group}" for pair, group in zip(self._pair_ids, self._groups, strict=True)).encode())
        digest.update(str(self._vectors.shape).encode())
        digest.update(np.ascontiguousarray(self._vectors, dtype="<f4").tobytes())
        return digest.hexdigest()

    def search(self, queries: Matrix, k: int, *, exclude_groups: Sequence[str] | None = None) -> Neighbours:
        """Return the `k` pairs with the largest inner product for each query, fewer if the index has no more.

        Args:
            queries: (Q, E), finite.
            exclude_groups: one prompt group per query, none of whose pairs may be returned.
        """
        excluded = check_queries(queries, self._cpu.d, exclude_groups)
        found: dict[int, tuple[list[str], Matrix]] = {}
        pending = list(range(len(queries))) if k > 0 and len(self) else []
        depth = k + _SLACK + max((self._group_sizes.get(excluded[row] or "", 0) for row in pending), default=0)
        while pending:
            depth = min(depth, len(self))
            rows_at_once = max(1, _MAX_CANDIDATES // depth)
            for start in range(0, len(pending), rows_at_once):
                found |= self._search_once(queries, pending[start : start + rows_at_once], k, depth, excluded)
            pending = [row for row in pending if row not in found]
            depth *= 4
        nothing: tuple[list[str], Matrix] = ([], np.zeros(0, dtype=np.float32))
        results = [found.get(row, nothing) for row in range(len(queries))]
        return Neighbours([ids for ids, _ in results], [scores for _, scores in results])

    def _search_once(self, queries: Matrix, rows: list[int], k: int, depth: int, excluded: list[str | None]) -> dict[int, tuple[list[str], Matrix]]:
        """Return the results that `depth` candidates settle: no pair outside of them can score as high as the last one returned."""
        engine = self._gpu if self._gpu is not None and depth <= _GPU_MAX_DEPTH else self._cpu
        batch = np.ascontiguousarray(queries[rows], dtype=np.float32)
        rough, candidates = engine.search(batch, depth)
        settled = {}
        for row, query, scores, numbers in zip(rows, batch, rough, candidates, strict=True):
            kept = numbers[self._groups[numbers] != excluded[row]]
            exact = (self._vectors[kept].astype(np.float64) * query.astype(np.float64)).sum(axis=1).astype(np.float32)
            best = np.lexsort((kept, -exact))[:k]
            doubt = 2.0**-23 * len(query) * float(np.linalg.norm(query)) * self._max_norm  # bound on the rounding of a float32 inner product
            if depth == len(self) or (len(best) == k and scores[-1] < exact[best[-1]] - doubt):
                settled[row] = ([self._pair_ids[number] for number in kept[best]], exact[best])
        return settled

    def save(self, storage: Storage, path: str) -> None:
        """Write the index as a Parquet file that carries its fingerprint."""
        embedding = pa.FixedSizeListArray.from_arrays(pa.array(self._vectors.reshape(-1)), self._cpu.d)
        columns = [pa.array(self._pair_ids, pa.string()), pa.array(self._groups.tolist(), pa.string()), embedding]
        table = pa.table(columns, names=list(INDEX_COLUMNS)).replace_schema_metadata({"fingerprint": self.fingerprint})
        storage.write_table(path, table)

    @classmethod
    def load(cls, storage: Storage, path: str, config: IndexConfig, *, fingerprint: str | None = None) -> Self:
        """Read an index back.

        Raises:
            RunConflictError: what was read is not what was saved, or not the index with the wanted fingerprint.
        """
        table = storage.read_table(path)
        index = cls.build(table, config)
        stored = (table.schema.metadata or {}).get(b"fingerprint", b"").decode()
        for expected in (stored, fingerprint):
            if expected is not None and index.fingerprint != expected:
                raise RunConflictError(
                    f"{storage.join(path)} holds index {index.fingerprint}, expected {expected or 'a fingerprint'}: build it again"
                )
        return index


def _view(index: Any) -> Matrix:
    """Return the vectors inside a flat index without copying them; they live as long as the index."""
    if index.ntotal == 0:
        return np.zeros((0, index.d), dtype=np.float32)
    vectors: Matrix = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(index.ntotal, index.d)
    return vectors


def check_gpu() -> None:
    """Refuse `use_gpu` where FAISS sees no GPU."""
    if faiss.get_num_gpus() == 0:
        raise ConfigError("use_gpu is set, but this FAISS sees no GPU: install faiss-gpu, or set use_gpu=false")


def _on_gpu(index: Any) -> Any:
    check_gpu()
    return faiss.index_cpu_to_all_gpus(index)
