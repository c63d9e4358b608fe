"""What a round of Stage 1 leaves behind: `round.json` (what it read, decided and measured), `selected.parquet`, and the closing table.

Paper: Sec. 3.2 names no record. Our choice: enough that every figure of the closing table and every choice of a pair can be looked up afterwards;
accuracies carry a 95 % interval, bootstrapped over prompts.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from synpref_ray.evaluation.accuracy import accuracy_over_groups, is_correct
from synpref_ray.pipeline.gold import NONE_DROPPED, Dropped, LabelledPool, count_labels
from synpref_ray.pipeline.gold_tables import GoldTables
from synpref_ray.pipeline.growth import INPUTS, SEED, UNVERIFIED, RoundInputs
from synpref_ray.pipeline.round_selection import RoundSelection
from synpref_ray.reporting.pair_story import SELECTED_FILE, WITHOUT_LEAKS
from synpref_ray.reporting.run import Run
from synpref_ray.reporting.table import format_share, format_table
from synpref_ray.rules.gold import GoldSplit, describe_small_gold
from synpref_ray.rules.judges import JudgeTrust, describe_trust
from synpref_ray.rules.labels import LabelReason
from synpref_ray.rules.stop import StopReason
from synpref_ray.schema import LabelSource, Verdict
from synpref_ray.tables.garbage import ROUND_SOURCES
from synpref_ray.tables.models import StoredModel
from synpref_ray.tables.sets import PairSet
from synpref_ray.tables.sidecars import Sidecar, zip_shard
from synpref_ray.tables.storage import Storage

ROUND_FILE = "round.json"


@dataclass(frozen=True)
class Labels:
    """What labelling a round's pairs gave: all gold with its votes, pools with their labels, sets, the judges' measure and report by split, and the
    pairs that stay out because decisions about leaks dropped them later.
    """

    gold: GoldTables
    pools: list[LabelledPool]
    labels: list[Sidecar]
    gold_votes: list[Sidecar]
    sets: dict[str, PairSet]
    trust: Mapping[str, JudgeTrust]
    audit: Mapping[str, JudgeTrust]
    judge_report: Mapping[str, Any]
    dropped: Dropped = NONE_DROPPED

    @property
    def gold_sizes(self) -> dict[GoldSplit, int]:
        """Gold pairs of each part."""
        counts = Counter(self.gold.human.read_all(["gold_split"])["gold_split"].to_pylist())
        return {split: counts[split.value] for split in GoldSplit}


class GoldMargin(NamedTuple):
    """A reward model's margin in favour of the human verdict on one gold pair; `is_first`: gold since round 0."""

    split: str
    prompt_group: str
    margin: float
    is_first: bool = False


@dataclass(frozen=True)
class Training:
    """What a round did with the labels that it found: the RM's summary, its rewards and margins on all gold, and what was selected (with the gold RM
    that selection read, if it read one); empty for the seed.
    """

    summary: Mapping[str, Any] | None = None
    rewards: Sidecar | None = None
    margins: Sequence[GoldMargin] = ()
    selected: RoundSelection | None = None
    gold_rm: StoredModel | None = None

    @property
    def first_gold(self) -> dict[str, Any]:
        """The best RM's accuracy on the working gold of round 0, which the stopping rule goes by; empty where none of it was scored.

        Our choice: gold grows, and what joins are pairs that an RM was unsure about or wrong on, so accuracies on each round's own gold are of other,
        harder pairs; those of round 0 are the same for every round.
        """
        return accuracy_on([margin for margin in self.margins if margin.is_first], GoldSplit.WORKING)


def gold_ids(gold: GoldTables) -> frozenset[str]:
    """Return the pair_ids of all gold."""
    return frozenset(gold.pool.read_all(["pair_id"])["pair_id"].to_pylist())


def gold_margins(gold: GoldTables, rewards: Sidecar, first: Set[str] = frozenset()) -> list[GoldMargin]:
    """Return the margin in favour of the human verdict for every scored gold pair.

    Args:
        first: pair_ids of round 0's gold.
    """
    beside: list[tuple[Sidecar, Mapping[str, str]]] = [
        (gold.human, {"human_verdict": "human_verdict", "gold_split": "gold_split"}),
        (rewards, {"margin": "margin"}),
    ]
    found = []
    for shard in gold.pool.shards:
        for row in zip_shard(gold.pool, shard.number, ["prompt_group"], beside).to_pylist():
            if row["margin"] is not None:
                margin = row["margin"] if row["human_verdict"] == Verdict.CHOSEN else -row["margin"]
                found.append(GoldMargin(row["gold_split"], row["prompt_group"], margin, row["pair_id"] in first))
    return found


