"""Gold as it grows: all human-verified pairs gathered into one pool per round, judges measured on it, labels and sets derived from it.

Paper: Sec. 3.2, Step 4 (human labels join gold, LLM labels join silver). Our choice: every table here is derived by rule from stored verdicts and
votes, so a new rule needs no model; the checks of `rules/gold.py` are made where a set comes into being.
"""

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from synpref_ray.errors import InputError
from synpref_ray.evaluation.judge_report import judge_report
from synpref_ray.pipeline.gathering import gather_pool, gather_sidecars
from synpref_ray.pipeline.gold_tables import GoldTables
from synpref_ray.pipeline.leak_marks import leaked_pairs
from synpref_ray.pipeline.metrics import export
from synpref_ray.pipeline.steps import Output, Resources, ShardKey, Step, StepInput, run_step
from synpref_ray.reporting.metrics import judge_samples
from synpref_ray.rules.gold import GoldConfig, GoldSplit, check_split
from synpref_ray.rules.judges import JudgeTrust, TrustConfig, judge_trust
from synpref_ray.rules.labels import LABEL_SCHEMA, LabelReason, label_shard
from synpref_ray.rules.verdicts import VERDICT_SCHEMA, MergeConfig, add_verdicts, agreement_records
from synpref_ray.rules.votes import VoteReason
from synpref_ray.schema import ATTRIBUTES_SCHEMA, HUMAN_SCHEMA, LabelSource
from synpref_ray.tables.pools import Pool, content_digest, open_pool
from synpref_ray.tables.reading import read_each
from synpref_ray.tables.selection import Piece
from synpref_ray.tables.sets import Member, PairSet, save_set
from synpref_ray.tables.sidecars import Sidecar, open_sidecar, zip_shard
from synpref_ray.tables.storage import Storage

RULES_VERSION = 2
VOTE_COLUMN = "votes"


@dataclass(frozen=True)
class LabelledPool:
    """A pool of Stage 1 with what is known about its pairs; `votes` are in the order of the judges, empty before judging.

    `leaks` says which pairs give benchmark items away, where judges have looked (`pipeline/leaks.py`).
    """

    pool: Pool
    attributes: Sidecar
    embeddings: Sidecar
    human: Sidecar
    votes: tuple[Sidecar, ...] = ()
    leaks: Sidecar | None = None

    @cached_property
    def gold_pieces(self) -> list[Piece]:
        """Where its human-decided pairs stand; every round gathers them, and they are read once."""
        pieces = []
        for shard in self.pool.shards:
            splits = self.human.read(shard.number, ["gold_split"])["gold_split"].to_pylist()
            rows = tuple(row for row, split in enumerate(splits) if split is not None)
            if rows:
                pieces.append(Piece(self.pool, shard.number, rows))
        return pieces

    def judged(self, votes: Sequence[Sidecar]) -> "LabelledPool":
        """Return the pool with its votes."""
        return replace(self, votes=tuple(votes))


@dataclass(frozen=True)
class Dropped:
    """Pairs of earlier rounds that decisions about leaks have dropped since: all of them, and those that people had decided, with their prompts."""

    pair_ids: frozenset[str] = frozenset()
    gold_ids: frozenset[str] = frozenset()
    gold_groups: frozenset[str] = frozenset()

    @classmethod
    def among(cls, pools: Sequence[LabelledPool], leaked: Set[str]) -> "Dropped":
        """Return what is dropped of these pools, given all pairs of theirs that leak."""
        if not leaked:
            return cls()
        wanted, found = pa.array(sorted(leaked), pa.string()), []
        for piece in (piece for labelled in pools for piece in labelled.gold_pieces):
            decided = piece.pool.read(piece.shard, ["pair_id", "prompt_group"]).take(pa.array(piece.rows, pa.int64()))
            found.append(decided.filter(pc.is_in(decided["pair_id"], value_set=wanted)))
        ids, groups = (frozenset(value for table in found for value in table[name].to_pylist()) for name in ("pair_id", "prompt_group"))
        return cls(frozenset(leaked), ids, groups)

    @property
    def digests(self) -> dict[str, str]:
        """What names these pairs in a fingerprint; nothing where there are none."""
        return {"dropped": content_digest(sorted(self.pair_ids))} if self.pair_ids else {}


NONE_DROPPED = Dropped()


