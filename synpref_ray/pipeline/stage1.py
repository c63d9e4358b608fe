"""Stage 1: human-in-the-loop rounds on the seed and the unverified pool, ending in a best RM and a gold RM.

Paper: Sec. 3.2. The seed is tagged, part of it verified (gold), the rest labelled by LLM judges (silver). A round then trains on silver, picks the
checkpoint on working gold, retrieves similar unverified pairs for its errors on gold, has people verify some of them and judges label the rest.
Our choice: after the last round the best RM is trained once more, on all silver, and the gold RM on working gold, so that Stage 2 gets both at their
best. Every step is resumable by itself; running the job again goes on where it stopped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
from pydantic import Field, field_validator

from synpref_ray.bundled import resolve_model
from synpref_ray.evaluation.accuracy import is_correct, pair_accuracy
from synpref_ray.pipeline.gathering import gather_pool, gather_sidecars
from synpref_ray.pipeline.gold import LabelledPool, gather_gold, label_pool, measure_judges, merge_pool_votes, save_label_sets
from synpref_ray.pipeline.job import JobConfig
from synpref_ray.pipeline.llm_steps import GoldTables, JudgedPool, JudgeStepConfig, TagStepConfig, judge_pools, tag_pools
from synpref_ray.pipeline.retrieval import EmbedStepConfig, embed_pools, find_exemplars, select_for_errors
from synpref_ray.pipeline.scoring import ScoreConfig, score_pools
from synpref_ray.pipeline.training import train_model
from synpref_ray.pipeline.verification import AnnotatorConfig, verify_pool
from synpref_ray.reporting.run import Run
from synpref_ray.reporting.table import format_share, format_table
from synpref_ray.retrieval.index import IndexConfig
from synpref_ray.retrieval.select import RetrievalConfig
from synpref_ray.reward.training_config import TrainConfig
from synpref_ray.rules.gold import GoldConfig, GoldSplit, check_best_rm_training, check_gold_rm_training, check_silver
from synpref_ray.rules.judges import JudgeTrust, TrustConfig
from synpref_ray.rules.stop import StopConfig, stop_reason
from synpref_ray.schema import ATTRIBUTES_SCHEMA, Verdict
from synpref_ray.tables.models import StoredModel
from synpref_ray.tables.pools import Pool, open_pool
from synpref_ray.tables.selection import GATHERED_SHARD_PAIRS
from synpref_ray.tables.sets import PairSet
from synpref_ray.tables.sidecars import Sidecar, zip_shard

STAGE1_RECORD = "rounds/stage1.json"


class Stage1Config(JobConfig):
    """Everything Stage 1 needs."""

    tag: TagStepConfig
    judges: tuple[JudgeStepConfig, ...] = Field(min_length=1)
    train: TrainConfig
    gold_train: TrainConfig
    annotator: AnnotatorConfig = AnnotatorConfig()
    embed: EmbedStepConfig = EmbedStepConfig()
    index: IndexConfig = IndexConfig()
    score: ScoreConfig = ScoreConfig()
    gold: GoldConfig = GoldConfig()
    trust: TrustConfig = TrustConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    stop: StopConfig = StopConfig()
    max_pairs_per_round: int = Field(default=250_000, ge=1)  # ours: about a million pairs in eight rounds would be 125,000 each
    gathered_shard_pairs: int = Field(default=GATHERED_SHARD_PAIRS, ge=1)

    @field_validator("judges")
    @classmethod
    def _names_differ(cls, judges: tuple[JudgeStepConfig, ...]) -> tuple[JudgeStepConfig, ...]:
        names = [judge.judge.judge for judge in judges]
        if len(set(names)) != len(names):
            raise ValueError(f"every judge needs a name of its own, found {', '.join(names)}")
        return judges


def check_stage1(config: Stage1Config) -> None:
    """Check pools, models and the verdict file, without loading a model."""
    storage = config.storage
    for name in ("seed", "unverified"):
        open_pool(storage, name)
    for model in (config.tag.engine.model, config.train.backbone, config.gold_train.backbone, config.embed.embedder.model):
        resolve_model(model)
    for judge in config.judges:
        resolve_model(judge.engine.model)
    config.annotator.open()


@dataclass(frozen=True)
class _Labels:
    """What labelling a round's pairs gave: all gold, the labelled pools, the round's sets and the judges' measure."""

    gold: GoldTables
    pools: list[LabelledPool]
    sets: dict[str, PairSet]
    trust: Mapping[str, JudgeTrust]
    audit: Mapping[str, JudgeTrust]


