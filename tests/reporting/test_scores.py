"""What a report shows of several evaluations: one run's numbers for a scorer and benchmark, models kept apart, and what readers must know of them."""

from typing import Any

import pytest

from synpref_ray.reporting.report.models import benchmarks_section
from synpref_ray.reporting.report.records import Records, RunRecord
from synpref_ray.reporting.report.scores import level_name, read_scores


def run(time: float, model: str, metrics: dict[str, Any], **about: Any) -> RunRecord:
    """Return a run of `jobs/evaluate.py` on one benchmark `b`, at a time."""
    config = {"model": model, **about.pop("config", {})}
    facts = {"items": 10, "official_items": 10, "sample_fraction": 1.0, "is_official": True, "contaminated_items": None, **about}
    values = {key: value for name, value in metrics.items() for key, value in named(name, value).items()}
    return RunRecord(f"evaluate-20260101-000000-{time:06.0f}", config, ({"time": time},), {"benchmarks": {"b": facts}, **values})


def named(name: str, value: Any) -> dict[str, Any]:
    if "/" not in name or name.rsplit("/", 1)[-1] in ("unscored", "missing"):
        return {name: value}
    return {name: value, f"{name}/low": value - 0.1, f"{name}/high": value + 0.1, f"{name}/verified": "hand-worked"}


def values(*runs: RunRecord) -> dict[tuple[str, str], float]:
    latest_first = sorted(runs, key=lambda one: -one.time)
    return {(score.scorer, score.metric): score.value for score in read_scores(latest_first)}


def section(*runs: RunRecord) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    records = Records(status=None, runs=runs, rounds=(), stage1=None, stage2=None, trainings={})  # type: ignore[arg-type]
    found = benchmarks_section(records)
    assert found is not None
    rows = {table.name: [dict(zip((one.name for one in table.columns), row, strict=True)) for row in table.rows] for table in found.tables}
    return rows, [block.text for block in found.blocks if hasattr(block, "text")]


def test_models_of_one_name_stay_apart_and_a_moved_model_is_one() -> None:
    first = run(1, "a/best", {"model_digest": "d" * 32, "b/accuracy": 0.5})
    second = run(2, "c/best", {"model_digest": "e" * 32, "b/accuracy": 0.6})
    assert values(first, second) == {("best (dddddddd)", "accuracy"): 0.5, ("best (eeeeeeee)", "accuracy"): 0.6}
    moved = run(3, "elsewhere/best", {"model_digest": "d" * 32, "b/accuracy": 0.5})
    assert values(first, moved) == {("best", "accuracy"): 0.5}


def test_runs_of_other_jobs_with_a_model_or_judges_are_no_evaluations() -> None:
    measured = run(1, "models/best", {"model_digest": "d" * 32, "b/accuracy": 0.5})
    score = RunRecord("score-20260101-000000-000002", {"model": "models/best"}, (), {"rows": 3})
    stage = RunRecord("stage2-20260101-000000-000003", {"model": "", "judges": ["other", "form"]}, (), {})
    assert values(score, stage, measured) == {("best", "accuracy"): 0.5}


def test_a_quick_look_never_hides_the_whole_and_numbers_of_runs_are_not_mixed() -> None:
    whole = run(1, "m", {"model_digest": "d", "b/accuracy": 0.5, "b/mrr": 0.7})
    quick = run(2, "m", {"model_digest": "d", "b/accuracy": 0.9}, sample_fraction=0.05, items=1)
    assert values(whole, quick) == {("m", "accuracy"): 0.5, ("m", "mrr"): 0.7}
    again = run(3, "m", {"model_digest": "d", "b/accuracy": 0.6})
    assert values(whole, quick, again) == {("m", "accuracy"): 0.6}  # no `mrr` of the first beside it
    half = run(4, "m", {"model_digest": "d", "b/accuracy": 0.8}, items=5)
    assert values(again, half) == {("m", "accuracy"): 0.6}


def test_judges_of_one_name_stay_apart_by_their_models() -> None:
    def judges(model: str) -> dict[str, Any]:
        return {"judges": [{"judge": {"judge": "j"}, "engine": {"model": model}}]}

    one, other = (run(time, "", {"b/judge.j/accuracy": 0.1 * time}, config=judges(f"org/m{time}")) for time in (1, 2))
    assert values(one) == {("judge j", "accuracy"): 0.1}
    assert set(values(one, other)) == {("judge j (m1)", "accuracy"), ("judge j (m2)", "accuracy")}


def test_shared_prompts_unscored_items_and_missing_metrics_are_on_the_page() -> None:
    metrics = {"model_digest": "d", "b/accuracy": 0.5, "b/unscored": 3, "b/missing": {"overall": "no item of math"}}
    measured = run(1, "m", metrics, contaminated_items=["x", "y"])
    measured = RunRecord(measured.name, measured.config, measured.events, {**measured.metrics, "b/clean/accuracy": 0.4})
    rows, notes = section(measured)
    assert [(row["unscored"], row["shared with pools"], row["without them"]) for row in rows["metrics"]] == [(3, 2, 0.4)]
    assert rows["missing_metrics"] == [{"benchmark": "b", "scorer": "m", "metric": "overall", "why there is none": "no item of math"}]
    assert any("b (2 of 10 items)" in note for note in notes)
    assert any("count as wrong: b (3, m)" in note for note in notes)


def test_parts_are_told_by_metric_and_unknown_sizes_are_said() -> None:
    counts = {"b/x/items": 5, "b/x/official_items": 5, "b/y/items": 2, "b/y/official_items": 5, "b/z/items": 2, "b/z/official_items": None}
    measured = run(1, "m", {"model_digest": "d", "b/x": 0.5, "b/y": 0.5, "b/z": 0.5})
    measured = RunRecord(measured.name, measured.config, measured.events, {**measured.metrics, **counts})
    rows, notes = section(measured)
    assert {row["metric"]: (row["items"], row["of official"]) for row in rows["metrics"]} == {"x": (5, 5), "y": (2, 5), "z": (2, None)}
    assert any(note.startswith("Not the whole official set: b (y).") for note in notes)
    assert any("how many items the official set has: b (z)." in note for note in notes)


@pytest.mark.parametrize(("level", "name"), [(0.95, "95 % interval"), (0.9, "90 % interval"), (0.995, "99.5 % interval")])
def test_intervals_are_called_by_their_level(level: float, name: str) -> None:
    rows, _ = section(run(1, "m", {"model_digest": "d", "b/accuracy": 0.5}, config={"confidence": level}))
    assert rows["metrics"][0][name] == (0.4, 0.6)
    assert level_name([0.95, level, 0.95]).count("interval") == 1
