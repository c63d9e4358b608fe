"""Ingest into pools that are there: nothing moves, nothing comes twice, and a kill in between changes nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from synpref_ray.errors import ConfigError, InputError, RunConflictError
from synpref_ray.ingest.benchmark_prompts import comparison_facts
from synpref_ray.pipeline import ingest_growth
from synpref_ray.pipeline import pools as pools_job
from synpref_ray.pipeline.growth import peek_inputs
from synpref_ray.pipeline.ingest import check_ingest, run_ingest
from synpref_ray.pipeline.ingest_growth import ingests_of
from synpref_ray.pipeline.ingest_sources import IngestConfig
from synpref_ray.pipeline.leak_proposals import check_compared, read_proposals
from synpref_ray.pipeline.licences import with_source_licences
from synpref_ray.reporting.run import Run
from synpref_ray.reward.model_card import CardConfig
from synpref_ray.tables.parts import pool_parts
from synpref_ray.tables.pools import open_pool
from synpref_ray.tables.storage import Storage

ITEM = "How many red foxes live in the old forest near the river, and who has counted them so far?"
FIRST = {
    "seed": [("a?", "yes", "no"), ("b?", "yes", "no"), ("c?", "yes", "no")],
    "people": [("d?", "yes", "no"), ("e?", "yes", "no")],
    "web": [(f"w{number}?", "yes", "no") for number in range(20)],
}
NEW = {
    "seed-new": [("b?", "yes", "no"), ("w1?", "yes", "no"), ("f?", "yes", "no")],  # a copy in its own pool, one in another, one that is new
    "people-new": [("e?", "no", "yes"), ("g?", "yes", "no"), ("g?", "yes", "no")],  # a contradiction, and a copy among the new ones
    "web-new": [(f"w{number}?", "yes", "no") for number in range(15, 30)],
}
ROUTES = {"seed": "seed", "people": "unverified", "web": "wild"}


def write(folder: Path, files: dict[str, list[tuple[str, str, str]]]) -> None:
    for name, rows in files.items():
        lines = [json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) for prompt, chosen, rejected in rows]
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))


def config_of(folder: Path, names: Any, workspace: Path, **more: Any) -> IngestConfig:
    sources = [
        {"name": name, "path": str(folder / f"{name}.jsonl"), "route": ROUTES[name.split("-")[0]], "licence": f"licence of {name}"} for name in names
    ]
    return IngestConfig.model_validate({"sources": sources, "workspace": str(workspace), "max_pairs_per_shard": 4, **more})


def ingest(config: IngestConfig) -> dict[str, Any]:
    run = Run(config.storage, "ingest", config)
    run_ingest(config, run)
    return run.metrics


def pairs_of(storage: Storage, name: str, version: int | None = None) -> list[tuple[str, str, bool]]:
    rows = open_pool(storage, name, version).read_all(["prompt", "chosen", "contradicted"]).to_pylist()
    return [(row["prompt"][0]["content"], row["chosen"], row["contradicted"]) for row in rows]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path, FIRST | NEW)
    return tmp_path


def test_new_pairs_join_as_shards_and_copies_of_held_ones_do_not(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest_growth, "SHARDS_PER_FILE", 2)  # the pool wild is read in several tasks
    workspace = data / "ws"
    ingest(config_of(data, FIRST, workspace))
    storage = Storage(str(workspace))
    before = {name: open_pool(storage, name) for name in ("seed", "unverified", "wild")}
    shards = {path: storage.read_bytes(path) for name in before for path in storage.list_files(f"pools/{name}", deep=False)}
    metrics = ingest(config_of(data, NEW, workspace, add=True))
    assert {path: storage.read_bytes(path) for path in shards} == shards
    assert pairs_of(storage, "seed") == [("a?", "yes", False), ("b?", "yes", False), ("c?", "yes", False), ("f?", "yes", False)]
    assert pairs_of(storage, "unverified") == [("d?", "yes", False), ("e?", "yes", False), ("e?", "no", True), ("g?", "yes", False)]
    assert pairs_of(storage, "wild") == [(f"w{number}?", "yes", False) for number in range(30)]
    assert metrics["pools"] == {"seed": 1, "unverified": 2, "wild": 10}
    assert metrics["pools_in_all"] == {"seed": 4, "unverified": 4, "wild": 30}
    assert {name: counts["duplicates"] for name, counts in metrics["sources"].items()} == {"seed-new": 2, "people-new": 1, "web-new": 5}
    assert metrics["contradicted"] == {"seed": 0, "unverified": 1, "wild": 0}
    (path,) = storage.list_files("rejects/ingest")[:1]
    homes = [json.loads(text)["first"] for text in storage.read_table(path)["row_json"].to_pylist()]
    assert homes == [{"source": "pool seed", "file": "pools/seed", "row": 1}, {"source": "pool wild", "file": "pools/wild", "row": 1}]
    for name, pool in before.items():
        old, new = pool_parts(storage, name, open_pool(storage, name).version)
        assert old.shards == pool.shards
        assert min(shard.number for shard in new.shards) == len(pool.shards)
    assert peek_inputs(storage, 0).unverified == 1
    licences = with_source_licences(CardConfig(), storage).source_licences
    assert licences == {name: f"licence of {name}" for name in (*FIRST, *NEW)}


def shard_rows(storage: Storage) -> dict[str, list[int]]:
    return {name: [shard.rows for shard in open_pool(storage, name).shards] for name in ("seed", "unverified", "wild")}


def test_pools_that_language_models_read_as_they_lie_are_cut_smaller(data: Path) -> None:
    for name, limit in {"small": 1, "large": 5, "default": 512}.items():
        ingest(config_of(data, FIRST, data / name, max_pairs_per_llm_shard=limit))
    storages = {name: Storage(str(data / name)) for name in ("small", "large", "default")}
    assert shard_rows(storages["small"]) == {"seed": [1, 1, 1], "unverified": [1, 1], "wild": [4, 4, 4, 4, 4]}
    assert shard_rows(storages["large"]) == {"seed": [3], "unverified": [2], "wild": [4, 4, 4, 4, 4]}
    names = {name: open_pool(storage, "seed").fingerprint for name, storage in storages.items()}
    assert names["large"] == names["default"] != names["small"]  # where the limit says nothing new, earlier versions' pools stay valid
    assert IngestConfig().pairs_per_shard == {"seed": 512, "unverified": 512, "wild": 8192}


def test_where_nothing_feeds_them_a_limit_of_theirs_names_no_other_pool(data: Path) -> None:
    for limit in (1, 512):
        ingest(config_of(data, ["web"], data / f"{limit}", max_pairs_per_llm_shard=limit))
    assert open_pool(Storage(str(data / "1")), "wild").fingerprint == open_pool(Storage(str(data / "512")), "wild").fingerprint


def test_a_rerun_of_either_ingest_has_nothing_to_do(data: Path) -> None:
    workspace = data / "ws"
    first, addition = config_of(data, FIRST, workspace), config_of(data, NEW, workspace, add=True)
    ingest(first), ingest(addition)
    storage = Storage(str(workspace))
    there = {path: storage.read_bytes(path) for path in storage.list_files("pools")}
    assert ingest(first)["rows_read"] == 25
    assert ingest(addition)["rows_read"] == 21
    assert {path: storage.read_bytes(path) for path in storage.list_files("pools")} == there
    again = config_of(data, [*NEW][:1], workspace, add=True)
    assert ingest(again)["pools"] == {"seed": 0, "unverified": 0, "wild": 0}
    assert open_pool(storage, "seed").version == 1  # nothing new, no new version


def test_a_kill_between_two_pools_changes_nothing(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ingest(config_of(data, FIRST, data / "ws"))
    ingest(config_of(data, FIRST, data / "wanted"))
    ingest(config_of(data, NEW, data / "wanted", add=True))
    commit = pools_job.commit_pool

    def commit_seed(storage: Storage, name: str, *more: Any) -> Any:
        if name != "seed":
            raise KeyboardInterrupt
        return commit(storage, name, *more)

    with monkeypatch.context() as patched:
        patched.setattr(pools_job, "commit_pool", commit_seed)
        with pytest.raises(KeyboardInterrupt):
            ingest(config_of(data, NEW, data / "ws", add=True))
    assert open_pool(Storage(str(data / "ws")), "seed").version == 1
    ingest(config_of(data, NEW, data / "ws", add=True))
    found, wanted = (Storage(str(data / name)) for name in ("ws", "wanted"))
    for folder in ("pools", "rejects"):
        names = [path for path in wanted.list_files(folder) if "lease" not in path]
        assert [path for path in found.list_files(folder) if "lease" not in path] == names
        assert all(found.read_bytes(path) == wanted.read_bytes(path) for path in names)


def test_an_addition_that_was_cut_off_does_not_join_pools_that_grew_meanwhile(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ingest(config_of(data, FIRST, data / "ws"))

    def killed(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pools_job, "commit_pool", killed)
        with pytest.raises(KeyboardInterrupt):
            ingest(config_of(data, NEW, data / "ws", add=True))
    ingest(config_of(data, ["web-new"], data / "ws", add=True))
    with pytest.raises(RunConflictError, match=r"pool 'wild' has grown to version 1 .* delete .*-base.json"):
        ingest(config_of(data, NEW, data / "ws", add=True))
    storage = Storage(str(data / "ws"))
    bases = [path for path in storage.list_files("pools", deep=False) if path.endswith("-base.json")]
    (base,) = [path for path in bases if not storage.exists(path.replace("-base", ""))]
    storage.delete(base)
    counts = ingest(config_of(data, NEW, data / "ws", add=True))["sources"]
    assert {name: counts[name]["kept"] for name in counts} == {"seed-new": 1, "people-new": 2, "web-new": 0}
    for name, wanted in (("seed", 4), ("unverified", 4), ("wild", 30)):
        pool = open_pool(storage, name)
        ids = pool.read_all(["pair_id"])["pair_id"].to_pylist()
        assert len(ids) == len(set(ids)) == pool.num_rows == wanted


def test_nothing_is_added_to_what_an_ingest_left_without_its_record(data: Path) -> None:
    config = config_of(data, FIRST, data / "ws")
    ingest(config)
    (record,) = [path for path in config.storage.list_files("pools", deep=False) if path.startswith("pools/ingest-")]
    kept = config.storage.read_bytes(record)
    config.storage.delete(record)
    with pytest.raises(RunConflictError, match="was cut off before it had written its record"):
        ingest(config_of(data, NEW, data / "ws", add=True))
    ingest(config)
    assert config.storage.read_json(record)["sources"].keys() == json.loads(kept)["sources"].keys()
    ingest(config_of(data, NEW, data / "ws", add=True))


def test_a_source_of_a_known_name_has_the_known_licence(data: Path) -> None:
    ingest(config_of(data, FIRST, data / "ws"))
    other = config_of(data, ["seed"], data / "ws", add=True)
    sources = [source.model_copy(update={"licence": "mit", "path": str(data / "seed-new.jsonl")}) for source in other.sources]
    with pytest.raises(ConfigError, match="a source 'seed' already, with licence 'licence of seed'; this one's is 'mit'"):
        ingest(other.model_copy(update={"sources": tuple(sources)}))


def test_there_must_be_a_pool_to_add_to_and_other_files_do_not_replace_one(data: Path) -> None:
    with pytest.raises(InputError, match="has no pool to add to"):
        check_ingest(config_of(data, NEW, data / "ws", add=True))
    with pytest.raises(InputError, match="has no pool to add to"):
        ingest(config_of(data, NEW, data / "ws", add=True))
    ingest(config_of(data, FIRST, data / "ws"))
    with pytest.raises(RunConflictError, match="add=true adds to them"):
        ingest(config_of(data, NEW, data / "ws"))


def test_what_joins_is_compared_with_the_benchmarks_of_the_pools(data: Path) -> None:
    (data / "bench.json").write_text(json.dumps([{"prompt": ITEM}]))
    write(data, {"web-old": [("Tell me how many red foxes live there", "Two.", "No.")]})
    write(data, {"web-leak": [(ITEM, "Forty.", "None."), ("Who has counted them so far?", "I.", "No.")]})
    decontaminate = {"benchmarks": [{"path": str(data / "bench.json"), "name": "bench"}], "candidates": True}
    ingest(config_of(data, [*FIRST, "web-old"], data / "ws", decontaminate=decontaminate))
    with pytest.raises(ConfigError, match="was compared with benchmark bench, and these sources would not be"):
        ingest(config_of(data, ["web-leak"], data / "ws", add=True))
    with pytest.raises(ConfigError, match=r"decontaminate.max_candidates=16, these sources would be with 4"):
        ingest(config_of(data, ["web-leak"], data / "ws", add=True, decontaminate={**decontaminate, "max_candidates": 4}))
    config = config_of(data, ["web-leak"], data / "ws", add=True, decontaminate=decontaminate)
    assert ingest(config)["sources"]["web-leak"]["contaminated"] == 1
    pool = open_pool(config.storage, "wild")
    assert len(ingests_of(pool)) == 2
    check_compared([pool], config.decontaminate)
    held = {pair["pair_id"]: pair["prompt"][0]["content"] for pair in pool.read_all(["pair_id", "prompt"]).to_pylist()}
    proposed = {held[pair_id] for pair_id in read_proposals(pool, ["bench"], 5)["pair_id"].to_pylist() if pair_id in held}
    assert proposed == {"Tell me how many red foxes live there", "Who has counted them so far?"}
    assert comparison_facts(config.decontaminate)["benchmarks"].keys() == {"bench"}
