"""Stage 1: human-in-the-loop rounds on the seed and the unverified pool, ending in a best RM and a gold RM.

Paper: Sec. 3.2. The seed is tagged, part of it verified (gold), the rest labelled by LLM judges (silver). A round then trains on silver, picks the
checkpoint on working gold, retrieves similar unverified pairs for its errors on gold, has people verify some of them and judges label the rest.
Our choice: after the last round the best RM is trained once more, on all silver, and the gold RM on working gold, so that Stage 2 gets both at their
best. Every step is resumable by itself; running the job again goes on where it stopped.
"""

import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pyarrow as pa
from pydantic import Field

from synpref_ray.bundled import find_model
from synpref_ray.errors import InputError
from synpref_ray.evaluation.tag_report import read_tag_edits
from synpref_ray.human.verdict_file import import_verdicts
from synpref_ray.pipeline.clusters import AUTO
from synpref_ray.pipeline.edited_tags import human_tags_file, use_edited_tags
from synpref_ray.pipeline.gathering import gather_sidecars
from synpref_ray.pipeline.gold import (
    NONE_DROPPED,
    Dropped,
    LabelledPool,
    gather_gold,
    gold_record,
    label_pool,
    measure_judges,
    merge_pool_votes,
    report_judges,
    save_label_sets,
)
from synpref_ray.pipeline.gold_tables import GoldTables
from synpref_ray.pipeline.growth import (
    UNVERIFIED,
    RoundInputs,
    check_leak_pins,
    choose_round_clusters,
    leaks_so_far,
    open_seed,
    peek_inputs,
    pin_inputs,
    seed_leaks,
)
from synpref_ray.pipeline.input_checks import check_each, check_gpus
from synpref_ray.pipeline.judge_steps import JudgedPool, judge_pools
from synpref_ray.pipeline.leak_marks import leaked_pairs
from synpref_ray.pipeline.licences import with_source_licences
from synpref_ray.pipeline.query_selection import Candidates
from synpref_ray.pipeline.retrieval import find_exemplars
from synpref_ray.pipeline.round_record import (
    Labels,
    Training,
    accuracy_on,
    closing_table,
    forget_rounds,
    gold_ids,
    gold_margins,
    make_record,
    table_names,
)
from synpref_ray.pipeline.round_selection import RoundSource, SelectionSettings, select_round
from synpref_ray.pipeline.scoring import parity_for, score_pools
from synpref_ray.pipeline.stage_config import StageConfig
from synpref_ray.pipeline.training import train_model
from synpref_ray.pipeline.unverified import UnverifiedParts
from synpref_ray.pipeline.verification import AnnotatorConfig, verify_pool
from synpref_ray.reporting.pair_story import WITHOUT_LEAKS
from synpref_ray.reporting.run import Run
from synpref_ray.retrieval.select import RetrievalConfig
from synpref_ray.reward.model_card import CardConfig
from synpref_ray.reward.parity_record import ParityConfig
from synpref_ray.reward.training_config import TrainConfig
from synpref_ray.rules.gold import GoldConfig, GoldSplit, check_best_rm_training, check_gold_rm_training, check_silver, describe_small_gold
from synpref_ray.rules.judges import JudgeTrust
from synpref_ray.rules.query_selection import SelectionConfig, SelectionKind
from synpref_ray.rules.stop import StopConfig, StopReason, stop_reason
from synpref_ray.schema import ATTRIBUTES_SCHEMA
from synpref_ray.tables.models import StoredModel
from synpref_ray.tables.pools import Pool, open_pool
from synpref_ray.tables.sidecars import Sidecar

STAGE1_RECORD = "rounds/stage1.json"
logger = logging.getLogger(__name__)


class Stage1Config(StageConfig):
    """Everything Stage 1 needs."""

    human_tags: str = ""  # attributes that people edited, for gold and the taggers' report; empty: the workspace's annotations, if they hold edits
    train: TrainConfig
    gold_train: TrainConfig
    annotator: AnnotatorConfig = AnnotatorConfig()
    parity: ParityConfig = ParityConfig()
    """What the best and the gold RM must pass. Ours: the models of the rounds, which score gold and nothing else, pass it without vLLM."""
    card: CardConfig = CardConfig()
    gold: GoldConfig = GoldConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    selection: SelectionConfig = SelectionConfig()
    near_duplicates: str = AUTO  # ours: prompts go by the clusters of jobs/hygiene.py where it was run; off, or the head of a comparison's name
    stop: StopConfig = StopConfig()
    max_pairs_per_round: int = Field(default=250_000, ge=1)  # ours: about a million pairs in eight rounds would be 125,000 each

    @property
    def simulated(self) -> bool:
        """Whether gold comes from an annotator that reads known truth."""
        return self.annotator.kind == "simulated"

    @property
    def selection_settings(self) -> SelectionSettings:
        """How rounds select."""
        return SelectionSettings(self.selection, self.retrieval, self.index, self.max_pairs_per_round, self.gathered_shard_pairs)

    @property
    def final_parity(self) -> ParityConfig:
        """What the models that go on to curate must pass."""
        return parity_for(self.score, self.parity)

    @property
    def round_parity(self) -> ParityConfig:
        """What the models of the rounds must pass."""
        return self.final_parity.model_copy(update={"vllm": False})


