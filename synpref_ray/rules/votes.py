"""From single answers of LLM judges to one verdict about a pair. Serves Stage 1, Step 3, and the judge of Stage 2.

Paper: Sec. 3.2, Step 3: self-consistency within each model first, then a merge across models; candidates in random order. It gives no
number of samples, no merge rule and no rule for ties.
"""

import math
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import NamedTuple

from synpref_ray.schema import Verdict

ORDERS = (0, 1)
"""Order 0 showed the pair's chosen reply as candidate 1; order 1 showed the rejected reply first."""


class VoteRecord(NamedTuple):
    """One sample of one judge in one order; `verdict` is about the pair as ingested, an unreadable answer is an abstention."""

    judge: str
    order: int
    sample: int
    verdict: Verdict


class VoteReason(StrEnum):
    """Why votes merged as they did."""

    AGREED = "agreed"
    MAJORITY = "majority"
    JUDGES_TIED = "judges_tied"
    ORDERS_DISAGREE = "orders_disagree"
    NO_CONSISTENT_ANSWER = "no_consistent_answer"
    NO_VOTES = "no_votes"
    NO_DECIDING_VOTE = "no_deciding_vote"  # there are votes, none by a judge that may decide, or the pair's category is not known
    NO_JUDGE_DECIDES = "no_judge_decides"  # no judge may decide the pair's category, whether or not there are votes (rules/verdicts.py)


class MergedVerdict(NamedTuple):
    """What votes amount to; the verdict is None only where there is no vote at all."""

    verdict: Verdict | None
    reason: VoteReason


def merge_votes(votes: Iterable[VoteRecord], weights: Mapping[str, float] | None = None) -> MergedVerdict:
    """Merge the votes about one pair: within each judge, then across judges; the order of the votes does not matter.

    Our choice: abstaining judges do not count, the side with the greater weight wins, a tie abstains. Without `weights` every judge weighs
    the same; their measured agreement already decides who may vote at all (`rules/judges.py`, which also gives weights by agreement).

    Args:
        votes: in any order.
        weights: by judge, 0 or more; a judge of weight 0 does not count. Every judge among the votes needs one.

    Raises:
        ValueError: two votes share judge, order and sample, an order is neither 0 nor 1, or a judge has no weight.
    """
    by_judge = _group_votes(votes)
    if not by_judge:
        return MergedVerdict(None, VoteReason.NO_VOTES)
    if weights is not None and (unknown := by_judge.keys() - weights.keys()):
        raise ValueError(f"no weight for judge {', '.join(sorted(unknown))}")
    merged = {judge: _merge_judge(answers) for judge, answers in by_judge.items()}
    # fsum is exact before it rounds, so the order of the judges cannot move a sum
    chosen, rejected = (
        math.fsum(1.0 if weights is None else weights[judge] for judge, found in merged.items() if found.verdict is side)
        for side in (Verdict.CHOSEN, Verdict.REJECTED)
    )
    if chosen == rejected == 0:
        split = any(verdict.reason is VoteReason.ORDERS_DISAGREE for verdict in merged.values())
        return MergedVerdict(Verdict.ABSTAIN, VoteReason.ORDERS_DISAGREE if split else VoteReason.NO_CONSISTENT_ANSWER)
    if math.isclose(chosen, rejected, rel_tol=1e-9):
        return MergedVerdict(Verdict.ABSTAIN, VoteReason.JUDGES_TIED)
    verdict = Verdict.CHOSEN if chosen > rejected else Verdict.REJECTED
    return MergedVerdict(verdict, VoteReason.MAJORITY if min(chosen, rejected) else VoteReason.AGREED)


def sum_over_orders(votes: Iterable[VoteRecord]) -> int | None:
    """Return the sum of one judge's verdicts on a pair over both orders: +1 for the chosen reply, -1 for the rejected one, 0 for neither.

    In each order the verdict is the one that more than half of the samples give. None without votes.

    Raises:
        ValueError: the votes are of several judges, or as for `merge_votes`.
    """
    by_judge = _group_votes(votes)
    if len(by_judge) > 1:
        raise ValueError(f"expected the votes of one judge, found {', '.join(sorted(by_judge))}")
    worth = {Verdict.CHOSEN: 1, Verdict.REJECTED: -1, Verdict.ABSTAIN: 0}
    return next((sum(worth[_self_consistent(answers[order])] for order in ORDERS) for answers in by_judge.values()), None)


def _group_votes(votes: Iterable[VoteRecord]) -> Mapping[str, Mapping[int, list[Verdict]]]:
    """Return the verdicts of the samples by judge and order."""
    by_judge: dict[str, dict[int, list[Verdict]]] = {}
    seen = set()
    for vote in votes:
        key = (vote.judge, vote.order, vote.sample)
        if vote.order not in ORDERS or key in seen:
            raise ValueError(f"expected one vote per judge, order (0 or 1) and sample; found another or a bad one: {key}")
        seen.add(key)
        by_judge.setdefault(vote.judge, {order: [] for order in ORDERS})[vote.order].append(vote.verdict)
    return by_judge


def _merge_judge(answers: Mapping[int, list[Verdict]]) -> MergedVerdict:
    """Merge one judge's samples.

    Our choice: in each order the verdict that more than half of all samples give (abstentions included in the count); then both orders must
    give the same verdict. A judge that follows the position of a candidate contradicts itself here and abstains: on 243 pairs with known
    truth SmolLM2-135M did so 165 times, and was right on 61 of the other 78.
    """
    first, second = (_self_consistent(answers[order]) for order in ORDERS)
    if Verdict.ABSTAIN in (first, second):
        return MergedVerdict(Verdict.ABSTAIN, VoteReason.NO_CONSISTENT_ANSWER)
    if first is not second:
        return MergedVerdict(Verdict.ABSTAIN, VoteReason.ORDERS_DISAGREE)
    return MergedVerdict(first, VoteReason.AGREED)


def _self_consistent(verdicts: list[Verdict]) -> Verdict:
    for verdict in (Verdict.CHOSEN, Verdict.REJECTED):
        if 2 * verdicts.count(verdict) > len(verdicts):
            return verdict
    return Verdict.ABSTAIN
