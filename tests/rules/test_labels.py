"""One pair's label from everything that is known of it: each rule by itself, and that it stands above all that come after it."""

from typing import Any

import pytest

from synpref_ray.rules.labels import Evidence, Label, LabelReason, label_pair
from synpref_ray.schema import LabelSource, Verdict

C, R, A = Verdict.CHOSEN, Verdict.REJECTED, Verdict.ABSTAIN
NOTHING: dict[str, Any] = {"human": None, "judge": None, "shares_gold_prompt": False, "contradicted": False, "leaked": False}


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
        ({"contradicted": True}, LabelSource.UNVERIFIED, False, LabelReason.CONTRADICTED),
        ({}, LabelSource.SILVER, False, LabelReason.SOURCE_LABEL),
    ],
)
def test_the_first_rule_that_applies_decides(known: dict[str, Any], source: LabelSource, flipped: bool, reason: LabelReason) -> None:
    assert label_pair(Evidence(**{**NOTHING, **known})) == Label(source, flipped, reason)
