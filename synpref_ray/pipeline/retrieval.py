"""Embedding, exemplars and error-driven selection as steps of a Stage 1 round.

Paper: Sec. 3.2, Step 2 (similar unverified pairs for the errors on gold) and Step 3 (gold exemplars for the judge).
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from synpref_ray.bundled import digest_model, pin_model
from synpref_ray.config import Settings
from synpref_ray.pipeline.gold_tables import ATTRIBUTE_COLUMNS, GoldTables
from synpref_ray.pipeline.pool_index import build_pool_index
from synpref_ray.pipeline.steps import Output, Resources, ShardKey, Step, StepInput, plan_sidecars, run_step
from synpref_ray.reporting.run import Run
from synpref_ray.retrieval.embedder import Embedder, EmbedderConfig, add_embeddings, embeddings_schema
from synpref_ray.retrieval.exemplars import EXEMPLARS_SCHEMA, ExemplarConfig, add_exemplars
from synpref_ray.retrieval.index import IndexConfig, PairIndex
from synpref_ray.retrieval.neighbours import JoinedSearch, NeighbourSearch
from synpref_ray.retrieval.quantised import LeftOut
from synpref_ray.retrieval.select import RetrievalConfig, retrieve_pairs
from synpref_ray.rules.gold import GoldSplit
from synpref_ray.tables.pools import Pool, Shard
from synpref_ray.tables.reading import read_each
from synpref_ray.tables.selection import Piece
from synpref_ray.tables.sidecars import Sidecar, zip_shard
from synpref_ray.versions import versions_of

EMBED_VERSION = 1
EXEMPLARS_VERSION = 1
EMBEDDING = {"embedding": "embedding"}


class EmbedStepConfig(Settings):
    """The embedder and its workers."""

    embedder: EmbedderConfig = EmbedderConfig()
    dimension: int = 384  # of all-MiniLM-L6-v2; 1024 for Qwen3-Embedding-0.6B and jina-embeddings-v3
    num_workers: int = 1
    """Processes that embed."""
    min_workers: int = Field(default=0, ge=0)  # ours: as of the scorer
    """Workers that a pool begins with and falls back to; 0: all of them from the start."""
    num_gpus_per_worker: float = 0.0
    """GPUs that Ray sets aside for each worker."""
    max_shard_seconds: float = Field(default=6 * 3600.0, ge=0)  # ours: as of the scorer
    """Seconds after which a worker that is still at one shard is ended and the shard run again; 0: never (docs/faults.md)."""

    @property
    def schema(self) -> pa.Schema:
        """Schema of the sidecar `embeddings`."""
        return embeddings_schema(self.dimension)


class EmbedWorker:
    """Holds one embedder."""

    def __init__(self, config: EmbedderConfig):
        self._embedder = Embedder.load(config)

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        return add_embeddings(shard, self._embedder), {}


def embed_pools(run: Run, name: str, pools: Sequence[tuple[Pool, Sidecar]], config: EmbedStepConfig) -> list[Sidecar]:
    """Make the sidecar `embeddings` of every (pool, attributes)."""
    result = run_step(_embed_step(name, config), [_to_embed(*pair) for pair in pools])
    run.step(name, rows=result.rows, computed=result.rows_computed, rejected=result.rejected, seconds=result.seconds)
    return [sidecars[0] for sidecars in result.sidecars]


def plan_embeddings(pool: Pool, attributes: Sidecar, config: EmbedStepConfig) -> Sidecar:
    """Return the embeddings that `embed_pools` would make of a pool, without making them."""
    return plan_sidecars(_embed_step("", config), [_to_embed(pool, attributes)])[0][0]


def _to_embed(pool: Pool, attributes: Sidecar) -> StepInput:
    return StepInput(pool, ("prompt",), ((attributes, ATTRIBUTE_COLUMNS),))


def _embed_step(title: str, config: EmbedStepConfig) -> Step:
    return Step(
        name="embed",
        title=title,
        version=EMBED_VERSION,
        worker=EmbedWorker,
        outputs=(Output("embeddings", config.schema),),
        settings={
            "max_window_tokens": config.embedder.max_window_tokens,
            **config.embedder.model_dump(mode="json", include={"prefix", "task", "dtype"}, exclude_defaults=True),
            "versions": versions_of("torch", "transformers"),
        },
        digests={"model": digest_model(config.embedder.model)},
        worker_arguments=lambda _: {"config": config.embedder.model_copy(update={"model": pin_model(config.embedder.model)})},
        resources=Resources(
            config.num_workers, num_gpus=config.num_gpus_per_worker, min_workers=config.min_workers, max_shard_seconds=config.max_shard_seconds
        ),
        model=config.embedder.model,
        max_failed_fraction=1.0,  # what has no attributes was counted by the tagger
    )


@lru_cache(maxsize=1)
def _index_working_gold(pool: Pool, embeddings: Sidecar, human: Sidecar, index: IndexConfig) -> PairIndex:
    """Return an exact index over working gold, built once a process: a stateless step makes its worker anew for every shard."""
    table = read_embedded(pool, embeddings, {"gold_split": "gold_split"}, human)
    return PairIndex.build(table.filter(pc.equal(table["gold_split"], GoldSplit.WORKING.value)), _on_cpu(index))


def _on_cpu(index: IndexConfig) -> IndexConfig:
    """Return the settings for a process that asked Ray for no GPU."""
    return index.model_copy(update={"use_gpu": False})


class ExemplarWorker:
    """Holds an exact index over working gold, and nothing else; on a CPU, since gold is small and these workers ask for no GPU."""

    def __init__(self, gold: GoldTables, config: ExemplarConfig, index: IndexConfig):
        self._index = _index_working_gold(gold.pool, gold.embeddings, gold.human, index)
        self._config = config

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        return add_exemplars(shard, self._index, self._config), {}


def find_exemplars(
    run: Run, name: str, pools: Sequence[tuple[Pool, Sidecar]], gold: GoldTables, max_exemplars: int, index: IndexConfig
) -> list[Sidecar]:
    """Make the sidecar `exemplars` of every (pool, embeddings): nearest working gold of other prompts."""
    result = run_step(_exemplar_step(name, gold, max_exemplars, index), [_to_find_exemplars(*pair) for pair in pools])
    run.step(name, rows=result.rows, computed=result.rows_computed, rejected=result.rejected, seconds=result.seconds)
    return [sidecars[0] for sidecars in result.sidecars]


def plan_exemplars(pool: Pool, embeddings: Sidecar, gold: GoldTables, max_exemplars: int, index: IndexConfig) -> Sidecar:
    """Return the exemplars that `find_exemplars` would make of a pool, without making them."""
    return plan_sidecars(_exemplar_step("", gold, max_exemplars, index), [_to_find_exemplars(pool, embeddings)])[0][0]


def _to_find_exemplars(pool: Pool, embeddings: Sidecar) -> StepInput:
    return StepInput(pool, ("prompt_group",), ((embeddings, {**EMBEDDING, "drop_reason": "drop_reason"}),))


def _exemplar_step(title: str, gold: GoldTables, max_exemplars: int, index: IndexConfig) -> Step:
    config = ExemplarConfig(max_exemplars=max_exemplars)
    return Step(
        name="exemplars",
        title=title,
        version=EXEMPLARS_VERSION,
        worker=ExemplarWorker,
        outputs=(Output("exemplars", EXEMPLARS_SCHEMA),),
        settings=config.model_dump(mode="json"),
        digests={"gold": gold.pool.digest, "embeddings": gold.embeddings.fingerprint, "human": gold.human.fingerprint},
        worker_arguments=lambda _: {"gold": gold, "config": config, "index": index},
        max_failed_fraction=1.0,
    )


def read_embedded(pool: Pool, embeddings: Sidecar, more: Mapping[str, str] | None = None, beside: Sidecar | None = None) -> pa.Table:
    """Return pair_id, prompt_group, embedding (and columns of one more sidecar) of a whole pool; for what one node indexes."""
    sidecars: list[tuple[Sidecar, Mapping[str, str]]] = [(embeddings, EMBEDDING)]
    if beside is not None and more:
        sidecars.append((beside, more))
    tables = [zip_shard(pool, shard.number, ["prompt_group"], sidecars) for shard in pool.shards]
    return pa.concat_tables(tables)


@dataclass(frozen=True)
class RetrievedPairs:
    """What the errors on gold called for: rows by shard of the unverified pool, in pool order, and the record of who called for what."""

    pieces: list[Piece]
    record: pa.Table


def select_for_errors(
    gold: GoldTables,
    rewards: Sidecar,
    candidates: Sequence[tuple[Pool, Sidecar]],
    already_selected: Set[str],
    config: RetrievalConfig,
    index: IndexConfig,
    max_pairs: int,
) -> RetrievedPairs:
    """Retrieve the unverified pairs that the best RM's errors on working gold call for.

    Our choice: pairs of gold prompts are left out, since they can become neither silver nor gold of the other part; above `max_pairs` the most wrong
    gold pairs' calls are served first.

    Args:
        candidates: the parts of the unverified pool, each with its embeddings.
    """
    with open_neighbours(candidates, LeftOut.of(gold.prompt_groups(), already_selected), index) as neighbours:
        record = retrieve_pairs(read_scored_gold(gold, rewards), neighbours, already_selected, config).slice(0, max_pairs)
    ids = set(record["pair_id"].to_pylist())
    return RetrievedPairs([piece for pool, _ in candidates for piece in pieces_of(pool, ids)], record)


def read_scored_gold(gold: GoldTables, rewards: Sidecar) -> pa.Table:
    """Return working gold with what retrieval for its errors needs: pair_id, prompt_group, embedding, human_verdict, gold_split, p_chosen."""
    beside: list[tuple[Sidecar, Mapping[str, str]]] = [
        (gold.embeddings, EMBEDDING),
        (gold.human, {"human_verdict": "human_verdict", "gold_split": "gold_split"}),
        (rewards, {"p_chosen": "p_chosen"}),
    ]
    table = pa.concat_tables([zip_shard(gold.pool, shard.number, ["prompt_group"], beside) for shard in gold.pool.shards])
    return table.filter(pc.equal(table["gold_split"], GoldSplit.WORKING.value))


@contextmanager
def open_neighbours(candidates: Sequence[tuple[Pool, Sidecar]], left_out: LeftOut, index: IndexConfig) -> Iterator[NeighbourSearch]:
    """Search the embedded pairs of a pool's parts, without what is left out: exactly in this process, or by a `PoolIndex` for each large part.

    Which it is `IndexConfig.search_exactly` says, by the pool's size and not the parts'; a part without pairs is passed over.
    """
    parts = [(pool, embeddings) for pool, embeddings in candidates if pool.num_rows]
    exactly = index.search_exactly([pool.num_rows for pool, _ in parts])
    with ExitStack() as opened:
        searches: list[NeighbourSearch] = []
        tables = [read_embedded(*part) for part, exact in zip(parts, exactly, strict=True) if exact]
        if tables:
            pairs = pa.concat_tables(tables)
            searches.append(PairIndex.build(pairs.filter(pa.array(left_out.allows(pairs))), _on_cpu(index)))
        for (pool, embeddings), exact in zip(parts, exactly, strict=True):
            if not exact:
                searches.append(opened.enter_context(build_pool_index(pool, embeddings, index).opened(left_out)))
        yield searches[0] if len(searches) == 1 else JoinedSearch(searches)


def pieces_of(pool: Pool, pair_ids: Set[str]) -> list[Piece]:
    """Return where the named pairs stand in the pool, in pool order."""
    wanted = pa.array(sorted(pair_ids), pa.string())

    def rows_of(shard: Shard) -> list[int]:
        found = pc.is_in(pool.read(shard.number, ["pair_id"])["pair_id"], value_set=wanted)
        rows: list[int] = np.flatnonzero(np.asarray(found)).tolist()
        return rows

    return [Piece(pool, shard.number, rows) for shard, rows in zip(pool.shards, read_each(rows_of, pool.shards), strict=True) if rows]
