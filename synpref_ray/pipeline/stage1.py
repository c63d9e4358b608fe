"""Stage 1: human-in-the-loop rounds on the seed and the unverified pool, ending in a best RM and a gold RM.

Paper: Sec. 3.2. The seed is tagged, part of it verified (gold), the rest labelled by LLM judges (silver). A round then trains on silver, picks the
checkpoint on working gold, retrieves similar unverified pairs for its errors on gold, has people verify some of them and judges label the rest.
Our choice: after the last round the best RM is trained once more, on all silver, and the gold RM on working gold, so that Stage 2 gets both at their
best. Every step is resumable by itself; running the job again goes on where it stopped.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import pyarrow as pa
from pydantic import Field

from synpref_ray.bundled import resolve_model
from synpref_ray.errors import InputError
from synpref_ray.evaluation.accuracy import bootstrap_accuracy, is_correct
from synpref_ray.evaluation.tag_report import read_tag_edits
from synpref_ray.human.verdict_file import import_verdicts
from synpref_ray.pipeline.clusters import AUTO, choose_clusters, read_by_clusters
from synpref_ray.pipeline.edited_tags import human_tags_file, use_edited_tags
from synpref_ray.pipeline.gathering import gather_pool, gather_sidecars
from synpref_ray.pipeline.gold import (
    LabelledPool,
    gather_gold,
    gold_record,
    label_pool,
    measure_judges,
    merge_pool_votes,
    report_judges,
    save_label_sets,
)
from synpref_ray.pipeline.job import JobConfig
from synpref_ray.pipeline.leak_marks import leaked_pairs, open_leaks
from synpref_ray.pipeline.licences import with_source_licences
from synpref_ray.pipeline.llm_steps import GoldTables, JudgedPool, Judges, Taggers, judge_pools, tag_pools
from synpref_ray.pipeline.retrieval import EmbedStepConfig, embed_pools, find_exemplars, select_for_errors
from synpref_ray.pipeline.scoring import ScoreConfig, parity_for, score_pools
from synpref_ray.pipeline.step_plan import (
    PoolSize,
    StagePlan,
    describe_plan,
    embed_work,
    gathered,
    judge_work,
    pool_size,
    score_work,
    tag_work,
    total,
    train_work,
)
from synpref_ray.pipeline.tag_reports import report_taggers
from synpref_ray.pipeline.training import train_model
from synpref_ray.pipeline.verification import AnnotatorConfig, verify_pool
from synpref_ray.reporting.run import Run
from synpref_ray.reporting.table import format_share, format_table
from synpref_ray.retrieval.index import IndexConfig
from synpref_ray.retrieval.select import RetrievalConfig
from synpref_ray.reward.model_card import CardConfig
from synpref_ray.reward.parity_record import ParityConfig
from synpref_ray.reward.training_config import TrainConfig
from synpref_ray.rules.gold import GoldConfig, GoldSplit, check_best_rm_training, check_gold_rm_training, check_silver
from synpref_ray.rules.judges import JudgeTrust, TrustConfig, describe_trust
from synpref_ray.rules.stop import StopConfig, stop_reason
from synpref_ray.rules.verdicts import MergeConfig
from synpref_ray.schema import ATTRIBUTES_SCHEMA, Verdict
from synpref_ray.tables.models import StoredModel
from synpref_ray.tables.pools import Pool, open_pool
from synpref_ray.tables.selection import GATHERED_SHARD_PAIRS
from synpref_ray.tables.sets import PairSet
from synpref_ray.tables.sidecars import Sidecar, zip_shard

STAGE1_RECORD = "rounds/stage1.json"
logger = logging.getLogger(__name__)


class Stage1Config(JobConfig):
    """Everything Stage 1 needs."""

    taggers: Taggers
    human_tags: str = ""  # attributes that people edited, for gold and the taggers' report; empty: the workspace's annotations, if they hold edits
    judges: Judges
    train: TrainConfig
    gold_train: TrainConfig
    annotator: AnnotatorConfig = AnnotatorConfig()
    embed: EmbedStepConfig = EmbedStepConfig()
    index: IndexConfig = IndexConfig()
    score: ScoreConfig = ScoreConfig()
    parity: ParityConfig = ParityConfig()
    """What the best and the gold RM must pass. Ours: the models of the rounds, which score gold and nothing else, pass it without vLLM."""
    card: CardConfig = CardConfig()
    gold: GoldConfig = GoldConfig()
    trust: TrustConfig = TrustConfig()
    merge: MergeConfig = MergeConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    near_duplicates: str = AUTO  # ours: prompts go by the clusters of jobs/hygiene.py where it was run; off, or the head of a comparison's name
    decontamination: str = AUTO  # ours: pairs that jobs/decontaminate.py drops are left out where it was run; off, or the head of a fingerprint
    stop: StopConfig = StopConfig()
    max_pairs_per_round: int = Field(default=250_000, ge=1)  # ours: about a million pairs in eight rounds would be 125,000 each
    gathered_shard_pairs: int = Field(default=GATHERED_SHARD_PAIRS, ge=1)
    plan: StagePlan = StagePlan()
    """What the plan of `--dry-run` supposes."""

    @property
    def final_parity(self) -> ParityConfig:
        """What the models that go on to curate must pass."""
        return parity_for(self.score, self.parity)

    @property
    def round_parity(self) -> ParityConfig:
        """What the models of the rounds must pass."""
        return self.final_parity.model_copy(update={"vllm": False})


def check_stage1(config: Stage1Config) -> None:
    """Check pools, models and the verdict file, without loading a model."""
    _open_pools(config)
    for model in (config.train.backbone, config.gold_train.backbone, config.embed.embedder.model):
        resolve_model(model)
    for step in (*config.taggers, *config.judges):
        step.check()
    human_tags = human_tags_file(config.storage, config.human_tags)
    if human_tags:
        read_tag_edits(human_tags)
    _check_annotator(config)


def plan_stage1(config: Stage1Config) -> str:
    """Return the steps of Stage 1 with what each takes, as `--dry-run` prints them: rounds at their ceiling (every round retrieves all it may)."""
    plan, rounds = config.plan, config.stop.max_rounds
    sizes = {name: pool_size(config.storage, name, plan) for name in ("seed", "unverified")}
    seed, unverified = sizes.values()
    both = PoolSize(seed.pairs + unverified.pairs, seed.shards + unverified.shards)
    simulated = config.annotator.kind == "simulated"
    gold_by_round = [_planned_gold(config, number) for number in range(rounds + 1)]
    left, selected = unverified.pairs, []
    for _ in range(rounds):
        selected.append(min(left, config.max_pairs_per_round))
        left -= selected[-1]
    looked_at = [seed.pairs + sum(selected[:number]) for number in range(rounds + 1)]
    golds = [gathered(gold, config.gathered_shard_pairs) for gold in gold_by_round]
    judged = [PoolSize(seed.pairs + golds[0].pairs, seed.shards + golds[0].shards)]
    for count, gold in zip(selected, golds[1:], strict=True):
        new = gathered(count, config.gathered_shard_pairs)
        judged.append(PoolSize(new.pairs + gold.pairs, new.shards + gold.shards))
    works = [*tag_work(config.taggers, both, plan), embed_work(config.embed, both, plan)]
    for judge in config.judges:
        works.append(total([judge_work([judge], size, plan)[0] for size in judged], f"judge ({judge.judge.judge}), seed and {rounds} rounds"))
    silver = [pairs - gold for pairs, gold in zip(looked_at, gold_by_round, strict=True)]
    trained = [train_work(config.train, "", max(pairs, 0), plan) for pairs in silver]
    works.append(total(trained, f"train best RM, {rounds} rounds and the last"))
    works.append(total([score_work(config.score, "", gold, plan, models=1) for gold in golds[:rounds]], f"score gold, {rounds} rounds"))
    works.append(train_work(config.gold_train, "train gold RM", golds[-1].pairs, plan))
    works.append(score_work(config.score, "score gold, final", golds[-1], plan, models=2))
    people = (
        f"{gold_by_round[-1]:,} gold pairs at the end" if gold_by_round[-1] else "gold is not known (`plan.gold_pairs`), so steps on it count nothing"
    )
    return describe_plan(works, sizes, [f"people: {people}{', simulated' if simulated else ''}; shards of a training are its optimizer steps"])


def _planned_gold(config: Stage1Config, number: int) -> int:
    """Return how much gold there is after a round: an annotator's budget, or what the plan states, grown evenly."""
    if config.annotator.kind == "simulated":
        return config.annotator.seed_pairs + number * config.annotator.round_pairs
    return round(config.plan.gold_pairs * (number + 1) / (config.stop.max_rounds + 1))