def check_stage1(config: Stage1Config) -> None:
    """Check pools, models, GPUs and the verdict file, without loading a model; all that is wrong is told at once."""
    check_each(
        partial(open_pool, config.storage, "seed"),
        partial(open_pool, config.storage, "unverified"),
        partial(_check_pools, config),
        *(partial(find_model, model) for model in (config.train.backbone, config.gold_train.backbone, config.embed.embedder.model)),
        partial(check_gpus, "embed", config.embed.embedder.device, config.embed.num_gpus_per_worker),
        partial(check_gpus, "score", config.score.device, config.score.num_gpus_per_worker),
        *(step.check for step in (*config.taggers, *config.judges)),
        partial(_check_human_tags, config),
        partial(_check_annotator, config),
    )


def _check_pools(config: Stage1Config) -> None:
    choose_round_clusters(config.storage, config.near_duplicates, peek_inputs(config.storage, 0))
    check_leak_pins(config.storage, config.decontamination, config.stop.max_rounds)


def _check_human_tags(config: Stage1Config) -> None:
    human_tags = human_tags_file(config.storage, config.human_tags)
    if human_tags:
        read_tag_edits(human_tags)


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
    inputs = pin_inputs(storage, 0, config.decontamination)
    clusters = choose_round_clusters(storage, config.near_duplicates, inputs)
    seed = replace(open_seed(storage, inputs), clusters=clusters)
    report_verdict_file(config.annotator, run, [seed, open_pool(storage, UNVERIFIED)])
    unverified = UnverifiedParts(config, human_tags_file(storage, config.human_tags), run, clusters)
    attributes, embeddings = unverified.begin(seed, inputs)
    labels = _label(config, run, 0, [], seed, attributes, embeddings, config.annotator.seed_pairs, seed_leaks(seed, inputs))
    if small := describe_small_gold(labels.gold_sizes):
        logger.warning("%s", small)
    then = _then(config, [], unverified.num_rows, inputs)
    known = [*unverified.tables, *leaks_so_far(storage, inputs)]
    rounds = [make_record(storage, run, 0, inputs, None, labels, Training(), then, candidates=known, simulated=config.simulated)]
    selected: set[str] = set()
    first_gold = gold_ids(labels.gold)
    while then is None:
        number = len(rounds)
        inputs = pin_inputs(storage, number, config.decontamination)
        unverified.extend(number, inputs)
        leaks = leaks_so_far(storage, inputs)
        labels = _drop_late_leaks(config, run, number, labels, selected & frozenset().union(*map(leaked_pairs, leaks)))
        best, trained = _train_best(config, run, number, labels, rounds[-1], config.round_parity)
        models = {f"best.r{number:02d}": best}
        rewards = score_pools(run, f"score gold, round {number}", [labels.gold.pool], models, config.score, config.round_parity).sidecars[0][0]
        candidates, gold_rm = _candidates(config, run, number, labels, models, unverified)
        chosen = select_round(storage, run, number, RoundSource(labels.gold, rewards, candidates, selected, leaks), config.selection_settings)
        selected, pool = selected | chosen.pair_ids, chosen.pool
        before, training = (labels, rounds[-1]), Training(trained, rewards, gold_margins(labels.gold, rewards, first_gold), chosen, gold_rm)
        if pool.num_rows:
            sources = {UNVERIFIED: unverified.attributes}, {UNVERIFIED: unverified.embeddings}
            tags, vectors = (
                gather_sidecars(name, schema, [(pool, source)])[0]
                for name, schema, source in zip(("attributes", "embeddings"), (ATTRIBUTES_SCHEMA, config.embed.schema), sources, strict=True)
            )
            labels = _label(config, run, number, labels.pools, pool, tags, vectors, config.annotator.round_pairs, dropped=labels.dropped)
        else:  # nothing joins; a round has its sets by its own name all the same
            labels = replace(labels, sets=save_label_sets(storage, f"r{number:02d}", labels.labels))
        accuracies = [*(entry["first_gold_accuracy"] for entry in rounds[1:]), training.first_gold.get("accuracy", 0.0)]
        then = _then(config, accuracies, pool.num_rows, inputs)
        known = [*unverified.tables, *leaks]
        rounds.append(make_record(storage, run, number, inputs, before, labels, training, then, candidates=known, simulated=config.simulated))
    return _finish(config, run, labels, rounds)


