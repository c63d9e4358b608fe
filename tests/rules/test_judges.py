"""Judge trust: the Wilson bound by hand, and when a judge may decide."""

import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synpref_ray.rules.intervals import wilson_interval
from synpref_ray.rules.judges import AgreementRecord, TrustConfig, agreement_record, describe_trust, judge_trust
from synpref_ray.rules.votes import VoteRecord
from synpref_ray.schema import Verdict

C, R, A = Verdict.CHOSEN, Verdict.REJECTED, Verdict.ABSTAIN


def records(category, *, right=0, wrong=0, abstained=0, gold=C):
    other = R if gold is C else C
    verdicts = [gold] * right + [other] * wrong + [A] * abstained
    return [AgreementRecord(category, verdict, gold) for verdict in verdicts]


def test_wilson_by_hand():
    # z^2 = 3.841459; all of n right: low = n / (n + z^2) = 8 / 11.841459
    low, high = wilson_interval(8, 8)
    assert low == pytest.approx(8 / 11.841459, abs=1e-6)
    assert high == 1.0
    # 7 of 10: centre (0.7 + 0.192073) / 1.384146 = 0.644494; spread 1.959964 * sqrt(0.021 + 0.0096036) / 1.384146 = 0.247715
    low, high = wilson_interval(7, 10)
    assert low == pytest.approx(0.396779, abs=2e-6)
    assert high == pytest.approx(0.892209, abs=2e-6)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 5)[0] == 0.0
    # one-sided 84.13 % has z = 1: confidence 0.682689..., 1 of 2: centre 0.5, spread sqrt(0.125 + 0.0625) / 1.5 = 0.288675
    assert wilson_interval(1, 2, confidence=math.erf(1 / math.sqrt(2)))[0] == pytest.approx(0.5 - 0.288675, abs=1e-6)


@given(st.integers(0, 200), st.integers(0, 200))
def test_wilson_holds_the_share_and_mirrors(right, wrong):
    low, high = wilson_interval(right, right + wrong)
    if right + wrong:
        assert 0 <= low <= right / (right + wrong) <= high <= 1
    mirrored = wilson_interval(wrong, right + wrong)
    assert (1 - high, 1 - low) == pytest.approx(mirrored)


@pytest.mark.parametrize(("successes", "trials", "confidence"), [(3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0), (1, 2, 0.0)])
def test_wilson_refuses_nonsense(successes, trials, confidence):
    with pytest.raises(ValueError, match="expected"):
        wilson_interval(successes, trials, confidence=confidence)


def test_a_judge_decides_where_it_beats_chance_overall_and_in_the_category():
    trust = judge_trust([*records("math", right=18, wrong=2), *records("coding", right=11, wrong=9), *records("advice", right=5)])
    # overall 34 of 45: low 0.6136; math 18 of 20: 0.699; coding 11 of 20: 0.342; advice: too few
    assert trust.overall.agreement == pytest.approx(34 / 45)
    assert trust.decides("math")
    assert not trust.decides("coding")
    assert not trust.decides("advice")
    assert not trust.decides("editing")  # never seen on gold
    assert not trust.decides(None)
    assert trust.report()["decides"] == ["math"]


def test_a_good_category_does_not_save_a_judge_that_is_bad_overall():
    trust = judge_trust([*records("math", right=10), *records("coding", right=5, wrong=15)])
    assert trust.by_category["math"].lower_bound > 0.5
    assert not trust.decides("math")


def test_few_verdicts_prove_nothing():
    # Wilson alone would let 4 of 4 pass: 4 / (4 + 3.841459) = 0.51
    assert judge_trust(records("math", right=4)).overall.lower_bound > 0.5
    assert not judge_trust(records("math", right=5)).decides("math")
    assert judge_trust(records("math", right=6)).decides("math")
    assert judge_trust(records("math", right=4), TrustConfig(min_verdicts=4)).decides("math")


def test_no_records():
    trust = judge_trust([])
    assert not trust.decides("math")
    overall = trust.report()["overall"]
    assert overall["num_pairs"] == 0
    assert overall["agreement"] is None
    assert overall["lower_bound"] == 0.0


def test_abstentions_are_reported_and_do_not_count_as_agreement():
    trust = judge_trust(records("math", right=9, abstained=27))
    assert trust.overall.agreement == 1.0
    assert trust.overall.abstention_share == pytest.approx(0.75)
    assert trust.overall.num_verdicts == 9
    assert trust.decides("math")


