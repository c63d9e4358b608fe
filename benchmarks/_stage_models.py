"""Stand-ins for the models of Stage 2, and a synthetic workspace for it: everything else of a run is the pipeline's own.

What a stand-in says follows from the pair_id, the text or the request's key alone, so results do not depend on workers or order; all take a few
microseconds a pair, whatever the pair. The scorer gives both models' rewards (the best RM disagrees with about three pairs in ten, the gold RM with
two of these), the tagger always the same tag, the judge a reply by the request's key, the embedder 384 numbers by the text's hash. Prompts, journals,
parsing, votes, trust and exemplar search are real.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from synpref_ray.llm.engine import EngineCounts, ModelIdentity, Reply, Request
from synpref_ray.pipeline import judge_steps, retrieval, scoring, tag_steps
from synpref_ray.pipeline.gold import LabelledPool, gather_gold, gold_record
from synpref_ray.pipeline.judge_steps import JudgeStepConfig, JudgeWorker
from synpref_ray.pipeline.llm_steps import EngineMeter
from synpref_ray.pipeline.stage1 import STAGE1_RECORD
from synpref_ray.pipeline.stage2 import Stage2Config
from synpref_ray.pipeline.steps import ShardKey
from synpref_ray.pipeline.tag_steps import TagStepConfig, TagWorker
from synpref_ray.retrieval.embedder import add_embeddings, embeddings_schema
from synpref_ray.rules.gold import GoldConfig, split_gold
from synpref_ray.schema import ATTRIBUTES_SCHEMA, HUMAN_SCHEMA, POOL_SCHEMA, REWARDS_SCHEMA, comparison_id, pair_id, prompt_group
from synpref_ray.tables.pools import Shard, commit_pool, write_pool_shard
from synpref_ray.tables.sidecars import Sidecar
from synpref_ray.tables.storage import Storage

DIMENSION = 384
BEST_DISAGREES, GOLD_DISAGREES = 0.3, 0.2
TAG = (
    '{"task_category":"advice_seeking","objectivity":"subjective","controversiality":"low",'
    '"desired_attributes":"clear and short","annotation_guideline":"Prefer the reply that answers what was asked."}'
)


def hashed(pair_ids: pa.Array) -> npt.NDArray[np.float64]:
    """Return one number in [0, 1) a pair, from its id (hex digits)."""
    names = np.array(pair_ids.to_numpy(zero_copy_only=False), dtype="S32")
    digits = names.view(np.uint8).reshape(-1, 32)[:, 8:24].astype(np.uint64)
    mixed = (digits * (np.arange(1, 17, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))).sum(axis=1)
    return np.asarray((mixed >> np.uint64(11)).astype(np.float64) / float(1 << 53))


def rewards_of(pair_ids: pa.Array, model: str) -> pa.Table:
    """Return a model's rewards (`REWARDS_SCHEMA`)."""
    share = BEST_DISAGREES if model.startswith("best") else GOLD_DISAGREES
    margin = (4 * (hashed(pair_ids) - share)).astype(np.float32)
    columns = [pair_ids, margin / 2, -margin / 2, margin, 1 / (1 + np.exp(-margin)), pa.nulls(len(pair_ids), pa.string())]
    return pa.table(columns, schema=REWARDS_SCHEMA)


class StandInScorer:
    """In place of `ScoreWorker`."""

    def __init__(self, models: Sequence[tuple[str, Any]], config: scoring.ScoreConfig):
        self._prefixes = [prefix for prefix, _ in models]

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        ids = shard["pair_id"].combine_chunks()
        result = shard.select(["pair_id"])
        for prefix in self._prefixes:
            rewards = rewards_of(ids, prefix)
            for name in REWARDS_SCHEMA.names[1:]:
                result = result.append_column(prefix + name, rewards[name])
        return result, {"scored_pairs": float(len(ids) * len(self._prefixes))}