def _open_pools(config: Stage1Config) -> list[Pool]:
    """Return the seed and the unverified pool, their prompts grouped by near-duplicate clusters if there are any."""
    pools = [open_pool(config.storage, name) for name in ("seed", "unverified")]
    clusters = choose_clusters(pools, config.near_duplicates)
    return [read_by_clusters(pool, clusters) for pool in pools]


def _check_annotator(config: Stage1Config) -> None:
    """Refuse verdicts that no pool can use, or that leave nothing of the seed to train on (an annotation queue is checked round by round)."""
    if config.annotator.kind == "queue":
        return
    annotator, path = config.annotator.open(), config.annotator.path
    seed, unverified = ({*open_pool(config.storage, name).read_all(["pair_id"])["pair_id"].to_pylist()} for name in ("seed", "unverified"))
    known = annotator.known(seed | unverified)
    if not known:
        raise InputError(f"{path} has no verdict on any pair of the pools seed and unverified; are its pair_ids those of this workspace?")
    if config.annotator.kind == "file" and seed <= known:
        raise InputError(f"{path} has a verdict on every seed pair: that leaves none for judges to label and the first RM to train on")


@dataclass(frozen=True)
class _Labels:
    """What labelling a round's pairs gave: all gold, the labelled pools, the round's sets, the judges' measure and their report by gold split."""

    gold: GoldTables
    pools: list[LabelledPool]
    sets: dict[str, PairSet]
    trust: Mapping[str, JudgeTrust]
    audit: Mapping[str, JudgeTrust]
    judge_report: Mapping[str, Any]


