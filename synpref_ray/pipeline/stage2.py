"""Stage 2: two reward models score the wild pool, judges see only what the best RM disagrees with, one table decides: keep, flip or drop.

Paper: Sec. 3.3 and App. H.4. Both curated datasets (kept pairs: the 26M kind; kept and flipped: the 40M kind) are filters over the decision sidecar.
A new judge bar or flip bar is applied to stored votes and rewards without running a model; a band that asks about more pairs has those judged that
no earlier run asked about, and decides as if it had been the band from the start.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synpref_ray.bundled import find_model
from synpref_ray.errors import InputError
from synpref_ray.pipeline.clusters import read_by_clusters
from synpref_ray.pipeline.curated_sets import save_curated_sets, silver_leaks, without_leaks
from synpref_ray.pipeline.gathering import find_gathered, gather_pool, gather_sidecars, plan_gathered_sidecar, scatter_sidecars
from synpref_ray.pipeline.gold import count_unanswered, measure_judges, measure_on_doubted, merge_pool_votes, open_gold, report_judges
from synpref_ray.pipeline.gold_tables import GoldTables
from synpref_ray.pipeline.input_checks import check_each, check_gpus
from synpref_ray.pipeline.job import JobConfig
from synpref_ray.pipeline.judge_steps import JudgedPool, judge_pools, plan_votes
from synpref_ray.pipeline.leak_marks import open_leaks
from synpref_ray.pipeline.llm_steps import num_unanswered
from synpref_ray.pipeline.parity import require_parity
from synpref_ray.pipeline.retrieval import embed_pools, find_exemplars, plan_embeddings, plan_exemplars
from synpref_ray.pipeline.round_record import table_names
from synpref_ray.pipeline.scoring import parity_for, score_pools
from synpref_ray.pipeline.stage1 import STAGE1_RECORD
from synpref_ray.pipeline.stage_config import StageConfig
from synpref_ray.pipeline.step_plan import (
    PlannedWork,
    PoolSize,
    describe_plan,
    embed_work,
    gathered,
    judge_work,
    pool_size,
    score_work,
    tag_work,
)
from synpref_ray.pipeline.steps import Output, Resources, ShardKey, Step, StepInput, run_step
from synpref_ray.pipeline.tag_steps import plan_tags, tag_pools
from synpref_ray.reporting.run import Run
from synpref_ray.reporting.table import format_share, format_table
from synpref_ray.reward.parity_record import ParityConfig
from synpref_ray.rules.gate import DECISION_SCHEMA, GateConfig, decide_shard, select_for_judge
from synpref_ray.rules.judges import JudgeTrust, describe_doubted, describe_trust
from synpref_ray.rules.verdicts import VERDICT_SCHEMA
from synpref_ray.schema import ATTRIBUTES_SCHEMA, Decision
from synpref_ray.tables.models import StoredModel
from synpref_ray.tables.pools import Pool, Shard, open_pool
from synpref_ray.tables.reading import read_each
from synpref_ray.tables.selection import Piece
from synpref_ray.tables.sets import PairSet, load_set
from synpref_ray.tables.sidecars import Sidecar, open_sidecar

GATE_VERSION = 2
STAGE2_RECORD = "rounds/stage2.json"
GOLD_REWARDS = "rewards.best"  # the best RM's on gold, among the tables of Stage 1's record
SELECTED_SCHEMA = pa.schema([pa.field("pair_id", pa.string(), nullable=False), pa.field("ask_judge", pa.bool_(), nullable=False)])


class Stage2Config(StageConfig):
    """Everything Stage 2 needs; reward models and gold come from Stage 1's record in the workspace."""

    pool: str = "wild"
    """The pool that is curated."""
    tag_scope: Literal["mismatches", "all"] = "mismatches"  # Sec. 3.3: attributes only for what a judge sees
    parity: ParityConfig = ParityConfig()  # what both reward models must have passed
    gate: GateConfig = GateConfig()


@dataclass(frozen=True)
class Stage1Result:
    """What Stage 1 left for Stage 2."""

    best: StoredModel
    gold_rm: StoredModel
    gold: GoldTables
    simulated_gold: bool
    gold_rewards: Sidecar | None = None
    """Of the best RM on gold."""
    near_duplicates: str = ""
    """The clusters by which it grouped prompts."""


