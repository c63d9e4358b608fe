"""`train_model` and its lease, its batches from a set of any size, and how a killed training goes on."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pytest

from synpref_ray.errors import RunConflictError, SynprefError
from synpref_ray.pipeline import training, training_batches
from synpref_ray.pipeline.ingest_sources import IngestConfig
from synpref_ray.pipeline.training_batches import prepare_set
from synpref_ray.reporting.run import Run
from synpref_ray.reward.batch_store import decode
from synpref_ray.reward.checkpoints import TrainingFolder
from synpref_ray.reward.model import load_tokenizer, read_row_layout
from synpref_ray.reward.model_card import DataSummary, summarise_pairs
from synpref_ray.reward.parity_record import ParityConfig
from synpref_ray.reward.trainer import run_in_process
from synpref_ray.reward.training_config import TrainConfig
from synpref_ray.reward.training_data import TrainingData, prepare_data
from synpref_ray.reward.training_record import TrainingRecord
from synpref_ray.tables.leases import Lease
from synpref_ray.tables.models import RECORD_FILE, StoredModel, model_is_stored, store_model
from synpref_ray.tables.pools import commit_pool, write_pool_shard
from synpref_ray.tables.sets import Member, PairSet, iter_shards
from synpref_ray.tables.sidecars import Sidecar
from synpref_ray.tables.storage import Storage
from tests.builders import make_pairs
from tests.reward.conftest import save_tiny_backbone


class Trainer:
    """Stands where `run_on_ray` does: the same loop in this process, on a tiny model; counts its calls."""

    def __init__(self, before_the_end: Callable[[], None] = lambda: None):
        self.calls = 0
        self._before_the_end = before_the_end

    def __call__(self, data: TrainingData, config: TrainConfig, folder: TrainingFolder, ray_dir: str, watch: object) -> TrainingRecord:
        self.calls += 1
        record = run_in_process(data, config, folder)
        self._before_the_end()
        return record


def config_for(backbone: str, **changes: object) -> TrainConfig:
    values = {"learning_rate": 1e-3, "global_batch_pairs": 4, "max_tokens_per_microbatch": 200, "precision": "float32", "num_threads": 1}
    return TrainConfig.model_validate({"backbone": backbone, **values, **changes})


@pytest.fixture(name="train")
def prepare_training(tmp_path: Path) -> Callable[..., tuple[object, TrainingRecord]]:
    backbone = save_tiny_backbone(tmp_path / "backbone", head=False)
    storage = Storage(str(tmp_path / "ws"))
    run = Run(storage, "train", IngestConfig())

    def train(pairs: object = None, **changes: object) -> tuple[object, TrainingRecord]:
        given = pairs if pairs is not None else (make_pairs(4), "d")
        config, parity = config_for(backbone, **changes), ParityConfig(vllm=False)
        return training.train_model(run, storage, "best", train=given, gold=None, config=config, parity=parity)  # type: ignore[arg-type]

    return train


def test_what_another_driver_stored_meanwhile_is_not_trained_again(train: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer()
    monkeypatch.setattr(training, "run_on_ray", trainer)
    enter: Callable[[Lease], Lease] = Lease.__enter__

    def enter_late(lease: Lease) -> Lease:
        monkeypatch.setattr(Lease, "__enter__", enter)
        train()
        return enter(lease)

    monkeypatch.setattr(Lease, "__enter__", enter_late)
    train()
    assert trainer.calls == 1


def test_the_pairs_of_a_stored_model_are_not_read_again(
    train: Callable[..., tuple[StoredModel, TrainingRecord]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "run_on_ray", Trainer())
    reads: list[int] = []

    def read() -> pa.Table:
        reads.append(1)
        return make_pairs(4)

    model, record = train((read, "d"))
    assert record.num_by_source == summarise_pairs("", make_pairs(4)).num_by_source
    card = model.storage.read_bytes(f"{model.path}/README.md")
    before = len(reads)
    train((read, "d"))
    assert (len(reads), model.storage.read_bytes(f"{model.path}/README.md")) == (before, card)


def test_a_model_whose_lease_was_lost_is_not_stored(train: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path / "ws"))

    def lose_the_lease() -> None:
        (lease,) = (tmp_path / "ws" / "models").glob(".lease-*.json")
        storage.write_json(f"models/{lease.name}", {"owner": "another", "host": "elsewhere", "pid": 1, "renewed": time.time()})

    monkeypatch.setattr(training, "run_on_ray", Trainer(lose_the_lease))
    with pytest.raises(RunConflictError, match="taken over"):
        train()
    assert storage.list_files("models") == []


def test_a_training_that_ended_but_was_not_stored_goes_on_from_its_last_checkpoint(
    train: Callable[..., tuple[object, TrainingRecord]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die() -> None:
        raise SynprefError("killed")

    monkeypatch.setattr(training, "run_on_ray", Trainer(die))
    pairs = (make_pairs(20), "d")
    with pytest.raises(SynprefError, match="killed"):
        train(pairs, checkpoint_every_steps=2)
    (folder,) = (tmp_path / "ws" / "tmp").glob("train-best-*")
    assert (folder / "checkpoints" / "step-000004" / "progress.json").is_file()
    monkeypatch.setattr(training, "run_on_ray", Trainer())
    _, record = train(pairs, checkpoint_every_steps=2, max_tokens_per_microbatch=300)
    assert len(record.steps) == 5
    assert not folder.exists()
    assert model_is_stored(Storage(str(tmp_path / "ws")), next((tmp_path / "ws" / "models").glob("best-*")).name)


def test_a_folder_without_weights_is_not_stored(tmp_path: Path) -> None:
    storage, folder = Storage(str(tmp_path / "ws")), tmp_path / "written-elsewhere"
    folder.mkdir()
    (folder / RECORD_FILE).write_text("{}")
    with pytest.raises(SynprefError, match="holds no model to store"):
        store_model(storage, "best-0a1b2c3d", str(folder))
    assert not model_is_stored(storage, "best-0a1b2c3d")


LABELS = pa.schema([("pair_id", pa.string()), ("decision", pa.string()), ("flipped", pa.bool_())])


def make_set(storage: Storage) -> PairSet:
    """Two pools of two shards; of each pool every third pair is dropped, every fourth flipped; one comparison stands in it twice."""
    members = []
    for name in ("tea", "coffee"):
        table = make_pairs(30, name)
        if name == "tea":  # row 20 is row 10 with the replies swapped; row 10 is flipped to the same preference below
            rows = table.to_pylist()
            twice = {**rows[10], "chosen": rows[10]["rejected"], "rejected": rows[10]["chosen"], "pair_id": "0" * 32}
            rows[20] = twice
            rows[10]["contradicted"] = rows[20]["contradicted"] = True
            table = pa.Table.from_pylist(rows, schema=table.schema)
        shards = [write_pool_shard(storage, name, 0, table.slice(0, 17)), write_pool_shard(storage, name, 1, table.slice(17))]
        pool = commit_pool(storage, name, name, shards, {})
        labels = Sidecar(pool, "decision", "f" * 32)
        for number, part in ((0, range(17)), (1, range(17, 30))):
            ids = table["pair_id"].to_pylist()
            rows = [{"pair_id": ids[i], "decision": "drop" if i % 3 == 0 else "flip" if i % 4 == 2 else "keep", "flipped": i % 4 == 2} for i in part]
            labels.write(number, pa.Table.from_pylist(rows, schema=LABELS))
        storage.write_json(f"{labels.folder}/manifest.json", {"pool_digest": pool.digest, "fingerprint": labels.fingerprint})
        members.append(Member(labels, (("decision", ("keep", "flip")),)))
    return PairSet("curated", tuple(members))


def batches_of(data: TrainingData) -> dict[str, tuple[list[int], list[int], int]]:
    """Token ids of (chosen, rejected) and the optimizer step of every pair, by pair_id."""
    found = {}
    index = data.open()
    for step in range(1, index.num_steps + 1):
        for number in index.batches_of(step):
            batch = decode(index.fetch(number))
            for group in batch.groups:
                for pair, chosen, rejected in zip(group.pairs, group.chosen, group.rejected, strict=True):
                    replies = group.group.sequences
                    assert batch.pair_ids[pair] not in found
                    found[batch.pair_ids[pair]] = (replies[chosen].tolist(), replies[rejected].tolist(), step)
    return found


def test_the_sources_of_a_set_are_counted_shard_by_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = make_set(Storage(str(tmp_path / "ws")))
    expected = summarise_pairs("curated", pa.concat_tables(iter_shards(pairs, ["source"])))
    rows: list[int] = []

    def count(name: str, table: pa.Table) -> DataSummary:
        rows.append(table.num_rows)
        return summarise_pairs(name, table)

    monkeypatch.setattr(training, "summarise_pairs", count)
    found = training._summarise("curated", pairs)
    assert found == expected
    assert list(found.num_by_source) == list(expected.num_by_source)
    assert len(rows) == 4


@pytest.mark.parametrize("where", ["inline", pytest.param("ray", marks=pytest.mark.ray)])
def test_a_set_is_packed_without_reading_it_whole_as_its_table_is(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if where == "ray":
        _: ModuleType = request.getfixturevalue("ray")
        monkeypatch.setattr(training_batches, "INLINE_ROWS", 0)
    storage, backbone = Storage(str(tmp_path / "ws")), save_tiny_backbone(tmp_path / "backbone", head=False)
    pairs, config = make_set(storage), config_for(backbone, max_length_tokens=72, seed=3)
    run = Run(storage, "train", IngestConfig())
    data = prepare_set(run, pairs, None, config, backbone, storage, "tmp/set")
    layout = read_row_layout(backbone, config.max_tokens_per_microbatch)
    whole = prepare_data(load_tokenizer(backbone), pairs.read(), None, config, layout, storage, "tmp/table")
    assert data.train == whole.train
    assert data.train.dropped["too_long"] > 0
    assert data.train.pairs < 40
    assert batches_of(data) == batches_of(whole)
    # Again with smaller windows: every pair once, and nothing that is there is written again.
    windowed = config.model_copy(update={"shuffle_window_pairs": 4})
    first = prepare_set(run, pairs, None, windowed, backbone, storage, "tmp/windows")
    assert first.num_windows > 3
    assert {name: found[:2] for name, found in batches_of(first).items()} == {name: found[:2] for name, found in batches_of(whole).items()}
    (windows,) = (tmp_path / "ws" / "tmp").glob("windows-*")
    (windows / "window-00001.index.parquet").unlink()
    before = {path: path.stat().st_ino for path in windows.iterdir()}
    prepare_set(run, pairs, None, windowed, backbone, storage, "tmp/windows")
    changed = {path.name for path in before if path.stat().st_ino != before[path]}
    assert changed == {"window-00001.arrows"}
    manifest = json.loads(next((tmp_path / "ws" / "pools" / "tea" / "tokens").glob("*/manifest.json")).read_text())
    assert manifest["rejected"]["too_long"] > 0


def test_a_set_of_source_labels_is_packed_under_them_and_apart(tmp_path: Path) -> None:
    storage, backbone = Storage(str(tmp_path / "ws")), save_tiny_backbone(tmp_path / "backbone", head=False)
    corrected, config, run = make_set(storage), config_for(backbone), Run(storage, "train", IngestConfig())
    original = PairSet("original", tuple(replace(member, as_ingested=True) for member in corrected.members))
    of_corrected, of_original = (prepare_set(run, pairs, None, config, backbone, storage, "tmp/set") for pairs in (corrected, original))
    layout = read_row_layout(backbone, config.max_tokens_per_microbatch)
    whole = prepare_data(load_tokenizer(backbone), original.read(), None, config, layout, storage, "tmp/table")
    assert batches_of(of_original) == batches_of(whole)
    assert of_original.folder != of_corrected.folder
    turned = [name for name, found in batches_of(of_corrected).items() if found[:2] != batches_of(whole)[name][:2]]
    assert turned
