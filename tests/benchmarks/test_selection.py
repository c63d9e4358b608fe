"""The comparison of selection rules: what it prints, what it leaves in the workspace, and what the report says of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.selection import BASELINE, Comparison, compare, comparison_record, unequal_budgets
from synpref_ray.evaluation.accuracy import bootstrap_accuracy, paired_bootstrap
from synpref_ray.reporting.report.content import Note
from synpref_ray.reporting.report.make import ReportOptions, make_report
from synpref_ray.reporting.report.page import render_html, report_json
from synpref_ray.reporting.run import Run
from synpref_ray.tables.storage import Storage

ASKED = Comparison(
    kinds=("similarity", "random", "uncertainty"), seeds=(0, 1), num_pairs=60, rounds=2, seed_gold=70, round_gold=25, gold_rm=False, config="c"
)
SHARES = {"similarity": 0.9, "random": 0.6, "uncertainty": 0.62}


def one_run(kind: str, seed: int) -> dict[str, Any]:
    gold = {"gold-working": 70, "gold-audit": 40, "silver": 100}
    audit = {"num_pairs": 40, "num_correct": 30, "accuracy": 0.75, "low": 0.6, "high": 0.86}
    return {"seed": seed, "selected": [0, 60, 60], "called_for": [None, 80, 75], "sets": gold, "audit_gold": audit, "kind": kind, "gold_rms": 0}


@pytest.fixture
def compared() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return runs, accuracies and differences: similarity is far better than chance, uncertainty is not told apart."""
    random = np.random.default_rng(0)
    flags = {kind: np.array([random.random(200) < share for _ in ASKED.seeds]) for kind, share in SHARES.items()}
    runs = {kind: [one_run(kind, seed) for seed in ASKED.seeds] for kind in SHARES}
    accuracies = {kind: [bootstrap_accuracy(of_seed, num_resamples=500) for of_seed in found] for kind, found in flags.items()}
    beside = {kind: paired_bootstrap(found, flags[BASELINE], num_resamples=500) for kind, found in flags.items() if kind != BASELINE}
    return runs, accuracies, beside


def test_every_rule_and_seed_has_a_line_and_every_rule_its_difference(compared: tuple[dict[str, Any], dict[str, Any], dict[str, Any]]) -> None:
    runs, accuracies, beside = compared
    lines = compare(runs, accuracies, beside, ASKED.seeds).splitlines()
    assert sum(line.startswith("| similarity | ") for line in lines) == len(ASKED.seeds)
    assert f"| random | 1 | 120 | 100 | 110 | {100 * accuracies['random'][1].accuracy:.1f} % of 200 |" in "\n".join(lines)
    assert [line.split(" minus ")[0] for line in lines if " minus random: " in line] == ["similarity", "uncertainty"]
    assert not any("WARNING" in line for line in lines)


def test_the_report_shows_the_comparison(tmp_path: Path, compared: tuple[dict[str, Any], dict[str, Any], dict[str, Any]]) -> None:
    runs, accuracies, beside = compared
    storage = Storage(str(tmp_path))
    run = Run(storage, "selection", ASKED)
    run.metrics["selection"] = comparison_record(runs, accuracies, beside, 3)
    run.finish()
    report = make_report(storage, ReportOptions(made=0.0))
    section = next(section for section in report.sections if section.name == "selection")
    assert [block.text for block in section.blocks if isinstance(block, Note) and block.warns] == [
        "3 held-out pairs that some model could not score are left out for all."
    ]
    tables = json.loads(report_json(report))["sections"]["selection"]["tables"]
    assert [(row["selected by"], row["seed"]) for row in tables["selection"]] == [(kind, seed) for kind in SHARES for seed in ASKED.seeds]
    assert {row["pairs selected"] for row in tables["selection"]} == {120}
    assert [row["best RM right"] for row in tables["selection"]] == [one.accuracy for found in accuracies.values() for one in found]
    differences = {row["difference, in points"]: (row["difference"], row["seeds"]) for row in tables["selection_differences"]}
    assert differences == {f"{kind} minus random": (beside[kind].difference, 2) for kind in ("similarity", "uncertainty")}
    assert "App. F.4 names uncertainty as future work" in render_html(report)


def test_unequal_budgets_are_said(tmp_path: Path, compared: tuple[dict[str, Any], dict[str, Any], dict[str, Any]]) -> None:
    runs, accuracies, beside = compared
    for kind in runs:
        runs[kind][1]["selected"] = [0, 60, 44]  # another seed calls for another number, the same for all rules
    assert unequal_budgets(runs) == []
    runs["similarity"][0]["selected"] = [0, 60, 41]
    runs["uncertainty"][1]["gold_rms"] = 2
    found = ["seed 0, selected pairs: similarity 101, random 120, uncertainty 120"]
    found.append("seed 1, trainings of a gold RM in rounds: similarity 0, random 0, uncertainty 2")
    assert unequal_budgets(runs) == found
    assert sum("WARNING" in line for line in compare(runs, accuracies, beside, ASKED.seeds).splitlines()) == 2
    storage = Storage(str(tmp_path))
    run = Run(storage, "selection", ASKED)
    run.metrics["selection"] = comparison_record(runs, accuracies, beside, 0)
    run.finish()
    section = next(section for section in make_report(storage, ReportOptions(made=0.0)).sections if section.name == "selection")
    assert [block.text for block in section.blocks if isinstance(block, Note) and block.warns] == [
        f"The rules did not spend the same: {line}." for line in found
    ]
