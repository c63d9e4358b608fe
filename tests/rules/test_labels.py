"""One pair's label from everything that is known of it: each rule by itself, and that it stands above all that come after it."""

from typing import Any

import pyarrow as pa
import pytest

from synpref_ray.rules.judges import AgreementRecord, judge_trust
from synpref_ray.rules.labels import LABEL_SCHEMA, Evidence, Label, LabelReason, label_pair, label_shard
from synpref_ray.rules.verdicts import add_verdicts
from synpref_ray.schema import LabelSource, Verdict

C, R, A = Verdict.CHOSEN, Verdict.REJECTED, Verdict.ABSTAIN
NOTHING: dict[str, Any] = {"human": None, "judge": None, "shares_gold_prompt": False, "contradicted": False, "leaked": False, "unanswered": False}


@pytest.mark.parametrize(
    ("known", "source", "flipped", "reason"),
    [
        ({"leaked": True, "human": C, "judge": C}, LabelSource.UNVERIFIED, False, LabelReason.CONTAMINATED),
        ({"human": A}, LabelSource.DISCARDED, False, LabelReason.HUMAN_UNDECIDABLE),
        ({"human": A, "judge": C}, LabelSource.DISCARDED, False, LabelReason.HUMAN_UNDECIDABLE),  # no LLM decides what a person could not
        ({"human": A, "judge": R, "shares_gold_prompt": True, "contradicted": True}, LabelSource.DISCARDED, False, LabelReason.HUMAN_UNDECIDABLE),
        ({"human": C, "judge": R, "shares_gold_prompt": True}, LabelSource.GOLD, False, LabelReason.HUMAN),
        ({"human": R, "judge": C}, LabelSource.GOLD, True, LabelReason.HUMAN),
        ({"shares_gold_prompt": True, "judge": C}, LabelSource.UNVERIFIED, False, LabelReason.GOLD_PROMPT),
        ({"judge": A, "contradicted": True}, LabelSource.UNVERIFIED, False, LabelReason.JUDGE_ABSTAINED),
        ({"judge": C, "contradicted": True}, LabelSource.SILVER, False, LabelReason.JUDGE),
        ({"judge": R}, LabelSource.SILVER, True, LabelReason.JUDGE),
        ({"unanswered": True}, LabelSource.UNVERIFIED, False, LabelReason.NOT_JUDGED),
        ({"unanswered": True, "contradicted": True}, LabelSource.UNVERIFIED, False, LabelReason.NOT_JUDGED),
        ({"unanswered": True, "judge": R}, LabelSource.SILVER, True, LabelReason.JUDGE),
        ({"contradicted": True}, LabelSource.UNVERIFIED, False, LabelReason.CONTRADICTED),
        ({}, LabelSource.SILVER, False, LabelReason.SOURCE_LABEL),
    ],
)
def test_the_first_rule_that_applies_decides(known: dict[str, Any], source: LabelSource, flipped: bool, reason: LabelReason) -> None:
    assert label_pair(Evidence(**{**NOTHING, **known})) == Label(source, flipped, reason)


def test_a_pair_that_no_deciding_judge_could_answer_makes_no_silver_and_one_that_none_may_decide_keeps_its_source_label() -> None:
    """A pair too long for the judge, one without attributes, and one of a category where nobody decides; none has a vote."""
    strong = judge_trust([AgreementRecord("math", C, C)] * 20)
    pairs = pa.table(
        {
            "pair_id": ["too_long", "no_attributes", "elsewhere"],
            "votes": pa.nulls(3, pa.list_(pa.struct([("judge", pa.string())]))),
            "task_category": pa.array(["math", None, "planning"]),
            "drop_reason": ["too_long", "no_attributes", None],
        }
    )
    others = {"prompt_group": pa.array(["a", "b", "c"]), "contradicted": pa.array([False] * 3)}
    others |= {name: pa.nulls(3, pa.string()) for name in ("human_verdict", "gold_split")}
    for trust, expected in (({"j": strong}, ["not_judged", "not_judged", "source_label"]), ({}, ["source_label"] * 3)):
        shard = add_verdicts(pairs, trust)
        for name, values in others.items():
            shard = shard.append_column(name, values)
        labels = label_shard(shard, frozenset())
        assert labels.schema.equals(LABEL_SCHEMA)
        assert labels["label_reason"].to_pylist() == expected
        assert [source == "silver" for source in labels["label_source"].to_pylist()] == [reason == "source_label" for reason in expected]
