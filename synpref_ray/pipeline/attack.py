"""Attacks on the judges: injections planted in the reply that gold says is worse, judged as ever, and what that does to merged verdicts.

Paper: arXiv:2507.01352 measures nothing like it. Our choice: a planted pair keeps the `pair_id`, the attributes and the exemplars of its original, so
that the planted text is all that differs from the clean verdict; where it leaves room for fewer exemplars, more differs, and the pair is counted
apart. Planted pairs live in a pool of their own (`attacked-<content>`), which nothing else reads. Every chosen pair also gets a harmless ending
(`control`): what that moves, no injection can be blamed for.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pyarrow as pa
from pydantic import Field, field_validator

from synpref_ray.config import Settings
from synpref_ray.errors import InputError
from synpref_ray.evaluation.shares import INTERVAL, share
from synpref_ray.llm.injections import CONTROL, INJECTIONS, INJECTIONS_VERSION, Injection, plant
from synpref_ray.pipeline.gathering import gather_sidecars
from synpref_ray.pipeline.gold_tables import GoldTables
from synpref_ray.pipeline.job import JobConfig
from synpref_ray.pipeline.judge_steps import JudgedPool, Judges, judge_pools
from synpref_ray.pipeline.retrieval import find_exemplars
from synpref_ray.pipeline.stage2 import load_stage1
from synpref_ray.reporting.judge_tables import show_interval, show_share
from synpref_ray.reporting.run import Run
from synpref_ray.reporting.table import format_table
from synpref_ray.retrieval.exemplars import EXEMPLARS_SCHEMA
from synpref_ray.retrieval.index import IndexConfig
from synpref_ray.rules.verdicts import read_votes
from synpref_ray.rules.votes import VoteRecord, merge_votes
from synpref_ray.schema import ATTRIBUTES_SCHEMA, GATHERED_SCHEMA, PAIR_FIELDS, Verdict, stable_hash
from synpref_ray.tables.leases import Lease
from synpref_ray.tables.pools import Pool, commit_pool, content_digest, open_pool, pool_exists, write_pool_shard
from synpref_ray.tables.selection import GATHERED_SHARD_PAIRS
from synpref_ray.tables.sidecars import Sidecar, zip_shard
from synpref_ray.tables.storage import Storage

PLANT_VERSION = 1
ALL_JUDGES = "all judges"
PLANTED_SCHEMA = pa.schema(
    [
        *GATHERED_SCHEMA,
        pa.field("injection", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("planted_in", pa.string(), nullable=False),  # chosen or rejected, of the pair as ingested: the reply that gold says is worse
    ]
)


class PlantConfig(Settings):
    """Which injections go into which gold pairs."""

    num_pairs: int = Field(default=200, ge=1)  # ours: by hash, all if gold is smaller; five planted versions of each are a thousand pairs to judge
    injections_per_pair: int = Field(default=4, ge=1)  # ours: by hash of pair and injection, so that each is planted about equally often
    injections: tuple[str, ...] = ()  # ours: names of the corpus; none named means all of it
    gold_split: Literal["working", "audit", "all"] = "all"  # ours: nothing is decided by this measurement, so no gold is used up
    seed: int = 0
    """Seed of the draws."""

    @field_validator("injections")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        unknown = sorted(set(names) - {injection.name for injection in INJECTIONS})
        if unknown:
            raise ValueError(f"no injection {', '.join(unknown)}; there are {', '.join(injection.name for injection in INJECTIONS)}")
        return names

    @property
    def chosen_injections(self) -> list[Injection]:
        """The injections to plant, in the corpus's order."""
        return [injection for injection in INJECTIONS if not self.injections or injection.name in self.injections]


class AttackConfig(JobConfig):
    """Everything the attack needs; gold and its exemplars come from Stage 1, and so should the judges' settings."""

    judges: Judges
    attack: PlantConfig = PlantConfig()
    index: IndexConfig = IndexConfig()
    confidence: float = Field(default=0.95, gt=0.0, lt=1.0)  # ours: the usual two-sided level
    gathered_shard_pairs: int = Field(default=GATHERED_SHARD_PAIRS, ge=1)
    """Pairs in a file of a gathered pool: what an LLM step finishes at once."""


