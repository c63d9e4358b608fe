"""The planner's job: exit codes, the refusal in one line, the curve, and times from a workspace's finished runs."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from jobs.plan import main
from synpref_ray.pipeline.plan import PlanConfig, _measured_throughputs, run_plan
from synpref_ray.reporting.run import Run
from synpref_ray.schema import POOL_SCHEMA
from synpref_ray.tables.pools import commit_pool, write_pool_shard
from synpref_ray.tables.storage import Storage
from tests.planning.test_timing import DEMO_RUN

REPOSITORY = Path(__file__).parents[2]
PAPER = str(REPOSITORY / "jobs" / "configs" / "plan_paper.yaml")


def metrics_of(output: str) -> dict[str, object]:
    folder = Storage(output.strip().splitlines()[-1].removeprefix("run: "))
    values: dict[str, object] = folder.read_json("metrics.json")
    return values


def test_a_budget_is_split_and_the_paper_s_example_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", PAPER, f"workspace={tmp_path}"]) == 0
    cost = metrics_of(capsys.readouterr().out)["cost"]
    assert isinstance(cost, dict)
    assert cost["sizes"] == {"gold": 25_000, "silver": 250_000, "stage2": 2_500_000}
    assert cost["total"] + cost["left"] == 50_000
    assert main(["--config", PAPER, f"workspace={tmp_path}", "policy.gold_fraction=0.5"]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in error if line.startswith("plan: ")]) == 1
    assert "nothing of 50,000 is left for Stage 2" in error[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say what to plan"),
        (["target=80"], "needs a scaling curve"),
        (["curve.file=nothing.json"], "there is no nothing.json"),
        (["like=demo"], "no finished run"),
    ],
)
def test_what_cannot_be_planned_is_one_line(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"workspace={tmp_path}", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_workspace_without_runs_is_not_made_by_asking_for_its_paces(tmp_path: Path) -> None:
    assert main([f"workspace={tmp_path / 'mistyped'}", "like=demo"]) == 2
    assert not (tmp_path / "mistyped").exists()


def test_a_target_is_read_off_the_curve_of_an_ablation(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    points = [{"pairs": size, "score": 90 - 400 / size**0.5} for size in (100, 400, 1600, 6400)]
    storage.write_json("ablation/metrics.json", {"scaling": {"points": points}})
    config = PlanConfig(
        workspace=str(tmp_path),
        target=80,
        curve={"file": f"{tmp_path}/ablation/metrics.json"},
        assumptions={"curated_fraction": 0.3, "flipped_fraction": 2 / 7},  # kept and flipped: half
    )
    run = Run(storage, "plan", config)
    table = run_plan(config, run)
    assert run.metrics["target"]["pairs"] == pytest.approx(1600, rel=0.02)
    assert run.metrics["cost"]["sizes"]["stage2"] == pytest.approx(3200, rel=0.02)
    assert run.metrics["cost"]["sizes"]["gold"] == pytest.approx(0.01 * 3200, abs=1)  # a quarter of the budget; silver another, Stage 2 a half
    assert "a score of 80 needs 1," in table
    assert "stop: " in table or "go on: " in table or "undecided: " in table


def test_what_lies_beyond_the_runs_is_called_so_and_metrics_are_json(tmp_path: Path) -> None:
    points = [{"pairs": size, "score": score} for size, score in ((10, 50.0), (100, 65.0), (1000, 80.0))]
    config = PlanConfig(workspace=str(tmp_path), budget=50_000, curve={"points": points, "ceiling": 1e9}, stop={"min_gain": 0.0})
    run = Run(Storage(str(tmp_path)), "plan", config)
    table = run_plan(config, run)
    run.finish()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    metrics = json.loads(Storage(str(tmp_path)).read_bytes(f"{run.folder}/metrics.json"), parse_constant=refuse)
    assert metrics["stop"]["size"] is None
    assert metrics["stop"]["stop"] is None
    assert metrics["cost"]["score"]["low"] is None
    assert "gain below 0 from" in table
    assert "no size; beyond the largest run (1,000 pairs): an extrapolation" in table
    assert "undecided: 1,000,000 further pairs" in table
    [split] = [line for line in table.splitlines() if line.startswith("the curve puts them at")]
    assert split.endswith("(not known); beyond the largest run (1,000 pairs): an extrapolation")


def test_only_a_stage_s_own_steps_measure_its_throughputs(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    run = Run(storage, "evaluate", PlanConfig(workspace=str(tmp_path), budget=1))
    for name, rows in (
        ("score replies", 60),
        ("judge (a) benchmarks", 60),
        ("judge leaks", 60),
        ("score, both RMs", 3600),
        ("judge (a), round 1", 7200),
    ):
        run.step(name, rows=rows, computed=rows, rejected={}, seconds=3600.0)
    run.finish()
    assert _measured_throughputs(PlanConfig(workspace=str(tmp_path), budget=1, measured={"gpus": 2})) == {"score": 1800.0, "judge": 3600.0}


def test_the_demo_s_time_comes_from_a_finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A workspace with the recorded events of a real demo: its own time is found again, step by step and with what lies between."""
    monkeypatch.chdir(REPOSITORY)
    storage = Storage(str(tmp_path))
    for name, rows in (("seed", 150), ("unverified", 300)):
        table = pa.table(
            [pa.nulls(rows, field.type) for field in POOL_SCHEMA], schema=pa.schema([field.with_nullable(True) for field in POOL_SCHEMA])
        )
        commit_pool(storage, name, "made", [write_pool_shard(storage, name, 0, table)], {})
    seconds = DEMO_RUN["metrics"]["seconds"]
    lines = [*DEMO_RUN["events"], {"event": "finish", "seconds": seconds}]
    storage.write_json("runs/demo-1/metrics.json", DEMO_RUN["metrics"])
    storage.write_bytes("runs/demo-1/events.jsonl", "\n".join(json.dumps(line) for line in lines).encode())
    config = PlanConfig(workspace=str(tmp_path), like="demo", expected_seconds=seconds)
    run = Run(storage, "plan", config)
    table = run_plan(config, run)
    time = run.metrics["time"]
    steps = {step["step"]: step for step in time["steps"]}
    assert steps["train gold RM"]["work"] == pytest.approx(279)
    assert steps["score held-out pairs"]["work"] == 1600
    assert time["seconds"] == pytest.approx(time["overhead"] + sum(step["seconds"] for step in time["steps"]))
    assert time["ratio"] == pytest.approx(1.0, abs=0.1)  # from its own steps: the check of the arithmetic, not of a forecast
    assert "estimated: " in table
