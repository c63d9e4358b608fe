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
