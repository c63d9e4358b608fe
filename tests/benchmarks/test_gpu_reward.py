"""The GPU benchmark runs, and finds its sides right, where there is no GPU."""

import json
from pathlib import Path

import pytest

from benchmarks.gpu_reward import main


@pytest.mark.parametrize("mode", ["score", "train"])
def test_the_gpu_benchmark_runs_without_one(mode: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    sides = "engine;engine, blocks;padding-free;padded;limit"
    assert main(["--device", "cpu", "--tiny", "--rounds", "1", "--mode", mode, "--sides", sides, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert set(result["sides"]) == set(sides.split(";"))
    assert result["wrong"] == []