def accuracy_on(found: Sequence[GoldMargin], split: GoldSplit) -> dict[str, Any]:
    """Return the accuracy on one part of gold with its interval, empty where that part has no scored pair."""
    of_split = [entry for entry in found if entry.split == split]
    correct = is_correct([entry.margin for entry in of_split])
    return asdict(accuracy_over_groups(correct, [entry.prompt_group for entry in of_split])) if of_split else {}


def make_record(
    storage: Storage,
    run: Run,
    number: int,
    inputs: RoundInputs,
    before: tuple[Labels, Mapping[str, Any]] | None,
    labels: Labels,
    training: Training,
    then: StopReason | None,
    *,
    candidates: Sequence[Sidecar],
    simulated: bool,
) -> dict[str, Any]:
    """Write a round's record: what its RM read (`read`, measured on that round's gold), and what the round made of it (`wrote`, `set_sizes`).

    The stopping rule reads `first_gold_accuracy`, on the working gold of round 0; `working_gold_accuracy` is on all working gold of the round.

    Args:
        before: the labels that the round's RM was trained and measured on, and the record of the round that left them; None for the seed.
        labels: those that the round left.
        then: why no further round follows.
        candidates: tables of the unverified pool's parts, and decisions about leaks, that a round selects from.
    """
    working, audit = accuracy_on(training.margins, GoldSplit.WORKING), accuracy_on(training.margins, GoldSplit.AUDIT)
    selected, pool = training.selected, training.selected.pool if training.selected else None
    read, wrote = _digests(before[0]) if before else {}, _digests(labels)
    sizes, counted = _count(storage, number, read, wrote, labels, is_new=before is None or len(labels.pools) > len(before[0].pools))
    earlier = before[1]["set_sizes"] if before else {}
    callers = {pair_id for pair_id in selected.record["gold_pair_id"].to_pylist() if pair_id is not None} if selected else set()
    record: dict[str, Any] = {
        "round": number,
        "pools": {SEED: inputs.seed, UNVERIFIED: inputs.unverified},
        "decontamination": inputs.leaks.record(),
        "read": read,
        "wrote": wrote,
        "selected_pairs": pool.num_rows if pool else 0,
        "selected_pool": pool.name if pool else None,
        "calling_gold_pairs": len(callers),
        "selection": dict(selected.counts) if selected else {},
        "set_sizes": sizes,
        "joined": {name: size - earlier.get(name, 0) for name, size in sizes.items()},
        "decided": {**counted, "then": then},
        "tables": table_names([*_tables(labels, training), *_tables_of_gold_anew(before)]),
        ROUND_SOURCES: table_names(candidates),
        "gold_rm": training.gold_rm.name if training.gold_rm else None,
        "simulated_gold": simulated,
        "judges_on_working_gold": {judge: trust.report() for judge, trust in labels.trust.items()},
        "judges_on_audit_gold": {judge: trust.report() for judge, trust in labels.audit.items()},
        "judge_report": dict(labels.judge_report),
        "training": dict(training.summary) if training.summary else None,
        "working_gold_accuracy": working.get("accuracy", 0.0),
        "first_gold_accuracy": training.first_gold.get("accuracy", 0.0),
        "best_rm_on_working_gold": working,
        "best_rm_on_first_gold": training.first_gold,
        "best_rm_on_audit_gold": audit,
    }
    storage.write_json(f"rounds/{number:02d}/{ROUND_FILE}", record)
    run.event("round", round=number, sets=record["set_sizes"], selected=record["selected_pairs"])
    return record


