"""The table of flips by source, and input that is not there."""

from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import flips
from synpref_ray.evaluation.label_quality import LabelEvidence, flip_detection, label_quality


def test_every_stage_and_source_has_a_line_with_intervals() -> None:
    decisions, better = ["keep", "flip", "flip", "drop"], ["chosen", "rejected", "chosen", "rejected"]
    known = LabelEvidence("Stage 2", "hh_rlhf", label_quality(decisions, better), flip_detection(decisions, better), is_total=False)
    none = LabelEvidence("Stage 2", "other", label_quality(["keep"], ["chosen"]), flip_detection(["keep"], ["chosen"]), is_total=False)
    first, second = flips._table([asdict(known), asdict(none)]).splitlines()[2:]
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    assert cells[:4] == ["Stage 2", "hh_rlhf", "2", "2"]
    assert [cell.split(" (")[0] for cell in cells[4:]] == ["50.0 %", "50.0 %", "50.0 %", "66.7 %"]
    assert all(cell.endswith(end) for cell, end in zip(cells[4:], ("of 2", "of 2", "of 4", "of 3"), strict=True))
    assert second.count("| - |") == 1  # no flips and no wrong label: neither precision nor recall, and what is right is told


def test_data_that_is_not_there_is_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert flips.main(["--workspace", str(tmp_path / "ws"), "--real-data", str(tmp_path / "none")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