def test_the_bar_may_be_the_source_label():
    # gold confirms 30 of 40 source labels; the judge agrees with gold on 32 of 40: low 0.652, above chance, below 0.75
    gold = [*records("math", right=24, wrong=6), *records("math", right=8, wrong=2, gold=R)]
    assert judge_trust(gold).decides("math")
    strict = judge_trust(gold, TrustConfig(must_beat_source_label=True))
    assert strict.overall.source_agreement == pytest.approx(0.75)
    assert not strict.decides("math")
    report = strict.report()
    assert (report["beats_chance_overall"], report["beats_chance_in"], report["beats_source_label_overall"]) == (True, ["math"], False)
    line = describe_trust("small", report)
    assert "above chance" in line
    assert "must also beat the source labels (75 % right on gold)" in line
    assert "no category" in line
    assert "decides in: math" in describe_trust("small", judge_trust(gold).report())
    assert "decides nothing" in describe_trust("small", judge_trust([]).report())


def test_pairs_of_one_prompt_count_once_in_the_bound():
    same = [record._replace(prompt_group=f"g{number // 3}") for number, record in enumerate(records("math", right=6))]
    trust = judge_trust(same)  # six verdicts, two prompts
    assert (trust.overall.num_verdicts, trust.overall.num_prompts) == (6, 2)
    assert not trust.decides("math")
    assert judge_trust(same, TrustConfig(min_verdicts=2)).overall.lower_bound == pytest.approx(wilson_interval(2, 2)[0])
    mixed = [record._replace(prompt_group="g") for record in records("math", right=1, wrong=1)]
    assert judge_trust(mixed).overall.lower_bound == pytest.approx(wilson_interval(0.5, 1)[0])


def test_position_bias_is_the_share_of_first_candidates():
    # order 0 shows the chosen reply first, order 1 the rejected one: "chosen" then "rejected" is twice the first candidate
    biased = agreement_record("math", [VoteRecord("j", 0, 0, C), VoteRecord("j", 1, 0, R)], C)
    assert biased == AgreementRecord("math", A, C, num_first_choices=2, num_choices=2)
    steady = agreement_record("math", [VoteRecord("j", 0, 0, R), VoteRecord("j", 1, 0, R)], C)
    assert steady == AgreementRecord("math", R, C, num_first_choices=1, num_choices=2)
    unread = agreement_record("math", [VoteRecord("j", 0, 0, A), VoteRecord("j", 1, 0, C)], C)
    assert unread == AgreementRecord("math", A, C, num_first_choices=0, num_choices=1)
    assert judge_trust([biased, steady, unread]).overall.first_choice_share == pytest.approx(3 / 5)
    assert agreement_record("math", [], C).judge_verdict is A


def test_one_record_is_about_one_judge():
    with pytest.raises(ValueError, match="one judge"):
        agreement_record("math", [VoteRecord("a", 0, 0, C), VoteRecord("b", 1, 0, C)], C)


def test_undecided_gold_is_no_gold():
    with pytest.raises(ValueError, match="abstention"):
        judge_trust([AgreementRecord("math", C, A)])


def test_trust_travels_between_processes():
    trust = judge_trust(records("math", right=9))
    assert pickle.loads(pickle.dumps(trust)) == trust


@given(st.lists(st.tuples(st.sampled_from(["math", "coding"]), st.sampled_from([C, R, A]), st.sampled_from([C, R])), max_size=60))
def test_a_deciding_judge_has_really_beaten_chance(rows):
    trust = judge_trust([AgreementRecord(*row) for row in rows])
    for category in ("math", "coding"):
        if trust.decides(category):
            for kept in (rows, [row for row in rows if row[0] == category]):
                verdicts = [judge is gold for _, judge, gold in kept if judge is not A]
                assert sum(verdicts) > len(verdicts) / 2


def test_the_weight_is_the_log_odds_of_being_right_with_one_prompt_added_to_each_side():
    assert judge_trust(records("math", right=8, wrong=2)).weight == pytest.approx(math.log(9 / 3))
    assert judge_trust(records("math", right=2, wrong=8)).weight == 0.0
    assert judge_trust([]).weight == 0.0
    together = [AgreementRecord("math", verdict, C, prompt_group="one") for verdict in (C, C, C, R)]  # a prompt counts once: 0.75 right
    assert judge_trust(together).weight == pytest.approx(math.log(1.75 / 1.25))