def run_stage1(config: Stage1Config, run: Run) -> str:
    """Run Stage 1 to its end; return the closing table."""
    storage = config.storage
    seed, unverified = open_pool(storage, "seed"), open_pool(storage, "unverified")
    attributes = tag_pools(run, "tag", [seed, unverified], config.tag)
    embeddings = embed_pools(run, "embed", [(seed, attributes[0]), (unverified, attributes[1])], config.embed)
    labels = _label(config, run, 0, [], seed, attributes[0], embeddings[0], config.annotator.seed_pairs)
    rounds: list[dict[str, Any]] = [_record(config, run, 0, labels, None, [])]
    selected: set[str] = set()
    num_new = unverified.num_rows
    while stop_reason([entry["working_gold_accuracy"] for entry in rounds[1:]], num_new_pairs=num_new, config=config.stop) is None:
        number = len(rounds)
        best, trained = _train_best(config, run, number, labels)
        rewards = score_pools(run, f"score gold, round {number}", [labels.gold.pool], {f"best.r{number:02d}": best}, config.score).sidecars[0][0]
        retrieved = select_for_errors(
            labels.gold, rewards, unverified, embeddings[1], selected, config.retrieval, config.index, config.max_pairs_per_round
        )
        inputs = {"gold": labels.gold.pool.digest, "rewards": rewards.fingerprint, "embeddings": embeddings[1].fingerprint}
        pool = gather_pool(storage, f"round-{number:02d}-selected", retrieved.pieces, inputs=inputs, max_pairs=config.gathered_shard_pairs)
        run.step(f"retrieve, round {number}", rows=unverified.num_rows, computed=0, rejected={}, seconds=0.0, selected=pool.num_rows)
        selected |= set(retrieved.record["pair_id"].to_pylist())
        num_new = pool.num_rows
        accuracy = _gold_accuracies(labels.gold, rewards)
        if num_new:
            tags, vectors = (
                gather_sidecars(sidecar.name, schema, [(pool, {unverified.name: sidecar})])[0]
                for sidecar, schema in ((attributes[1], ATTRIBUTES_SCHEMA), (embeddings[1], config.embed.schema))
            )
            labels = _label(config, run, number, labels.pools, pool, tags, vectors, config.annotator.round_pairs)
        rounds.append(_record(config, run, number, labels, trained, accuracy, retrieved.record, pool))
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
) -> _Labels:
    """Verify part of a new pool, judge the rest with all gold as exemplars, and label every pool of Stage 1 anew under the grown gold."""
    suffix = f"r{number:02d}"
    human = verify_pool(run, f"verify, round {number}", pool, attributes, budget, config.annotator, config.gold).sidecars[0][0]
    new = LabelledPool(pool, attributes, embeddings, human)
    gold = gather_gold(config.storage, f"gold-{suffix}", [*earlier, new], config.gold, config.embed.schema)
    gold_votes, new_votes = [], []
    for judge in config.judges:
        name = f"exemplars, round {number}"
        targets = [(gold.pool, gold.embeddings), (pool, embeddings)]
        exemplars = find_exemplars(run, name, targets, gold, judge.judge.max_exemplars, config.index)
        judged = [JudgedPool(gold.pool, gold.attributes, exemplars[0], None), JudgedPool(pool, attributes, exemplars[1], human)]
        votes = judge_pools(run, f"judge ({judge.judge.judge}), round {number}", judged, gold, judge)
        gold_votes.append(votes[0])
        new_votes.append(votes[1])
    trust, audit = measure_judges(gold, gold_votes, config.trust)
    pools = [*earlier, new.judged(new_votes)]
    labels = [label_pool(p, merge_pool_votes(p.pool, p.attributes, p.votes, trust), gold) for p in pools]
    sets = save_label_sets(config.storage, suffix, labels)
    return _Labels(gold, pools, sets, trust, audit)


def _train_best(config: Stage1Config, run: Run, number: int, labels: _Labels) -> tuple[StoredModel, dict[str, Any]]:
    """Train on silver, pick the checkpoint on working gold (Sec. 3.2, Step 1), with the checks that keep gold clean."""
    silver, working, gold = labels.sets["silver"].read(), labels.sets["gold-working"].read(), labels.gold.read()
    check_silver(silver, gold)
    check_best_rm_training(silver, gold)
    train, check = (silver, labels.sets["silver"].digest), (working, labels.sets["gold-working"].digest)
    model, record = train_model(run, config.storage, f"best-r{number:02d}", train=train, gold=check, config=config.train)
    return model, {"model": model.name, "silver_pairs": silver.num_rows, **_training_summary(record.model_dump(mode="json"))}


def _training_summary(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if isinstance(value, int | float | str)}


def _gold_accuracies(gold: GoldTables, rewards: Sidecar) -> list[tuple[str, float]]:
    """Return (split, margin in favour of the human verdict) for every scored gold pair."""
    beside: list[tuple[Sidecar, Mapping[str, str]]] = [
        (gold.human, {"human_verdict": "human_verdict", "gold_split": "gold_split"}),
        (rewards, {"p_chosen": "p_chosen", "margin": "margin"}),
    ]
    found = []
    for shard in gold.pool.shards:
        for row in zip_shard(gold.pool, shard.number, [], beside).to_pylist():
            if row["margin"] is not None:
                margin = row["margin"] if row["human_verdict"] == Verdict.CHOSEN else -row["margin"]
                found.append((row["gold_split"], margin))
    return found


