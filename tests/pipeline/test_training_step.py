"""`train_model` and its lease: what another driver stored is not trained again, and nothing is stored without the lease."""

import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from synpref_ray.errors import RunConflictError, SynprefError
from synpref_ray.pipeline import training
from synpref_ray.pipeline.ingest import IngestConfig
from synpref_ray.reporting.run import Run
from synpref_ray.reward.trainer import train_in_process
from synpref_ray.reward.training_config import TrainConfig
from synpref_ray.tables.leases import Lease
from synpref_ray.tables.models import RECORD_FILE, model_is_stored, store_model
from synpref_ray.tables.storage import Storage
from tests.builders import make_pairs
from tests.reward.conftest import save_tiny_backbone


class Trainer:
    """Stands where `train_reward_model` does, without Ray: counts its calls."""

    def __init__(self, before_the_end: Callable[[], None] = lambda: None):
        self.calls = 0
        self._before_the_end = before_the_end

    def __call__(self, train: pa.Table, gold: pa.Table | None, config: TrainConfig, output: str, scratch: str) -> None:
        self.calls += 1
        train_in_process(train, gold, config, output)
        self._before_the_end()


@pytest.fixture
def train(tmp_path: Path) -> Callable[[], object]:
    storage = Storage(str(tmp_path / "ws"))
    config = TrainConfig(backbone=save_tiny_backbone(tmp_path / "backbone", head=False), global_batch_pairs=4, num_threads=1)
    run = Run(storage, "train", IngestConfig())
    return lambda: training.train_model(run, storage, "best", train=(make_pairs(4), "d"), gold=None, config=config)


def test_what_another_driver_stored_meanwhile_is_not_trained_again(train: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer()
    monkeypatch.setattr(training, "train_reward_model", trainer)
    enter: Callable[[Lease], Lease] = Lease.__enter__

    def enter_late(lease: Lease) -> Lease:
        monkeypatch.setattr(Lease, "__enter__", enter)
        train()
        return enter(lease)

    monkeypatch.setattr(Lease, "__enter__", enter_late)
    train()
    assert trainer.calls == 1


def test_a_model_whose_lease_was_lost_is_not_stored(train: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path / "ws"))

    def lose_the_lease() -> None:
        (lease,) = (tmp_path / "ws" / "models").glob(".lease-*.json")
        storage.write_json(f"models/{lease.name}", {"owner": "another", "host": "elsewhere", "pid": 1, "renewed": time.time()})

    monkeypatch.setattr(training, "train_reward_model", Trainer(lose_the_lease))
    with pytest.raises(RunConflictError, match="taken over"):
        train()
    assert storage.list_files("models") == []


def test_a_folder_without_weights_is_not_stored(tmp_path: Path) -> None:
    storage, folder = Storage(str(tmp_path / "ws")), tmp_path / "written-elsewhere"
    folder.mkdir()
    (folder / RECORD_FILE).write_text("{}")
    with pytest.raises(SynprefError, match="holds no model to store"):
        store_model(storage, "best-0a1b2c3d", str(folder))
    assert not model_is_stored(storage, "best-0a1b2c3d")
