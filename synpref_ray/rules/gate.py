"""The Stage 2 gate: keep, flip or drop a pair, given two reward models and at most one judge's verdict. Serves the paper's Sec. 3.3.

The paper gives two filters and a recycling step in prose, and never a full table. Here is the full table. In one breath: *keep* if the gold
RM agrees with the source label and the best RM or the judge does too; *flip* if both reward models disagree with it and no judge defends
it; *drop* otherwise. `docs/gate.md` is rendered from `TRUTH_TABLE`; the table is all that decides, for one pair as for a shard.

An opinion is `True` (the RM prefers the pair's chosen reply), `False` (the other) or `None`: no opinion, because both rewards are equal or,
for the best RM, because its confidence lies within the band around 0.5. A verdict of `None` means that no judge was asked, answered, or may
decide here.
"""

import math
from collections.abc import Set
from dataclasses import dataclass
from enum import StrEnum
from itertools import product

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from synpref_ray.config import Settings
from synpref_ray.errors import SchemaError
from synpref_ray.rules.columns import require_columns
from synpref_ray.schema import Decision, Verdict


class GateReason(StrEnum):
    """Why the gate decided as it did."""

    BOTH_RMS_AGREE = "both_rms_agree"
    GOLD_RM_AND_JUDGE_AGREE = "gold_rm_and_judge_agree"
    BOTH_RMS_DISAGREE = "both_rms_disagree"
    JUDGE_DEFENDS_LABEL = "judge_defends_label"
    JUDGE_REJECTS_LABEL = "judge_rejects_label"
    JUDGE_ABSTAINS = "judge_abstains"
    NO_JUDGE = "no_judge"
    GOLD_RM_DISAGREES = "gold_rm_disagrees"
    GOLD_RM_UNSURE = "gold_rm_unsure"
    UNSCORED = "unscored"
    GOLD_PROMPT = "gold_prompt"
    FLIP_UNSURE = "flip_unsure"
    CONTAMINATED = "contaminated"


class Basis(StrEnum):
    """Whether the paper's text gives the decision of a cell, or leaves it (or a part of it) open."""

    PAPER = "Paper"
    OUR_CHOICE = "Our choice"


class GateConfig(Settings):
    """The gate's settings."""

    band: float = Field(default=0.0, ge=0.0, lt=0.5)  # Paper: Sec. 3.3 has only the threshold 0.5; Fig. 3 adds "or close to 0.5"
    min_flip_confidence: float = Field(
        default=0.5, ge=0.5, lt=1.0
    )  # Paper: App. H.4 flips whatever both reject; ours: small models err most where they are unsure


@dataclass(frozen=True)
class Cell:
    """One cell of the truth table."""

    best: bool | None
    gold: bool | None
    judge: Verdict | None
    decision: Decision
    reason: GateReason
    basis: Basis
    why: str


_OPINIONS: tuple[bool | None, ...] = (True, False, None)
_VERDICTS: tuple[Verdict | None, ...] = (Verdict.CHOSEN, Verdict.REJECTED, Verdict.ABSTAIN, None)

_KEEPS = "Sec. 3.3: what the best RM agrees with is kept unannotated if the gold RM agrees; App. H.4: both agree, keep. No judge undoes it."
_JUDGED = "Sec. 3.3: kept if the gold RM AND (the judge OR the best RM) agree."
_CLOSE = f"{_JUDGED} Fig. 3 sends p close to 0.5 to the judge too."
_REJECTED = (
    "Sec. 3.3 does not keep it. Nor do we flip it: the gold RM, more often right than the best RM (Table 19), stands by the label, "
    "and App. H.4 flips only what both reward models reject."
)
_ABSTAINED = "Sec. 3.3 does not keep it: neither judge nor best RM agrees. The paper knows no abstention; it is no reason to flip."
_ALONE = "No judge may decide, so the reward models do, and they differ: App. H.4 leaves mixed cases to a judge."
_GOLD_AGAINST = (
    "Sec. 3.3 keeps nothing that the gold RM rejects. App. H.4 would ask a judge, but Sec. 3.3 asks only where the best RM disagrees, "
    "and no answer could keep the pair; it is not flipped, since App. H.4 flips only what both reward models reject."
)
_GOLD_AGAINST_CLOSE = (
    "Sec. 3.3 keeps nothing that the gold RM rejects, and a best RM without an opinion is not the second rejection that App. H.4 wants "
    "for a flip. So no answer of a judge matters, and none is asked."
)
_FLIPS = "App. H.4: both disagree, flip; recycling costs no judge (Sec. 3.3). 92 % of such flips agreed with humans (Table 19)."
_DEFENDED = (
    "App. H.4 read alone would flip; Sec. 3.3 asks a judge about every mismatch of the best RM and is silent on this answer. A flip "
    "claims that the label is wrong, so a judge that has proved itself on gold and says the label is right vetoes it. Two against two "
    "(the label is evidence too): a wrong flip poisons training, a drop costs one pair."
)
_GOLD_SILENT = "Equal rewards from the gold RM are neither the agreement that Sec. 3.3 keeps for nor the disagreement that App. H.4 flips for."