def _then(config: Stage1Config, accuracies: Sequence[float], num_new: int, read: RoundInputs) -> StopReason | None:
    """Return why no further round is run, None to go on; a pool that has run dry and then grown has new pairs."""
    has_grown = peek_inputs(config.storage, len(accuracies) + 1).unverified > read.unverified
    return stop_reason(accuracies, num_new_pairs=max(num_new, int(has_grown)), config=config.stop)


def _candidates(
    config: Stage1Config, run: Run, number: int, labels: Labels, models: Mapping[str, StoredModel], unverified: UnverifiedParts
) -> tuple[Candidates, StoredModel | None]:
    """Return what a round selects from; the unverified pool is scored only where the rule asks for it, by a gold RM too if it asks for one."""
    if config.selection.kind is not SelectionKind.UNCERTAINTY:
        return unverified.candidates, None
    gold_rm = _train_gold(config, run, f"gold-r{number:02d}", labels, config.round_parity) if config.selection.gold_rm else None
    models = {**models, **({f"gold.r{number:02d}": gold_rm} if gold_rm else {})}
    scored = score_pools(run, f"score unverified, round {number}", unverified.parts, models, config.score, config.round_parity)
    return replace(unverified.candidates, rewards=scored.sidecars), gold_rm


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
    *,
    dropped: Dropped = NONE_DROPPED,
) -> Labels:
    """Verify part of a new pool, judge the rest with all gold as exemplars, and label every pool of Stage 1 anew under the grown gold.

    Args:
        leaks: decisions about the new pool's own overlaps with benchmarks (the seed's).
        dropped: pairs of earlier rounds that stay out.
    """
    verified = verify_pool(run, f"verify, round {number}", pool, attributes, budget, config.annotator, config.gold, leaked_pairs(leaks))
    new = LabelledPool(pool, attributes, embeddings, verified.sidecars[0][0], leaks=leaks)
    return _judge_and_label(config, run, f"round {number}", f"r{number:02d}", earlier, new, dropped)


def _drop_late_leaks(config: Stage1Config, run: Run, number: int, labels: Labels, leaked: Set[str]) -> Labels:
    """Return the labels that a round begins with, without the pairs of earlier rounds that the decisions it goes by drop.

    Our choice: before the round trains and selects, so that no such pair trains its RM, is an exemplar, or calls for pairs like itself. All gold is
    judged anew where one of them was gold (or is again, under another setting), for exemplars are others then; the rest are labels alone.

    Args:
        leaked: these pairs.
    """
    if leaked == labels.dropped.pair_ids:
        return labels
    dropped, suffix = Dropped.among(labels.pools, leaked), f"r{number:02d}{WITHOUT_LEAKS}"
    logger.info(
        "round %d: %d pairs of earlier rounds leak by the decisions that it goes by; %d of them were gold", number, len(leaked), len(dropped.gold_ids)
    )
    if dropped.gold_ids != labels.dropped.gold_ids:
        return _judge_and_label(config, run, f"round {number}, without leaks", suffix, labels.pools, None, dropped)
    left = _label_pools(config, labels.pools, labels.trust, labels.gold, dropped)
    return replace(labels, labels=left, sets=save_label_sets(config.storage, suffix, left), dropped=dropped)


def _judge_and_label(
    config: Stage1Config, run: Run, where: str, suffix: str, earlier: Sequence[LabelledPool], new: LabelledPool | None, dropped: Dropped
) -> Labels:
    """Gather all gold and judge it, and the new pool's pairs with it as exemplars; label all pools under it."""
    pools = [*earlier, *([new] if new else [])]
    gathered = gather_gold(config.storage, f"gold-{suffix}", pools, config.gold, config.embed.schema, dropped)
    gold = use_edited_tags(run, where, gathered, human_tags_file(config.storage, config.human_tags), config.embed)
    votes: list[list[Sidecar]] = []
    for judge in config.judges:
        targets = [(gold.pool, gold.as_targets.embeddings), *([(new.pool, new.embeddings)] if new else [])]
        exemplars = find_exemplars(run, f"exemplars, {where}", targets, gold, judge.judge.max_exemplars, config.index)
        judged = [JudgedPool(gold.pool, gold.as_targets.attributes, exemplars[0], None)]
        judged += [JudgedPool(new.pool, new.attributes, exemplars[1], new.human)] if new else []
        votes.append(judge_pools(run, f"judge ({judge.judge.judge}), {where}", judged, gold, judge))
    gold_votes = [of_judge[0] for of_judge in votes]
    pools = [*earlier, *([new.judged([of_judge[1] for of_judge in votes])] if new else [])]
    trust, audit = measure_judges(gold, gold_votes, config.trust)
    labels = _label_pools(config, pools, trust, gold, dropped)
    sets = save_label_sets(config.storage, suffix, labels)
    return Labels(gold, pools, labels, gold_votes, sets, trust, audit, report_judges(gold, gold_votes), dropped)


