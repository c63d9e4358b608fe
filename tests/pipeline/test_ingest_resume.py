"""Ingest in parts: the same bytes as before, whatever the number of parts, wherever it was interrupted, in one process or on Ray."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from synpref_ray.errors import RunConflictError
from synpref_ray.ingest.partition import Comparison, Layout
from synpref_ray.pipeline import ingest as ingest_job
from synpref_ray.pipeline import pools as pools_job
from synpref_ray.pipeline.ingest import run_ingest
from synpref_ray.pipeline.ingest_sources import IngestConfig
from synpref_ray.reporting.run import Run
from synpref_ray.tables.pools import content_digest, list_pools, open_pool
from synpref_ray.tables.storage import Storage
from tests.pipeline.test_ingest_accounts import KINDS, LONG, ROUTES, write_corpus

CORPUS_DIGEST = "2590bfac8630bcd57f6271cd707386f5"
"""Of the pools' rows, as the version that planned on the driver made them."""
TABLES = ("pools", "rejects", "decontamination")


def write_pairs(folder: Path) -> None:
    """Write pairs of which many repeat or contradict another, and some hold a benchmark prompt."""
    chance = random.Random(4)
    for name, count in (("seed", 40), ("people", 60), ("web", 200)):
        rows = []
        for number in range(count):
            prompt = f"{LONG} {number}" if number % 29 == 0 else f"Question {chance.randrange(20)}?"
            chosen, rejected = chance.sample(["Yes.", "No.", "Perhaps — später."], 2)
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "id": f"{name}-{number}"})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def config_of(folder: Path, workspace: Path) -> IngestConfig:
    sources = [{"name": name, "path": str(folder / f"{name}.jsonl"), "route": ROUTES[name], **kind} for name, kind in KINDS.items()]
    routes = {"seed": "seed", "people": "unverified", "web": "wild"}
    sources += [{"name": name, "path": str(folder / f"{name}.jsonl"), "route": route} for name, route in routes.items()]
    settings = {"sources": sources, "workspace": str(workspace), "max_rejected_fraction": 1.0, "max_pairs_per_shard": 7}
    return IngestConfig.model_validate({**settings, "decontaminate": {"benchmarks": [{"path": str(folder / "bench.json"), "name": "bench"}]}})


def ingest(config: IngestConfig) -> dict[str, bytes]:
    run_ingest(config, Run(config.storage, "ingest", config))
    return tables_of(config.storage)


def tables_of(storage: Storage) -> dict[str, bytes]:
    assert storage.list_files("staging") == []
    return {path: storage.read_bytes(path) for table in TABLES for path in storage.list_files(table)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, 240, seed=11)
    write_pairs(folder)
    return folder


@pytest.fixture(scope="module")
def wanted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return what one run without an interruption writes."""
    return ingest(config_of(corpus, tmp_path_factory.mktemp("wanted")))


def test_pools_are_those_of_earlier_versions(corpus: Path, tmp_path: Path) -> None:
    config = config_of(corpus, tmp_path)
    ingest(config)
    pools = {
        name: [open_pool(config.storage, name).read(shard.number).to_pylist() for shard in open_pool(config.storage, name).shards]
        for name in list_pools(config.storage)
    }
    assert [len(pools[name]) for name in ("seed", "unverified", "wild")] == [6, 6, 7]
    assert any(row["contradicted"] for shards in pools.values() for shard in shards for row in shard)
    assert content_digest(pools) == CORPUS_DIGEST


def in_parts(monkeypatch: pytest.MonkeyPatch, num_parts: int) -> None:
    def of(storage: Storage, folder: str, layout: Layout) -> Comparison:
        return Comparison(storage, folder, layout, num_parts)

    monkeypatch.setattr(Comparison, "of", of)


@pytest.mark.parametrize("num_parts", [2, 50])
def test_the_number_of_parts_changes_nothing(
    corpus: Path, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_parts: int
) -> None:
    in_parts(monkeypatch, num_parts)
    assert ingest(config_of(corpus, tmp_path)) == wanted


@pytest.mark.parametrize(
    ("function", "calls"),
    [
        ("_stage_file", 2),
        ("_decide_part", 3),
        ("_gather_piece", 1),
        ("write_pool_shard", 6),
        ("commit_pool", 1),
        ("account", 0),
    ],
)
def test_an_interrupted_ingest_goes_on(
    corpus: Path, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, calls: int
) -> None:
    in_parts(monkeypatch, 5)
    config = config_of(corpus, tmp_path)
    module = ingest_job if hasattr(ingest_job, function) else pools_job
    own = getattr(module, function)
    done: list[int] = []

    def interrupted(*values: Any, **named: Any) -> Any:
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(1)
        return own(*values, **named)

    with monkeypatch.context() as patch:
        patch.setattr(module, function, interrupted)
        with pytest.raises(KeyboardInterrupt):
            ingest(config)
    assert ingest(config) == wanted


@pytest.mark.ray
@pytest.mark.usefixtures("ray")
def test_ray_writes_the_same_bytes(corpus: Path, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch, 3)
    monkeypatch.setattr(ingest_job, "INLINE_FILES", 0)
    monkeypatch.setattr(pools_job, "INLINE_PAIRS", 0)
    assert ingest(config_of(corpus, tmp_path)) == wanted


def test_a_kill_while_staged_files_are_removed_is_survived(
    corpus: Path, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_parts(monkeypatch, 2)
    config = config_of(corpus, tmp_path)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "delete_folder", stop)
        with pytest.raises(KeyboardInterrupt):
            ingest(config)
    for path in config.storage.list_files("staging")[::3]:
        config.storage.delete(path)
    assert ingest(config) == wanted


@pytest.mark.parametrize("at", ["read", "shard", "commit", "clean up"])
def test_a_driver_that_was_taken_for_dead_writes_no_more(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """It stalls at some point, another takes its lease, and it wakes up."""
    config = config_of(corpus, tmp_path)
    storage, taken = config.storage, [False]
    module, name = {
        "read": (ingest_job, "make_pools"),
        "shard": (pools_job, "write_pool_shard"),
        "commit": (pools_job, "commit_pool"),
        "clean up": (ingest_job, "account"),
    }[at]
    stalled = getattr(module, name)

    def stall(*arguments: Any, **named: Any) -> Any:
        result = stalled(*arguments, **named) if at != "read" else None
        if not taken[0]:
            taken[0] = True
            storage.write_json(
                "pools/ingest.lease.json", {"owner": "x", "host": "elsewhere", "pid": 1, "process_started": 0.0, "renewed": time.time()}
            )
        return stalled(*arguments, **named) if at == "read" else result

    monkeypatch.setattr(module, name, stall)
    with pytest.raises(RunConflictError, match="taken over by another driver"):
        run_ingest(config, Run(storage, "ingest", config))
    assert taken[0]
    shards = [path for path in storage.list_files("pools") if "/shard-" in path]
    seed = len(open_pool(storage, "seed").shards) if at in ("commit", "clean up") else 0
    assert len(shards) == {"read": 0, "shard": 1, "commit": seed, "clean up": 19}[at]
    assert list_pools(storage) == {"read": [], "shard": [], "commit": ["seed"], "clean up": ["seed", "unverified", "wild"]}[at]
    assert storage.list_files("staging")  # what the successor works on is still there
    assert json.loads(storage.read_bytes("pools/ingest.lease.json"))["owner"] == "x"
