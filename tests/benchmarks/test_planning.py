"""The part of the demo's data that the planner's benchmark measures."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from benchmarks.planning import make_part, measured_seconds


def test_the_part_is_a_third_of_every_pool(tmp_path: Path) -> None:
    folder = make_part(tmp_path)
    sizes = {file.stem: len(file.read_text(encoding="utf-8").splitlines()) for file in (folder / "pools").glob("*.jsonl")}
    assert sizes == {"seed": 50, "unverified": 100, "wild": 167}
    assert pq.read_metadata(folder / "held_out.parquet").num_rows == 134
    assert (folder / "truth.parquet").is_file()


def test_the_first_demo_of_a_workspace_counts(tmp_path: Path) -> None:
    for name, seconds in (("demo-1", 1500.0), ("demo-2", 9.0)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "metrics.json").write_text(json.dumps({"seconds": seconds}))
    assert measured_seconds(tmp_path) == 1500.0
    with pytest.raises(SystemExit, match="no finished demo"):
        measured_seconds(tmp_path / "none")