def _accuracy(found: Sequence[tuple[str, float]], split: GoldSplit) -> dict[str, Any]:
    margins = [margin for name, margin in found if name == split]
    return asdict(pair_accuracy(is_correct(margins))) if margins else {}


def _record(
    config: Stage1Config,
    run: Run,
    number: int,
    labels: _Labels,
    trained: Mapping[str, Any] | None,
    accuracy: Sequence[tuple[str, float]],
    retrieved: pa.Table | None = None,
    pool: Pool | None = None,
) -> dict[str, Any]:
    working, audit = _accuracy(accuracy, GoldSplit.WORKING), _accuracy(accuracy, GoldSplit.AUDIT)
    record: dict[str, Any] = {
        "round": number,
        "read": {name: pairs.digest for name, pairs in labels.sets.items()} | {"gold_pool": labels.gold.pool.name},
        "selected_pairs": pool.num_rows if pool else 0,
        "selected_pool": pool.name if pool else None,
        "calling_gold_pairs": len(set(retrieved["gold_pair_id"].to_pylist())) if retrieved is not None else 0,
        "set_sizes": {name: pairs.read().num_rows for name, pairs in labels.sets.items()},
        "simulated_gold": config.annotator.kind == "simulated",
        "judges_on_working_gold": {judge: trust.report() for judge, trust in labels.trust.items()},
        "judges_on_audit_gold": {judge: trust.report() for judge, trust in labels.audit.items()},
        "training": dict(trained) if trained else None,
        "working_gold_accuracy": working.get("accuracy", 0.0),
        "best_rm_on_working_gold": working,
        "best_rm_on_audit_gold": audit,
    }
    config.storage.write_json(f"rounds/{number:02d}/round.json", record)
    run.event("round", round=number, sets=record["set_sizes"], selected=record["selected_pairs"])
    return record


def _finish(config: Stage1Config, run: Run, labels: _Labels, rounds: list[dict[str, Any]]) -> str:
    best, _ = _train_best(config, run, len(rounds), labels)
    working, gold = labels.sets["gold-working"].read(), labels.gold.read()
    check_gold_rm_training(working, gold)
    gold_rm, _ = train_model(run, config.storage, "gold", train=(working, labels.sets["gold-working"].digest), gold=None, config=config.gold_train)
    scored = score_pools(run, "score gold, final", [labels.gold.pool], {"best": best, "gold": gold_rm}, config.score).sidecars[0]
    final = {name: _accuracy(_gold_accuracies(labels.gold, rewards), GoldSplit.AUDIT) for name, rewards in zip(("best", "gold"), scored, strict=True)}
    record = {
        "best_rm": {"name": best.name, "digest": best.digest},
        "gold_rm": {"name": gold_rm.name, "digest": gold_rm.digest},
        "gold": {
            "pool": labels.gold.pool.name,
            "attributes": labels.gold.attributes.fingerprint,
            "embeddings": labels.gold.embeddings.fingerprint,
            "human": labels.gold.human.fingerprint,
        },
        "sets": {name: pairs.name for name, pairs in labels.sets.items()},
        "simulated_gold": config.annotator.kind == "simulated",
        "audit_gold_accuracy": final,
        "rounds": len(rounds) - 1,
    }
    config.storage.write_json(STAGE1_RECORD, record)
    run.metrics.update({"stage1": record, "rounds": rounds})
    return _closing_table(rounds, final, config.annotator.kind == "simulated")


def _closing_table(rounds: Sequence[Mapping[str, Any]], final: Mapping[str, Mapping[str, Any]], simulated: bool) -> str:
    rows = []
    for entry in rounds:
        sizes, audit = entry["set_sizes"], entry["best_rm_on_audit_gold"]
        decides = sorted({category for judge in entry["judges_on_working_gold"].values() for category in judge["decides"]})
        rows.append(
            (
                "seed" if entry["round"] == 0 else f"round {entry['round']}",
                str(entry["selected_pairs"] or "-"),
                str(sizes["silver"]),
                str(sizes["gold-working"]),
                str(sizes["gold-audit"]),
                format_share(entry["working_gold_accuracy"], 1) if entry["best_rm_on_working_gold"] else "-",
                format_share(audit["accuracy"], 1) if audit else "-",
                ", ".join(decides) or "none",
            )
        )
    header = ("", "selected", "silver", "working gold", "audit gold", "RM, working", "RM, audit", "judges decide in")
    lines = [format_table(header, rows)]
    for name, accuracy in final.items():
        lines.append(f"final {name} RM on audit gold: {format_share(accuracy.get('accuracy', 0.0), 1)} of {accuracy.get('num_pairs', 0)} pairs")
    if simulated:
        lines.append("gold is SIMULATED: an annotator that reads known truth for the budgeted pairs")
    return "\n".join(lines)