def gather_gold(
    storage: Storage,
    name: str,
    pools: Sequence[LabelledPool],
    config: GoldConfig,
    embeddings: pa.Schema,
    dropped: Dropped = NONE_DROPPED,
) -> GoldTables:
    """Gather every human-decided pair of the pools, in their order, with attributes, embeddings and verdicts beside them.

    Args:
        dropped: pairs that are left out; their prompts stay gold's.

    Raises:
        InputError: nobody has decided any pair yet.
    """
    pieces = [kept for labelled in pools for piece in labelled.gold_pieces if (kept := _without(piece, dropped.gold_ids)).rows]
    if not pieces:
        raise InputError("no pair of these pools has a human verdict: raise the simulated budget, or give verdicts whose pair_ids are in the pools")
    pool = gather_pool(storage, name, pieces, inputs={f"human:{labelled.pool.name}": labelled.human.fingerprint for labelled in pools})
    attributes, vectors, human = (
        gather_sidecars(sidecar, schema, [(pool, {labelled.pool.name: getattr(labelled, sidecar) for labelled in pools})])[0]
        for sidecar, schema in (("attributes", ATTRIBUTES_SCHEMA), ("embeddings", embeddings), ("human", HUMAN_SCHEMA))
    )
    gold = GoldTables(pool, attributes, vectors, human, left_groups=dropped.gold_groups)
    check_split(gold.splits(), config)
    return gold


def _without(piece: Piece, dropped: frozenset[str]) -> Piece:
    if not dropped:
        return piece
    ids = piece.pool.read(piece.shard, ["pair_id"])["pair_id"].to_pylist()
    return replace(piece, rows=tuple(row for row in piece.rows if ids[row] not in dropped))


def gold_record(gold: GoldTables) -> dict[str, Any]:
    """Return what names gold in a job's record; `open_gold` reads it."""
    record: dict[str, Any] = {"pool": gold.pool.name, **{name: getattr(gold, name).fingerprint for name in ("attributes", "embeddings", "human")}}
    if gold.left_groups:
        record["left_groups"] = sorted(gold.left_groups)
    if gold.tagged:
        record["tagged"] = {name: getattr(gold.tagged, name).fingerprint for name in ("attributes", "embeddings")}
    return record


def open_gold(storage: Storage, record: Mapping[str, Any]) -> GoldTables:
    """Return the gold that a record names.

    Raises:
        InputError: one of its tables is not there any more.
    """
    pool = open_pool(storage, record["pool"])
    attributes, embeddings, human = (open_sidecar(pool, name, record[name]) for name in ("attributes", "embeddings", "human"))
    gold = GoldTables(pool, attributes, embeddings, human, left_groups=frozenset(record.get("left_groups", ())))
    if "tagged" not in record:
        return gold
    attributes, embeddings = (open_sidecar(pool, name, record["tagged"][name]) for name in ("attributes", "embeddings"))
    return replace(gold, tagged=GoldTables(pool, attributes, embeddings, human))


def measure_judges(gold: GoldTables, votes: Sequence[Sidecar], config: TrustConfig) -> tuple[dict[str, JudgeTrust], dict[str, JudgeTrust]]:
    """Measure every judge on working gold, which decides what it may decide, and on audit gold, which is what reports show.

    Our choice: a category is the taggers' here, also where people edited it, because it is theirs by which verdicts on other pairs are admitted.
    """
    measured = []
    for split in GoldSplit:
        records: dict[str, Any] = {}
        for sidecar in votes:
            table = _gold_votes(gold, sidecar)
            table = table.filter(pc.equal(table["gold_split"], split.value))
            records |= agreement_records(table)
        measured.append({judge: judge_trust(found, config) for judge, found in records.items()})
        for judge, trust in measured[-1].items():
            if trust.overall.agreement is not None:
                export(judge_samples(judge, split.value, trust.overall.agreement, trust.overall.lower_bound))
    return measured[0], measured[1]


def measure_on_doubted(gold: GoldTables, votes: Sequence[Sidecar], rewards: Sidecar, config: TrustConfig) -> dict[str, JudgeTrust]:
    """Measure every judge on the working gold whose source label the best RM rejects: the kind of pairs that Stage 2 asks judges about.

    Our choice: reported, and decides nothing. These pairs are harder than working gold at large, by which a judge is trusted, and too few of them
    are verified for a bound per category.

    Args:
        rewards: of the best RM on gold.
    """
    scored = rewards.read_all(["pair_id", "margin"])
    doubted = scored["pair_id"].filter(pc.fill_null(pc.less_equal(scored["margin"], 0.0), False))
    found: dict[str, JudgeTrust] = {}
    for sidecar in votes:
        table = _gold_votes(gold, sidecar)
        table = table.filter(pc.and_(pc.equal(table["gold_split"], GoldSplit.WORKING.value), pc.is_in(table["pair_id"], value_set=doubted)))
        found[sidecar.name.removeprefix("votes.")] = judge_trust([], config)
        found |= {judge: judge_trust(records, config) for judge, records in agreement_records(table).items()}
    return found


