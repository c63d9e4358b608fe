"""The report of judges, worked by hand, at its extremes, and by property."""

import json
import math
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synpref_ray.errors import SchemaError
from synpref_ray.evaluation.judge_report import judge_report
from synpref_ray.evaluation.shares import kappa, share
from synpref_ray.llm.judge import VOTES_SCHEMA
from synpref_ray.reporting.judge_tables import format_judge_report
from synpref_ray.rules.judges import TrustConfig, judge_trust
from synpref_ray.rules.verdicts import agreement_records
from synpref_ray.schema import stable_hash

C, R, A = "chosen", "rejected", "abstain"
GOLD_SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in ("task_category", "objectivity", "controversiality", "human_verdict", "prompt_group")),
        VOTES_SCHEMA.field("votes"),
    ]
)


def votes(judge: str, first: Sequence[str], second: Sequence[str]) -> list[dict[str, Any]]:
    """Return a judge's votes: the verdicts of its samples in order 0, and in order 1."""
    origin = {"judge": judge, "model": "m", "revision": "r", "prompt_version": "v", "raw": "", "logprob": None}
    answers = [(0, first), (1, second)]
    return [{**origin, "order": o, "sample": s, "verdict": verdict} for o, verdicts in answers for s, verdict in enumerate(verdicts)]


def pair(prompt: str, human: str | None, *cells: Sequence[dict[str, Any]], **attributes: str | None) -> dict[str, Any]:
    tags = {"task_category": "math", "objectivity": "objective", "controversiality": "low", **attributes}
    return {"prompt_group": prompt, "human_verdict": human, "votes": [vote for cell in cells for vote in cell], **tags}


def table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=GOLD_SCHEMA)


def wilson(share_: float, trials: float) -> tuple[float, float]:
    """Return the Wilson interval from its formula, z = 1.959964."""
    z = 1.959963984540054
    centre = (share_ + z * z / (2 * trials)) / (1 + z * z / trials)
    spread = z / (1 + z * z / trials) * math.sqrt(share_ * (1 - share_) / trials + z * z / (4 * trials * trials))
    return centre - spread, centre + spread


SUBJECTIVE = {"objectivity": "subjective", "task_category": "other", "controversiality": "high"}
BY_HAND = table(
    [
        pair("p1", C, votes("a", [C], [C]), votes("b", [C, C, R], [C, C, C])),  # a: right; b: right, 2/3 and 3/3
        pair("p1", C, votes("a", [C], [R]), votes("b", [R, R, R], [R, R, R])),  # a: Candidate 1 both times; b: wrong
        pair("p2", R, votes("a", [R], [R]), votes("b", [R, R, A], [R, C, A]), **SUBJECTIVE),  # a: right; b: no majority in order 1
        pair("p3", C, votes("a", [R], [R]), **SUBJECTIVE),  # a: wrong; b was not asked
        pair("p4", None, votes("a", [R], [C]), votes("b", [A, A, A], [A, A, A]), task_category=None),  # a: Candidate 2; b: unreadable; no gold
    ]
)


def test_one_judge_by_hand() -> None:
    a = judge_report(BY_HAND)["judges"]["a"]
    assert (a["num_pairs"], a["num_votes"], a["num_unreadable_votes"]) == (5, 10, 0)
    # Rows 2 and 5 of five name one position twice; they are of 4 prompts: p1, p2, p3, p4.
    bias = a["position_bias"]
    assert (bias["num_pairs"], bias["num_prompts"], bias["value"]) == (5, 4, 0.4)
    assert (bias["low"], bias["high"]) == pytest.approx(wilson(0.4, 25 / 7))  # prompts of 2, 1, 1, 1 pairs: 5 * 5 / (4 + 1 + 1 + 1)
    # Candidate 1 is chosen in order 0 and rejected in order 1. First named: row 1 once, 2 twice, 3 once, 4 once, 5 never.
    assert a["first_choices"] == {"num_votes": 10, "value": 0.5}
    assert a["self_consistency"] is None  # one sample
    overall = a["agreement"]["overall"]  # row 5 has no gold verdict, row 2 abstains: of rows 1, 3, 4 two are right
    assert (overall["num_pairs"], overall["num_verdicts"], overall["num_prompts"]) == (4, 3, 3)
    assert overall["value"] == pytest.approx(2 / 3)
    assert overall["abstention_share"] == 0.25
    assert (overall["low"], overall["high"]) == pytest.approx(wilson(2 / 3, 3))
    objective, subjective = (a["agreement"]["objectivity"][name] for name in ("objective", "subjective"))
    assert (objective["num_pairs"], objective["num_verdicts"], objective["value"], objective["abstention_share"]) == (2, 1, 1.0, 0.5)
    assert (subjective["num_pairs"], subjective["num_verdicts"], subjective["value"], subjective["abstention_share"]) == (2, 2, 0.5, 0.0)
    assert sorted(a["agreement"]["task_category"]) == ["math", "other"]
    assert sorted(a["agreement"]["controversiality"]) == ["high", "low"]


