"""The index over a pool that is too large to search exactly: trained, filled in parts and merged by tasks, saved under its fingerprint, and searched
by an actor, while tasks score the candidates shard by shard. Serves Stage 1, Step 2 (paper: Sec. 3.2); what is computed is in retrieval/quantised.py.

Layout: `indexes/<pool>-<fp8>/trained.faiss, parts/part-00000.faiss …, index.faiss, manifest.json`. A kill loses the parts in the making; the manifest
is written last, as a seal, and the parts are removed then. The driver holds row numbers, scores and pair_ids of one batch of queries, and no vectors.
"""

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import ray

from synpref_ray.pipeline.cluster import tell_if_no_room
from synpref_ray.pipeline.crashes import MAX_TASK_RETRIES
from synpref_ray.pipeline.steps import INLINE_ROWS, unwrap
from synpref_ray.pipeline.tasks import max_running, run_tasks
from synpref_ray.retrieval.embedder import embedding_matrix
from synpref_ray.retrieval.index import IndexConfig, IndexShape
from synpref_ray.retrieval.neighbours import Matrix
from synpref_ray.retrieval.quantised import (
    Asked,
    CandidateScorer,
    CandidateSearch,
    Codes,
    LeftOut,
    LocalScorer,
    QuantisedIndex,
    Rows,
    Scored,
    ShardCandidates,
    check_shape,
    fill_part,
    first_rows,
    load_index,
    merge_parts,
    save_index,
    score_candidates,
    train_index,
    training_sample,
)
from synpref_ray.tables.leases import Lease
from synpref_ray.tables.pools import Pool
from synpref_ray.tables.sidecars import Sidecar, fingerprint
from synpref_ray.versions import faiss_version

logger = logging.getLogger(__name__)

INDEX_VERSION = 1
HOLDER_RESTARTS = 20  # ours: a search of minutes may lose a node or two; an index that kills every holder should end the job
TASKS_IN_FLIGHT = 64  # ours: scoring tasks whose results the driver has not merged yet


@dataclass(frozen=True)
class PoolIndex:
    """A sealed index over a pool's embeddings, as tables lie in a workspace."""

    pool: Pool
    embeddings: Sidecar
    config: IndexConfig
    shape: IndexShape
    fingerprint: str

    @property
    def folder(self) -> str:
        """Path of the index under the workspace."""
        return f"indexes/{self.pool.name}-{self.fingerprint[:8]}"

    @property
    def path(self) -> str:
        """Path of the merged index."""
        return f"{self.folder}/index.faiss"

    @property
    def is_sealed(self) -> bool:
        """Whether it is complete."""
        return self.pool.storage.exists(f"{self.folder}/manifest.json")

    @contextmanager
    def opened(self, left_out: LeftOut) -> Iterator[QuantisedIndex]:
        """Hold the codes in an actor (small pools: in this process) while searches go on; nothing of what is left out is found.

        An actor that dies reads the codes again, at most `HOLDER_RESTARTS` times, and what it was asked is asked again.
        """
        if self._is_small:
            codes: CandidateSearch = Codes(load_index(self.pool.storage, self.path), self.config)
            yield QuantisedIndex(self.pool, codes, LocalScorer(self.pool, self.embeddings), self.shape, left_out)
            return
        lives = {"max_restarts": HOLDER_RESTARTS, "max_task_retries": HOLDER_RESTARTS}
        size = _resources(self.config)
        tell_if_no_room(f"search {self.folder}", size["num_cpus"], size.get("num_gpus", 0.0))
        holder = _Holder.options(**size, **lives).remote(self)  # type: ignore[attr-defined]  # what @ray.remote adds
        try:
            yield QuantisedIndex(self.pool, _RemoteCodes(holder), _RemoteScorer(self), self.shape, left_out)
        finally:
            ray.kill(holder)

    @property
    def _is_small(self) -> bool:
        return self.pool.num_rows <= INLINE_ROWS


def build_pool_index(pool: Pool, embeddings: Sidecar, config: IndexConfig) -> PoolIndex:
    """Return the pool's index, made now unless it is there.

    Raises:
        RunConflictError: another driver is making it.
        InputError: there are too few embeddings for its lists.
    """
    index = plan_pool_index(pool, embeddings, config)
    if index.is_sealed:
        return index
    with Lease(pool.storage, f"{index.folder}/lease.json") as lease:
        if index.is_sealed:
            return index
        num_bytes, num_vectors, seconds = _build(index)
        lease.check()
        pool.storage.write_json(
            f"{index.folder}/manifest.json",
            {
                "fingerprint": index.fingerprint,
                "pool": pool.name,
                "pool_digest": pool.digest,
                "embeddings": embeddings.fingerprint,
                "factory": index.shape.factory,
                "vectors": num_vectors,
                "bytes": num_bytes,
                "seconds_by_phase": seconds,  # of the last run
            },
        )
    pool.storage.delete_folder(f"{index.folder}/parts")
    return index


