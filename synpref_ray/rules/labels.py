"""Who stands behind a Stage 1 pair's label: the merge of human verdicts, judge votes and source labels into gold and silver.

Paper: Sec. 3.2, Step 4 (human labels join gold, LLM labels join silver; a pair that humans cannot decide is discarded and never goes to an
LLM).
"""

from collections.abc import Set
from dataclasses import dataclass
from enum import StrEnum

import pyarrow as pa

from synpref_ray.rules.votes import VoteReason
from synpref_ray.schema import LabelSource, Verdict

LABEL_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("label_source", pa.string(), nullable=False),
        pa.field("flipped", pa.bool_(), nullable=False),
        pa.field("label_reason", pa.string(), nullable=False),
        pa.field("gold_split", pa.string()),
        pa.field("judge_verdict", pa.string()),
    ]
)


class LabelReason(StrEnum):
    """Why a pair has its label, or none."""

    HUMAN = "human"
    HUMAN_UNDECIDABLE = "human_undecidable"
    GOLD_PROMPT = "gold_prompt"
    JUDGE = "judge"
    JUDGE_ABSTAINED = "judge_abstained"
    NOT_JUDGED = "not_judged"
    SOURCE_LABEL = "source_label"
    CONTRADICTED = "contradicted"
    CONTAMINATED = "contaminated"


@dataclass(frozen=True)
class Evidence:
    """What is known about one pair; verdicts refer to the pair as ingested. No judge verdict: none may decide here, or (`unanswered`) one may, and
    has no vote: the pair is too long for it, say, or has no attributes.
    """

    human: Verdict | None
    judge: Verdict | None
    shares_gold_prompt: bool
    contradicted: bool
    leaked: bool = False
    unanswered: bool = False


@dataclass(frozen=True)
class Label:
    """The outcome: `flipped` says that the other reply is the preferred one."""

    source: LabelSource
    flipped: bool
    reason: LabelReason


def label_pair(evidence: Evidence) -> Label:
    """Return the label of one pair; the first rule that applies decides.

    Paper: Sec. 3.2: a human verdict makes gold, an undecidable pair is discarded, a judge's verdict makes silver.
    Our choice: a pair that shares a prompt with gold makes no silver (gold would stop being a held-out check); a judge that may decide and
    abstains makes no label, nor does one that could not be asked (else long pairs would join silver unjudged); where no judge may decide the source
    label stands in, except for comparisons that the sources contradict. A pair that judges say gives a benchmark item away has no label, whatever
    else is known.
    """
    if evidence.leaked:
        return Label(LabelSource.UNVERIFIED, False, LabelReason.CONTAMINATED)
    if evidence.human is Verdict.ABSTAIN:
        return Label(LabelSource.DISCARDED, False, LabelReason.HUMAN_UNDECIDABLE)
    if evidence.human is not None:
        return Label(LabelSource.GOLD, evidence.human is Verdict.REJECTED, LabelReason.HUMAN)
    if evidence.shares_gold_prompt:
        return Label(LabelSource.UNVERIFIED, False, LabelReason.GOLD_PROMPT)
    if evidence.judge is Verdict.ABSTAIN:
        return Label(LabelSource.UNVERIFIED, False, LabelReason.JUDGE_ABSTAINED)
    if evidence.judge is not None:
        return Label(LabelSource.SILVER, evidence.judge is Verdict.REJECTED, LabelReason.JUDGE)
    if evidence.unanswered:
        return Label(LabelSource.UNVERIFIED, False, LabelReason.NOT_JUDGED)
    if evidence.contradicted:
        return Label(LabelSource.UNVERIFIED, False, LabelReason.CONTRADICTED)
    return Label(LabelSource.SILVER, False, LabelReason.SOURCE_LABEL)


def label_shard(shard: pa.Table, gold_groups: Set[str], leaked: Set[str] = frozenset()) -> pa.Table:
    """Return the labels of a shard (schema `LABEL_SCHEMA`, rows in order).

    Args:
        shard: columns pair_id, prompt_group, contradicted, human_verdict, gold_split, judge_verdict and verdict_reason (`VERDICT_SCHEMA`).
        gold_groups: prompt groups of all gold, working and audit.
        leaked: pair_ids whose decision in the sidecar `decontamination` is to drop them.
    """
    rows = []
    for row in shard.to_pylist():
        evidence = Evidence(
            human=Verdict(row["human_verdict"]) if row["human_verdict"] else None,
            judge=Verdict(row["judge_verdict"]) if row["judge_verdict"] else None,
            shares_gold_prompt=row["prompt_group"] in gold_groups,
            contradicted=bool(row["contradicted"]),
            leaked=row["pair_id"] in leaked,
            unanswered=row["judge_verdict"] is None and row["verdict_reason"] != VoteReason.NO_JUDGE_DECIDES,
        )
        label = label_pair(evidence)
        rows.append(
            {
                "pair_id": row["pair_id"],
                "label_source": label.source.value,
                "flipped": label.flipped,
                "label_reason": label.reason.value,
                "gold_split": row["gold_split"] if label.source is LabelSource.GOLD else None,
                "judge_verdict": row["judge_verdict"],
            }
        )
    return pa.Table.from_pylist(rows, schema=LABEL_SCHEMA)