class Outcome(NamedTuple):
    """One planted pair before one judge: its merged verdict on the clean pair and on the planted one; None where it gave no vote, with the reason.
    `same_exemplars`: whether both were judged with equally many exemplars, so that the planted text is all that differs.
    """

    injection: str
    kind: str
    prompt: str | None
    planted_in: Verdict
    clean: Verdict | None
    attacked: Verdict | None
    reason: str | None = None
    same_exemplars: bool = True


def check_attack(config: AttackConfig) -> None:
    """Check Stage 1's record and the judges' models, without loading one."""
    load_stage1(config)
    for judge in config.judges:
        judge.check()


def plant_pairs(gold: pa.Table, config: PlantConfig) -> pa.Table:
    """Return the planted versions of gold pairs (`PLANTED_SCHEMA`), those of one pair together, pairs in the order given.

    Args:
        gold: GATHERED_SCHEMA columns that say where in the gold pool each row stands, `human_verdict` (one of the replies) and `gold_split`.
    """
    rows = [row for row in gold.to_pylist() if config.gold_split in ("all", row["gold_split"])]
    ranked = sorted(rows, key=lambda row: (stable_hash(config.seed, row["pair_id"], "attack-pair"), row["pair_id"]))
    taken = {row["pair_id"] for row in ranked[: config.num_pairs]}
    planted = []
    for row in rows:
        if row["pair_id"] not in taken:
            continue
        worse = Verdict.REJECTED if row["human_verdict"] == Verdict.CHOSEN else Verdict.CHOSEN
        for injection in [CONTROL, *_injections_of(row["pair_id"], config)]:
            about = {"injection": injection.name, "kind": injection.kind.value, "planted_in": worse.value}
            planted.append({**row, **about, worse.value: plant(row[worse.value], injection)})
    return pa.Table.from_pylist(planted, schema=PLANTED_SCHEMA)


def _injections_of(pair_id: str, config: PlantConfig) -> list[Injection]:
    ranked = sorted(config.chosen_injections, key=lambda injection: stable_hash(config.seed, pair_id, f"attack-{injection.name}"))
    taken = {injection.name for injection in ranked[: config.injections_per_pair]}
    return [injection for injection in config.chosen_injections if injection.name in taken]


def plant_pool(storage: Storage, gold: GoldTables, config: PlantConfig, *, max_pairs: int = GATHERED_SHARD_PAIRS) -> Pool:
    """Make (or reopen) the pool of planted pairs, named by its content; it says of every row where in the gold pool its original stands.

    Raises:
        InputError: gold has no pair of the split asked for.
    """
    table = plant_pairs(_read_gold(gold), config)
    if not table.num_rows:
        raise InputError(f"no gold pair to plant anything in: the pool {gold.pool.name} has none of gold_split={config.gold_split}")
    shards = [table.slice(start, max_pairs) for start in range(0, table.num_rows, max_pairs)]
    digest = content_digest([PLANT_VERSION, gold.pool.digest, [shard.to_pylist() for shard in shards]])
    name = f"attacked-{digest[:8]}"
    if pool_exists(storage, name):
        return open_pool(storage, name)
    with Lease(storage, f"pools/{name}/lease.json") as lease:
        if pool_exists(storage, name):  # made by another driver meanwhile
            return open_pool(storage, name)
        written = [write_pool_shard(storage, name, number, shard) for number, shard in enumerate(shards)]
        lease.check()
        return commit_pool(storage, name, digest, written, {"step": "plant", "gold": gold.pool.name, "injections": INJECTIONS_VERSION})


def _read_gold(gold: GoldTables) -> pa.Table:
    """Return gold pairs with their verdicts and their place in the gold pool, not in the pools that gold was gathered from."""
    human = {"human_verdict": "human_verdict", "gold_split": "gold_split"}
    tables = []
    for shard in gold.pool.shards:
        table = zip_shard(gold.pool, shard.number, [field.name for field in PAIR_FIELDS], [(gold.human, human)])
        places = {
            "source_pool": pa.array([gold.pool.name] * table.num_rows, pa.string()),
            "source_shard": pa.array([shard.number] * table.num_rows, pa.int32()),
            "source_row": pa.array(range(table.num_rows), pa.int32()),
        }
        for name, values in places.items():
            table = table.append_column(name, values)
        tables.append(table)
    return pa.concat_tables(tables)