def plan_pool_index(pool: Pool, embeddings: Sidecar, config: IndexConfig) -> PoolIndex:
    """Return the index that `build_pool_index` would make, without making it; how it is searched is no part of its name."""
    dimension = _dimension(pool, embeddings)
    shape = config.shape(pool.num_rows, dimension)
    check_shape(shape)
    settings = {
        "factory": shape.factory,
        **config.model_dump(mode="json", include={"train_per_list", "shards_per_part", "seed"}),
        "versions": faiss_version(),
    }
    digests = {"pool": pool.digest, "embeddings": embeddings.fingerprint}
    return PoolIndex(pool, embeddings, config, shape, fingerprint("index", INDEX_VERSION, settings, digests))


def _dimension(pool: Pool, embeddings: Sidecar) -> int:
    first = next(shard.number for shard in pool.shards if shard.rows)
    return int(embedding_matrix(embeddings.read(first, ["embedding"])["embedding"].slice(0, 0)).shape[1])


def _build(index: PoolIndex) -> tuple[int, int, dict[str, float]]:
    """Train, fill and merge what is missing; return the index's bytes and vectors, and the seconds of each phase."""
    clock = [time.monotonic()]
    storage, pool = index.pool.storage, index.pool
    call = partial(run_tasks, inline=index._is_small, options={"max_retries": MAX_TASK_RETRIES, **_resources(index.config)})
    if not storage.exists(f"{index.folder}/trained.faiss"):
        call(_train, index, [()], title=f"train {index.folder}")
    clock.append(time.monotonic())
    starts = dict(zip((shard.number for shard in pool.shards), first_rows(pool).tolist(), strict=False))
    filled = [(shard.number, starts[shard.number]) for shard in pool.shards if shard.rows]
    step = index.config.shards_per_part
    parts = [filled[start : start + step] for start in range(0, len(filled), step)]
    there = {*storage.list_files(f"{index.folder}/parts", deep=False)}
    missing = [(number, shards) for number, shards in enumerate(parts) if _part_path(index, number) not in there]
    call(_fill, index, missing, title=f"fill {index.folder}")
    clock.append(time.monotonic())
    num_bytes, num_vectors = call(_merge, index, [(len(parts),)], title=f"merge {index.folder}")[0]
    clock.append(time.monotonic())
    seconds = {phase: round(stop - start, 3) for phase, (start, stop) in zip(("train", "fill", "merge"), pairwise(clock), strict=True)}
    return num_bytes, num_vectors, seconds


def _part_path(index: PoolIndex, number: int) -> str:
    return f"{index.folder}/parts/part-{number:05d}.faiss"


def _train(index: PoolIndex) -> None:
    sample = training_sample(index.embeddings, index.config.train_per_list * max(index.shape.nlist, 256), index.config.seed)
    save_index(train_index(sample, index.shape, index.config), index.pool.storage, f"{index.folder}/trained.faiss")


def _fill(index: PoolIndex, number: int, shards: Sequence[tuple[int, int]]) -> None:
    trained = load_index(index.pool.storage, f"{index.folder}/trained.faiss")
    save_index(fill_part(trained, index.embeddings, shards, index.config), index.pool.storage, _part_path(index, number))


def _merge(index: PoolIndex, num_parts: int) -> tuple[int, int]:
    storage = index.pool.storage
    parts = (load_index(storage, _part_path(index, number)) for number in range(num_parts))
    merged = merge_parts(load_index(storage, f"{index.folder}/trained.faiss"), parts)
    return save_index(merged, storage, index.path), int(merged.ntotal)


def _resources(config: IndexConfig) -> dict[str, float]:
    return {"num_cpus": config.num_threads, **({"num_gpus": 1} if config.use_gpu else {})}


@ray.remote
class _Holder:
    """Holds the codes of one index."""

    def __init__(self, index: PoolIndex):
        self._codes = Codes(load_index(index.pool.storage, index.path), index.config)

    def candidates(self, queries: Matrix, depth: int, nprobe: int) -> Rows:
        return self._codes.candidates(queries, depth, nprobe)


@dataclass(frozen=True)
class _RemoteCodes:
    holder: Any

    def candidates(self, queries: Matrix, depth: int, nprobe: int) -> Rows:
        try:
            rows: Rows = ray.get(self.holder.candidates.remote(queries, depth, nprobe))
        except ray.exceptions.RayError as error:
            raise unwrap(error) from error
        return rows


@dataclass(frozen=True)
class _RemoteScorer(CandidateScorer):
    """Scores every shard's candidates in a task of its own, a bounded number at a time."""

    index: PoolIndex

    def score(self, asked: Asked, candidates: Sequence[ShardCandidates]) -> Iterable[Scored]:
        shared, question = ray.put(self.index), ray.put(asked)
        running: deque[Any] = deque()
        try:
            for one in candidates:
                if len(running) >= min(TASKS_IN_FLIGHT, max_running()):
                    yield ray.get(running.popleft())
                running.append(_score.remote(shared, question, one))
            while running:
                yield ray.get(running.popleft())
        except ray.exceptions.RayError as error:
            raise unwrap(error) from error


@ray.remote(max_retries=MAX_TASK_RETRIES)
def _score(index: PoolIndex, asked: Asked, candidates: ShardCandidates) -> Scored:
    return score_candidates(index.pool, index.embeddings, asked, candidates)
