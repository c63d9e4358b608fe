"""Times: a start and a pace from exact steps, kinds from the names of events, and the demo's own steps estimated from each other.

Two real runs of the demo on two shared CPU cores: `demo_steps.json` holds the step events of one that was cut off in Stage 2's judging, from its log;
`demo_run.json` those of a whole one, with what its metrics say of rounds, Stage 2 and time. `models` and `epochs` were added: events had no such
fields then. Other work ran beside both, more beside the second, so that the paces of one are not those of the other.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synpref_ray.errors import InputError
from synpref_ray.planning.loop import LoopShares, LoopSizes, loop_steps, read_shares
from synpref_ray.planning.timing import MeasuredRuns, MeasuredStep, PlannedStep, estimate, fit_paces, kind_of, leave_one_out, measured_steps

DEMO_STEPS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "demo_steps.json").read_text())
DEMO_RUN: dict[str, Any] = json.loads((Path(__file__).parent / "demo_run.json").read_text())
DEMO = LoopSizes(
    seed=150, unverified=300, wild=500, held_out=400, seed_gold=76, round_gold=33, rounds=2, taggers=("tagger",),
    judges=("smollm2-135m",), gold_epochs=3,
)  # fmt: skip
SHARES = LoopShares(selected=(175 / 300, 125 / 300), silver=302 / 308, working_gold=97 / 142, mismatches=145 / 500, curated=346 / 500)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tag (tagger)", "tag (tagger)"),
        ("tag mismatches (tagger)", "tag (tagger)"),
        ("embed mismatches", "embed"),
        ("judge (a b), round 12", "judge (a b)"),
        ("train best-r01", "train"),
        ("score gold, round 1", "score"),
        ("score, both RMs", "score"),
        ("score held_out.parquet", "score"),
        ("score replies", "score replies"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_work_counts_models_epochs_and_what_was_asked() -> None:
    steps = measured_steps(
        [
            {"event": "start"},
            {"event": "step", "step": "score, both RMs", "rows": 9, "computed": 9, "seconds": 1.0, "models": 2},
            {"event": "step", "step": "train gold", "rows": 9, "computed": 9, "seconds": 2.0, "epochs": 3},
            {"event": "step", "step": "judge (a), round 1", "rows": 9, "computed": 9, "seconds": 3.0, "judged": 4},
            {"event": "step", "step": "embed", "rows": 9, "computed": 0, "seconds": 3.0},
            {"event": "parity", "seconds": 4.0},
        ]
    )
    assert steps == [
        MeasuredStep("score", 18, 1.0),
        MeasuredStep("train", 27, 2.0),
        MeasuredStep("judge (a)", 4, 3.0),
        MeasuredStep("parity", 1, 4.0),
    ]


def test_a_start_and_a_pace() -> None:
    pace = fit_paces([MeasuredStep("x", 10, 7.0), MeasuredStep("x", 30, 11.0)])["x"]
    assert (pace.start, pace.per_unit) == pytest.approx((5.0, 0.2))
    alone = fit_paces([MeasuredStep("x", 10, 7.0)])["x"]
    assert (alone.start, alone.per_unit) == pytest.approx((0.0, 0.7))


@given(
    steps=st.lists(st.tuples(st.integers(1, 1000), st.floats(0, 1000)), min_size=1, max_size=6), work=st.integers(0, 1000), more=st.integers(0, 1000)
)
def test_estimates_never_fall_with_the_work(steps: list[tuple[int, float]], work: int, more: int) -> None:
    pace = fit_paces([MeasuredStep("x", w, s) for w, s in steps])["x"]
    assert 0 <= pace.seconds(work) <= pace.seconds(work + more) + 1e-9


def test_a_kind_that_was_never_measured_is_named() -> None:
    with pytest.raises(InputError, match=r"kind judge \(b\)"):
        estimate([PlannedStep("judge (b)", 1)], MeasuredRuns((MeasuredStep("judge (a)", 1, 1.0),), 1.0))


def test_the_seconds_between_steps_count() -> None:
    runs = MeasuredRuns((MeasuredStep("x", 1, 1.0), MeasuredStep("x", 2, 2.0)), 5.0)
    found = estimate([PlannedStep("x", 4)], runs)
    assert found.seconds == pytest.approx(4.0 + 1.0)


def test_each_step_of_the_measured_demo_from_its_other_steps() -> None:
    left_out = leave_one_out(measured_steps(DEMO_STEPS))
    assert 0.7 <= left_out.estimated / left_out.measured <= 1.3
    assert left_out.measured > 3 * left_out.unchecked


def test_the_rest_of_the_demo_from_its_first_rounds() -> None:
    """What came after round 1 (larger training sets, both reward models on the wild pool), estimated from what came before it."""
    cut = next(place for place, event in enumerate(DEMO_STEPS) if event["step"] == "score gold, round 2")
    before = measured_steps(DEMO_STEPS[:cut])
    kinds = {step.kind for step in before}
    after = [step for step in measured_steps(DEMO_STEPS[cut:]) if step.kind in kinds and step.kind.split(" ")[0] in {"train", "judge"}]
    found = estimate([PlannedStep(step.kind, step.work) for step in after], MeasuredRuns(tuple(before), sum(step.seconds for step in before)))
    assert 0.7 <= found.seconds / sum(step.seconds for step in after) <= 1.3


def test_the_whole_demo_from_its_first_rounds() -> None:
    """Paces from the steps up to the second round's training; shares from the end, as a run before would have given them."""
    events, metrics = DEMO_RUN["events"], DEMO_RUN["metrics"]
    cut = next(place for place, event in enumerate(events) if event.get("step") == "score gold, round 2")
    early = measured_steps(events[:cut])
    planned = loop_steps(DEMO, read_shares(metrics, seed=150, unverified=300))
    found = estimate(planned, MeasuredRuns(tuple(early), sum(step.seconds for step in early)))
    assert 0.7 <= found.seconds / metrics["seconds"] <= 1.3
    left_out = leave_one_out(measured_steps(events))
    assert 0.7 <= left_out.estimated / left_out.measured <= 1.3


