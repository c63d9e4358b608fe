"""Stage 1 with deterministic stand-ins for its models, and everything else real: steps, tables, rules, retrieval, records. No Ray, no engine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from synpref_ray.llm.judge import VOTES_SCHEMA
from synpref_ray.pipeline import stage1, unverified
from synpref_ray.pipeline.job import JobConfig
from synpref_ray.pipeline.judge_steps import JudgedPool, JudgeStepConfig
from synpref_ray.pipeline.stage1 import Stage1Config, run_stage1
from synpref_ray.pipeline.steps import Output, ShardKey, Step, StepInput, StepResult, run_step
from synpref_ray.pipeline.tag_steps import TaggedPools
from synpref_ray.reporting.run import Run
from synpref_ray.retrieval.embedder import embeddings_schema
from synpref_ray.schema import ATTRIBUTES_SCHEMA, REWARDS_SCHEMA, Verdict, stable_uniform
from synpref_ray.tables.models import StoredModel
from synpref_ray.tables.pools import Pool, commit_pool, content_digest, open_pool, pool_exists, write_pool_shard
from synpref_ray.tables.sidecars import Sidecar
from synpref_ray.tables.storage import Storage
from tests.builders import make_pairs

DIMENSION = 4
Answer = Callable[[dict[str, Any]], dict[str, Any]]


class Killed(Exception):
    """What a model raises in the place of a kill."""


class StandIn:
    """Answers row by row, and counts the shards; after `kill_after` shards of all models it dies."""

    def __init__(self, answer: Answer, schemas: Sequence[tuple[str, pa.Schema]], models: "Models"):
        self._answer = answer
        self._schemas = schemas
        self._models = models

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        self._models.num_shards += 1
        if self._models.num_shards > self._models.kill_after:
            raise Killed
        rows = [self._answer(row) for row in shard.to_pylist()]
        columns: dict[str, pa.Array] = {"pair_id": shard["pair_id"]}
        for prefix, schema in self._schemas:
            columns |= {f"{prefix}{f.name}": pa.array([row.get(f"{prefix}{f.name}") for row in rows], f.type) for f in schema if f.name != "pair_id"}
        return pa.table(columns), {}


@dataclass
class Models:
    """The stand-ins of one test; `num_shards` counts what they computed, `trained` the models trained."""

    kill_after: int = 10**9
    num_shards: int = 0
    trained: list[str] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put them in the place of Stage 1's models."""
        for room, names in ((unverified, ("tag_pools", "embed_pools")), (stage1, ("judge_pools", "score_pools", "train_model"))):
            for name in names:
                monkeypatch.setattr(room, name, getattr(self, name))

    def _run(self, name: str, answer: Answer, outputs: Sequence[Output], inputs: Sequence[StepInput], digests: Mapping[str, str]) -> StepResult:
        return run_step(self._step(name, answer, outputs, digests), inputs)

    def _step(self, name: str, answer: Answer, outputs: Sequence[Output], digests: Mapping[str, str]) -> Step:
        schemas = [(output.prefix, output.schema) for output in outputs]
        arguments = {"answer": answer, "schemas": schemas, "models": self}
        return Step(name, 1, StandIn, tuple(outputs), {}, digests=digests, worker_arguments=lambda _: arguments, max_failed_fraction=1.0)

    def tag_pools(self, run: Run, name: str, pools: Sequence[Pool], taggers: Any) -> TaggedPools:
        tags = {"task_category": "math", "objectivity": "objective", "controversiality": "low", "desired_attributes": "short"}
        made = self._run("tag", lambda _: tags, [Output("attributes", ATTRIBUTES_SCHEMA)], [StepInput(pool, ()) for pool in pools], {})
        sidecars = [outputs[0] for outputs in made.sidecars]
        return TaggedPools(sidecars, {"tagger": sidecars})

    def embed_pools(self, run: Run, name: str, pools: Sequence[tuple[Pool, Sidecar]], config: Any) -> list[Sidecar]:
        def embed(row: dict[str, Any]) -> dict[str, Any]:
            vector = np.array([stable_uniform(0, row["pair_id"], f"e{place}") - 0.5 for place in range(DIMENSION)])
            return {"embedding": (vector / np.linalg.norm(vector)).tolist()}

        inputs = [StepInput(pool, (), ((attributes, {"task_category": "task_category"}),)) for pool, attributes in pools]
        return [outputs[0] for outputs in self._run("embed", embed, [Output("embeddings", embeddings_schema(DIMENSION))], inputs, {}).sidecars]

    def judge_pools(self, run: Run, name: str, pools: Sequence[JudgedPool], gold: Any, config: JudgeStepConfig) -> list[Sidecar]:
        judge = config.judge.judge

        def vote(row: dict[str, Any]) -> dict[str, Any]:
            if row.get("human_verdict") is not None:
                return {"drop_reason": "not_selected"}
            verdict = Verdict.CHOSEN if stable_uniform(0, row["pair_id"], judge) < 0.8 else Verdict.REJECTED
            origin = {"judge": judge, "model": "stand-in", "revision": "1", "prompt_version": "1", "raw": "1", "logprob": -0.5}
            return {"votes": [{**origin, "order": order, "sample": 0, "verdict": verdict.value} for order in (0, 1)], "num_exemplars": 0}

        inputs = [
            StepInput(
                p.pool, (), ((p.exemplars, {"exemplar_ids": "exemplar_ids"}), *(((p.human, {"human_verdict": "human_verdict"}),) if p.human else ()))
            )
            for p in pools
        ]
        made = self._run("judge", vote, [Output(f"votes.{judge}", VOTES_SCHEMA)], inputs, {"gold": gold.pool.digest})
        return [outputs[0] for outputs in made.sidecars]

    def score_pools(self, run: Run, name: str, pools: Sequence[Pool], models: Mapping[str, StoredModel], *_: Any) -> StepResult:
        prefixes = {short: f"{short}." if len(models) > 1 else "" for short in models}

        def score(row: dict[str, Any]) -> dict[str, Any]:
            found = {}
            for short, model in models.items():
                margin = 4 * stable_uniform(0, row["pair_id"], model.digest) - 1.5
                values = {"reward_chosen": margin, "reward_rejected": 0.0, "margin": margin, "p_chosen": float(1 / (1 + np.exp(-margin)))}
                found |= {f"{prefixes[short]}{column}": value for column, value in values.items()}
            return found

        outputs = [Output(f"rewards.{short}", REWARDS_SCHEMA, prefix) for short, prefix in prefixes.items()]
        return self._run("score", score, outputs, [StepInput(pool, ()) for pool in pools], {short: model.digest for short, model in models.items()})

    def train_model(self, run: Run, storage: Storage, name: str, *, train: Any, gold: Any, **_: Any) -> tuple[StoredModel, Any]:
        digest = content_digest([name, train[1], gold[1] if gold else ""])
        model = StoredModel(storage, f"{name}-{digest[:8]}", digest)
        if not storage.exists(f"{model.path}/stand-in.json"):
            self.trained.append(name)
            for read, _ in filter(None, (train, gold)):
                read()
            storage.write_json(f"{model.path}/stand-in.json", {})
        return model, Record()