class _GoldMargin(NamedTuple):
    split: str
    prompt_group: str
    margin: float


@dataclass(frozen=True)
class _Training:
    """What a round did with the labels that it found: the RM's summary, its margins on all gold, what its errors retrieved; empty for the seed."""

    summary: Mapping[str, Any] | None = None
    margins: Sequence[_GoldMargin] = ()
    retrieved: pa.Table | None = None
    pool: Pool | None = None


def report_verdict_file(config: AnnotatorConfig, run: Run, pools: Sequence[Pool]) -> None:
    """Say how the verdict file fits the pools, if verdicts come from one: those on pairs that no pool holds would vanish silently."""
    if config.kind != "file":
        return
    known = {pair_id for pool in pools for shard in pool.shards for pair_id in pool.read(shard.number, ["pair_id"])["pair_id"].to_pylist()}
    report = import_verdicts(config.path).report(known)
    run.metrics["verdict_file"] = report.model_dump(mode="json")
    if report.num_unknown:
        examples = ", ".join(report.unknown_examples)
        names = " or ".join(pool.name for pool in pools)
        logger.warning(
            "%s: %d of %d judged pairs are in no pool (%s), left out: %s …", config.path, report.num_unknown, report.num_pairs, names, examples
        )


def run_stage1(config: Stage1Config, run: Run) -> str:
    """Run Stage 1 to its end; return the closing table."""
    storage = config.storage
    seed, unverified = _open_pools(config)
    report_verdict_file(config.annotator, run, [seed, unverified])
    tagged = tag_pools(run, "tag", [seed, unverified], config.taggers)
    run.metrics["tag_report"] = report_taggers([seed, unverified], tagged, human_tags_file(storage, config.human_tags))
    attributes = tagged.merged
    embeddings = embed_pools(run, "embed", [(seed, attributes[0]), (unverified, attributes[1])], config.embed)
    leaks = [open_leaks(pool, config.decontamination) for pool in (seed, unverified)]
    labels = _label(config, run, 0, [], seed, attributes[0], embeddings[0], config.annotator.seed_pairs, leaks[0])
    rounds: list[dict[str, Any]] = [_record(config, run, 0, None, labels, _Training())]
    selected = set(leaked_pairs(leaks[1]))  # never retrieved
    num_new = unverified.num_rows
    while stop_reason([entry["working_gold_accuracy"] for entry in rounds[1:]], num_new_pairs=num_new, config=config.stop) is None:
        number = len(rounds)
        best, trained = _train_best(config, run, number, labels, config.round_parity)
        models = {f"best.r{number:02d}": best}
        rewards = score_pools(run, f"score gold, round {number}", [labels.gold.pool], models, config.score, config.round_parity).sidecars[0][0]
        retrieved = select_for_errors(
            labels.gold, rewards, unverified, embeddings[1], selected, config.retrieval, config.index, config.max_pairs_per_round
        )
        inputs = {"gold": labels.gold.pool.digest, "rewards": rewards.fingerprint, "embeddings": embeddings[1].fingerprint}
        pool = gather_pool(storage, f"round-{number:02d}-selected", retrieved.pieces, inputs=inputs, max_pairs=config.gathered_shard_pairs)
        run.step(f"retrieve, round {number}", rows=unverified.num_rows, computed=0, rejected={}, seconds=0.0, selected=pool.num_rows)
        selected |= set(retrieved.record["pair_id"].to_pylist())
        num_new = pool.num_rows
        before, training = labels, _Training(trained, _gold_accuracies(labels.gold, rewards), retrieved.record, pool)
        if num_new:
            tags, vectors = (
                gather_sidecars(sidecar.name, schema, [(pool, {unverified.name: sidecar})])[0]
                for sidecar, schema in ((attributes[1], ATTRIBUTES_SCHEMA), (embeddings[1], config.embed.schema))
            )
            labels = _label(config, run, number, labels.pools, pool, tags, vectors, config.annotator.round_pairs)
        rounds.append(_record(config, run, number, before, labels, training))
    return _finish(config, run, labels, rounds)