def test_every_step_of_the_demo_that_takes_time_is_planned() -> None:
    """Kinds, their number and their work, against the events of the run whose shares are used."""
    metrics = DEMO_RUN["metrics"]
    planned = loop_steps(DEMO, read_shares(metrics, seed=150, unverified=300))
    ran = [step for step in measured_steps(DEMO_RUN["events"]) if step.kind not in {"verify", "exemplars", "decide"}]
    for kind in {step.kind for step in ran}:
        theirs, ours = ([step.work for step in steps if step.kind == kind] for steps in (ran, planned))
        assert len(ours) == len(theirs), kind
        assert sum(ours) == pytest.approx(sum(theirs), rel=0.03), kind


def test_the_planned_work_is_the_demo_s() -> None:
    """The work of every planned step, against the events of the run whose shares it has."""
    planned = {step.name: step.work for step in loop_steps(DEMO, SHARES)}
    assert planned["ingest"] == 950
    assert planned["tag (tagger), Stage 1"] == 450
    assert planned["judge (smollm2-135m), seed"] == 150
    assert planned["train best RM, round 1"] == pytest.approx(74, abs=2)
    assert planned["train best RM, round 2"] == pytest.approx(215, abs=5)
    assert planned["train best RM, final"] == pytest.approx(302, abs=1)
    assert planned["train gold RM"] == pytest.approx(3 * 97)
    assert planned["judge (smollm2-135m), round 1"] == pytest.approx(250, abs=2)
    assert planned["score gold, round 2"] == 109
    assert planned["score, both RMs"] == 1000
    assert planned["judge (smollm2-135m), mismatches"] == pytest.approx(145)
    assert planned["score held-out pairs"] == 1600


def test_shares_of_a_finished_run() -> None:
    rounds = [
        {"set_sizes": {}, "selected_pairs": 0},
        {"set_sizes": {}, "selected_pairs": 175},
        {"set_sizes": {"silver": 302, "gold-working": 97, "gold-audit": 45}, "selected_pairs": 125},
    ]
    stage2 = {"pairs": 500, "judged_pairs": 145, "decisions": {"keep": 248, "flip": 98, "drop": 154}}
    assert read_shares({"rounds": rounds, "stage2": stage2}, seed=150, unverified=300) == SHARES
    with pytest.raises(InputError, match="finished Stage 1"):
        read_shares({"rounds": rounds}, seed=150, unverified=300)
