"""From judges' answers to a decision about a pair that shares words with a benchmark item: keep it, or drop it as a leak.

Paper: App. C (v3): overlaps propose, a judge strikes false alarms (and found nothing beyond them). Our choice, all else: what it confirms is dropped;
as with preferences, every judge is asked with the two statements in both orders, one that follows their position contradicts itself and abstains, the
majority of judges decides, and a pair is dropped only where they confirm the leak: an abstention or a tie keeps it, and the report names it.
"""

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

import pyarrow as pa

from synpref_ray.rules.votes import VoteReason, VoteRecord, merge_votes
from synpref_ray.schema import Decision, Verdict

LEAKS = "decontamination"
"""Name of the sidecar that holds the decisions."""


class LeakVerdict(StrEnum):
    """What a judge says of a pair and the benchmark item that it shares words with."""

    LEAK = "leak"
    CLEAN = "clean"
    ABSTAIN = "abstain"


class LeakReason(StrEnum):
    """Why a proposed pair is kept or dropped."""

    CONFIRMED = "confirmed"
    CLEARED = "cleared"
    UNDECIDED = "undecided"
    NOT_JUDGED = "not_judged"


_AS_SIDES = {LeakVerdict.LEAK: Verdict.CHOSEN, LeakVerdict.CLEAN: Verdict.REJECTED, LeakVerdict.ABSTAIN: Verdict.ABSTAIN}
"""Votes on two statements merge as votes on two replies do; order 0 states the leak first."""

PROPOSAL_FIELDS = (
    *(pa.field(name, pa.string(), nullable=False) for name in ("kind", "benchmark", "item", "field")),
    pa.field("n", pa.int32(), nullable=False),
    pa.field("ngram", pa.string(), nullable=False),
)
"""What proposes a pair: the benchmark item and the n words that they share, as `ingest/decontamination.py` reported them."""
LEAK_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("leak_verdict", pa.string()),
        pa.field("vote_reason", pa.string(), nullable=False),
        pa.field("leak_decision", pa.string(), nullable=False),
        pa.field("leak_reason", pa.string(), nullable=False),
    ]
)
"""Of each proposal."""
LEAKS_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("leak_decision", pa.string()),
        pa.field("leak_reason", pa.string()),
        pa.field("num_proposals", pa.int32(), nullable=False),
        *(field.with_nullable(True) for field in PROPOSAL_FIELDS),
    ]
)
"""Of each pair of a pool: null where nothing proposed it; the item and the words are those of the proposal that decided."""


class LeakDecision(NamedTuple):
    """What becomes of one proposal; the verdict is None where no judge voted."""

    verdict: LeakVerdict | None
    votes: VoteReason
    decision: Decision
    reason: LeakReason


def decide_leak(votes: Iterable[Mapping[str, Any]]) -> LeakDecision:
    """Decide one proposal.

    Args:
        votes: with `judge`, `order`, `sample` and `verdict` (a LeakVerdict), in any order.
    """
    records = (VoteRecord(vote["judge"], vote["order"], vote["sample"], _AS_SIDES[LeakVerdict(vote["verdict"])]) for vote in votes)
    merged = merge_votes(records)
    match merged.verdict:
        case None:
            return LeakDecision(None, merged.reason, Decision.KEEP, LeakReason.NOT_JUDGED)
        case Verdict.CHOSEN:
            return LeakDecision(LeakVerdict.LEAK, merged.reason, Decision.DROP, LeakReason.CONFIRMED)
        case Verdict.REJECTED:
            return LeakDecision(LeakVerdict.CLEAN, merged.reason, Decision.KEEP, LeakReason.CLEARED)
        case _:
            return LeakDecision(LeakVerdict.ABSTAIN, merged.reason, Decision.KEEP, LeakReason.UNDECIDED)


def merge_proposals(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the proposal that decides about a pair: a confirmed one, else one that is open, else a cleared one; of these the longest n-gram."""
    order = (LeakReason.CONFIRMED, LeakReason.UNDECIDED, LeakReason.NOT_JUDGED, LeakReason.CLEARED)
    return min(rows, key=lambda row: (order.index(row["leak_reason"]), -row["n"], row["benchmark"], row["item"]))
