"""The real things: DeepSpeed under Ray Train, and the bundled SmolLM2 against plain transformers."""

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
from transformers import AutoModelForSequenceClassification

from synpref_ray.bundled import resolve_model
from synpref_ray.errors import InputError
from synpref_ray.reward.model import load_backbone_with_head, load_tokenizer, save_reward_model
from synpref_ray.reward.ray_trainer import train_reward_model
from synpref_ray.reward.scorer import PairScorer, ScorerConfig, add_rewards
from synpref_ray.reward.trainer import TrainConfig, train_in_process
from synpref_ray.reward.training_record import TrainingRecord
from tests.reward.conftest import random_pairs
from tests.reward.test_scorer import plain_rewards
from tests.reward.test_trainer import config_for

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


def on_ray(backbone: str, tmp_path: Path, name: str, **changes: Any) -> TrainingRecord:
    """Train 15 pairs for two epochs; on 2 workers one micro-batch is empty, as the budget takes all pairs at once."""
    settings = {"num_epochs": 2, "max_tokens_per_microbatch": 100_000, "evaluations_per_epoch": 1, "num_workers": 2, **changes}
    config = config_for(backbone, **settings)
    train = train_in_process if name == "plain" else partial(train_reward_model, storage_dir=str(tmp_path / "storage"))
    record: TrainingRecord = train(random_pairs(15), random_pairs(6, seed=3), config, output_dir=str(tmp_path / name))
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
    workers = [process for process in psutil.Process().children(recursive=True) if "RayTrainWorker" in process.name() + " ".join(process.cmdline())]
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
def test_an_error_in_a_worker_comes_back_as_ours(ray: ModuleType, tiny_backbone: str, tmp_path: Path) -> None:
    config = config_for(tiny_backbone, learning_rate=1e38, max_grad_norm=1e30, zero_stage=0)
    with pytest.raises(InputError, match="the loss became nan in optimizer step"):
        train_reward_model(random_pairs(8), None, config, str(tmp_path / "model"), str(tmp_path / "storage"))
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