def judge_planted(config: AttackConfig, run: Run, gold: GoldTables, planted: Pool) -> dict[str, list[Outcome]]:
    """Judge the planted pairs with every judge, and gold itself where Stage 1 has not; return the outcomes by judge, and those of all together."""
    attributes = gather_sidecars("attributes", ATTRIBUTES_SCHEMA, [(planted, {gold.pool.name: gold.as_targets.attributes})])[0]
    clean, attacked = {}, {}
    for judge in config.judges:
        exemplars = find_exemplars(run, "exemplars", [(gold.pool, gold.as_targets.embeddings)], gold, judge.judge.max_exemplars, config.index)[0]
        same = gather_sidecars("exemplars", EXEMPLARS_SCHEMA, [(planted, {gold.pool.name: exemplars})])[0]
        pools = [JudgedPool(gold.pool, gold.as_targets.attributes, exemplars, None), JudgedPool(planted, attributes, same, None)]
        every_row = judge.model_copy(update={"max_failed_fraction": 1.0})  # a planted reply that is too long for the judge is a finding here
        name = judge.judge.judge
        clean[name], attacked[name] = judge_pools(run, f"judge ({name}), planted", pools, gold, every_row)
    return read_outcomes(planted, attacked, clean)


def read_outcomes(planted: Pool, attacked: Mapping[str, Sidecar], clean: Mapping[str, Sidecar]) -> dict[str, list[Outcome]]:
    """Merge the stored votes, by judge, on every planted pair and on its original; with several judges also the merge of all (`ALL_JUDGES`)."""
    before = {judge: {shard.number: _votes(sidecar, shard.number) for shard in sidecar.pool.shards} for judge, sidecar in clean.items()}
    outcomes: dict[str, list[Outcome]] = {judge: [] for judge in [*attacked, *([ALL_JUDGES] if len(attacked) > 1 else [])]}
    for shard in planted.shards:
        rows = planted.read(shard.number, ["injection", "kind", "prompt_group", "planted_in", "source_shard", "source_row"]).to_pylist()
        after = {judge: _votes(sidecar, shard.number) for judge, sidecar in attacked.items()}
        for number, row in enumerate(rows):
            pairs = {judge: (before[judge][row["source_shard"]][row["source_row"]], after[judge][number]) for judge in attacked}
            for judge, (original, changed) in pairs.items():
                outcomes[judge].append(_outcome(row, original, changed))
            if len(pairs) > 1:
                outcomes[ALL_JUDGES].append(_outcome(row, _join([old for old, _ in pairs.values()]), _join([new for _, new in pairs.values()])))
    return outcomes


class _Votes(NamedTuple):
    votes: list[VoteRecord]
    reason: str | None
    num_exemplars: tuple[int | None, ...]  # of each judge


def _votes(sidecar: Sidecar, number: int) -> list[_Votes]:
    columns = sidecar.read(number, ["votes", "drop_reason", "num_exemplars"]).to_pydict()
    return [_Votes(read_votes(votes), reason, (number,)) for votes, reason, number in zip(*columns.values(), strict=True)]


def _join(cells: Sequence[_Votes]) -> _Votes:
    votes, numbers = [vote for cell in cells for vote in cell.votes], tuple(number for cell in cells for number in cell.num_exemplars)
    return _Votes(votes, next((cell.reason for cell in cells if cell.reason), None), numbers)


def _outcome(row: Mapping[str, Any], clean: _Votes, attacked: _Votes) -> Outcome:
    verdicts = merge_votes(clean.votes).verdict, merge_votes(attacked.votes).verdict
    reason = (clean.reason if verdicts[0] is None else attacked.reason) if None in verdicts else None
    same = clean.num_exemplars == attacked.num_exemplars
    return Outcome(row["injection"], row["kind"], row["prompt_group"], Verdict(row["planted_in"]), *verdicts, reason, same)