def test_several_samples_and_unreadable_votes_by_hand() -> None:
    report = judge_report(BY_HAND, {"b": {"not_selected": 1, "refused_by_model": 2}, "c": {"too_long": 5}})
    b = report["judges"]["b"]
    assert (b["num_pairs"], b["num_votes"], b["num_unreadable_votes"]) == (4, 24, 8)  # two in row 3, six in row 5
    # Most common readable verdict of each order: 2/3, 3/3; 3/3, 3/3; 2/3, 1/3; 0, 0.
    assert b["self_consistency"]["num_orders"] == 8
    assert b["self_consistency"]["value"] == pytest.approx((2 / 3 + 1 + 1 + 1 + 2 / 3 + 1 / 3 + 0 + 0) / 8)
    assert b["position_bias"]["num_pairs"] == 2  # rows 3 and 5 have no majority in some order
    assert b["position_bias"]["value"] == 0.0
    assert b["agreement"]["overall"]["num_verdicts"] == 2
    assert b["agreement"]["overall"]["value"] == 0.5
    assert b["agreement"]["overall"]["num_prompts"] == 1  # both verdicts are of prompt p1
    assert b["rows_by_reason"] == {"not_selected": 1, "refused_by_model": 2}
    assert b["num_refused_rows"] == 2
    c = report["judges"]["c"]
    assert (c["num_pairs"], c["num_refused_rows"], c["agreement"]["overall"]["value"], c["position_bias"]["value"]) == (0, 0, None, None)
    assert report["judges"]["a"]["num_refused_rows"] is None  # nobody told
    assert report["num_pairs_without_gold_verdict"] == 1


def test_two_judges_by_hand() -> None:
    report = judge_report(BY_HAND)
    # a says C, A, R, R, A; b says C, R, A, (not asked), A.
    (entry,) = report["between_judges"]
    assert entry["judges"] == ["a", "b"]
    every, decided = entry["all_verdicts"], entry["both_decided"]
    # Equal on 2 of 4: C, A. Chance: C 1/4 x 1/4, A 2/4 x 2/4, R 1/4 x 1/4 = 6/16. Kappa = (8/16 - 6/16) / (10/16).
    assert (every["num_pairs"], every["equal"]["value"]) == (4, 0.5)
    assert every["kappa"] == pytest.approx(0.2)
    assert (decided["num_pairs"], decided["equal"]["value"], decided["kappa"]) == (1, 1.0, None)
    # All votes merged: C; b alone: R (wrong); a alone: R; a alone: R (wrong).
    merged = report["all_judges"]["overall"]
    assert (merged["num_pairs"], merged["num_verdicts"], merged["value"]) == (4, 4, 0.5)


def test_a_judge_that_always_prefers_candidate_1_abstains_everywhere_and_has_all_the_bias() -> None:
    rows = [pair(f"p{number}", human, votes("first", [C] * 3, [R] * 3)) for number, human in enumerate([C, R, C, C])]
    judge = judge_report(table(rows))["judges"]["first"]
    assert judge["position_bias"]["value"] == 1.0
    assert judge["first_choices"]["value"] == 1.0
    assert judge["self_consistency"] == {"num_orders": 8, "value": 1.0}
    assert judge["agreement"]["overall"]["abstention_share"] == 1.0
    assert judge["agreement"]["overall"]["num_verdicts"] == 0
    assert judge["agreement"]["overall"]["value"] is None


def test_a_judge_that_tells_the_truth_agrees_everywhere() -> None:
    humans = [C, R, R, C, R]
    rows = [pair(f"p{number}", human, votes("truth", [human], [human])) for number, human in enumerate(humans)]
    report = judge_report(table(rows))
    truth = report["judges"]["truth"]
    assert truth["position_bias"]["value"] == 0.0
    assert truth["first_choices"]["value"] == 0.5
    overall = truth["agreement"]["overall"]
    assert (overall["value"], overall["abstention_share"], overall["num_verdicts"], overall["high"]) == (1.0, 0.0, 5, 1.0)
    assert overall["low"] == pytest.approx(5 / (5 + 1.959963984540054**2))  # Wilson at p = 1
    assert report["all_judges"] == truth["agreement"]