def _gold_votes(gold: GoldTables, votes: Sidecar) -> pa.Table:
    beside: list[tuple[Sidecar, Mapping[str, str]]] = [
        (gold.as_targets.attributes, {"task_category": "task_category"}),
        (gold.human, {"human_verdict": "human_verdict", "gold_split": "gold_split"}),
        (votes, {"votes": VOTE_COLUMN}),
    ]
    return pa.concat_tables([zip_shard(gold.pool, shard.number, ["prompt_group"], beside) for shard in gold.pool.shards])


def report_judges(gold: GoldTables, votes: Sequence[Sidecar], *, confidence: float = 0.95) -> dict[str, dict[str, Any]]:
    """Return the judges' report (`evaluation/judge_report.py`) on working gold and on audit gold, by the split's name.

    Args:
        votes: one sidecar a judge, of the gold pool.
    """
    beside: list[tuple[Sidecar, Mapping[str, str]]] = [
        (gold.attributes, {name: name for name in ("task_category", "objectivity", "controversiality")}),
        (gold.human, {"human_verdict": "human_verdict", "gold_split": "gold_split"}),
    ]
    numbers = range(len(votes))
    beside += [(sidecar, {"votes": f"{VOTE_COLUMN}.{number}", "drop_reason": f"drop_reason.{number}"}) for number, sidecar in enumerate(votes)]
    table = pa.concat_tables([zip_shard(gold.pool, shard.number, ["prompt_group"], beside) for shard in gold.pool.shards])
    table = table.append_column(VOTE_COLUMN, _together(table, [f"{VOTE_COLUMN}.{number}" for number in numbers]))
    reports = {}
    for split in GoldSplit:
        part = table.filter(pc.equal(table["gold_split"], split.value))
        reasons = {
            sidecar.name.removeprefix("votes."): dict(Counter(reason for reason in part[f"drop_reason.{number}"].to_pylist() if reason is not None))
            for number, sidecar in enumerate(votes)
        }
        reports[split.value] = judge_report(part, reasons, confidence=confidence)
    return reports


def _together(table: pa.Table, names: Sequence[str]) -> pa.Array:
    """Return, for every row, the votes of all these columns in one list."""
    cells = zip(*(table[name].to_pylist() for name in names), strict=True)
    return pa.array([[vote for votes in cell for vote in votes or []] for cell in cells], table.schema.field(names[0]).type)


class MergeWorker:
    """Merges the votes of all judges that may decide."""

    def __init__(self, trust: Mapping[str, JudgeTrust], num_judges: int, config: MergeConfig):
        self._trust = trust
        self._config = config
        self._names = [f"{VOTE_COLUMN}.{number}" for number in range(num_judges)]

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        merged = _together(shard, self._names)
        return add_verdicts(shard.drop_columns(self._names).append_column(VOTE_COLUMN, merged), self._trust, self._config), {}


def merge_pool_votes(pool: Pool, attributes: Sidecar, votes: Sequence[Sidecar], trust: Mapping[str, JudgeTrust], config: MergeConfig) -> Sidecar:
    """Make the sidecar `verdict`: what the judges that may decide say together."""
    report = {judge: measured.report() for judge, measured in trust.items()}
    step = Step(
        name="merge votes",
        version=RULES_VERSION,
        worker=MergeWorker,
        outputs=(Output("verdict", VERDICT_SCHEMA),),
        settings={"trust": content_digest(report), **config.model_dump(mode="json")},
        worker_arguments=lambda _: {"trust": dict(trust), "num_judges": len(votes), "config": config},
        resources=Resources(),
        max_failed_fraction=1.0,
    )
    beside: list[tuple[Sidecar, Mapping[str, str]]] = [(attributes, {"task_category": "task_category"})]
    beside += [(sidecar, {"votes": f"{VOTE_COLUMN}.{number}"}) for number, sidecar in enumerate(votes)]
    return run_step(step, [StepInput(pool, (), tuple(beside))]).sidecars[0][0]


