"""Vote merging by hand and by property."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synpref_ray.rules.votes import VoteReason, VoteRecord, merge_votes
from synpref_ray.schema import Verdict

C, R, A = Verdict.CHOSEN, Verdict.REJECTED, Verdict.ABSTAIN


def judge(first, second, name="j"):
    """Votes of one judge: verdicts of the samples in order 0, and in order 1."""
    answers = [(0, first), (1, second)]
    return [VoteRecord(name, order, sample, verdict) for order, verdicts in answers for sample, verdict in enumerate(verdicts)]


@pytest.mark.parametrize(
    ("votes", "verdict", "reason"),
    [
        ([], None, VoteReason.NO_VOTES),
        (judge([C], [C]), C, VoteReason.AGREED),
        (judge([R], [R]), R, VoteReason.AGREED),
        (judge([C], [R]), A, VoteReason.ORDERS_DISAGREE),  # always the first candidate: position, not preference
        (judge([R], [C]), A, VoteReason.ORDERS_DISAGREE),
        (judge([C], [A]), A, VoteReason.NO_CONSISTENT_ANSWER),
        (judge([C], []), A, VoteReason.NO_CONSISTENT_ANSWER),  # one order alone proves nothing
        (judge([C, C, R], [C, R, C]), C, VoteReason.AGREED),  # 2 of 3 in each order
        (judge([C, R], [C, C]), A, VoteReason.NO_CONSISTENT_ANSWER),  # 1 of 2 is no majority
        (judge([C, A, A], [C, C, C]), A, VoteReason.NO_CONSISTENT_ANSWER),  # 1 of 3 samples
        (judge([C, C, A], [C, C, A]), C, VoteReason.AGREED),
    ],
)
def test_one_judge(votes, verdict, reason):
    assert merge_votes(votes) == (verdict, reason)


@pytest.mark.parametrize(
    ("judges", "verdict", "reason"),
    [
        ([([C], [C]), ([C], [C])], C, VoteReason.AGREED),
        ([([C], [C]), ([R], [R])], A, VoteReason.JUDGES_TIED),
        ([([C], [C]), ([R], [R]), ([R], [R])], R, VoteReason.MAJORITY),
        ([([C], [C]), ([C], [R]), ([A], [A])], C, VoteReason.AGREED),  # the others abstain and do not count
        ([([C], [R]), ([A], [A])], A, VoteReason.ORDERS_DISAGREE),
        ([([C], [C]), ([R], [R]), ([C], [R])], A, VoteReason.JUDGES_TIED),
    ],
)
def test_several_judges(judges, verdict, reason):
    votes = [vote for number, answers in enumerate(judges) for vote in judge(*answers, name=f"judge {number}")]
    assert merge_votes(votes) == (verdict, reason)


VOTES = st.lists(
    st.builds(VoteRecord, st.sampled_from("abc"), st.sampled_from([0, 1]), st.integers(0, 3), st.sampled_from(list(Verdict))),
    max_size=24,
    unique_by=lambda vote: vote[:3],
)


@given(VOTES.flatmap(lambda votes: st.tuples(st.just(votes), st.permutations(votes))))
def test_order_does_not_matter(pair):
    votes, shuffled = pair
    assert merge_votes(votes) == merge_votes(shuffled)


@given(VOTES)
def test_swapping_the_pair_swaps_the_verdict(votes):
    """The swapped pair: what was shown first is now the other label's reply, and so is every preference."""
    swap = {C: R, R: C, A: A, None: None}
    swapped = [vote._replace(order=1 - vote.order, verdict=swap[vote.verdict]) for vote in votes]
    verdict, reason = merge_votes(votes)
    assert merge_votes(swapped) == (swap[verdict], reason)


@given(VOTES)
def test_a_verdict_needs_a_judge_that_gives_it_in_both_orders(votes):
    verdict, _ = merge_votes(votes)
    if verdict in (C, R):
        orders = {}
        for vote in votes:
            if vote.verdict is verdict:
                orders.setdefault(vote.judge, set()).add(vote.order)
        assert {0, 1} in orders.values()


@pytest.mark.parametrize("votes", [[VoteRecord("j", 0, 0, C), VoteRecord("j", 0, 0, C)], [VoteRecord("j", 2, 0, C)]], ids=["twice", "no such order"])
def test_bad_votes_are_refused(votes):
    with pytest.raises(ValueError, match="one vote per judge"):
        merge_votes(votes)


@pytest.mark.parametrize(
    ("weights", "verdict", "reason"),
    [
        ({"a": 1.0, "b": 1.0, "c": 1.0}, R, VoteReason.MAJORITY),
        ({"a": 3.0, "b": 1.0, "c": 1.0}, C, VoteReason.MAJORITY),  # one good judge outweighs two poor ones
        ({"a": 2.0, "b": 1.0, "c": 1.0}, A, VoteReason.JUDGES_TIED),
        ({"a": 0.3, "b": 0.1, "c": 0.2}, A, VoteReason.JUDGES_TIED),  # up to rounding
        ({"a": 0.0, "b": 1.0, "c": 1.0}, R, VoteReason.AGREED),  # a judge of weight 0 does not count
    ],
)
def test_weights(weights, verdict, reason):
    votes = [*judge([C], [C], "a"), *judge([R], [R], "b"), *judge([R], [R], "c")]
    assert merge_votes(votes, weights) == (verdict, reason)


def test_a_judge_without_a_weight_is_an_error():
    with pytest.raises(ValueError, match="no weight for judge b"):
        merge_votes([*judge([C], [C], "a"), *judge([C], [C], "b")], {"a": 1.0})


@given(st.permutations("abcde"), st.lists(st.floats(0, 10), min_size=5, max_size=5))
def test_weighted_votes_merge_the_same_in_any_order(order, values):
    weights = dict(zip("abcde", values, strict=True))
    sides = {name: C if name in "ace" else R for name in "abcde"}
    merged = {merge_votes([vote for name in names for vote in judge([sides[name]], [sides[name]], name)], weights) for names in (order, "abcde")}
    assert len(merged) == 1