def load_stage1(config: JobConfig) -> Stage1Result:
    """Read Stage 1's record.

    Raises:
        InputError: Stage 1 has not finished in this workspace.
    """
    storage = config.storage
    if not storage.exists(STAGE1_RECORD):
        raise InputError(f"Stage 1 has not finished in {storage.url}: run jobs/stage1.py with this workspace first")
    record = storage.read_json(STAGE1_RECORD)
    best, gold_rm = (StoredModel(storage, record[name]["name"], record[name]["digest"]) for name in ("best_rm", "gold_rm"))
    gold = open_gold(storage, record["gold"])
    rewards = next((open_sidecar(gold.pool, name, digest) for _, name, digest in record.get("tables", ()) if name == GOLD_REWARDS), None)
    return Stage1Result(best, gold_rm, gold, bool(record["simulated_gold"]), rewards, record.get("near_duplicates", ""))


@dataclass(frozen=True)
class _Judges:
    """How the judges of the mismatches did on gold: by judge on working and on audit gold, and their report by gold split; `doubted`: on working gold
    whose label the best RM rejects.
    """

    working: Mapping[str, JudgeTrust]
    audit: Mapping[str, JudgeTrust]
    report: Mapping[str, Any]
    doubted: Mapping[str, JudgeTrust]
    votes: Sequence[Sidecar] = ()
    """On gold, as it was judged here."""


@dataclass(frozen=True)
class _Mismatches:
    """Which pairs of the pool a judge is asked about (a sidecar of flags), how many, and gathered pools that hold them, and perhaps more."""

    flags: Sidecar
    num_pairs: int
    pools: Sequence[Pool]


def check_stage2(config: Stage2Config) -> None:
    """Check the pool, Stage 1's record, GPUs and the models' names, without loading a model; all that is wrong is told at once."""
    check_each(
        partial(open_pool, config.storage, config.pool),
        partial(_check_stage1_s_result, config),
        partial(find_model, config.embed.embedder.model),
        partial(check_gpus, "embed", config.embed.embedder.device, config.embed.num_gpus_per_worker),
        partial(check_gpus, "score", config.score.device, config.score.num_gpus_per_worker),
        *(step.check for step in (*config.taggers, *config.judges)),
    )


def _check_stage1_s_result(config: Stage2Config) -> None:
    """Check what Stage 1 left, and that it fits the pool."""
    before = load_stage1(config)
    open_leaks(read_by_clusters(open_pool(config.storage, config.pool), before.near_duplicates), config.decontamination)
    if (silver := _load_silver(config)) is not None:
        silver_leaks(silver, config.decontamination)
    for stored in (before.best, before.gold_rm):
        require_parity(stored, parity_for(config.score, config.parity))


def _load_silver(config: Stage2Config) -> PairSet | None:
    """Return the silver of Stage 1's last round; None where its record names none."""
    silver = config.storage.read_json(STAGE1_RECORD).get("sets", {}).get("silver")
    return load_set(config.storage, **silver) if silver else None


def plan_stage2(config: Stage2Config) -> str:
    """Return the steps of Stage 2 with what each takes, as `--dry-run` prints them."""
    plan = config.plan
    size = pool_size(config.storage, config.pool, plan)
    asked = gathered(round(size.pairs * plan.mismatch_fraction), config.gathered_shard_pairs)
    gold = gathered(plan.gold_pairs, config.gathered_shard_pairs)
    works = [score_work(config.score, "score, both RMs", size, plan, models=2)]
    works += tag_work(config.taggers, size if config.tag_scope == "all" else asked, plan)
    works.append(embed_work(config.embed, asked, plan))
    works += judge_work(config.judges, PoolSize(asked.pairs + gold.pairs, asked.shards + gold.shards), plan)
    works.append(PlannedWork("decide", size.pairs, size.shards, 0, 0.0))
    return describe_plan(works, {config.pool: size}, [f"supposing that a judge is asked about {plan.mismatch_fraction:.0%} of the pairs"])


class SelectWorker:
    """Says which pairs a judge should see."""

    def __init__(self, gate: GateConfig, gold_groups: pa.Array):
        self._gate = gate
        self._gold_groups = gold_groups

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        asked = select_for_judge(shard, self._gate, self._gold_groups)
        return pa.table([shard["pair_id"], asked], schema=SELECTED_SCHEMA), {"asked": float(asked.true_count)}