class StandInEngine:
    """In place of a language model."""

    def __init__(self) -> None:
        self._replies = 0

    def generate(
        self, requests: Sequence[Request], on_finished: Callable[[Reply], None] | None = None, on_idle: Callable[[], None] | None = None
    ) -> list[Reply]:
        """Answer at once: with a choice by the request's key, or the one tag."""
        replies = []
        for request in requests:
            text = request.choices[int(request.key[:8], 16) % len(request.choices)] if request.choices else TAG
            if request.reply_start:
                text = text.removeprefix(request.reply_start)
            replies.append(Reply(key=request.key, text=text, finish_reason="stop", prompt_tokens=0, output_tokens=0))
            if on_finished is not None:
                on_finished(replies[-1])
        self._replies += len(replies)
        return replies

    def count_tokens(self, text: str) -> int:
        """Count four characters as a token."""
        return len(text) // 4

    def counts(self) -> EngineCounts:
        """Return the replies given."""
        return EngineCounts(
            requests_sent=self._replies, replies=self._replies, prompt_tokens=0, cached_prompt_tokens=0, output_tokens=0, start_seconds=0.0
        )

    def identity(self) -> ModelIdentity:
        """Be a stand-in."""
        return ModelIdentity(model="stand-in", revision="1")


class StandInTagger(TagWorker):
    """`TagWorker` with the stand-in for its engine."""

    def __init__(self, config: TagStepConfig, tables: list[Sidecar], budget: Any = None):
        self._config, self._tables, self._engine = config, tables, StandInEngine()  # type: ignore[assignment]
        self._meter = EngineMeter(self._engine)


class _JudgeConfig(JudgeStepConfig):
    def open_engine(self, budget: Any) -> Any:
        return StandInEngine()


class StandInJudge(JudgeWorker):
    """`JudgeWorker` with the stand-in for its engine."""

    def __init__(self, config: JudgeStepConfig, gold: Any, tables: list[Sidecar], budget: Any = None):
        super().__init__(_JudgeConfig.model_validate(config.model_dump()), gold, tables, budget)


class StandInEmbedder:
    """In place of `EmbedWorker`."""

    dimension = DIMENSION

    def __init__(self, config: Any = None):
        pass

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return unit vectors by the texts' hashes."""
        numbers = [np.frombuffer(hashlib.shake_128(text.encode()).digest(DIMENSION), dtype=np.uint8) for text in texts]
        vectors = np.array(numbers, dtype=np.float32).reshape(-1, DIMENSION) - 127.5
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        return add_embeddings(shard, self), {}


@contextmanager
def stand_ins() -> Iterator[None]:
    """Let the steps that this process plans use the stand-ins."""
    places: list[tuple[Any, str, Any]] = [
        (scoring, "ScoreWorker", StandInScorer),
        (tag_steps, "TagWorker", StandInTagger),
        (judge_steps, "JudgeWorker", StandInJudge),
        (retrieval, "EmbedWorker", StandInEmbedder),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in places]
    for module, name, worker in places:
        setattr(module, name, worker)
    try:
        yield
    finally:
        for module, name, worker in before:
            setattr(module, name, worker)


class PairMaker:
    """Seeded pairs whose texts are cut from one long text: 2.3 KB a row on average, lengths lognormal as in real sets."""

    def __init__(self, seed: int):
        chance = random.Random(seed)
        vocabulary = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(3000)]
        self._text = " ".join(chance.choice(vocabulary) for _ in range(300_000))
        self._seed = seed

    def rows(self, number: int, count: int, topic: str) -> pa.Table:
        """Return shard `number` (`POOL_SCHEMA`)."""
        rng = np.random.default_rng([self._seed, number, len(topic)])
        lengths = np.minimum(30_000, rng.lognormal(6.25, 0.8, size=(count, 3))).astype(int) + 40
        starts = rng.integers(0, len(self._text) - 40_000, size=(count, 3))
        rows = []
        for row in range(count):
            asked, chosen, rejected = (
                self._text[start : start + length] for start, length in zip(starts[row].tolist(), lengths[row].tolist(), strict=True)
            )
            prompt = [{"role": "user", "content": f"{topic} {number}-{row}: {asked}"}]
            ids = {"pair_id": pair_id(prompt, chosen, rejected), "comparison_id": comparison_id(prompt, chosen, rejected)}
            rest = {"prompt_group": prompt_group(prompt), "source": topic, "source_id": str(row), "contradicted": False}
            rows.append({**ids, **rest, "prompt": prompt, "chosen": chosen, "rejected": rejected})
        return pa.Table.from_pylist(rows, schema=POOL_SCHEMA)