def _label(
    config: Stage1Config,
    run: Run,
    number: int,
    earlier: Sequence[LabelledPool],
    pool: Pool,
    attributes: Sidecar,
    embeddings: Sidecar,
    budget: int,
    leaks: Sidecar | None = None,
) -> _Labels:
    """Verify part of a new pool, judge the rest with all gold as exemplars, and label every pool of Stage 1 anew under the grown gold."""
    suffix = f"r{number:02d}"
    verified = verify_pool(run, f"verify, round {number}", pool, attributes, budget, config.annotator, config.gold, leaked_pairs(leaks))
    human = verified.sidecars[0][0]
    new = LabelledPool(pool, attributes, embeddings, human, leaks=leaks)
    gathered = gather_gold(config.storage, f"gold-{suffix}", [*earlier, new], config.gold, config.embed.schema)
    gold = use_edited_tags(run, f"round {number}", gathered, human_tags_file(config.storage, config.human_tags), config.embed)
    gold_votes, new_votes = [], []
    for judge in config.judges:
        name = f"exemplars, round {number}"
        targets = [(gold.pool, gold.as_targets.embeddings), (pool, embeddings)]
        exemplars = find_exemplars(run, name, targets, gold, judge.judge.max_exemplars, config.index)
        judged = [JudgedPool(gold.pool, gold.as_targets.attributes, exemplars[0], None), JudgedPool(pool, attributes, exemplars[1], human)]
        votes = judge_pools(run, f"judge ({judge.judge.judge}), round {number}", judged, gold, judge)
        gold_votes.append(votes[0])
        new_votes.append(votes[1])
    trust, audit = measure_judges(gold, gold_votes, config.trust)
    pools = [*earlier, new.judged(new_votes)]
    labels = [label_pool(p, merge_pool_votes(p.pool, p.attributes, p.votes, trust, config.merge), gold) for p in pools]
    sets = save_label_sets(config.storage, suffix, labels)
    return _Labels(gold, pools, sets, trust, audit, report_judges(gold, gold_votes))