_KEEP, _FLIP, _DROP = Decision.KEEP, Decision.FLIP, Decision.DROP
_Rule = tuple[bool | None, bool | None, tuple[Verdict | None, ...], Decision, GateReason, Basis, str]
_RULES: tuple[_Rule, ...] = (
    # best, gold, judge, decision, reason, basis, why
    (True, True, _VERDICTS, _KEEP, GateReason.BOTH_RMS_AGREE, Basis.PAPER, _KEEPS),
    (True, False, _VERDICTS, _DROP, GateReason.GOLD_RM_DISAGREES, Basis.OUR_CHOICE, _GOLD_AGAINST),
    (True, None, _VERDICTS, _DROP, GateReason.GOLD_RM_UNSURE, Basis.OUR_CHOICE, _GOLD_SILENT),
    (False, True, (Verdict.CHOSEN,), _KEEP, GateReason.GOLD_RM_AND_JUDGE_AGREE, Basis.PAPER, _JUDGED),
    (False, True, (Verdict.REJECTED,), _DROP, GateReason.JUDGE_REJECTS_LABEL, Basis.OUR_CHOICE, _REJECTED),
    (False, True, (Verdict.ABSTAIN,), _DROP, GateReason.JUDGE_ABSTAINS, Basis.OUR_CHOICE, _ABSTAINED),
    (False, True, (None,), _DROP, GateReason.NO_JUDGE, Basis.OUR_CHOICE, _ALONE),
    (False, False, (Verdict.CHOSEN,), _DROP, GateReason.JUDGE_DEFENDS_LABEL, Basis.OUR_CHOICE, _DEFENDED),
    (False, False, (Verdict.REJECTED, Verdict.ABSTAIN, None), _FLIP, GateReason.BOTH_RMS_DISAGREE, Basis.PAPER, _FLIPS),
    (False, None, _VERDICTS, _DROP, GateReason.GOLD_RM_UNSURE, Basis.OUR_CHOICE, _GOLD_SILENT),
    (None, True, (Verdict.CHOSEN,), _KEEP, GateReason.GOLD_RM_AND_JUDGE_AGREE, Basis.PAPER, _CLOSE),
    (None, True, (Verdict.REJECTED,), _DROP, GateReason.JUDGE_REJECTS_LABEL, Basis.OUR_CHOICE, _REJECTED),
    (None, True, (Verdict.ABSTAIN,), _DROP, GateReason.JUDGE_ABSTAINS, Basis.OUR_CHOICE, _ABSTAINED),
    (None, True, (None,), _DROP, GateReason.NO_JUDGE, Basis.OUR_CHOICE, _ALONE),
    (None, False, _VERDICTS, _DROP, GateReason.GOLD_RM_DISAGREES, Basis.OUR_CHOICE, _GOLD_AGAINST_CLOSE),
    (None, None, _VERDICTS, _DROP, GateReason.GOLD_RM_UNSURE, Basis.OUR_CHOICE, _GOLD_SILENT),
)
_CELLS = {
    (best, gold, judge): Cell(best, gold, judge, decision, reason, basis, why)
    for best, gold, judges, decision, reason, basis, why in _RULES
    for judge in judges
}
TRUTH_TABLE: tuple[Cell, ...] = tuple(_CELLS[key] for key in product(_OPINIONS, _OPINIONS, _VERDICTS))
"""All 36 cells, ordered by best RM, gold RM (agrees, disagrees, no opinion), judge (chosen, rejected, abstain, none)."""