def _count(
    storage: Storage, number: int, read: Mapping[str, str], wrote: Mapping[str, str], labels: Labels, *, is_new: bool
) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Return the sizes of the sets, and how many pairs have which label: of all, and of those that joined.

    Our choice: they follow from the sets, whose digests the round's record holds; where these are the same, the record's counts are taken.
    """
    path = f"rounds/{number:02d}/{ROUND_FILE}"
    if storage.exists(path):
        stored = storage.read_json(path)
        if (stored.get("read"), stored.get("wrote")) == (read, wrote):
            return stored["set_sizes"], {name: stored["decided"][name] for name in ("labels", "of_new_pairs")}
    sizes = {name: pairs.count() for name, pairs in labels.sets.items()}
    return sizes, {"labels": count_labels(labels.labels), "of_new_pairs": count_labels(labels.labels[-1:] if is_new else ())}


def _digests(labels: Labels) -> dict[str, str]:
    return {name: pairs.digest for name, pairs in labels.sets.items()} | {"gold_pool": labels.gold.pool.name}


def table_names(tables: Sequence[Sidecar]) -> list[list[str]]:
    """Return how a record names tables: pool, table and fingerprint of each."""
    return [[table.pool.name, table.name, table.fingerprint] for table in tables]


def _tables(labels: Labels, training: Training) -> list[Sidecar]:
    """Return the tables that nothing else in the record names: what is beside gold, and what selection read."""
    gold = labels.gold
    scored = [*([training.rewards] if training.rewards else []), *(training.selected.tables if training.selected else ())]
    return [gold.attributes, gold.human, *labels.gold_votes, *scored]


def _tables_of_gold_anew(before: tuple[Labels, Mapping[str, Any]] | None) -> list[Sidecar]:
    """Return the tables beside gold that the round itself gathered before it trained, without pairs that leak; none where it took what it found."""
    if before is None or before[0].gold.pool.name == before[1]["wrote"]["gold_pool"]:
        return []
    return _tables(before[0], Training())


def forget_rounds(storage: Storage, rounds: Sequence[Mapping[str, Any]], sets: Iterable[str]) -> None:
    """Remove the records and sets of rounds after these, and the sets without leaks of those of these that began with what the round before left: of
    an earlier run with other settings, more rounds, or later decisions.
    """
    number = len(rounds)
    began_anew = {entry["round"] for before, entry in itertools.pairwise(rounds) if entry["read"] != before["wrote"]}
    for path in storage.list_files("rounds"):
        if path.endswith((f"/{ROUND_FILE}", f"/{SELECTED_FILE}", f"/{INPUTS}")) and int(path.split("/")[1]) >= number:
            storage.delete(path)
    for path in storage.list_files("sets"):
        stem = path.removeprefix("sets/").removesuffix(".json")
        name, _, suffix = stem.removesuffix(WITHOUT_LEAKS).rpartition("-r")
        is_stale = suffix.isdigit() and (int(suffix) >= number or (stem.endswith(WITHOUT_LEAKS) and int(suffix) not in began_anew))
        if name in sets and is_stale:
            storage.delete(path)


def closing_table(
    rounds: Sequence[Mapping[str, Any]], final: Mapping[str, Mapping[str, Any]], gold_sizes: Mapping[GoldSplit, int], *, simulated: bool
) -> str:
    """Return the last screen of Stage 1: a line a round, the final models, the judges, and a warning where gold is too small to judge anything by."""
    rows = []
    for entry in rounds:
        sizes, summary = entry["set_sizes"], entry["training"]
        name = "seed" if entry["round"] == 0 else f"round {entry['round']}"
        measured = [_share_of(entry[f"best_rm_on_{split}_gold"]) for split in ("working", "audit")]
        trained = str(summary["silver_pairs"]) if summary else "-"
        shown = ("silver", "gold-working", "gold-audit", "filtered", "corrected")
        rows.append((name, trained, *measured, str(entry["selected_pairs"] or "-"), *(str(sizes[n]) for n in shown)))
    header = ("", "RM trained on", "right, working gold", "right, audit gold", "then selected", "silver", "working gold", "audit gold")
    lines = [format_table((*header, "filtered", "corrected"), rows)]
    decided = rounds[-1]["decided"]["labels"]
    if fallback := decided.get(f"{LabelSource.SILVER}/{LabelReason.SOURCE_LABEL}"):
        lines.append(f"of the silver pairs {fallback} have their source label, as no judge may decide there; filtered and corrected leave them out")
    if left := decided.get(f"{LabelSource.UNVERIFIED}/{LabelReason.NOT_JUDGED}"):
        lines.append(f"{left} pairs that a judge may decide had no answer of one (too long for it, say; its votes say why): they make no silver")
    lines += [f"final {name} RM on audit gold: {_share_of(accuracy)}" for name, accuracy in final.items()]
    lines += [describe_trust(judge, report) for judge, report in sorted(rounds[-1]["judges_on_working_gold"].items())]
    lines.append("intervals are 95 %, bootstrapped over prompts (Wilson's where all are right, or none); audit gold is what nothing was tuned on")
    if small := describe_small_gold(gold_sizes):
        lines.append(f"WARNING: {small}")
    if simulated:
        lines.append("gold is SIMULATED: an annotator that reads known truth for the budgeted pairs")
    return "\n".join(lines)


def _share_of(accuracy: Mapping[str, Any]) -> str:
    if not accuracy:
        return "-"
    interval = f"{100 * accuracy['low']:.0f} to {100 * accuracy['high']:.0f}"
    return f"{format_share(accuracy['accuracy'], 1)} of {accuracy['num_pairs']} ({interval})"