class DecideWorker:
    """Applies the truth table; verdicts on pairs that these settings would not ask about do not count, though an earlier run may have asked."""

    def __init__(self, gate: GateConfig, gold_groups: pa.Array):
        self._gate = gate
        self._gold_groups = gold_groups

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        place = shard.schema.get_field_index("judge_verdict")
        verdicts = pc.if_else(shard["ask_judge"], shard["judge_verdict"], pa.scalar(None, pa.string()))
        return decide_shard(shard.set_column(place, "judge_verdict", verdicts), self._gate, self._gold_groups), {}


def run_stage2(config: Stage2Config, run: Run) -> str:
    """Run Stage 2 to its end; return the closing table."""
    storage = config.storage
    before = load_stage1(config)
    pool = read_by_clusters(open_pool(storage, config.pool), before.near_duplicates)
    leaks = open_leaks(pool, config.decontamination)
    left_out: list[tuple[Sidecar, Mapping[str, str]]] = [(leaks, {"leak_decision": "leak_decision"})] if leaks else []
    models = {"best": before.best, "gold": before.gold_rm}
    rewards = score_pools(run, "score, both RMs", [pool], models, config.score, config.parity).sidecars[0]
    margins: list[tuple[Sidecar, Mapping[str, str]]] = [(rewards[0], {"margin": "margin_best"}), (rewards[1], {"margin": "margin_gold"})]
    gold_groups = pa.array(sorted(before.gold.prompt_groups()), pa.string())  # once: a worker is made anew for each shard
    gate_arguments = {"gate": config.gate, "gold_groups": gold_groups}
    selected = _select(config, pool, before.gold, [*margins, *left_out], gate_arguments)
    asked = _gather_mismatches(config, run, pool, before.gold, selected)
    judges = _Judges({}, {}, {}, {})
    if asked.pools:
        found, judges = _judge(config, run, pool, asked.pools, before)
        verdicts = scatter_sidecars(pool, list(zip(asked.pools, found, strict=True)), "judge_verdict", VERDICT_SCHEMA)
    else:
        verdicts = _no_verdicts(pool)
    step = Step(
        name="decide",
        version=GATE_VERSION,
        worker=DecideWorker,
        outputs=(Output("decision", DECISION_SCHEMA),),
        settings=config.gate.model_dump(mode="json"),
        digests={"gold": before.gold.digest},
        worker_arguments=lambda _: gate_arguments,
    )
    beside = (*margins, (asked.flags, {"ask_judge": "ask_judge"}), (verdicts, {"judge_verdict": "judge_verdict"}), *left_out)
    result = run_step(step, [StepInput(pool, ("prompt_group",), beside)])
    run.step("decide", rows=result.rows, computed=result.rows_computed, rejected={}, seconds=result.seconds)
    decision = result.sidecars[0][0]
    return _finish(config, run, pool, decision, (asked.num_pairs, count_unanswered(asked.flags, verdicts)), judges, before)


def _select(
    config: Stage2Config, pool: Pool, gold: GoldTables, beside: Sequence[tuple[Sidecar, Mapping[str, str]]], arguments: Mapping[str, Any]
) -> Sidecar:
    """Return flags of the pairs that a judge is asked about.

    Our choice: the gate drops a pair of a gold prompt whatever a judge says, so none is asked. Other gold gives other flags; it also gives another
    gold RM and with it other margins, so nothing is asked again for that.
    """
    step = Step(
        name="select for judge",
        version=GATE_VERSION,
        worker=SelectWorker,
        outputs=(Output("selected", SELECTED_SCHEMA),),
        settings=config.gate.model_dump(mode="json"),
        digests={"gold": gold.digest},
        worker_arguments=lambda _: arguments,
    )
    return run_step(step, [StepInput(pool, ("prompt_group",), tuple(beside))]).sidecars[0][0]