def _train_best(config: Stage1Config, run: Run, number: int, labels: _Labels, parity: ParityConfig) -> tuple[StoredModel, dict[str, Any]]:
    """Train on silver, pick the checkpoint on working gold (Sec. 3.2, Step 1), with the checks that keep gold clean."""
    silver, working, gold = labels.sets["silver"].read(), labels.sets["gold-working"].read(), labels.gold.read()
    check_silver(silver, gold)
    check_best_rm_training(silver, gold)
    train, check = (silver, labels.sets["silver"].digest), (working, labels.sets["gold-working"].digest)
    model, record = train_model(
        run,
        config.storage,
        f"best-r{number:02d}",
        train=train,
        gold=check,
        config=config.train,
        parity=parity,
        card=with_source_licences(config.card, config.storage),
        data_name=labels.sets["silver"].name,
    )
    return model, {"model": model.name, "silver_pairs": silver.num_rows, **_training_summary(record.model_dump(mode="json"))}


def _training_summary(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if isinstance(value, int | float | str)}


def _gold_accuracies(gold: GoldTables, rewards: Sidecar) -> list[_GoldMargin]:
    """Return the margin in favour of the human verdict for every scored gold pair."""
    beside: list[tuple[Sidecar, Mapping[str, str]]] = [
        (gold.human, {"human_verdict": "human_verdict", "gold_split": "gold_split"}),
        (rewards, {"p_chosen": "p_chosen", "margin": "margin"}),
    ]
    found = []
    for shard in gold.pool.shards:
        for row in zip_shard(gold.pool, shard.number, ["prompt_group"], beside).to_pylist():
            if row["margin"] is not None:
                margin = row["margin"] if row["human_verdict"] == Verdict.CHOSEN else -row["margin"]
                found.append(_GoldMargin(row["gold_split"], row["prompt_group"], margin))
    return found


def _accuracy(found: Sequence[_GoldMargin], split: GoldSplit) -> dict[str, Any]:
    of_split = [entry for entry in found if entry.split == split]
    correct = is_correct([entry.margin for entry in of_split])
    return asdict(bootstrap_accuracy(correct, groups=[entry.prompt_group for entry in of_split])) if of_split else {}


def _record(config: Stage1Config, run: Run, number: int, before: _Labels | None, labels: _Labels, training: _Training) -> dict[str, Any]:
    """Write a round's record: what its RM read (`read`, measured on that round's gold), and what the round made of it (`wrote`, `set_sizes`)."""
    working, audit = _accuracy(training.margins, GoldSplit.WORKING), _accuracy(training.margins, GoldSplit.AUDIT)
    retrieved, pool = training.retrieved, training.pool
    record: dict[str, Any] = {
        "round": number,
        "read": _digests(before) if before else {},
        "wrote": _digests(labels),
        "selected_pairs": pool.num_rows if pool else 0,
        "selected_pool": pool.name if pool else None,
        "calling_gold_pairs": len(set(retrieved["gold_pair_id"].to_pylist())) if retrieved is not None else 0,
        "set_sizes": {name: pairs.read().num_rows for name, pairs in labels.sets.items()},
        "simulated_gold": config.annotator.kind == "simulated",
        "judges_on_working_gold": {judge: trust.report() for judge, trust in labels.trust.items()},
        "judges_on_audit_gold": {judge: trust.report() for judge, trust in labels.audit.items()},
        "judge_report": dict(labels.judge_report),
        "training": dict(training.summary) if training.summary else None,
        "working_gold_accuracy": working.get("accuracy", 0.0),
        "best_rm_on_working_gold": working,
        "best_rm_on_audit_gold": audit,
    }
    config.storage.write_json(f"rounds/{number:02d}/round.json", record)
    run.event("round", round=number, sets=record["set_sizes"], selected=record["selected_pairs"])
    return record


