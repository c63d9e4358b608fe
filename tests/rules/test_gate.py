"""The gate against a table written by hand, and its shard version against the table."""

import math
from collections import Counter
from itertools import product
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synpref_ray.errors import SchemaError
from synpref_ray.rules.gate import (
    DECISION_SCHEMA,
    TRUTH_TABLE,
    Basis,
    GateConfig,
    GateReason,
    decide_shard,
    needs_judge,
    opinion,
    render_truth_table,
    select_for_judge,
    stage2_decision,
)
from synpref_ray.schema import Decision, Verdict

CHOSEN, REJECTED, ABSTAIN = Verdict.CHOSEN, Verdict.REJECTED, Verdict.ABSTAIN
OPINIONS = (True, False, None)
VERDICTS = (CHOSEN, REJECTED, ABSTAIN, None)

# The whole table by hand: rows (best RM, gold RM), columns judge says chosen, rejected, abstains, none. k keep, f flip, d drop.
BY_HAND = {
    (True, True): "kkkk",
    (True, False): "dddd",
    (True, None): "dddd",
    (False, True): "kddd",
    (False, False): "dfff",
    (False, None): "dddd",
    (None, True): "kddd",
    (None, False): "dddd",
    (None, None): "dddd",
}
# Cells whose decision the paper's text gives (P); all others are ours (o).
BASIS_BY_HAND = {
    (True, True): "PPPP",
    (True, False): "oooo",
    (True, None): "oooo",
    (False, True): "Pooo",
    (False, False): "oPPP",
    (False, None): "oooo",
    (None, True): "Pooo",
    (None, False): "oooo",
    (None, None): "oooo",
}
LETTER = {Decision.KEEP: "k", Decision.FLIP: "f", Decision.DROP: "d"}


def shard(rows):
    """Build a shard from (margin_best, margin_gold, verdict) rows."""
    columns = list(zip(*rows, strict=True)) if rows else [(), (), ()]
    return pa.table(
        {
            "pair_id": pa.array([f"p{i}" for i in range(len(rows))], pa.string()),
            "margin_best": pa.array(columns[0], pa.float32()),
            "margin_gold": pa.array(columns[1], pa.float32()),
            "judge_verdict": pa.array(columns[2], pa.string()),
        }
    )


@pytest.mark.parametrize(("best", "gold"), list(product(OPINIONS, OPINIONS)))
def test_every_cell_is_as_written_by_hand(best, gold):
    assert "".join(LETTER[stage2_decision(best, gold, verdict)[0]] for verdict in VERDICTS) == BY_HAND[best, gold]
    cells = [cell for cell in TRUTH_TABLE if (cell.best, cell.gold) == (best, gold)]
    assert [cell.judge for cell in cells] == list(VERDICTS)
    assert "".join("P" if cell.basis is Basis.PAPER else "o" for cell in cells) == BASIS_BY_HAND[best, gold]


def test_the_table_is_the_whole_table_once():
    keys = [(cell.best, cell.gold, cell.judge) for cell in TRUTH_TABLE]
    assert keys == list(product(OPINIONS, OPINIONS, VERDICTS))
    assert all(cell.why for cell in TRUTH_TABLE)


def test_kept_is_exactly_the_papers_formula():
    """Paper: Sec. 3.3: gold RM AND (judge OR best RM)."""
    for cell in TRUTH_TABLE:
        kept = cell.gold is True and (cell.judge is CHOSEN or cell.best is True)
        assert (cell.decision is Decision.KEEP) == kept


def test_a_flip_needs_both_reward_models_and_no_defender():
    for cell in TRUTH_TABLE:
        flipped = cell.gold is False and cell.best is False and cell.judge is not CHOSEN
        assert (cell.decision is Decision.FLIP) == flipped


def test_without_a_judge_the_reward_models_decide_alone():
    """Paper: App. H.4: both agree, keep; both disagree, flip. The mixed cases, which it gives to a judge, are dropped."""
    alone = {(best, gold): stage2_decision(best, gold, None)[0] for best, gold in product((True, False), (True, False))}
    assert alone == {(True, True): Decision.KEEP, (False, False): Decision.FLIP, (True, False): Decision.DROP, (False, True): Decision.DROP}


@pytest.mark.parametrize(
    ("best", "gold", "judge", "reason"),
    [
        (True, True, None, GateReason.BOTH_RMS_AGREE),
        (True, True, REJECTED, GateReason.BOTH_RMS_AGREE),
        (False, True, CHOSEN, GateReason.GOLD_RM_AND_JUDGE_AGREE),
        (False, True, REJECTED, GateReason.JUDGE_REJECTS_LABEL),
        (False, True, ABSTAIN, GateReason.JUDGE_ABSTAINS),
        (False, True, None, GateReason.NO_JUDGE),
        (False, False, CHOSEN, GateReason.JUDGE_DEFENDS_LABEL),
        (False, False, REJECTED, GateReason.BOTH_RMS_DISAGREE),
        (False, False, None, GateReason.BOTH_RMS_DISAGREE),
        (True, False, None, GateReason.GOLD_RM_DISAGREES),
        (None, False, REJECTED, GateReason.GOLD_RM_DISAGREES),
        (True, None, None, GateReason.GOLD_RM_UNSURE),
        (None, True, None, GateReason.NO_JUDGE),
    ],
)
def test_the_reason_says_why(best, gold, judge, reason):
    assert stage2_decision(best, gold, judge)[1] is reason