class Record:
    """The record of a training that was none."""

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """Return what a round keeps of it."""
        return {"num_pairs": 1}


def add_shards(storage: Storage, name: str, sizes: Sequence[int]) -> Pool:
    """Commit a pool, or its next version, with one more shard for each size."""
    before = list(open_pool(storage, name).shards) if pool_exists(storage, name) else []
    numbers = range(len(before), len(before) + len(sizes))
    new = [write_pool_shard(storage, name, n, make_pairs(size, f"{name} {n}")) for n, size in zip(numbers, sizes, strict=True)]
    return commit_pool(storage, name, "f" * 32, [*before, *new], {})


def write_truth(path: Path, storage: Storage) -> Path:
    """Write the truth of the seed and the unverified pool: three labels of four are right."""
    names = [pair_id for pool in ("seed", "unverified") for pair_id in open_pool(storage, pool).read_all(["pair_id"])["pair_id"].to_pylist()]
    verdicts = ["chosen" if stable_uniform(0, pair_id, "truth") < 0.75 else "rejected" for pair_id in names]
    pq.write_table(pa.table({"pair_id": names, "verdict": verdicts}), path)
    return path


def stage1_config(workspace: Path | str, truth: Path, **changes: Any) -> Stage1Config:
    """Return a Stage 1 of two rounds over the stand-ins; the models that it names are never loaded."""
    engine = {"engine": {"model": "stand-in"}}
    values = {
        "workspace": str(workspace),
        "taggers": [engine],
        "judges": [{**engine, "judge": {"judge": "j", "max_exemplars": 2}}],
        "train": {"backbone": "stand-in"},
        "gold_train": {"backbone": "stand-in"},
        "embed": {"dimension": DIMENSION},
        "annotator": {"kind": "simulated", "path": str(truth), "seed_pairs": 12, "round_pairs": 3},
        "stop": {"max_rounds": 2},
        "retrieval": {"k_max": 2},
        "gathered_shard_pairs": 4,
        **changes,
    }
    return Stage1Config.model_validate(values)


def run_rounds(config: Stage1Config) -> tuple[str, Run]:
    """Run Stage 1 in this process; return its closing table and the run."""
    run = Run(config.storage, "stage1", JobConfig(workspace=config.workspace))
    return run_stage1(config, run), run
