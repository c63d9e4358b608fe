"""Deterministic stand-ins for the models of Stage 1 and Stage 2. Everything around them is real: jobs, steps, actors, storage, leases, HTTP.

A stand-in reads the truth of the embedded example, is wrong on a fixed part of it, and depends on nothing but what it is asked: so tables made by
any number of killed workers must be byte for byte those of a quiet run. Each computed shard and training step is a line in a log.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from synpref_ray.llm.prompts import quote
from synpref_ray.pipeline import retrieval, scoring, training
from synpref_ray.pipeline.steps import ShardKey
from synpref_ray.retrieval.embedder import ATTRIBUTES, embeddings_schema
from synpref_ray.reward.checkpoints import TrainingFolder
from synpref_ray.reward.training_config import TrainConfig
from synpref_ray.reward.training_data import TrainingData
from synpref_ray.reward.training_record import TrainingRecord
from synpref_ray.schema import DropReason, stable_uniform
from synpref_ray.tables.models import StoredModel
from tests.llm.http_server import Answer, Seen, chat

DIMENSION = 8
SHARD_SECONDS = 0.3
TRAINING_STEPS = 8
CATEGORIES = ("math", "coding_and_debugging", "reasoning", "other")


@cache
def read_truth(path: str) -> dict[str, bool]:
    """Return for every pair of the example whether its label is right."""
    return {row["pair_id"]: row["verdict"] == "chosen" for row in pq.read_table(path, columns=["pair_id", "verdict"]).to_pylist()}


def log_line(log: str, line: str) -> None:
    """Append a line; whole, whoever else writes."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{line}\n".encode())
    os.close(descriptor)


class StandInScorer:
    """Rewards that are right about nine pairs in ten, others for every model."""

    def __init__(self, log: str, truth: str, models: Sequence[tuple[str, StoredModel | str]], config: scoring.ScoreConfig):
        self._log, self._truth, self._models = log, truth, models

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        time.sleep(SHARD_SECONDS)
        log_line(self._log, f"score {','.join(prefix for prefix, _ in self._models)} {key.table} {key.number} {shard.num_rows}")
        truth, ids = read_truth(self._truth), shard["pair_id"].to_pylist()
        result = shard.select(["pair_id"])
        for prefix, model in self._models:
            name = model.digest if isinstance(model, StoredModel) else model
            right = [truth[pair_id] == (stable_uniform(0, pair_id, f"{name} right") < 0.9) for pair_id in ids]
            size = [0.1 + 3 * stable_uniform(0, pair_id, f"{name} size") for pair_id in ids]
            margin = np.asarray([value if sign else -value for value, sign in zip(size, right, strict=True)], dtype=np.float32)
            p_chosen = (1.0 / (1.0 + np.exp(-margin.astype(np.float64)))).astype(np.float32)
            columns = {"reward_chosen": margin / 2, "reward_rejected": -margin / 2, "margin": margin, "p_chosen": p_chosen}
            for column, values in columns.items():
                result = result.append_column(prefix + column, pa.array(values, pa.float32()))
            result = result.append_column(f"{prefix}drop_reason", pa.nulls(len(ids), pa.string()))
        return result, {"scored_pairs": float(len(ids))}


class StandInEmbedder:
    """Unit vectors from a hash of the prompt."""

    def __init__(self, log: str, config: Any):
        self._log = log

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        time.sleep(SHARD_SECONDS)
        log_line(self._log, f"embed {key.table} {key.number} {shard.num_rows}")
        tagged = [any(row.values()) for row in shard.select(list(ATTRIBUTES)).to_pylist()]
        digests = [hashlib.blake2b(json.dumps(prompt).encode(), digest_size=DIMENSION).digest() for prompt in shard["prompt"].to_pylist()]
        vectors = np.asarray([list(digest) for digest in digests], dtype=np.float64) - 127.5
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        missing = pa.array([not has_any for has_any in tagged])
        embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float32).reshape(-1)), DIMENSION, mask=missing)
        reasons = pa.array([None if has_any else DropReason.NO_ATTRIBUTES.value for has_any in tagged], pa.string())
        return pa.table([shard["pair_id"].combine_chunks(), embedding, reasons], schema=embeddings_schema(DIMENSION)), {}