def test_a_judge_is_asked_where_the_best_rm_does_not_agree_and_an_answer_matters():
    asked = {(best, gold) for best, gold in product(OPINIONS, OPINIONS) if needs_judge(best, gold)}
    assert asked == {(False, True), (False, False), (None, True)}


def test_opinion_by_hand():
    assert opinion(1e-30) is True  # its confidence is exactly 0.5 in floating point; the published threshold still counts it as agreement
    assert opinion(-1e-30) is False
    assert opinion(0.0) is None
    # band 0.1: confidences 0.4 to 0.6, that is |margin| <= ln(0.6 / 0.4) = 0.405465...
    assert opinion(0.4054, band=0.1) is None
    assert opinion(-0.4054, band=0.1) is None
    assert opinion(0.4055, band=0.1) is True
    assert opinion(-0.4055, band=0.1) is False


def test_shard_by_hand():
    rows = [
        (2.0, 1.0, None),  # both agree
        (-2.0, 1.0, "chosen"),  # gold RM and judge
        (-2.0, -1.0, None),  # both disagree
        (-2.0, -1.0, "chosen"),  # defended
        (2.0, -1.0, None),  # gold RM disagrees
        (None, 1.0, None),  # unscored
        (2.0, math.nan, None),  # unscored
        (2.0, math.inf, None),  # unscored
        (2.0, 0.0, None),  # gold RM has no opinion
    ]
    decided = decide_shard(shard(rows), GateConfig())
    assert decided.schema.equals(DECISION_SCHEMA)
    assert decided["pair_id"].to_pylist() == [f"p{i}" for i in range(9)]
    assert decided["decision"].to_pylist() == ["keep", "keep", "flip", "drop", "drop", "drop", "drop", "drop", "drop"]
    assert decided["flipped"].to_pylist() == [False, False, True, False, False, False, False, False, False]
    assert decided["decision_reason"].to_pylist() == [
        "both_rms_agree",
        "gold_rm_and_judge_agree",
        "both_rms_disagree",
        "judge_defends_label",
        "gold_rm_disagrees",
        "unscored",
        "unscored",
        "unscored",
        "gold_rm_unsure",
    ]
    assert decided["best_agrees"].to_pylist() == [True, False, False, False, True, None, True, True, True]
    assert decided["gold_agrees"].to_pylist() == [True, True, False, False, False, True, None, None, None]
    assert decided["judge_verdict"].to_pylist() == [None, "chosen", None, "chosen", None, None, None, None, None]
    assert decided["margin_best"].to_pylist()[:6] == [2.0, -2.0, -2.0, -2.0, 2.0, None]
    assert Counter(decided["decision"].to_pylist()) == {"keep": 2, "flip": 1, "drop": 6}
    assert decided["decision_reason"].to_pylist().count("unscored") == 3


def test_a_band_never_asks_about_fewer():
    rows = shard([(best, gold, None) for best in (-2.0, -0.2, 0.0, 0.2, 2.0) for gold in (-1.0, 0.0, 1.0)])
    narrow, wide = (select_for_judge(rows, GateConfig(band=band)).to_pylist() for band in (0.0, 0.1))
    assert all(asked or not before for before, asked in zip(narrow, wide, strict=True))
    assert sum(wide) > sum(narrow)


def test_a_flip_needs_the_confidence_of_both():
    config = GateConfig(min_flip_confidence=0.7)  # a margin of 0.847
    rows = shard([(-0.9, -0.9, None), (-0.8, -5.0, None), (-5.0, -0.8, "rejected"), (-0.8, -0.8, "chosen"), (0.8, 0.8, None)])
    decided = decide_shard(rows, config)
    assert decided["decision"].to_pylist() == ["flip", "drop", "drop", "drop", "keep"]
    assert decided["decision_reason"].to_pylist() == ["both_rms_disagree", "flip_unsure", "flip_unsure", "judge_defends_label", "both_rms_agree"]
    assert select_for_judge(rows, config).to_pylist() == [True, False, False, False, False]
    assert decide_shard(rows, GateConfig())["decision"].to_pylist() == ["flip", "flip", "flip", "drop", "keep"]


def test_pairs_of_gold_prompts_stay_out_of_curated_data():
    rows = shard([(2.0, 1.0, None), (-2.0, -1.0, None), (2.0, 1.0, None)]).append_column("prompt_group", pa.array(["a", "b", "c"]))
    decided = decide_shard(rows, GateConfig(), {"a", "b"})
    assert decided["decision"].to_pylist() == ["drop", "drop", "keep"]
    assert decided["decision_reason"].to_pylist() == ["gold_prompt", "gold_prompt", "both_rms_agree"]
    assert decided["flipped"].to_pylist() == [False, False, False]
    assert decide_shard(rows, GateConfig(), pa.array(["a", "b"])).equals(decided)
    with pytest.raises(SchemaError, match="prompt_group"):
        decide_shard(shard([(1.0, 1.0, None)]), GateConfig(), {"a"})


