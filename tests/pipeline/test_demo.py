"""The demo's claims, checked on a full run with three seeds; and the same jobs on real human pairs, where a null result is an answer."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from synpref_ray.schema import Verdict
from synpref_ray.tables.pools import open_pool
from synpref_ray.tables.storage import Storage
from tests.pipeline.small_loop import REPOSITORY, environment


def run_job(job: str, *arguments: str) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """Run a job from the repository's root; return its standard output, metrics and events."""
    command = [sys.executable, f"jobs/{job}.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment(), check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    folder = Path(done.stdout.strip().splitlines()[-1].removeprefix("run: "))
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return done.stdout, json.loads((folder / "metrics.json").read_text()), events


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.engine
def test_curation_mends_labels_and_helps_a_reward_model(tmp_path: Path) -> None:
    arguments = ["--config", "jobs/configs/demo.yaml", f"workspace={tmp_path / 'demo'}", "comparison_seeds=[0, 1, 2]"]
    output, metrics, _ = run_job("demo", *arguments)
    assert "SIMULATED" in output
    found = metrics["demo"]
    assert found["gold_share"] <= 0.15
    assert found["labels"]["raw"]["accuracy"] == pytest.approx(0.7, abs=0.001)
    assert found["labels"]["kept_and_flipped"]["accuracy"] >= 0.82
    assert found["labels"]["kept_share"] + found["labels"]["flipped_share"] >= 0.5
    assert found["curated_minus_raw"]["num_seeds"] == 3
    assert found["curated_minus_raw"]["low"] > 0
    _, _, events = run_job("demo", *arguments)
    assert sum(event["computed"] for event in events if event["event"] == "step") == 0


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.engine
def test_the_jobs_run_on_real_human_pairs(tmp_path: Path, shared_data: Path) -> None:
    data, workspace = tmp_path / "data", tmp_path / "ws"
    data.mkdir()
    human = pq.read_table(shared_data / "hh_rlhf" / "train.parquet").slice(0, 400)
    extra = pq.read_table(shared_data / "human_extra" / "train.parquet").slice(0, 200)
    for name, table in (
        ("seed", human.slice(0, 60)),
        ("unverified", human.slice(60, 140)),
        ("wild-hh", human.slice(200)),
        ("wild-extra", extra),
    ):
        pq.write_table(table, data / f"{name}.parquet")
    _, ingested, _ = run_job("ingest", "--config", "jobs/configs/laptop_ingest.yaml", f"data={data}", f"workspace={workspace}")
    assert sum(ingested["pools"].values()) + sum(ingested["rejected"].values()) == 600
    storage = Storage(str(workspace))
    ids = [i for name in ("seed", "unverified") for i in open_pool(storage, name).read_all(["pair_id"])["pair_id"].to_pylist()]
    truth = tmp_path / "human-labels.parquet"
    pq.write_table(pa.table({"pair_id": ids, "verdict": [Verdict.CHOSEN.value] * len(ids)}), truth)
    annotator = ["annotator.kind=simulated", f"annotator.path={truth}", "annotator.seed_pairs=30", "annotator.round_pairs=15"]
    run_job("stage1", "--config", "jobs/configs/laptop_stage1.yaml", f"workspace={workspace}", "stop.max_rounds=1", *annotator)
    _, metrics, _ = run_job("stage2", "--config", "jobs/configs/laptop_stage2.yaml", f"workspace={workspace}")
    assert sum(metrics["stage2"]["decisions"].values()) == ingested["pools"]["wild"]
