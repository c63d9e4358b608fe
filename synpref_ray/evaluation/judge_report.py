"""What LLM judges are worth, from their stored votes on gold: position bias, self-consistency, agreement with gold and with each other.

Paper: arXiv:2507.01352, Table 14 gives judges' agreement with gold on objective and subjective pairs; no position bias, no intervals. Our choice:
everything here is a function of stored votes, so a report is made anew without asking a judge. Every share has an interval (`shares.py`).
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import pyarrow as pa

from synpref_ray.evaluation.shares import INTERVAL, UNKNOWN, kappa, share
from synpref_ray.rules.columns import require_columns
from synpref_ray.rules.judges import agreement_record
from synpref_ray.rules.verdicts import read_votes
from synpref_ray.rules.votes import ORDERS, VoteReason, VoteRecord, merge_votes
from synpref_ray.schema import DropReason, Verdict

REQUIRES = ("votes", "task_category", "objectivity", "controversiality", "human_verdict", "prompt_group")
BREAKDOWNS = ("task_category", "objectivity", "controversiality")
REPORT_VERSION = 1


class _Pair(NamedTuple):
    """One pair with some votes on it; `gold` is None where no person decided."""

    votes: list[VoteRecord]
    gold: Verdict | None
    prompt: str | None
    attributes: Mapping[str, str | None]

    def of_judge(self, judge: str) -> "_Pair":
        return self._replace(votes=[vote for vote in self.votes if vote.judge == judge])

    @property
    def verdict(self) -> Verdict | None:
        return merge_votes(self.votes).verdict


def judge_report(gold: pa.Table, rows_by_reason: Mapping[str, Mapping[str, int]] | None = None, *, confidence: float = 0.95) -> dict[str, Any]:
    """Return the report of all judges with votes in the table: plain values, ready for JSON, that depend on no order of rows or votes.

    Args:
        gold: with `REQUIRES`; `votes` holds the votes of all judges on a pair (null or empty: nobody was asked). A pair whose `human_verdict` is
            neither reply counts for position bias and consistency, not for agreement.
        rows_by_reason: by judge, its rows without votes or without a readable one, by `drop_reason`; a judge named here alone is reported too.

    Returns:
        `judges`: by name, the figures of `_judge`. `all_judges`: agreement of the merge over all votes. `between_judges`: for each two judges the
        agreement of their merged verdicts on the pairs that both were asked about. A share is None where there is nothing to take it of.

    Raises:
        SchemaError: a column is missing.
    """
    require_columns(gold, REQUIRES, rule="judge_report")
    pairs = _read(gold)
    reasons = rows_by_reason or {}
    names = sorted({vote.judge for pair in pairs for vote in pair.votes} | set(reasons))
    of_judge = {name: [pair.of_judge(name) for pair in pairs] for name in names}
    return {
        "version": REPORT_VERSION,
        "confidence": confidence,
        "interval": INTERVAL,
        "num_pairs": len(pairs),
        "num_pairs_without_gold_verdict": sum(pair.gold is None for pair in pairs),
        "judges": {name: _judge([p for p in of_judge[name] if p.votes], reasons.get(name), confidence) for name in names},
        "all_judges": _agreements([pair for pair in pairs if pair.votes], confidence),
        "between_judges": [_between(one, other, of_judge[one], of_judge[other], confidence) for one, other in itertools.combinations(names, 2)],
    }


def _read(gold: pa.Table) -> list[_Pair]:
    columns = (gold.column(name).to_pylist() for name in REQUIRES)
    pairs = []
    for stored, category, objectivity, controversiality, human, prompt in zip(*columns, strict=True):
        verdict = Verdict(human) if human in (Verdict.CHOSEN, Verdict.REJECTED) else None
        pairs.append(_Pair(read_votes(stored), verdict, prompt, dict(zip(BREAKDOWNS, (category, objectivity, controversiality), strict=True))))
    return pairs


def _judge(pairs: Sequence[_Pair], reasons: Mapping[str, int] | None, confidence: float) -> dict[str, Any]:
    """Return one judge's figures, over the pairs that it has votes on."""
    votes = [vote for pair in pairs for vote in pair.votes]
    num_unreadable = sum(vote.verdict is Verdict.ABSTAIN for vote in votes)
    return {
        "num_pairs": len(pairs),
        "num_votes": len(votes),
        "num_unreadable_votes": num_unreadable,
        "unreadable_share": num_unreadable / len(votes) if votes else None,
        "rows_by_reason": None if reasons is None else dict(sorted(reasons.items())),
        "num_refused_rows": None if reasons is None else reasons.get(DropReason.REFUSED_BY_MODEL.value, 0),
        "position_bias": _position_bias(pairs, confidence),
        "first_choices": _first_choices(pairs),
        "self_consistency": _self_consistency(pairs),
        "agreement": _agreements(pairs, confidence),
    }