def test_no_judge_is_asked_about_a_pair_of_a_gold_prompt():
    rows = shard([(-2.0, 1.0, None), (-2.0, -1.0, None), (-2.0, 1.0, None)]).append_column("prompt_group", pa.array(["a", "b", "c"]))
    assert select_for_judge(rows, GateConfig(), {"a", "b"}).to_pylist() == [False, False, True]
    assert select_for_judge(rows, GateConfig(), pa.array(["a", "b"])).to_pylist() == [False, False, True]
    assert select_for_judge(rows, GateConfig()).to_pylist() == [True, True, True]
    with pytest.raises(SchemaError, match="prompt_group"):
        select_for_judge(shard([(1.0, 1.0, None)]), GateConfig(), {"a"})


def test_a_band_asks_about_more_and_drops_nothing_without_a_judge():
    wide = GateConfig(band=0.1)
    close = shard([(0.2, 1.0, None), (0.2, 1.0, "rejected"), (0.2, 1.0, "chosen"), (-0.2, -1.0, None), (-0.2, -1.0, "rejected")])
    assert select_for_judge(close, GateConfig()).to_pylist() == [False, False, False, True, True]
    assert select_for_judge(close, wide).to_pylist() == [True, True, True, True, True]
    assert decide_shard(close, wide)["decision"].to_pylist() == ["keep", "drop", "keep", "flip", "flip"]
    assert decide_shard(close, GateConfig())["decision"].to_pylist() == ["keep", "keep", "keep", "flip", "flip"]


def test_an_unscored_pair_is_never_asked_about():
    rows = [(None, 1.0, None), (-1.0, None, None), (-1.0, math.nan, None), (-1.0, 1.0, None)]
    assert select_for_judge(shard(rows), GateConfig()).to_pylist() == [False, False, False, True]


MARGINS = st.one_of(st.none(), st.sampled_from([0.0, math.nan, 1e-30, -1e-30]), st.floats(-5, 5, width=32))
ROWS = st.lists(st.tuples(MARGINS, MARGINS, st.sampled_from(["chosen", "rejected", "abstain", None])), max_size=40)


@given(ROWS, st.sampled_from([0.0, 0.05, 0.3]))
def test_shard_equals_table_and_nothing_is_lost(rows, band):
    decided = decide_shard(shard(rows), GateConfig(band=band))
    assert decided.schema.equals(DECISION_SCHEMA)
    assert decided.num_rows == len(rows)
    assert set(decided["decision"].to_pylist()) <= {decision.value for decision in Decision}
    assert set(decided["decision_reason"].to_pylist()) <= {reason.value for reason in GateReason}
    for (best, gold, verdict), row in zip(rows, decided.to_pylist(), strict=True):
        if best is None or gold is None or math.isnan(best) or math.isnan(gold):
            expected = (Decision.DROP, GateReason.UNSCORED)
        else:
            judge = None if verdict is None else Verdict(verdict)
            expected = stage2_decision(opinion(best, band=band if judge and gold > 0 else 0.0), opinion(gold), judge)
        assert (row["decision"], row["decision_reason"]) == expected
        assert row["flipped"] == (row["decision"] == "flip")


@given(ROWS, st.sampled_from([0.0, 0.05, 0.3]), st.sampled_from([0.5, 0.7]))
def test_asking_is_worth_it(rows, band, confidence):
    """Where no judge is asked, no answer would have changed the decision."""
    config = GateConfig(band=band, min_flip_confidence=confidence)
    asked = select_for_judge(shard(rows), config).to_pylist()
    answers = [decide_shard(shard([(best, gold, v) for best, gold, _ in rows]), config)["decision"].to_pylist() for v in Verdict]
    for was_asked, *decisions in zip(asked, *answers, strict=True):
        assert was_asked == (len(set(decisions)) > 1)


def test_zero_rows_and_one_chunk_or_many():
    assert decide_shard(shard([]), GateConfig()).schema.equals(DECISION_SCHEMA)
    rows = [(2.0, 1.0, None), (-2.0, -1.0, "abstain"), (None, 1.0, None)]
    parts = pa.concat_tables([shard(rows).slice(0, 1), shard(rows).slice(1)])
    assert decide_shard(parts, GateConfig()).equals(decide_shard(shard(rows), GateConfig()))


def test_bad_shards_are_named():
    with pytest.raises(SchemaError, match="margin_gold"):
        decide_shard(shard([]).drop_columns(["margin_gold"]), GateConfig())
    with pytest.raises(SchemaError, match=r"found something else at p1$"):
        decide_shard(shard([(1.0, 1.0, None), (1.0, 1.0, "maybe")]), GateConfig())


def test_the_document_is_the_table():
    document = Path(__file__).parents[2] / "docs" / "gate.md"
    remedy = "python -c \"from synpref_ray.rules.gate import render_truth_table as r; print(r(), end='')\" > docs/gate.md"
    assert document.read_text(encoding="utf-8") == render_truth_table(), remedy