def train_on_ray(log: str, data: TrainingData, config: TrainConfig, folder: TrainingFolder, storage_dir: str, watch: Any = None) -> TrainingRecord:
    """Train for a few seconds in a task that goes on where a killed one stopped."""
    ray.get(ray.remote(max_retries=5)(train_stand_in).remote(log, folder))
    return TrainingRecord(
        config=config, versions={}, template_digest=data.template_digest, shares_prefixes=True, num_pairs=data.train.pairs,
        num_dropped=data.train.dropped, num_gold_pairs=data.chosen_by.pairs, num_gold_dropped=data.chosen_by.dropped, num_workers=1, steps=[],
        evaluations=[], chosen_step=TRAINING_STEPS, gold_accuracy=None, gold_loss=None, num_sequence_tokens=0, num_unique_tokens=0,
        padding_fraction=0.0, shared_fraction=0.0, seconds={},
    )  # fmt: skip


def train_stand_in(log: str, folder: TrainingFolder) -> None:
    """Do the steps that no earlier worker has sealed."""
    for step in range(1, TRAINING_STEPS + 1):
        seal = f"{folder.path}/stand-in/{step}"
        if folder.storage.exists(seal):
            continue
        time.sleep(SHARD_SECONDS)
        log_line(log, f"train {folder.path} {step}")
        folder.storage.write_bytes(seal, b"done")


def make_stand_in_model(folder: TrainingFolder, record: TrainingRecord, output_dir: str) -> None:
    """Write a model whose weights are a digest of all that went into it: its name holds the fingerprint."""
    path = Path(output_dir)
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"stand_in": folder.path}))
    (path / "model.safetensors").write_bytes(hashlib.blake2b(folder.path.encode()).digest())
    (path / training.RECORD_FILE).write_text(record.model_dump_json(indent=1))


class _Given:
    """A worker class with its first arguments; a partial has no name for Ray's dashboard."""

    def __init__(self, made: Callable[..., Any], *arguments: str):
        self._made, self._arguments = made, arguments

    def __call__(self, *more: Any, **named: Any) -> Any:
        return self._made(*self._arguments, *more, **named)


def use_stand_ins(log: str, truth: str) -> None:
    """Put the stand-ins in place of the models of this process's jobs."""
    scoring.ScoreWorker = _Given(StandInScorer, log, truth)  # type: ignore[assignment, misc]
    retrieval.EmbedWorker = _Given(StandInEmbedder, log)  # type: ignore[assignment, misc]
    training.run_on_ray = _Given(train_on_ray, log)  # type: ignore[assignment]
    training.make_model = make_stand_in_model


class LanguageModel:
    """The script of an endpoint that tags by a hash of the prompt, and judges by the truth, wrong in one order of one pair in ten."""

    def __init__(self, seconds: float = 0.15):
        self._seconds = seconds
        self._pairs: dict[tuple[str, str], tuple[str, bool]] = {}

    def know(self, pairs: Sequence[Mapping[str, Any]], truth: str) -> None:
        """Learn which of the pairs are labelled right."""
        right = read_truth(truth)
        known = (pair for pair in pairs if pair["pair_id"] in right)
        self._pairs = {(quote(pair["chosen"]), quote(pair["rejected"])): (pair["pair_id"], right[pair["pair_id"]]) for pair in known}

    def __call__(self, seen: Seen, number: int) -> Answer:
        time.sleep(self._seconds)
        prompt = "".join(message["content"] for message in seen.body["messages"])
        return Answer(chat(self._judge(prompt) if "Candidate 2: " in prompt else self._tag(prompt)))

    def _tag(self, prompt: str) -> str:
        digest = hashlib.blake2b(prompt.encode(), digest_size=2).digest()
        attributes = {
            "task_category": CATEGORIES[digest[0] % len(CATEGORIES)],
            "objectivity": ("objective", "subjective")[digest[1] % 2],
            "controversiality": "low",
            "desired_attributes": digest.hex(),
            "annotation_guideline": "Prefer what is right.",
        }
        return json.dumps(attributes)

    def _judge(self, prompt: str) -> str:
        first, second = (part.partition("\n")[0] for part in prompt.rpartition("Candidate 1: ")[2].split("Candidate 2: ", 1))
        is_first_chosen = (first, second) in self._pairs
        pair_id, is_right = self._pairs.get((first, second)) or self._pairs.get((second, first)) or ("", True)
        says_chosen = is_right == (stable_uniform(0, pair_id, f"judge {is_first_chosen}") < 0.9)
        return "1" if says_chosen == is_first_chosen else "2"