def _digests(labels: _Labels) -> dict[str, str]:
    return {name: pairs.digest for name, pairs in labels.sets.items()} | {"gold_pool": labels.gold.pool.name}


def _finish(config: Stage1Config, run: Run, labels: _Labels, rounds: list[dict[str, Any]]) -> str:
    best, _ = _train_best(config, run, len(rounds), labels, config.final_parity)
    working, gold = labels.sets["gold-working"].read(), labels.gold.read()
    check_gold_rm_training(working, gold)
    gold_rm, _ = train_model(
        run,
        config.storage,
        "gold",
        train=(working, labels.sets["gold-working"].digest),
        gold=None,
        config=config.gold_train,
        parity=config.final_parity,
        card=with_source_licences(config.card, config.storage),
        data_name=labels.sets["gold-working"].name,
    )
    both = {"best": best, "gold": gold_rm}
    scored = score_pools(run, "score gold, final", [labels.gold.pool], both, config.score, config.final_parity).sidecars[0]
    final = {name: _accuracy(_gold_accuracies(labels.gold, rewards), GoldSplit.AUDIT) for name, rewards in zip(("best", "gold"), scored, strict=True)}
    record = {
        "best_rm": {"name": best.name, "digest": best.digest},
        "gold_rm": {"name": gold_rm.name, "digest": gold_rm.digest},
        "gold": gold_record(labels.gold),
        "sets": {name: {"name": pairs.name, "digest": pairs.digest} for name, pairs in labels.sets.items()},
        "simulated_gold": config.annotator.kind == "simulated",
        "audit_gold_accuracy": final,
        "rounds": len(rounds) - 1,
        **({"near_duplicates": clusters} if (clusters := labels.pools[0].pool.clusters) else {}),
    }
    for path in config.storage.list_files("rounds"):  # of an earlier run with other settings and more rounds
        if path.endswith("/round.json") and int(path.split("/")[1]) >= len(rounds):
            config.storage.delete(path)
    config.storage.write_json(STAGE1_RECORD, record)
    run.metrics.update({"stage1": record, "rounds": rounds})
    return _closing_table(rounds, final, config.annotator.kind == "simulated")


def _closing_table(rounds: Sequence[Mapping[str, Any]], final: Mapping[str, Mapping[str, Any]], simulated: bool) -> str:
    rows = []
    for entry in rounds:
        sizes, summary = entry["set_sizes"], entry["training"]
        name = "seed" if entry["round"] == 0 else f"round {entry['round']}"
        measured = [_share_of(entry[f"best_rm_on_{split}_gold"]) for split in ("working", "audit")]
        trained = str(summary["silver_pairs"]) if summary else "-"
        rows.append(
            (name, trained, *measured, str(entry["selected_pairs"] or "-"), *(str(sizes[n]) for n in ("silver", "gold-working", "gold-audit")))
        )
    header = ("", "RM trained on", "right, working gold", "right, audit gold", "then selected", "silver", "working gold", "audit gold")
    lines = [format_table(header, rows)]
    lines += [f"final {name} RM on audit gold: {_share_of(accuracy)}" for name, accuracy in final.items()]
    lines += [describe_trust(judge, report) for judge, report in sorted(rounds[-1]["judges_on_working_gold"].items())]
    if simulated:
        lines.append("gold is SIMULATED: an annotator that reads known truth for the budgeted pairs")
    return "\n".join(lines)


def _share_of(accuracy: Mapping[str, Any]) -> str:
    return f"{format_share(accuracy['accuracy'], 1)} of {accuracy['num_pairs']}" if accuracy else "-"