def _gather_mismatches(config: Stage2Config, run: Run, pool: Pool, gold: GoldTables, selected: Sidecar) -> _Mismatches:
    """Return which pairs a judge is asked about, how many, and gathered pools that hold them.

    Our choice: where an earlier run, with other thresholds, other judges or cut off, asked about some of these pairs, its pools are taken as they are
    wherever that costs fewer answers of taggers and judges than asking anew (`find_gathered`), and only the rest is gathered into one of its own: no
    model is asked twice about a pair of a pool that is taken. One that is taken is finished, also for its pairs that nobody asks about now, so a
    judge that joins is asked about those too. The decisions are those of a single run, since all that is made of a gathered pair follows from the
    pair, gold and the settings, and not from the pairs beside it (an engine's replies as far as its batches do not change them); tables differ in
    name alone.
    """
    started = time.monotonic()

    def asked_of(shard: Shard) -> list[int]:
        rows: list[int] = np.flatnonzero(np.asarray(selected.read(shard.number, ["ask_judge"])["ask_judge"])).tolist()
        return rows

    found = zip(pool.shards, read_each(asked_of, pool.shards), strict=True)
    pieces = [Piece(pool, shard.number, rows) for shard, rows in found if rows]
    name = f"{pool.name}-mismatches"
    num_models = len(config.judges) + (len(config.taggers) if config.tag_scope == "mismatches" else 0)
    gathered, missing = find_gathered(config.storage, name, pieces, lambda other: _num_lacking(config, pool, other, gold), num_models)
    if missing:  # named by its rows: same pairs, same votes
        gathered.append(gather_pool(config.storage, name, missing, inputs={}, max_pairs=config.gathered_shard_pairs))
    num_asked, num_new = (sum(len(piece.rows) for piece in some) for some in (pieces, missing))
    counts = {"selected": num_asked, "gathered_before": num_asked - num_new}
    run.step("gather mismatches", rows=pool.num_rows, computed=0, rejected={}, seconds=time.monotonic() - started, **counts)
    return _Mismatches(selected, num_asked, sorted(gathered, key=lambda one: one.name))


def _num_lacking(config: Stage2Config, pool: Pool, mismatches: Pool, gold: GoldTables) -> int:
    """Return how many answers the tables of taggers and judges lack that `_judge` would make of a gathered pool, without making them."""
    lacking = 0
    if config.tag_scope == "all":
        whole = plan_tags([pool], config.taggers).merged[0]
        attributes = plan_gathered_sidecar("attributes", ATTRIBUTES_SCHEMA, mismatches, {pool.name: whole})
    else:
        tags = plan_tags([mismatches], config.taggers)
        attributes = tags.merged[0]
        of_taggers = zip(config.taggers, tags.by_tagger.values(), strict=True)
        lacking += sum(num_unanswered(tables[0], tagger.max_failed_fraction) for tagger, tables in of_taggers)
    embeddings = plan_embeddings(mismatches, attributes, config.embed)
    for judge in config.judges:
        exemplars = plan_exemplars(mismatches, embeddings, gold, judge.judge.max_exemplars, config.index)
        votes = plan_votes(JudgedPool(mismatches, attributes, exemplars, None), gold, judge)
        lacking += num_unanswered(votes, judge.max_failed_fraction)
    return lacking


def _judge(config: Stage2Config, run: Run, pool: Pool, mismatches: Sequence[Pool], before: Stage1Result) -> tuple[list[Sidecar], _Judges]:
    """Tag, embed, find exemplars and judge the mismatches, and return the verdicts on each pool of them; judges are measured on gold as in Stage 1
    (its stored votes, if they are the same).
    """
    gold = before.gold
    if config.tag_scope == "all":
        whole = tag_pools(run, "tag", [pool], config.taggers).merged[0]
        attributes = gather_sidecars("attributes", ATTRIBUTES_SCHEMA, [(some, {pool.name: whole}) for some in mismatches])
    else:
        attributes = tag_pools(run, "tag mismatches", mismatches, config.taggers).merged
    embeddings = embed_pools(run, "embed mismatches", list(zip(mismatches, attributes, strict=True)), config.embed)
    gold_votes: list[Sidecar] = []
    votes: list[list[Sidecar]] = [[] for _ in mismatches]
    for judge in config.judges:
        targets = [(gold.pool, gold.as_targets.embeddings), *zip(mismatches, embeddings, strict=True)]
        exemplars = find_exemplars(run, "exemplars", targets, gold, judge.judge.max_exemplars, config.index)
        judged = [JudgedPool(gold.pool, gold.as_targets.attributes, exemplars[0], None)]
        judged += [JudgedPool(*tables, None) for tables in zip(mismatches, attributes, exemplars[1:], strict=True)]
        of_gold, *of_pools = judge_pools(run, f"judge ({judge.judge.judge})", judged, gold, judge)
        gold_votes.append(of_gold)
        for said, new in zip(votes, of_pools, strict=True):
            said.append(new)
    trust, audit = measure_judges(gold, gold_votes, config.trust)
    found = [merge_pool_votes(*tables, trust, config.merge) for tables in zip(mismatches, attributes, votes, strict=True)]
    doubted = measure_on_doubted(gold, gold_votes, before.gold_rewards, config.trust) if before.gold_rewards else {}
    return found, _Judges(trust, audit, report_judges(gold, gold_votes), doubted, gold_votes)