_OUTSIDE = (GateReason.UNSCORED, GateReason.GOLD_PROMPT, GateReason.FLIP_UNSURE, GateReason.CONTAMINATED)  # drops that the table does not hold
_UNSCORED, _GOLD_PROMPT, _FLIP_UNSURE, _CONTAMINATED = range(len(TRUTH_TABLE), len(TRUTH_TABLE) + len(_OUTSIDE))
_DECISIONS = [*(cell.decision.value for cell in TRUTH_TABLE), *(Decision.DROP.value for _ in _OUTSIDE)]
_REASONS = [*(cell.reason.value for cell in TRUTH_TABLE), *(reason.value for reason in _OUTSIDE)]
_FLIPS_IN_TABLE = [index for index, cell in enumerate(TRUTH_TABLE) if cell.decision is Decision.FLIP]

DECISION_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("decision", pa.string(), nullable=False),
        pa.field("flipped", pa.bool_(), nullable=False),
        pa.field("decision_reason", pa.string(), nullable=False),
        pa.field("margin_best", pa.float32()),
        pa.field("margin_gold", pa.float32()),
        pa.field("best_agrees", pa.bool_()),
        pa.field("gold_agrees", pa.bool_()),
        pa.field("judge_verdict", pa.string()),
    ]
)
DECISION_REQUIRES = ("pair_id", "margin_best", "margin_gold", "judge_verdict")


def stage2_decision(best: bool | None, gold: bool | None, judge: Verdict | None) -> tuple[Decision, GateReason]:
    """Look one pair up in the truth table.

    Args:
        best, gold: whether that RM agrees with the source label; None is no opinion (see the module), not a missing reward.
        judge: about the pair as ingested; None if no judge was asked or may decide (then the reward models decide alone).
    """
    cell = _CELLS[best, gold, judge]
    return cell.decision, cell.reason


def opinion(margin: float, *, band: float = 0.0) -> bool | None:
    """Return whether a margin (reward of chosen minus reward of rejected) agrees with the label; None within `band` of confidence 0.5.

    Compared as logits, because the confidence of a margin below 1e-16 is exactly 0.5 in floating point; with band 0 only a margin of 0 is
    no opinion.
    """
    return None if abs(margin) <= _band_margin(band) else margin > 0


def needs_judge(best: bool | None, gold: bool | None) -> bool:
    """Whether a judge is asked.

    Paper: Sec. 3.3 asks where the best RM does not agree. Our choice: and only if an answer can change the decision, which saves the call
    otherwise.
    """
    return best is not True and len({_CELLS[best, gold, verdict].decision for verdict in Verdict}) > 1


def select_for_judge(shard: pa.Table, config: GateConfig, gold_groups: Set[str] | pa.Array = frozenset()) -> pa.Array:
    """Return one boolean per row: whether a judge should be asked about it. Never about a pair that is dropped whatever a judge says: an unscored
    one, one of a gold prompt, one that gives a benchmark item away.

    Args:
        gold_groups: as for `decide_shard`.
        shard: with `margin_best` and `margin_gold`, and `leak_decision` where judges of benchmark overlaps have decided.
    """
    require_columns(shard, ("margin_best", "margin_gold"), rule="select_for_judge")
    best, gold = _floats(shard, "margin_best"), _floats(shard, "margin_gold")
    asks = np.array([[needs_judge(b, g) for g in _OPINIONS] for b in _OPINIONS])
    gold_code = _opinion_codes(gold, 0.0)
    asked = asks[_opinion_codes(best, _band_margin(config.band)), gold_code] | asks[_opinion_codes(best, 0.0), gold_code]
    doomed = (best < 0) & (gold < 0) & ~_is_sure_flip(best, gold, config)  # no flip whatever a judge says
    left_out = _is_leaked(shard) | _shares_gold_prompt(shard, gold_groups, rule="select_for_judge")
    return pa.array(asked & ~doomed & ~left_out & np.isfinite(best) & np.isfinite(gold))