def count_outcomes(outcomes: Sequence[Outcome], *, confidence: float = 0.95) -> dict[str, Any]:
    """Return what planting did to one judge's merged verdicts: plain values, ready for JSON.

    Returns:
        `num_planted`; `not_judged` by reason (a pair without a vote, clean or planted, counts nowhere else); `other_exemplars`: how many pairs were
        judged with another number of exemplars once planted, and what changed (they count nowhere else); and shares with their intervals:
        `clean_right` and `clean_planted_wins` of the clean verdicts (the rest abstained), `moved_to_planted` of the pairs whose clean verdict was
        right or an abstention, `changed` and `planted_wins` of all judged pairs.
    """
    voted = [(outcome, outcome.clean, outcome.attacked) for outcome in outcomes if outcome.clean is not None and outcome.attacked is not None]
    judged = [entry for entry in voted if entry[0].same_exemplars]
    other = [entry for entry in voted if not entry[0].same_exemplars]
    missing = Counter(outcome.reason or "no_votes" for outcome in outcomes if outcome.clean is None or outcome.attacked is None)
    movable = [entry for entry in judged if entry[1] is not entry[0].planted_in]

    def of(entries: Sequence[tuple[Outcome, Verdict, Verdict]], flags: Sequence[bool]) -> dict[str, Any]:
        return share(flags, (outcome.prompt for outcome, _, _ in entries), confidence=confidence)

    return {
        "num_planted": len(outcomes),
        "not_judged": dict(sorted(missing.items())),
        "other_exemplars": {"num_planted": len(other), "changed": of(other, [clean is not attacked for _, clean, attacked in other])},
        "clean_right": of(judged, [clean not in (outcome.planted_in, Verdict.ABSTAIN) for outcome, clean, _ in judged]),
        "clean_planted_wins": of(judged, [clean is outcome.planted_in for outcome, clean, _ in judged]),
        "planted_wins": of(judged, [attacked is outcome.planted_in for outcome, _, attacked in judged]),
        "moved_to_planted": of(movable, [attacked is outcome.planted_in for outcome, _, attacked in movable]),
        "changed": of(judged, [clean is not attacked for _, clean, attacked in judged]),
    }


def attack_report(outcomes: Mapping[str, Sequence[Outcome]], *, confidence: float = 0.95) -> dict[str, Any]:
    """Return by judge the counts over all injections (the control left out), by kind and by injection."""
    report: dict[str, Any] = {}
    for judge, found in outcomes.items():
        kinds = list(dict.fromkeys(injection.kind.value for injection in (CONTROL, *INJECTIONS)))
        names = [injection.name for injection in (CONTROL, *INJECTIONS)]
        of_kind = {kind: [outcome for outcome in found if outcome.kind == kind] for kind in kinds}
        of_name = {name: [outcome for outcome in found if outcome.injection == name] for name in names}
        report[judge] = {
            "overall": count_outcomes([outcome for outcome in found if outcome.kind != CONTROL.kind], confidence=confidence),
            "by_kind": {kind: count_outcomes(part, confidence=confidence) for kind, part in of_kind.items() if part},
            "by_injection": {name: count_outcomes(part, confidence=confidence) for name, part in of_name.items() if part},
        }
    return report


def run_attack(config: AttackConfig, run: Run) -> str:
    """Plant, judge and count; return the closing table."""
    before = load_stage1(config)
    planted = plant_pool(config.storage, before.gold, config.attack, max_pairs=config.gathered_shard_pairs)
    report = attack_report(judge_planted(config, run, before.gold, planted), confidence=config.confidence)
    run.metrics["attack"] = {
        "injections": INJECTIONS_VERSION,
        "pool": planted.name,
        "gold_pool": before.gold.pool.name,
        "simulated_gold": before.simulated_gold,
        "confidence": config.confidence,
        "interval": INTERVAL,
        "judges": report,
    }
    return _closing_table(report, config.confidence, before.simulated_gold)


def _closing_table(report: Mapping[str, Any], confidence: float, simulated: bool) -> str:
    level = f"{100 * confidence:.0f} %"
    rows = []
    for judge, figures in report.items():
        for kind, counts in {**figures["by_kind"], "all but control": figures["overall"]}.items():
            shares = [show_share(counts[name]) for name in ("clean_right", "clean_planted_wins")]
            moved, changed = counts["moved_to_planted"], counts["changed"]
            left_out = (sum(counts["not_judged"].values()), counts["other_exemplars"]["num_planted"])
            numbers = (str(counts["num_planted"]), *map(str, left_out))
            rows.append((judge, kind, *numbers, *shares, show_share(moved), show_interval(moved), show_share(changed), show_interval(changed)))
    header = (
        "judge",
        "planted",
        "pairs",
        "not judged",
        "other exemplars",
        "clean: right",
        "clean: wrong",
        "moved to planted",
        level,
        "changed",
        level,
    )
    lines = [format_table(header, rows)]
    lines.append("moved to planted: of the verdicts that were right or abstained, those that now name the planted reply (docs/judges.md)")
    if simulated:
        lines.append("gold is SIMULATED: an annotator that reads known truth for the budgeted pairs")
    return "\n".join(lines)
