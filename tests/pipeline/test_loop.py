"""Ingest, Stage 1, Stage 2, training, scoring and evaluation with real engines, small; and a second run that computes nothing."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from synpref_ray.tables.pools import open_pool
from synpref_ray.tables.sets import load_set
from synpref_ray.tables.sidecars import open_sidecar
from synpref_ray.tables.storage import Storage
from tests.pipeline.small_loop import SIZES, SmallLoop, finished_shards


@pytest.mark.ray
@pytest.mark.engine
def test_the_loop_runs_and_a_second_run_computes_nothing(tmp_path: Path) -> None:
    loop, workspace = SmallLoop(tmp_path), tmp_path / "ws"
    assert loop.run("ingest", workspace)["pools"] == SIZES
    stage1 = loop.run("stage1", workspace)
    stage2 = loop.run("stage2", workspace)
    assert stage1["stage1"]["simulated_gold"] is True
    assert sum(stage2["stage2"]["decisions"].values()) == SIZES["wild"]

    storage = Storage(str(workspace))
    gold = open_pool(storage, stage1["stage1"]["gold"]["pool"]).read_all()
    silver = load_set(storage, **stage1["stage1"]["sets"]["silver"]).read()
    assert not set(silver["prompt_group"].to_pylist()) & set(gold["prompt_group"].to_pylist())
    wild = open_pool(storage, "wild")
    decision = open_sidecar(wild, "decision").read_all()
    assert decision["pair_id"].to_pylist() == wild.read_all(["pair_id"])["pair_id"].to_pylist()

    before = finished_shards(workspace)
    for job in ("stage1", "stage2"):
        again = loop.run(job, workspace)
        assert sum(event["computed"] for event in again["events"] if event["event"] == "step") == 0
    assert finished_shards(workspace) == before

    model = workspace / "models" / stage1["stage1"]["best_rm"]["name"]
    assert json.loads((model / "parity_record.json").read_text())["sides"][0]["status"] == "passed"
    assert "| our engine in float32 | passed |" in (model / "README.md").read_text()
    out = tmp_path / "rewards.parquet"
    assert loop.run("score", workspace, f"model={model}", f"pairs={loop.data / 'wild.jsonl'}", f"out={out}")["rows"] == SIZES["wild"]
    assert pq.read_table(out)["pair_id"].to_pylist() == decision["pair_id"].to_pylist()
    measured = loop.run("evaluate", workspace, f"model={model}", "benchmarks=[seed.jsonl]", f"data={loop.data}")
    assert measured["seed/num_pairs"] == SIZES["seed"]


@pytest.mark.ray
@pytest.mark.engine
@pytest.mark.slow
def test_the_loop_goes_by_clusters_where_hygiene_was_run_and_its_set_is_exported(tmp_path: Path) -> None:
    loop, workspace = SmallLoop(tmp_path), tmp_path / "ws"
    loop.run("ingest", workspace)
    clean = loop.run("hygiene", workspace)
    assert sum(counts["pairs"] for counts in clean["pii"].values()) == sum(SIZES.values())
    stage1 = loop.run("stage1", workspace)["stage1"]
    assert stage1["near_duplicates"]
    record = loop.run("stage2", workspace)["stage2"]
    storage = Storage(str(workspace))
    near = [
        open_sidecar(open_pool(storage, name), "hygiene").read_all(["pair_id", "near_duplicate_group"]) for name in ("seed", "unverified", "wild")
    ]
    cluster = {row["pair_id"]: row["near_duplicate_group"] for table in near for row in table.to_pylist()}
    gold = {cluster[pair_id] for pair_id in open_pool(storage, stage1["gold"]["pool"]).read_all(["pair_id"])["pair_id"].to_pylist()}
    silver = load_set(storage, **stage1["sets"]["silver"]).read()["pair_id"].to_pylist()
    curated = load_set(storage, record["sets"]["kept_and_flipped"]).read()["pair_id"].to_pylist()
    assert not gold & {cluster[pair_id] for pair_id in [*silver, *curated]}
    together = load_set(storage, record["sets"]["kept_and_flipped_and_silver"]).read()["pair_id"].to_pylist()
    assert {*curated} <= {*together} <= {*curated, *silver}
    if curated:
        export = loop.run("export", workspace, f"set={record['sets']['kept_and_flipped']}", "unknown_licences=true")["export"]
        assert export["pairs"] == len(curated)
        assert "SIMULATED" in (Path(export["folder"]) / "README.md").read_text()