def decide_shard(shard: pa.Table, config: GateConfig, gold_groups: Set[str] | pa.Array = frozenset()) -> pa.Table:
    """Decide every pair of a shard by the truth table; before it, pairs of a gold prompt and pairs that an RM could not score are dropped.

    Our choice: a pair whose prompt is in gold is left out of curated data, so that gold can pick checkpoints of, and audit, what trains on it.

    Our choice: the band only widens whom the judge is asked about, and counts only where the gold RM agrees with the label and a verdict
    came back. Everywhere else the published threshold 0.5 holds: a wider band must neither drop pairs that nobody doubts nor take the
    judge's say from pairs that both reward models reject.

    Args:
        gold_groups: prompt groups of all gold, working and audit; if there are any, the shard needs `prompt_group`. Who decides many shards gives
            an array of strings, made once.
        shard: with `DECISION_REQUIRES`; `judge_verdict` is null unless a judge that may decide was asked and answered. Where there is a
            `leak_decision` (`rules/leaks.py`), pairs that it drops are dropped.

    Returns:
        `DECISION_SCHEMA`, same rows and order: the decision, and the evidence it rests on (`best_agrees` as used, so null within the band).
    """
    require_columns(shard, DECISION_REQUIRES, rule="decide_shard")
    best, gold = _floats(shard, "margin_best"), _floats(shard, "margin_gold")
    verdicts, judge = _verdict_codes(shard)
    answered = judge < len(Verdict)
    gold_code = _opinion_codes(gold, 0.0)
    in_band = answered & (gold_code == _OPINIONS.index(True))
    best_code = np.where(in_band, _opinion_codes(best, _band_margin(config.band)), _opinion_codes(best, 0.0))
    cells = (best_code * len(_OPINIONS) + gold_code) * len(_VERDICTS) + judge
    cells = np.where(np.isin(cells, _FLIPS_IN_TABLE) & ~_is_sure_flip(best, gold, config), _FLIP_UNSURE, cells)
    cells = np.where(np.isfinite(best) & np.isfinite(gold), cells, _UNSCORED)
    cells = np.where(_shares_gold_prompt(shard, gold_groups, rule="decide_shard"), _GOLD_PROMPT, cells)
    cells = np.where(_is_leaked(shard), _CONTAMINATED, cells)
    decisions = pa.array(_DECISIONS).take(pa.array(cells))
    columns = [
        shard.column("pair_id"),
        decisions,
        pc.equal(decisions, Decision.FLIP.value),
        pa.array(_REASONS).take(pa.array(cells)),
        _evidence(best),
        _evidence(gold),
        _agreement(best_code, best),
        _agreement(gold_code, gold),
        verdicts,
    ]
    return pa.table(columns, schema=DECISION_SCHEMA)


def render_truth_table() -> str:
    """Return `docs/gate.md`."""
    head = "| best RM | gold RM | judge: label right (`chosen`) | judge: label wrong (`rejected`) | judge abstains | no judge |"
    lines = [_INTRODUCTION, head, "|---|---|---|---|---|---|"]
    for best, gold in product(_OPINIONS, _OPINIONS):
        cells = [_CELLS[best, gold, verdict] for verdict in _VERDICTS]
        shown = [f"**{cell.decision.value}** · {cell.basis.value}" for cell in cells]
        asked = " (asked)" if needs_judge(best, gold) else ""
        lines.append(f"| {_NAMES[best]}{asked} | {_NAMES[gold]} | {' | '.join(shown)} |")
    lines += ["", "## Why", "", "| best RM | gold RM | judge | decision | reason | says who | why |", "|---|---|---|---|---|---|---|"]
    for best, gold, judges, decision, reason, basis, why in _RULES:
        said = "any or none" if judges == _VERDICTS else ", ".join(verdict.value if verdict else "none" for verdict in judges)
        lines.append(f"| {_NAMES[best]} | {_NAMES[gold]} | {said} | {decision.value} | `{reason.value}` | {basis.value} | {why} |")
    return "\n".join(lines) + "\n"