def count_unanswered(asked: Sidecar, verdicts: Sidecar) -> int:
    """Return how many pairs that judges are asked about, and may decide, have no vote of one.

    Args:
        asked: of a pool, with `ask_judge`.
        verdicts: beside it (`VERDICT_SCHEMA`).
    """
    without = pa.array([VoteReason.NO_VOTES.value, VoteReason.NO_DECIDING_VOTE.value])

    def count(number: int) -> int:
        reasons = verdicts.read(number, ["verdict_reason"])["verdict_reason"].filter(asked.read(number, ["ask_judge"])["ask_judge"])
        found: int = pc.sum(pc.is_in(reasons, value_set=without)).as_py() or 0
        return found

    return sum(read_each(count, [shard.number for shard in asked.pool.shards]))


class LabelWorker:
    """Applies the label rule."""

    def __init__(self, gold_groups: frozenset[str], leaked: frozenset[str] = frozenset()):
        self._gold_groups = gold_groups
        self._leaked = leaked

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        return label_shard(shard, self._gold_groups, self._leaked), {}


def label_pool(labelled: LabelledPool, verdict: Sidecar, gold: GoldTables, dropped: Dropped = NONE_DROPPED) -> Sidecar:
    """Make the sidecar `label` of a pool, given all gold so far, and the pairs that decisions about leaks drop wherever they stand."""
    groups, leaked = gold.prompt_groups(), leaked_pairs(labelled.leaks) | dropped.pair_ids
    step = Step(
        name="label",
        version=RULES_VERSION,
        worker=LabelWorker,
        outputs=(Output("label", LABEL_SCHEMA),),
        settings={},
        digests={"gold": gold.digest, **({"leaks": labelled.leaks.fingerprint} if labelled.leaks else {}), **dropped.digests},
        worker_arguments=lambda _: {"gold_groups": groups, "leaked": leaked},
    )
    beside: tuple[tuple[Sidecar, Mapping[str, str]], ...] = (
        (labelled.human, {"human_verdict": "human_verdict", "gold_split": "gold_split"}),
        (verdict, {"judge_verdict": "judge_verdict", "verdict_reason": "verdict_reason"}),
    )
    return run_step(step, [StepInput(labelled.pool, ("prompt_group", "contradicted"), beside)]).sidecars[0][0]


_Where = tuple[tuple[str, tuple[str, ...]], ...]
_SILVER: _Where = (("label_source", (LabelSource.SILVER.value,)),)
_JUDGED: _Where = (*_SILVER, ("label_reason", (LabelReason.JUDGE.value,)))
_WORKING: _Where = (("label_source", (LabelSource.GOLD.value,)), ("gold_split", (GoldSplit.WORKING.value,)))
_AUDIT: _Where = (("label_source", (LabelSource.GOLD.value,)), ("gold_split", (GoldSplit.AUDIT.value,)))
_STANDS: _Where = (("flipped", ("false",)),)
_TURNED: _Where = (("flipped", ("true",)),)


def save_label_sets(storage: Storage, suffix: str, labels: Sequence[Sidecar]) -> dict[str, PairSet]:
    """Write the sets of a round, over all pairs labelled so far: silver, gold-working and gold-audit, and the paper's four.

    Paper: Fig. 5 and Table 20. *filtered*: gold and silver whose source label people or judges agree with. *corrected*: those that they turn round,
    with the turned label. *original*: both, with the labels that they came with; *filtered-and-corrected*: both, with the labels that they have now.
    Our choice: audit gold is in none of the four, because they are for training and audit gold trains nothing; nor is silver under its source label
    where no judge may decide (`label_reason` source_label), with which nobody has agreed.
    """
    decided = (_JUDGED, _WORKING)
    names = {
        "silver": [Member(label, _SILVER) for label in labels],
        "gold-working": [Member(label, _WORKING) for label in labels],
        "gold-audit": [Member(label, _AUDIT) for label in labels],
        "original": [Member(label, where, as_ingested=True) for label in labels for where in decided],
        "filtered": [Member(label, (*where, *_STANDS)) for label in labels for where in decided],
        "corrected": [Member(label, (*where, *_TURNED)) for label in labels for where in decided],
        "filtered-and-corrected": [Member(label, where) for label in labels for where in decided],
    }
    return {name: save_set(storage, f"{name}-{suffix}", members) for name, members in names.items()}


def count_labels(labels: Sequence[Sidecar]) -> dict[str, int]:
    """Return how many pairs have which label and why, as `source/reason` and `source/reason, turned round`."""
    counts: Counter[str] = Counter()
    for label in labels:
        for shard in label.pool.shards:
            table = label.read(shard.number, ["label_source", "label_reason", "flipped"])
            for source, reason, flipped in zip(*(table[name].to_pylist() for name in table.column_names), strict=True):
                counts[f"{source}/{reason}{', turned round' if flipped else ''}"] += 1
    return dict(sorted(counts.items()))