def _label_pools(
    config: Stage1Config, pools: Sequence[LabelledPool], trust: Mapping[str, JudgeTrust], gold: GoldTables, dropped: Dropped
) -> list[Sidecar]:
    return [label_pool(p, merge_pool_votes(p.pool, p.attributes, p.votes, trust, config.merge), gold, dropped) for p in pools]


def _train_best(
    config: Stage1Config, run: Run, number: int, labels: Labels, record: Mapping[str, Any], parity: ParityConfig
) -> tuple[StoredModel, dict[str, Any]]:
    """Train on silver, pick the checkpoint on working gold (Sec. 3.2, Step 1), with the checks that keep gold clean.

    Args:
        record: of the round that left the labels.
    """
    silver, working = labels.sets["silver"], labels.sets["gold-working"]

    @cache
    def read_silver() -> pa.Table:
        pairs, gold = silver.read(), labels.gold.splits()
        check_silver(pairs, gold)
        check_best_rm_training(pairs, gold)
        return pairs

    model, trained = train_model(
        run,
        config.storage,
        f"best-r{number:02d}",
        train=(read_silver, silver.digest),
        gold=(working.read, working.digest),
        config=config.train,
        parity=parity,
        card=with_source_licences(config.card, config.storage),
        data_name=silver.name,
    )
    num_silver = record["set_sizes"]["silver"] if record["wrote"]["silver"] == silver.digest else silver.count()
    summary = {key: value for key, value in trained.model_dump(mode="json").items() if isinstance(value, int | float | str)}
    return model, {"model": model.name, "silver_pairs": num_silver, **summary}


def _train_gold(config: Stage1Config, run: Run, name: str, labels: Labels, parity: ParityConfig) -> StoredModel:
    """Train on working gold alone (Sec. 3.3)."""
    working = labels.sets["gold-working"]

    @cache
    def read_working() -> pa.Table:
        pairs = working.read()
        check_gold_rm_training(pairs, labels.gold.splits())
        return pairs

    model, _ = train_model(
        run,
        config.storage,
        name,
        train=(read_working, working.digest),
        gold=None,
        config=config.gold_train,
        parity=parity,
        card=with_source_licences(config.card, config.storage),
        data_name=working.name,
    )
    return model


def _finish(config: Stage1Config, run: Run, labels: Labels, rounds: list[dict[str, Any]]) -> str:
    best, _ = _train_best(config, run, len(rounds), labels, rounds[-1], config.final_parity)
    gold_rm = _train_gold(config, run, "gold", labels, config.final_parity)
    both = {"best": best, "gold": gold_rm}
    scored = score_pools(run, "score gold, final", [labels.gold.pool], both, config.score, config.final_parity).sidecars[0]
    final = {name: accuracy_on(gold_margins(labels.gold, rewards), GoldSplit.AUDIT) for name, rewards in zip(("best", "gold"), scored, strict=True)}
    record = {
        "best_rm": {"name": best.name, "digest": best.digest},
        "gold_rm": {"name": gold_rm.name, "digest": gold_rm.digest},
        "gold": gold_record(labels.gold),
        "sets": {name: {"name": pairs.name, "digest": pairs.digest} for name, pairs in labels.sets.items()},
        "simulated_gold": config.simulated,
        "audit_gold_accuracy": final,
        "tables": table_names(scored),
        "rounds": len(rounds) - 1,
        "stop_reason": rounds[-1]["decided"]["then"],
        **({"near_duplicates": clusters} if (clusters := labels.pools[0].pool.clusters) else {}),
    }
    config.storage.write_json(STAGE1_RECORD, record)
    forget_rounds(config.storage, rounds, labels.sets)  # after what no longer names them
    run.metrics.update({"stage1": record, "rounds": rounds})
    return closing_table(rounds, final, labels.gold_sizes, simulated=config.simulated)