@cache
def _maker(seed: int) -> PairMaker:
    return PairMaker(seed)


def make_shard(storage: Storage, name: str, seed: int, number: int, count: int) -> Shard:
    """Write one shard of a synthetic pool."""
    return write_pool_shard(storage, name, number, _maker(seed).rows(number, count, name))


def write_stage1(storage: Storage, num_gold: int, seed: int) -> None:
    """Write what Stage 2 reads of Stage 1: gold with its tables, and the record; the models are names alone."""
    pool = commit_pool(storage, "seed", "synthetic", [make_shard(storage, "seed", seed, 0, num_gold)], {})
    config, ids = GoldConfig(), pool.read(0)["pair_id"].to_pylist()
    splits = split_gold(pool.read(0)["prompt_group"], config).to_pylist()
    human = [
        {"pair_id": name, "human_verdict": "chosen" if place % 4 else "rejected", "annotator": "synthetic", "simulated": True, "gold_split": split}
        for place, (name, split) in enumerate(zip(ids, splits, strict=True))
    ]
    tags = [{"pair_id": name, "task_category": "advice_seeking", "objectivity": "subjective", "controversiality": "low"} for name in ids]
    vectors = [{"pair_id": name, "embedding": vector.tolist()} for name, vector in zip(ids, StandInEmbedder().embed(ids), strict=True)]
    schema = embeddings_schema(DIMENSION)
    labelled = LabelledPool(
        pool,
        _seal(Sidecar(pool, "attributes", "a" * 32), pa.Table.from_pylist(tags, schema=ATTRIBUTES_SCHEMA)),
        _seal(Sidecar(pool, "embeddings", "b" * 32), pa.Table.from_pylist(vectors, schema=schema)),
        _seal(Sidecar(pool, "human", "c" * 32), pa.Table.from_pylist(human, schema=HUMAN_SCHEMA)),
    )
    gold = gather_gold(storage, "gold-r00", [labelled], config, schema)
    models = {name: {"name": name.removesuffix("_rm"), "digest": name[0] * 32} for name in ("best_rm", "gold_rm")}
    storage.write_json(STAGE1_RECORD, {**models, "gold": gold_record(gold), "simulated_gold": True})


def _seal(sidecar: Sidecar, table: pa.Table) -> Sidecar:
    sidecar.write(0, table)
    manifest = {"pool_digest": sidecar.pool.digest, "fingerprint": sidecar.fingerprint, "rejected": {}}
    sidecar.pool.storage.write_json(f"{sidecar.folder}/manifest.json", manifest)
    return sidecar


def stage2_config(storage: Storage, workers: int, **changes: Any) -> Stage2Config:
    """Return a config of Stage 2 for the stand-ins; engines are named, and never opened."""
    engine = {"model": "HuggingFaceTB/SmolLM2-135M-Instruct"}
    return Stage2Config.model_validate(
        {
            "workspace": storage.url,
            "taggers": [{"engine": engine, "num_workers": workers}],
            "judges": [{"engine": engine, "num_workers": workers, "judge": {"judge": "stand-in", "max_input_tokens": 100_000}}],
            "embed": {"num_workers": workers, "dimension": DIMENSION},
            "score": {"num_workers": workers},
            "parity": {"enabled": False},
            **changes,
        }
    )
