"""What Stage 1 says about a verdict file before it begins."""

import json
import logging
from pathlib import Path

import pytest

from synpref_ray.pipeline.job import JobConfig
from synpref_ray.pipeline.stage1 import report_verdict_file
from synpref_ray.pipeline.verification import AnnotatorConfig
from synpref_ray.reporting.run import Run
from synpref_ray.tables.pools import Pool, commit_pool, write_pool_shard
from synpref_ray.tables.storage import Storage
from tests.builders import make_pairs


def make_pool(storage: Storage, name: str) -> Pool:
    return commit_pool(storage, name, "f" * 32, [write_pool_shard(storage, name, 0, make_pairs(3, topic=name))], {})


@pytest.mark.parametrize("unknown", [[], ["elsewhere"]])
def test_verdicts_on_pairs_that_no_pool_holds_are_counted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture, unknown: list[str]) -> None:
    storage = Storage(str(tmp_path / "ws"))
    pools = [make_pool(storage, "seed"), make_pool(storage, "unverified")]
    judged = [pool.read(0)["pair_id"][0].as_py() for pool in pools] + unknown
    file = tmp_path / "verdicts.jsonl"
    file.write_text("".join(json.dumps({"pair_id": pair_id, "verdict": "chosen", "annotator": "ann"}) + "\n" for pair_id in judged))
    run = Run(storage, "stage1", JobConfig(workspace=str(tmp_path / "ws")))
    with caplog.at_level(logging.WARNING):
        report_verdict_file(AnnotatorConfig(kind="file", path=str(file)), run, pools)
    found = run.metrics["verdict_file"]
    assert (found["num_pairs"], found["num_unknown"], found["unknown_examples"]) == (len(judged), len(unknown), unknown)
    assert ("1 of 3 judged pairs are in no pool (seed or unverified)" in caplog.text) == bool(unknown)
    assert caplog.text.count("\n") == len(unknown)


def test_a_simulated_annotator_has_no_verdict_file_to_report_on(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "ws"))
    run = Run(storage, "stage1", JobConfig(workspace=str(tmp_path / "ws")))
    report_verdict_file(AnnotatorConfig(kind="simulated", path=str(tmp_path / "none.parquet"), seed_pairs=1), run, [make_pool(storage, "seed")])
    assert "verdict_file" not in run.metrics