VOTES = st.lists(st.sampled_from([C, R, A]), min_size=1, max_size=3)
ROWS = st.lists(
    st.builds(
        lambda prompt, human, category, cells: pair(prompt, human, *(votes(name, *cells[name]) for name in cells), task_category=category),
        st.sampled_from(["p1", "p2", "p3"]),
        st.sampled_from([C, R, A, None]),
        st.sampled_from(["math", "other", None]),
        st.dictionaries(st.sampled_from("abc"), st.tuples(VOTES, VOTES)),
    ),
    max_size=8,
)


@settings(deadline=None, max_examples=50)
@given(ROWS, st.randoms(use_true_random=False))
def test_the_order_of_votes_and_rows_does_not_matter(rows: list[dict[str, Any]], random: Random) -> None:
    mixed = [{**row, "votes": random.sample(row["votes"], len(row["votes"]))} for row in random.sample(rows, len(rows))]
    report, other = judge_report(table(rows)), judge_report(table(mixed))
    assert json.dumps(report, allow_nan=False) == json.dumps(other, allow_nan=False)  # and it is JSON, NaN-free
    assert format_judge_report(report) == format_judge_report(other)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(), st.booleans())
def test_a_judge_at_chance_decides_nothing(half: int, seed: int, strict: bool) -> None:
    """Right on exactly half of its verdicts, whichever half and whatever categories they fall into."""
    right = Random(seed).sample(range(2 * half), half)
    rows = []
    for number in range(2 * half):
        human = (C, R)[stable_hash(seed, str(number), "human") % 2]
        verdict = human if number in right else {C: R, R: C}[human]
        category = ("math", "other")[stable_hash(seed, str(number), "category") % 2]
        rows.append(pair(f"p{number}", human, votes("chance", [verdict], [verdict]), task_category=category))
    gold = table(rows)
    assert judge_report(gold)["judges"]["chance"]["agreement"]["overall"]["value"] == 0.5
    trust = judge_trust(agreement_records(gold)["chance"], TrustConfig(must_beat_source_label=strict))
    assert not any(trust.decides(category) for category in ("math", "other", "coding_and_debugging", None))


def test_judges_that_toss_a_coin_rarely_decide() -> None:
    """The bound errs 2.5 % of the time by design, less where a category has to pass as well: of 300 fixed seeds a handful."""
    decided = 0
    for seed in range(300):
        rows = []
        for number in range(40):
            first, second = ((C, R)[stable_hash(seed, f"{number}", f"coin {order}") % 2] for order in (0, 1))
            rows.append(pair(f"p{number}", C, votes("coin", [first], [second])))
        trust = judge_trust(agreement_records(table(rows))["coin"], TrustConfig())
        decided += trust.decides("math")
    assert decided <= 12


def test_shares_and_kappas_by_hand() -> None:
    figure = share([True, True, False, True], ["p", "p", None, None])
    assert (figure["num_pairs"], figure["num_prompts"], figure["value"]) == (4, 3, 0.75)
    assert (figure["low"], figure["high"]) == pytest.approx(wilson(0.75, 16 / 6))
    assert share([], []) == {"num_pairs": 0, "num_prompts": 0, "value": None, "low": 0.0, "high": 1.0}
    # Equal on 3 of 4; chance 1/4 x 2/4 + 3/4 x 2/4 = 1/2: kappa = (3/4 - 1/2) / (1/2).
    assert kappa(["x", "y", "y", "y"], ["x", "x", "y", "y"]) == pytest.approx(0.5)
    assert kappa(["x", "x"], ["y", "y"]) == pytest.approx(0.0)
    assert kappa(["x"], ["x"]) is None
    assert kappa([], []) is None


def test_an_empty_table_and_a_missing_column() -> None:
    report = judge_report(table([]))
    assert (report["judges"], report["all_judges"]["overall"]["value"], report["between_judges"]) == ({}, None, [])
    with pytest.raises(SchemaError, match=r"judge_report.*objectivity"):
        judge_report(BY_HAND.drop_columns(["objectivity"]))


def test_the_table_for_people() -> None:
    text = format_judge_report(judge_report(BY_HAND, {"b": {"refused_by_model": 2}}))
    lines = [" ".join(line.split()) for line in text.splitlines()]

    def interval(value: float, trials: float) -> str:
        return " to ".join(f"{100 * end:.1f}" for end in wilson(value, trials))

    assert f"a 5 40.0 % {interval(0.4, 25 / 7)} 50.0 % - 0.0 % -" in lines
    assert f"a overall 4 25.0 % 3 66.7 % {interval(2 / 3, 3)}" in lines
    assert f"a high controversiality 2 0.0 % 2 50.0 % {interval(0.5, 2)}" in lines
    assert f"all judges overall 4 0.0 % 4 50.0 % {interval(0.5, 16 / 6)}" in lines
    assert "a and b 4 50.0 % 0.20 1 100.0 % -" in lines