def _position_bias(pairs: Sequence[_Pair], confidence: float) -> dict[str, Any]:
    """Return the share of pairs, among those with a self-consistent answer in both orders, whose two answers name the same position.

    Those are the pairs on which the orders name different replies. A judge that answers by position has 1; one that answers by the replies has 0.
    """
    reasons = [(merge_votes(pair.votes).reason, pair.prompt) for pair in pairs]
    readable = [(reason is VoteReason.ORDERS_DISAGREE, prompt) for reason, prompt in reasons if reason is not VoteReason.NO_CONSISTENT_ANSWER]
    return share((flag for flag, _ in readable), (prompt for _, prompt in readable), confidence=confidence)


def _first_choices(pairs: Sequence[_Pair]) -> dict[str, Any]:
    """Return how many of the readable votes named the candidate shown first; 0.5 where a position is not favoured."""
    records = [agreement_record(None, pair.votes, Verdict.CHOSEN) for pair in pairs]
    num_first, num_choices = sum(record.num_first_choices for record in records), sum(record.num_choices for record in records)
    return {"num_votes": num_choices, "value": num_first / num_choices if num_choices else None}


def _self_consistency(pairs: Sequence[_Pair]) -> dict[str, Any] | None:
    """Return the mean, over pairs and orders with several samples, of the share of samples that give the most common readable verdict.

    Unreadable samples are in the denominator, as in the merge; an order without a readable one counts 0. None where no order has two samples.
    """
    shares = []
    for pair in pairs:
        for order in ORDERS:
            verdicts = [vote.verdict for vote in pair.votes if vote.order == order]
            if len(verdicts) > 1:
                shares.append(max(verdicts.count(verdict) for verdict in (Verdict.CHOSEN, Verdict.REJECTED)) / len(verdicts))
    return {"num_orders": len(shares), "value": fmean(shares)} if shares else None


def _agreements(pairs: Sequence[_Pair], confidence: float) -> dict[str, Any]:
    """Return the agreement of the pairs' merged verdicts with gold, overall and by every attribute's values."""
    known = [(pair, pair.verdict, pair.gold) for pair in pairs if pair.gold is not None]

    def agreement(rows: Iterable[tuple[_Pair, Verdict | None, Verdict | None]]) -> dict[str, Any]:
        asked = list(rows)
        decided = [(verdict is gold, pair.prompt) for pair, verdict, gold in asked if verdict is not Verdict.ABSTAIN]
        figures = share((flag for flag, _ in decided), (prompt for _, prompt in decided), confidence=confidence)
        abstentions = 1 - len(decided) / len(asked) if asked else None
        return {"num_pairs": len(asked), "abstention_share": abstentions, "num_verdicts": figures.pop("num_pairs"), **figures}

    report: dict[str, Any] = {"overall": agreement(known)}
    for name in BREAKDOWNS:
        values = sorted({pair.attributes[name] or UNKNOWN for pair, _, _ in known})
        report[name] = {value: agreement(row for row in known if (row[0].attributes[name] or UNKNOWN) == value) for value in values}
    return report


def _between(one: str, other: str, first: Sequence[_Pair], second: Sequence[_Pair], confidence: float) -> dict[str, Any]:
    """Compare the merged verdicts of two judges: abstentions as a verdict of their own, and again where both decided."""
    both = [(a.verdict, b.verdict, a.prompt) for a, b in zip(first, second, strict=True) if a.votes and b.votes]
    decided = [row for row in both if Verdict.ABSTAIN not in row[:2]]

    def compare(rows: Sequence[tuple[Verdict | None, Verdict | None, str | None]]) -> dict[str, Any]:
        equal = share((a is b for a, b, _ in rows), (prompt for *_, prompt in rows), confidence=confidence)
        return {"num_pairs": len(rows), "kappa": kappa([str(a) for a, *_ in rows], [str(b) for _, b, _ in rows]), "equal": equal}

    return {"judges": [one, other], "all_verdicts": compare(both), "both_decided": compare(decided)}
