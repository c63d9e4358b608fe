"""The real things: DeepSpeed under Ray Train, and the bundled SmolLM2 against plain transformers."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ray.train.v2.api.exceptions import TrainingFailedError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from synpref_ray.bundled import resolve_model
from synpref_ray.errors import InputError
from synpref_ray.reward.model import load_backbone_with_head, load_tokenizer, read_row_layout, save_reward_model
from synpref_ray.reward.ray_trainer import train_reward_model
from synpref_ray.reward.scorer import PairScorer, ScorerConfig, add_rewards
from synpref_ray.reward.trainer import TrainConfig, train_in_process
from synpref_ray.reward.training_data import StepLoader, prepare_data
from synpref_ray.reward.training_record import TrainingRecord
from synpref_ray.tables.storage import Storage
from tests.processes import children_of
from tests.reward.conftest import random_pairs
from tests.reward.killing import DyingFolder, train_with
from tests.reward.test_scorer import plain_rewards
from tests.reward.test_trainer import config_for

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


PAIRS, GOLD = 15, 6


def settings_for(backbone: str, name: str, **changes: Any) -> TrainConfig:
    """Two epochs in steps of 8 and 7 pairs. In the plain loop all of them are one micro-batch.

    Elsewhere each is one of its own: gradients of 8 add up on one worker, of 4 each on two, where one of every second step is empty.
    """
    budget = 100_000 if name == "plain" else 1
    return config_for(backbone, **{"num_epochs": 2, "max_tokens_per_microbatch": budget, "evaluations_per_epoch": 1, "num_workers": 2, **changes})


def on_ray(backbone: str, tmp_path: Path, name: str, **changes: Any) -> TrainingRecord:
    """Train on Ray, or in this process as "plain"."""
    config = settings_for(backbone, name, **changes)
    train = train_in_process if name == "plain" else partial(train_reward_model, storage_dir=str(tmp_path / "storage"))
    record: TrainingRecord = train(random_pairs(PAIRS), random_pairs(GOLD, seed=3), config, output_dir=str(tmp_path / name))
    return record


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).state_dict()
    return weights


@pytest.mark.ray
@pytest.mark.engine
@pytest.mark.parametrize(
    ("zero_stage", "num_workers"),
    [(1, 2), *(pytest.param(stage, workers, marks=pytest.mark.slow) for stage in (0, 1, 2, 3) for workers in (1, 2) if (stage, workers) != (1, 2))],
)
def test_deepspeed_equals_the_plain_loop(ray: ModuleType, tiny_backbone: str, tmp_path: Path, zero_stage: int, num_workers: int) -> None:
    record = on_ray(tiny_backbone, tmp_path, "ray", zero_stage=zero_stage, num_workers=num_workers)
    plain = on_ray(tiny_backbone, tmp_path, "plain")
    assert (record.num_workers, plain.num_workers, len(record.steps)) == (num_workers, 1, 4)
    for ours, expected in zip(record.steps, plain.steps, strict=True):
        assert (ours.loss, ours.grad_norm) == pytest.approx((expected.loss, expected.grad_norm), rel=1e-3)
        assert (ours.accuracy, ours.num_pairs, ours.num_tokens) == (expected.accuracy, expected.num_pairs, expected.num_tokens)
    assert (record.chosen_step, record.gold_accuracy) == (plain.chosen_step, plain.gold_accuracy)
    first, second = weights_of(tmp_path / "ray"), weights_of(tmp_path / "plain")
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=1e-4)
    assert record.versions["deepspeed"]
    assert record.seconds["startup"] > 0


@pytest.mark.ray
@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_deepspeed_trains_compiled_layers(ray: ModuleType, tiny_backbone: str, tmp_path: Path, zero_stage: int) -> None:
    record = on_ray(tiny_backbone, tmp_path, "ray", zero_stage=zero_stage, compile_layers=True)
    plain = on_ray(tiny_backbone, tmp_path, "plain")
    assert [step.loss for step in record.steps] == pytest.approx([step.loss for step in plain.steps], rel=1e-3)
    first, second = weights_of(tmp_path / "ray"), weights_of(tmp_path / "plain")
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=1e-4)


def kill_a_worker(training: Path, after_step: int) -> None:
    """Kill the first training worker with SIGKILL as soon as the checkpoint of a step is whole."""
    seal = training / "checkpoints" / f"step-{after_step:06d}" / "progress.json"
    deadline = time.monotonic() + 300
    while not seal.is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = [process for process, command in children_of(psutil.Process()).items() if "RayTrainWorker" in command]
    if seal.is_file() and workers:
        workers[0].kill()


@pytest.mark.ray
@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_killed_worker_is_replaced_and_the_run_goes_on(ray: ModuleType, tiny_backbone: str, tmp_path: Path, zero_stage: int) -> None:
    """The same number of workers: bit-equal in float32 on a CPU, whatever the moment of the kill."""
    settings: dict[str, Any] = {"zero_stage": zero_stage, "num_epochs": 20, "checkpoint_every_steps": 3}
    whole = on_ray(tiny_backbone, tmp_path, "whole", **settings)
    killer = Thread(target=kill_a_worker, args=(tmp_path / "killed.training", 9))
    killer.start()
    killed = on_ray(tiny_backbone, tmp_path, "killed", **settings)
    killer.join()
    assert killed.num_resumes >= 1
    assert [step.loss for step in killed.steps] == [step.loss for step in whole.steps]
    first, second = weights_of(tmp_path / "killed"), weights_of(tmp_path / "whole")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.ray
@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize(("zero_stage", "before", "after"), [(0, 2, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (3, 2, 1)])
def test_a_run_goes_on_with_another_number_of_workers(
    ray: ModuleType, tiny_backbone: str, tmp_path: Path, zero_stage: int, before: int, after: int
) -> None:
    settings: dict[str, Any] = {"zero_stage": zero_stage, "num_epochs": 20, "checkpoint_every_steps": 3, "learning_rate": 1e-4}
    whole = on_ray(tiny_backbone, tmp_path, "whole", num_workers=before, **settings)
    killer = Thread(target=kill_a_worker, args=(tmp_path / "moved.training", 9))
    killer.start()
    with pytest.raises(TrainingFailedError):
        on_ray(tiny_backbone, tmp_path, "moved", num_workers=before, max_failures=0, **settings)
    killer.join()
    moved = on_ray(tiny_backbone, tmp_path, "moved", num_workers=after, **settings)
    assert moved.num_workers == after
    assert moved.num_resumes >= 1
    assert [step.loss for step in moved.steps] == pytest.approx([step.loss for step in whole.steps], rel=1e-3)
    first, second = weights_of(tmp_path / "moved"), weights_of(tmp_path / "whole")
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=1e-4)


@pytest.mark.ray
@pytest.mark.engine
@pytest.mark.slow
def test_a_worker_that_dies_in_the_middle_of_a_checkpoint_costs_only_that_checkpoint(ray: ModuleType, tiny_backbone: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"num_epochs": 6, "checkpoint_every_steps": 3}
    whole = on_ray(tiny_backbone, tmp_path, "whole", **settings)
    folder_of = partial(DyingFolder, rank=1, step=9, marker=str(tmp_path / "died"))
    config = settings_for(tiny_backbone, "killed", **settings)
    killed = train_with(folder_of, config, str(tmp_path / "killed"), str(tmp_path / "storage"), random_pairs(PAIRS), random_pairs(GOLD, seed=3))
    assert (tmp_path / "died").exists()
    assert killed.num_resumes == 1
    assert [step.loss for step in killed.steps] == [step.loss for step in whole.steps]
    first, second = weights_of(tmp_path / "killed"), weights_of(tmp_path / "whole")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.ray
@pytest.mark.engine
@pytest.mark.slow
def test_a_killed_driver_goes_on_from_the_last_checkpoint(ray: ModuleType, tiny_backbone: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"num_epochs": 6, "checkpoint_every_steps": 3}
    whole = on_ray(tiny_backbone, tmp_path, "whole", **settings)
    config = settings_for(tiny_backbone, "killed", **settings)
    given = {
        "address": ray.get_runtime_context().gcs_address, "config": config.model_dump(mode="json"), "pairs": PAIRS, "gold": GOLD, "step": 6,
        "marker": str(tmp_path / "held"), "output": str(tmp_path / "killed"), "storage": str(tmp_path / "driver-storage"),
    }  # fmt: skip
    repository = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-m", "tests.reward.killing", json.dumps(given)], cwd=repository, env={**os.environ, "PYTHONPATH": str(repository)}
    ) as driver:
        deadline = time.monotonic() + 300
        try:
            while not (tmp_path / "held").exists():
                assert driver.poll() is None, "the driver ended before the moment came"
                assert time.monotonic() < deadline, "the moment never came"
                time.sleep(0.05)
        finally:
            driver.send_signal(signal.SIGKILL)
    assert not (tmp_path / "killed").exists()
    resumed = on_ray(tiny_backbone, tmp_path, "killed", **settings)
    assert resumed.num_resumes == 1
    assert [step.loss for step in resumed.steps] == [step.loss for step in whole.steps]
    first, second = weights_of(tmp_path / "killed"), weights_of(tmp_path / "whole")
    assert all(torch.equal(first[name], second[name]) for name in first)


def first_pairs_of(rank: int, pairs: pa.Table, config: TrainConfig, folder: Path) -> list[str]:
    """Return the ids of the pairs that a rank trains on in the first step."""
    storage, layout = Storage(str(folder)), read_row_layout(config.backbone, config.max_tokens_per_microbatch)
    data = prepare_data(load_tokenizer(config.backbone), pairs, None, config, layout, storage, "batches")
    loader = StepLoader(data.open(), storage, rank=rank, world_size=config.num_workers, first_step=1, prefetch_steps=1)
    return [name for batch in next(iter(loader)) if batch.weight for name in batch.microbatch.pair_ids]


@pytest.mark.ray
@pytest.mark.engine
def test_an_error_of_the_second_worker_comes_back_as_ours_with_its_pair(ray: ModuleType, tiny_backbone: str, tmp_path: Path) -> None:
    """One reply ends with a letter whose embedding is not a number; only the second worker sees it."""
    config, pairs = settings_for(tiny_backbone, "ray"), random_pairs(PAIRS)
    bad = first_pairs_of(1, pairs, config, tmp_path / "plan")[1]
    rows = [{**row, "chosen": f"{row['chosen'][:-1]}Z"} if row["pair_id"] == bad else row for row in pairs.to_pylist()]
    pairs = pa.Table.from_pylist(rows, schema=pairs.schema)
    assert bad in first_pairs_of(1, pairs, config, tmp_path / "plan-with-it")
    file = Path(tiny_backbone) / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][load_tokenizer(tiny_backbone).convert_tokens_to_ids("Z")] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"the loss became nan in optimizer step 1 \(pairs {bad}\); no weights were kept yet, and there is no"):
        train_reward_model(pairs, None, config, str(tmp_path / "model"), str(tmp_path / "storage"))
    assert not (tmp_path / "model").exists()


@pytest.fixture(scope="module")
def smollm2_reward_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """SmolLM2 with a random head of a size that spreads the rewards over several units."""
    folder = str(tmp_path_factory.mktemp("models") / "smollm2-rm")
    backbone = resolve_model(SMOLLM2)
    model = load_backbone_with_head(backbone, "float32", new_head=True, head_init_std=0.2)
    save_reward_model(model, load_tokenizer(backbone), folder, dtype="float32")
    return folder


def check_against_plain(folder: str, pairs: pa.Table) -> None:
    scorer = PairScorer.load(folder, ScorerConfig(dtype="float32", num_threads=2))
    table = add_rewards(pairs, scorer)
    ours = np.stack([np.asarray(table["reward_chosen"]), np.asarray(table["reward_rejected"])], axis=1)
    plain = plain_rewards(folder, pairs)
    assert table["pair_id"].to_pylist() == pairs["pair_id"].to_pylist()
    assert plain.std() > 0.5
    assert (np.abs(ours - plain) <= 1e-4 * np.maximum(1.0, np.abs(plain))).all()
    margin = plain[:, 0] - plain[:, 1]
    clear = np.abs(margin) > 2e-4
    assert (np.sign(ours[:, 0] - ours[:, 1])[clear] == np.sign(margin)[clear]).all()


@pytest.mark.engine
def test_the_bundled_model_scores_as_plain_transformers(smollm2_reward_model: str) -> None:
    turns = [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": "Another."},
    ]
    rows = [
        {"pair_id": "a", "prompt": turns, "chosen": "Blue.", "rejected": "Red."},
        {"pair_id": "b", "prompt": turns[:1], "chosen": "Green is a colour, and so is blue.", "rejected": "No"},
        {"pair_id": "c", "prompt": [{"role": "system", "content": "Be brief."}, turns[0]], "chosen": "Blue", "rejected": "Blue!"},
        {"pair_id": "d", "prompt": [{"role": "user", "content": "¿Qué hora es? 🙂\n\n"}], "chosen": " Son las dos. ", "rejected": "x"},
    ]
    check_against_plain(smollm2_reward_model, pa.Table.from_pylist(rows))


@pytest.mark.slow
@pytest.mark.engine
def test_200_real_pairs_score_as_plain_transformers(smollm2_reward_model: str, shared_data: Path) -> None:
    check_against_plain(smollm2_reward_model, pq.read_table(shared_data / "hh_rlhf" / "test.parquet").slice(0, 200))


@pytest.mark.slow
@pytest.mark.engine
def test_smollm2_learns_eight_real_pairs_by_heart(shared_data: Path, tmp_path: Path) -> None:
    pairs = pq.read_table(shared_data / "hh_rlhf" / "train.parquet").slice(0, 8)
    config = TrainConfig(
        backbone=SMOLLM2, learning_rate=1e-4, head_learning_rate_multiplier=20, num_epochs=4, global_batch_pairs=8,
        max_tokens_per_microbatch=2048, evaluations_per_epoch=1,
    )  # fmt: skip
    record = train_in_process(pairs, pairs, config, str(tmp_path / "model"))
    assert record.gold_accuracy == 1.0
    assert record.steps[-1].loss < 0.2