class _NothingAsked:
    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        same = {"verdict_reason": "not_asked", "num_votes": 0, "drop_reason": "not_selected"}
        columns = [pa.repeat(pa.scalar(same.get(field.name), field.type), shard.num_rows) for field in VERDICT_SCHEMA.remove(0)]
        return pa.table([shard["pair_id"], *columns], schema=VERDICT_SCHEMA), {}


def _no_verdicts(pool: Pool) -> Sidecar:
    step = Step("nothing to judge", GATE_VERSION, _NothingAsked, (Output("judge_verdict", VERDICT_SCHEMA),), {}, resources=Resources())
    return run_step(step, [StepInput(pool, ())]).sidecars[0][0]


def _finish(
    config: Stage2Config,
    run: Run,
    pool: Pool,
    decision: Sidecar,
    asked: tuple[int, int],
    judges: _Judges,
    before: Stage1Result,
) -> str:
    num_asked, num_without = asked
    names, reasons = ["decision", "decision_reason"], Counter[tuple[str, str]]()
    for table in read_each(lambda shard: decision.read(shard.number, names), pool.shards):
        counted = table.group_by(names).aggregate([([], "count_all")])
        reasons.update({(row["decision"], row["decision_reason"]): row["count_all"] for row in counted.to_pylist()})
    silver = _load_silver(config)
    sets = save_curated_sets(decision, without_leaks(silver, config.decontamination) if silver else None)
    counts = {name.value: sum(count for (what, _), count in reasons.items() if what == name) for name in Decision}
    record: dict[str, Any] = {
        "pool": pool.name,
        "pool_digest": pool.digest,
        "decision": decision.fingerprint,
        "best_rm": before.best.name,
        "gold_rm": before.gold_rm.name,
        "pairs": pool.num_rows,
        "judged_pairs": num_asked,
        "unanswered_pairs": num_without,
        "decisions": counts,
        "reasons": {f"{what}/{why}": count for (what, why), count in sorted(reasons.items())},
        "judges_on_working_gold": {judge: measured.report() for judge, measured in judges.working.items()},
        "judges_on_audit_gold": {judge: measured.report() for judge, measured in judges.audit.items()},
        "judges_on_doubted_gold": {judge: measured.report() for judge, measured in judges.doubted.items()},
        "judge_report": dict(judges.report),
        "tables": table_names(judges.votes),
        "sets": sets,
        "simulated_gold": before.simulated_gold,
    }
    config.storage.write_json(STAGE2_RECORD, record)
    run.metrics.update({"stage2": record})
    rows = [(what, why, str(count), format_share(count, pool.num_rows)) for (what, why), count in sorted(reasons.items())]
    rows.append(("all", "", str(pool.num_rows), format_share(pool.num_rows, pool.num_rows)))
    lines = [format_table(("decision", "reason", "pairs", "share"), rows)]
    lines.append(f"asked a judge about {num_asked} pairs; where no judge decides, both reward models alone do")
    if num_without:
        lines.append(
            f"{num_without} pairs that a judge may decide have no answer of one (rejected, as its votes say why): both reward models alone do"
        )
    lines += [describe_trust(judge, measured.report()) for judge, measured in sorted(judges.working.items())]
    lines += [describe_doubted(judge, measured.report()) for judge, measured in sorted(judges.doubted.items())]
    if before.simulated_gold:
        lines.append("gold is SIMULATED: an annotator that reads known truth for the budgeted pairs")
    return "\n".join(lines)
