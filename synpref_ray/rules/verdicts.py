"""Stored votes to verdicts, for a whole shard: Stage 1, Step 3, and the judge of Stage 2.

They read stored votes only, so a new trust measurement or a new merge rule is applied without asking a judge again.
"""

from collections.abc import Mapping
from typing import Any, Literal

import pyarrow as pa

from synpref_ray.config import Settings
from synpref_ray.rules.columns import require_columns
from synpref_ray.rules.judges import AgreementRecord, JudgeTrust, agreement_record
from synpref_ray.rules.votes import VoteReason, VoteRecord, merge_votes
from synpref_ray.schema import Verdict

VERDICT_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("judge_verdict", pa.string()),
        pa.field("verdict_reason", pa.string()),
        pa.field("all_judges_verdict", pa.string()),
        pa.field("num_votes", pa.int32()),
        pa.field("drop_reason", pa.string()),
    ]
)


class MergeConfig(Settings):
    """How the verdicts of several judges become one."""

    weights: Literal["equal", "agreement"] = "equal"  # ours: the paper says no more than "merge"; agreement: JudgeTrust.weight


def add_verdicts(shard: pa.Table, trust: Mapping[str, JudgeTrust], config: MergeConfig | None = None) -> pa.Table:
    """Merge each pair's votes into the verdict of the judges that may decide its category.

    Args:
        shard: with `pair_id`, `votes` (of `VOTES_SCHEMA`; null or empty: not asked) and `task_category`; a `drop_reason` is handed on.
        trust: by judge name; a judge that was never measured decides nothing.

    Returns:
        `VERDICT_SCHEMA`: `judge_verdict` is null where no judge may decide (`verdict_reason` no_judge_decides: the stated fallback applies), or where
        one may and has no vote (no_votes, no_deciding_vote: not asked, too long for it, without attributes); `all_judges_verdict` is what every
        judge together says, each with the same weight, for reports.
    """
    require_columns(shard, ("pair_id", "votes", "task_category"), rule="add_verdicts")
    reasons = shard.column("drop_reason").to_pylist() if "drop_reason" in shard.column_names else [None] * shard.num_rows
    by_agreement = config is not None and config.weights == "agreement"
    weights = {judge: measured.weight for judge, measured in trust.items()} if by_agreement else None
    rows = []
    columns = (shard.column(name).to_pylist() for name in ("pair_id", "votes", "task_category"))
    for pair_id, stored, category, drop_reason in zip(*columns, reasons, strict=True):
        votes = read_votes(stored)
        allowed = {judge for judge in {vote.judge for vote in votes} if judge in trust and trust[judge].decides(category)}
        merged = merge_votes((vote for vote in votes if vote.judge in allowed), weights)
        rows.append(
            {
                "pair_id": pair_id,
                "judge_verdict": merged.verdict,
                "verdict_reason": merged.reason if allowed else _why_none(trust, category, bool(votes)),
                "all_judges_verdict": merge_votes(votes).verdict,
                "num_votes": len(votes),
                "drop_reason": drop_reason,
            }
        )
    return pa.Table.from_pylist(rows, schema=VERDICT_SCHEMA)


def _why_none(trust: Mapping[str, JudgeTrust], category: str | None, has_votes: bool) -> VoteReason:
    """Return why there is no verdict. A pair whose category is not known may be of any that a judge decides."""
    categories = [category] if category is not None else [name for measured in trust.values() for name in measured.by_category]
    if not any(measured.decides(name) for measured in trust.values() for name in categories):
        return VoteReason.NO_JUDGE_DECIDES
    return VoteReason.NO_DECIDING_VOTE if has_votes else VoteReason.NO_VOTES


def read_votes(stored: list[dict[str, Any]] | None) -> list[VoteRecord]:
    """Return the records of one stored `votes` cell; null is no vote."""
    return [VoteRecord(vote["judge"], vote["order"], vote["sample"], Verdict(vote["verdict"])) for vote in stored or []]


def agreement_records(gold: pa.Table) -> dict[str, list[AgreementRecord]]:
    """Return, for each judge, its records on gold pairs; a pair without votes, or that the person could not decide, makes none.

    Args:
        gold: with `prompt_group`, `votes`, `task_category` and `human_verdict`.
    """
    names = ("votes", "task_category", "human_verdict", "prompt_group")
    require_columns(gold, names, rule="agreement_records")
    records: dict[str, list[AgreementRecord]] = {}
    for stored, category, human, group in zip(*(gold.column(name).to_pylist() for name in names), strict=True):
        if human not in (Verdict.CHOSEN, Verdict.REJECTED):
            continue
        votes = read_votes(stored)
        for judge in sorted({vote.judge for vote in votes}):
            own = [vote for vote in votes if vote.judge == judge]
            records.setdefault(judge, []).append(agreement_record(category, own, Verdict(human), group))
    return records