_NAMES = {True: "agrees", False: "disagrees", None: "no opinion"}
_INTRODUCTION = """# The Stage 2 gate

Generated from `TRUTH_TABLE` in `synpref_ray/rules/gate.py` (`python -c "from synpref_ray.rules.gate import render_truth_table as r;
print(r(), end='')"`); a test compares. Section numbers are those of arXiv 2507.01352 v3.

- **keep** if the gold RM agrees with the source label AND (the best RM OR the judge) does;
- **flip** if both reward models disagree with it and no judge defends it;
- **drop** otherwise.

*Agrees*: the RM's margin (reward of chosen minus reward of rejected) is above 0. *No opinion*: the margin is exactly 0 or, for the best RM,
its confidence lies within `band` of 0.5 (default 0: the paper publishes only the threshold). *No judge*: none was asked, none answered, or
none has proved on gold that it beats chance; then `band` is ignored and the reward models decide alone, by their signs. "(asked)" marks
where a judge is asked: the best RM does not agree, and an answer can change the decision.
The band counts only where the gold RM agrees; elsewhere the sign decides, and "no opinion" of the best RM means equal rewards.
After the table: a pair to flip is dropped as `flip_unsure` unless both reward models reject its label with a confidence of
`min_flip_confidence` (default 0.5, the paper's: every rejection will do).
Before the table: a pair that one of the reward models could not score (too long, not finite) is dropped as `unscored`; a pair that shares
its prompt with gold is dropped as `gold_prompt`, so that gold stays clean for whatever trains on the curated pairs; and one that judges say
gives a benchmark item away (`jobs/decontaminate.py`) is dropped as `contaminated`. No judge is asked about these, so whom a judge is asked about
changes with gold.

*Paper* marks a decision that the paper's text gives; *Our choice* one that it leaves open in whole or in part.
"""


def _is_leaked(shard: pa.Table) -> npt.NDArray[np.bool_]:
    """Whether the judges of benchmark overlaps say that a pair gives an item away; nobody has looked where the column is missing."""
    if "leak_decision" not in shard.column_names:
        return np.zeros(shard.num_rows, np.bool_)
    return np.asarray(pc.fill_null(pc.equal(shard.column("leak_decision"), Decision.DROP.value), False))


def _shares_gold_prompt(shard: pa.Table, gold_groups: Set[str] | pa.Array, *, rule: str) -> npt.NDArray[np.bool_]:
    if not len(gold_groups):
        return np.zeros(shard.num_rows, np.bool_)
    require_columns(shard, ("prompt_group",), rule=rule)
    groups = gold_groups if isinstance(gold_groups, pa.Array) else pa.array(sorted(gold_groups), pa.string())
    return np.asarray(pc.is_in(shard.column("prompt_group"), value_set=groups))


def _is_sure_flip(best: npt.NDArray[np.float64], gold: npt.NDArray[np.float64], config: GateConfig) -> npt.NDArray[np.bool_]:
    """Whether both reward models reject the label with the confidence that a flip needs."""
    bar = _band_margin(config.min_flip_confidence - 0.5)
    return np.asarray((-best >= bar) & (-gold >= bar))


def _band_margin(band: float) -> float:
    return math.log((0.5 + band) / (0.5 - band))


def _floats(shard: pa.Table, column: str) -> npt.NDArray[np.float64]:
    """Return a float column as float64, null as NaN."""
    return np.asarray(shard.column(column).cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)


def _opinion_codes(margins: npt.NDArray[np.float64], band_margin: float) -> npt.NDArray[np.int64]:
    """Return indices into `_OPINIONS`; NaN becomes no opinion."""
    return np.select([margins > band_margin, margins < -band_margin], [0, 1], 2)


def _verdict_codes(shard: pa.Table) -> tuple[pa.ChunkedArray, npt.NDArray[np.int64]]:
    """Return the verdict column as strings, and indices into `_VERDICTS`."""
    verdicts = shard.column("judge_verdict").cast(pa.string())
    codes = pc.index_in(verdicts, value_set=pa.array([verdict.value for verdict in Verdict]))
    unknown = pc.and_(pc.is_null(codes), pc.is_valid(verdicts))
    if pc.any(unknown).as_py():
        ids = shard.column("pair_id").filter(unknown).slice(0, 3).to_pylist()
        raise SchemaError(f"judge_verdict must be chosen, rejected, abstain or null; found something else at {', '.join(ids)}")
    return verdicts, np.asarray(pc.fill_null(codes, len(Verdict)).to_numpy(), dtype=np.int64)


def _evidence(margins: npt.NDArray[np.float64]) -> pa.Array:
    return pa.array(margins, mask=np.isnan(margins)).cast(pa.float32())


def _agreement(codes: npt.NDArray[np.int64], margins: npt.NDArray[np.float64]) -> pa.Array:
    return pa.array(codes == 0, mask=(codes == 2) | ~np.isfinite(margins))
