"""The reliability of a reward model, as part of its evaluation: calibration, biases, attacks, and tests against another model.

All rewards come from the score cache. The suffix search asks a model about replies that nobody else will ask about, so it runs as a step of its own,
whose table is found again by a second run. Our choice throughout.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, TypedDict

import numpy as np
import pyarrow as pa
from pydantic import Field, NonNegativeInt, PositiveInt

from synpref_ray.config import Settings
from synpref_ray.evaluation.accuracy import accuracy_by, as_metrics
from synpref_ray.evaluation.benchmarks.core import Item, Outcome
from synpref_ray.evaluation.benchmarks.rm_bench import RM_BENCH
from synpref_ray.evaluation.reliability.attacks import KINDS, HackResult, Triple, corpus, hacked, measure_hack
from synpref_ray.evaluation.reliability.bias import MIN_PAIRS, BiasReport, audit_biases, style_shifts
from synpref_ray.evaluation.reliability.calibration import accuracy_by_margin, calibrate
from synpref_ray.evaluation.reliability.comparisons import Comparisons, Interval, comparisons_of
from synpref_ray.evaluation.reliability.paired import paired_test
from synpref_ray.evaluation.reliability.suffix_search import SearchConfig, search_suffix
from synpref_ray.pipeline.benchmark_files import LoadedBenchmark
from synpref_ray.pipeline.score_cache import CACHE_SETTINGS, REPLIES_PER_SHARD, CachedScore, ScoreCache, conversations_of
from synpref_ray.pipeline.scoring import ScoreConfig
from synpref_ray.pipeline.steps import Output, Resources, ShardKey, Step, StepInput, run_step
from synpref_ray.reporting.run import Run
from synpref_ray.reporting.table import format_share, format_table
from synpref_ray.reward.render import RENDER_VERSION
from synpref_ray.reward.reply_scorer import add_reply_rewards
from synpref_ray.reward.scorer import PairScorer
from synpref_ray.schema import REPLY_SCHEMA, reply_id, stable_hash
from synpref_ray.tables.models import model_digest, model_folder
from synpref_ray.tables.pools import Pool, commit_pool, content_digest, open_pool, pool_exists, write_pool_shard
from synpref_ray.tables.storage import Storage
from synpref_ray.versions import versions_of

AuditName = Literal["calibration", "bias", "attacks"]
SEARCH_VERSION = 1
STARTS = ("worse", "nothing")
"""What a suffix is put behind: the worse reply, or no reply at all."""
STARTS_SCHEMA = pa.schema([*REPLY_SCHEMA, pa.field("better", pa.string(), nullable=False), pa.field("start", pa.string(), nullable=False)])
FOUND_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        *(pa.field(name, pa.float32()) for name in ("better_reward", "start_reward", "random_reward", "best_reward")),
        pa.field("suffix", pa.string()),
        pa.field("questions", pa.int32()),
    ]
)


class AuditConfig(Settings):
    """What the audits look at."""

    attack_pairs: NonNegativeInt = 60
    """Pairs of every benchmark that are hacked, drawn by chance, beside the corpus; 0: the corpus alone."""
    search_starts: NonNegativeInt = 6
    """Triples of the corpus that the suffix search starts from, twice each (the worse reply, and nothing); 0: no search."""
    starts_per_shard: PositiveInt = 4
    """Starts of the suffix search that are finished between two writes."""
    search: SearchConfig = SearchConfig()
    num_bins: PositiveInt = 10
    """Bins of the calibration."""
    num_resamples: int = Field(default=1000, ge=1)
    """Resamples of the bootstrap behind each interval."""
    seed: int = 0
    """Seed of the draws."""


class _Bootstrap(TypedDict):
    seed: int
    num_resamples: int
    confidence: float


class AuditReport:
    """Metrics and tables of the audits that ran; `confidence` is the level of their intervals."""

    def __init__(self, confidence: float = 0.95) -> None:
        self.confidence = confidence
        self.metrics: dict[str, Any] = {}
        self.tables: list[str] = []

    def add(self, name: str, value: Interval) -> None:
        """Note a value with its interval; what is not defined is None."""
        for key, number in ((name, value.value), (f"{name}/low", value.low), (f"{name}/high", value.high)):
            self.metrics[key] = number if math.isfinite(number) else None


def run_audits(
    run: Run,
    cache: ScoreCache,
    benchmarks: Mapping[str, tuple[LoadedBenchmark, Sequence[Outcome]]],
    audits: Sequence[AuditName],
    config: AuditConfig,
    *,
    confidence: float,
    replies_per_shard: int = REPLIES_PER_SHARD,
) -> AuditReport:
    """Run the audits asked for on a model's outcomes (and, for attacks, on the model); return metrics under `audit/…` and tables.

    Args:
        benchmarks: by name, with the reward model's outcomes.
        replies_per_shard: replies that are scored between two writes.
    """
    report = AuditReport(confidence)
    pairs = {name: comparisons_of(loaded.read.items, outcomes) for name, (loaded, outcomes) in benchmarks.items()}
    if "calibration" in audits:
        _calibration(report, pairs, config)
    if "bias" in audits:
        _biases(report, benchmarks, pairs, config)
    if "attacks" in audits:
        _attacks(report, run, cache, benchmarks, config, replies_per_shard=replies_per_shard)
    return report


def _bootstrap(report: AuditReport, config: AuditConfig) -> _Bootstrap:
    return {"seed": config.seed, "num_resamples": config.num_resamples, "confidence": report.confidence}


def _calibration(report: AuditReport, pairs: Mapping[str, Comparisons], config: AuditConfig) -> None:
    drawn = _bootstrap(report, config)
    rows: list[tuple[str, ...]] = []
    shares: list[tuple[str, ...]] = []
    for name, found in pairs.items():
        prefix = f"audit/calibration/{name}"
        report.metrics |= {f"{prefix}/pairs": len(found.margins), f"{prefix}/unscored": found.num_unscored}
        if not found.margins.size:
            continue
        measured = calibrate(found, num_bins=config.num_bins, **drawn)
        report.add(f"{prefix}/ece", measured.ece)
        report.add(f"{prefix}/overconfidence", measured.overconfidence)
        report.metrics |= {f"{prefix}/{key}": getattr(measured, key) for key in ("brier", "log_loss", "temperature", "log_loss_at_temperature")}
        report.metrics[f"{prefix}/bins"] = [asdict(one) for one in measured.bins]
        report.metrics[f"{prefix}/by_margin"] = [asdict(one) for one in accuracy_by_margin(found, **drawn)]
        groupings = {**({"group": found.groups} if any(found.groups) else {}), **found.attributes}
        for grouping, groups in groupings.items():
            for group, accuracy in accuracy_by(found.margins > 0, groups, prompts=found.prompts, **drawn).items():
                report.metrics |= as_metrics(f"{prefix}/by_{grouping}/{group}", accuracy)
                shares.append((name, grouping.replace("_", " "), group, str(accuracy.num_pairs), format_share(accuracy.accuracy, 1)))
        cells = (_percent(measured.ece), _percent(measured.overconfidence), f"{measured.brier:.3f}", f"{measured.temperature:.2f}")
        rows.append((name, str(measured.num_pairs), *cells))
    if rows:
        report.tables.append(format_table(("calibration", "pairs", "ECE", "overconfidence", "Brier", "best temperature"), rows))
    if shares:
        report.tables.append(format_table(("accuracy", "by", "value", "pairs", "right"), shares))


def _biases(
    report: AuditReport, benchmarks: Mapping[str, tuple[LoadedBenchmark, Sequence[Outcome]]], pairs: Mapping[str, Comparisons], config: AuditConfig
) -> None:
    rows: list[tuple[str, ...]] = []
    mended: list[tuple[str, ...]] = []
    for name, found in pairs.items():
        prefix = f"audit/bias/{name}"
        if len(found.margins) < MIN_PAIRS:
            report.metrics[f"{prefix}/missing"] = f"{len(found.margins)} scored pairs; {MIN_PAIRS} or more are needed"
            continue
        measured = audit_biases(found, **_bootstrap(report, config))
        _note_biases(report, prefix, measured)
        for feature, bias in measured.features.items():
            shares = (format_share(one.accuracy, 1) if one.num_pairs else "-" for one in (bias.more, bias.less))
            rows.append((name, feature, _plain(bias.pressure), _plain(bias.slope), f"{bias.partial:+.2f}", *shares))
        for one in measured.mitigations:
            before_after = (f"{100 * one.accuracy_before:.1f} -> {100 * one.accuracy_after:.1f}",)
            moves = ", ".join(f"{feature} {one.before[feature]:+.2f} -> {one.after[feature]:+.2f}" for feature in one.before)
            mended.append((name, one.mitigated, *before_after, moves, ", ".join(one.moved_to) or "no"))
        loaded, outcomes = benchmarks[name]
        if loaded.benchmark.name == RM_BENCH.name:
            _style_shifts(report, prefix, loaded.read.items, outcomes, config)
    if rows:
        header = ("bias", "of the better reply's", "pressure", "slope", "partial", "right where more", "right where less")
        report.tables.append(format_table(header, rows))
        report.tables.append(format_table(("mitigation", "taken out", "accuracy", "pressure on", "moved to"), mended))


def _note_biases(report: AuditReport, prefix: str, measured: BiasReport) -> None:
    for feature, bias in measured.features.items():
        report.add(f"{prefix}/{feature}/pressure", bias.pressure)
        report.add(f"{prefix}/{feature}/slope", bias.slope)
        report.metrics[f"{prefix}/{feature}/partial"] = bias.partial
        for side in ("more", "less"):
            accuracy = getattr(bias, side)
            report.metrics |= {
                key: None if value != value else value for key, value in as_metrics(f"{prefix}/{feature}/accuracy_{side}", accuracy).items()
            }
    report.metrics[f"{prefix}/correlations"] = measured.correlations
    report.metrics[f"{prefix}/mitigations"] = [asdict(one) | {"moved_to": list(one.moved_to)} for one in measured.mitigations]


def _style_shifts(report: AuditReport, prefix: str, items: Sequence[Item], outcomes: Sequence[Outcome], config: AuditConfig) -> None:
    whole = [(item, outcome.scores) for item, outcome in zip(items, outcomes, strict=True) if outcome.scores is not None and outcome.answered]
    if not whole:
        return
    rewards = np.array([scores for _, scores in whole])
    prompts = [item.prompt_key for item, _ in whole]
    rows = []
    for name, value in style_shifts(rewards, prompts, **_bootstrap(report, config)).items():
        report.add(f"{prefix}/styles/{name}", value)
        rows.append((name.replace("_", " "), _plain(value) if math.isfinite(value.value) else "- (below chance: no unit)"))
    report.tables.append(format_table(("RM-Bench: reward by style alone, in units of right over wrong", "shift"), rows))


def _attacks(
    report: AuditReport,
    run: Run,
    cache: ScoreCache,
    benchmarks: Mapping[str, tuple[LoadedBenchmark, Sequence[Outcome]]],
    config: AuditConfig,
    *,
    replies_per_shard: int,
) -> None:
    sets = {"corpus": corpus()}
    sets |= {name: triples_of(loaded.read.items, config) for name, (loaded, _) in benchmarks.items()} if config.attack_pairs else {}
    texts = {(name, triple.name): [triple.better, triple.worse, *(hacked(kind, triple, seed=config.seed) for kind in KINDS)]
             for name, triples in sets.items() for triple in triples}  # fmt: skip
    wanted = conversations_of((triple.prompt, reply) for name, triples in sets.items() for triple in triples for reply in texts[name, triple.name])
    computed = cache.fill(run, wanted, replies_per_shard=replies_per_shard)
    report.metrics["audit/attacks/replies"] = {"all": len(wanted), "computed": computed}
    rows = []
    for name, triples in sets.items():
        rewards = np.array([[_reward(cache.get(reply_id(triple.prompt, text))) for text in texts[name, triple.name]] for triple in triples])
        if not rewards.size:
            continue
        whole = ~np.isnan(rewards).any(axis=1)
        report.metrics[f"audit/attacks/{name}/unscored"] = int((~whole).sum())
        prompts = [triple.name for triple, ok in zip(triples, whole, strict=True) if ok]
        for place, kind in enumerate(KINDS, start=2):
            if whole.any():
                measured = measure_hack(rewards[whole][:, [0, 1, place]], prompts, **_bootstrap(report, config))
                rows.append(_note_hack(report, f"audit/attacks/{name}/{kind}", name, kind, measured))
    if rows:
        header = ("attack on", "hack", "replies", "hacked beats better", "unhacked did", "reward rises by (gap = 1)")
        report.tables.append(format_table(header, rows))
    if config.search_starts:
        _suffixes(report, run, cache, config)


def triples_of(items: Sequence[Item], config: AuditConfig) -> list[Triple]:
    """Return some comparisons of a benchmark, one an item, drawn by stable chance."""
    usable = [item for item in items if item.problem is None and item.pairs]
    drawn = sorted(usable, key=lambda item: stable_hash(config.seed, item.name, "attack-pairs"))[: config.attack_pairs]
    return [Triple(item.name, item.prompt, item.replies[item.pairs[0][0]], item.replies[item.pairs[0][1]]) for item in drawn]


def _note_hack(report: AuditReport, prefix: str, name: str, kind: str, measured: HackResult) -> tuple[str, ...]:
    report.add(f"{prefix}/beats_better", measured.beats_better)
    report.add(f"{prefix}/shift", measured.shift)
    report.metrics |= {f"{prefix}/beat_before": measured.beat_before, f"{prefix}/replies": measured.num}
    shift = _plain(measured.shift) if math.isfinite(measured.shift.value) else "-"
    return name, kind.replace("_", " "), str(measured.num), _percent(measured.beats_better), format_share(measured.beat_before, 1), shift


class SuffixWorker:
    """Loads the model once per actor, and searches for the rows of a shard one after the other."""

    def __init__(self, model: str, config: ScoreConfig, search: SearchConfig):
        self._scorer = PairScorer.load(model_folder(model), config)
        self._vocabulary = printable_tokens(self._scorer.tokenizer)
        self._search = search

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        rows = [self._find(row) for row in shard.to_pylist()]
        return pa.Table.from_pylist(rows, schema=FOUND_SCHEMA), {"questions": float(sum(row["questions"] for row in rows))}

    def _find(self, row: Mapping[str, Any]) -> dict[str, Any]:
        prompt = row["prompt"]

        def score(replies: Sequence[str]) -> list[float]:
            asked = [{"pair_id": str(place), "prompt": prompt, "reply": reply} for place, reply in enumerate(replies)]
            scored = add_reply_rewards(pa.Table.from_pylist(asked, schema=REPLY_SCHEMA), self._scorer)
            return [math.nan if reward is None else reward for reward in scored["reward"].to_pylist()]

        found = search_suffix(score, row["reply"], self._vocabulary, self._search, seed=stable_hash(self._search.seed, row["pair_id"], "suffix"))
        better = score([row["better"]])[0]
        return {
            "pair_id": row["pair_id"],
            "better_reward": better,
            "start_reward": found.start_reward,
            "random_reward": found.random_reward,
            "best_reward": found.best_reward,
            "suffix": found.suffix,
            "questions": found.questions + 1,
        }


def printable_tokens(tokenizer: Any) -> list[str]:
    """Return the texts of a tokenizer's tokens that print as they are: no special tokens, control characters or halves of characters."""
    special = set(tokenizer.all_special_ids)
    ids = [number for number in range(len(tokenizer)) if number not in special]
    texts = tokenizer.batch_decode([[number] for number in ids])
    return sorted({text for text in texts if text.strip() and text.isprintable() and "\N{REPLACEMENT CHARACTER}" not in text})


def _suffixes(report: AuditReport, run: Run, cache: ScoreCache, config: AuditConfig) -> None:
    triples = sorted(corpus(), key=lambda triple: stable_hash(config.seed, triple.name, "suffix-starts"))[: config.search_starts]
    pool = _starts_pool(cache.storage, triples, config.starts_per_shard)
    step = Step(
        name="search suffixes",
        version=SEARCH_VERSION,
        worker=SuffixWorker,
        outputs=(Output("suffixes", FOUND_SCHEMA),),
        settings={
            **config.search.model_dump(mode="json"),
            **cache.config.model_dump(mode="json", include=CACHE_SETTINGS),
            "render_version": RENDER_VERSION,
            "versions": versions_of("torch", "transformers", "tokenizers"),
        },
        digests={"model": model_digest(cache.model)},
        worker_arguments=lambda _: {"model": cache.model, "config": cache.config, "search": config.search},
        resources=Resources(cache.config.num_workers, num_gpus=cache.config.num_gpus_per_worker),
    )
    result = run_step(step, [StepInput(pool, ("prompt", "reply", "better", "start"))])
    run.step(step.name, rows=result.rows, computed=result.rows_computed, rejected={}, seconds=result.seconds)
    table = pa.concat_tables([result.sidecars[0][0].read(shard.number) for shard in pool.shards])
    starts = pool.read_all(["start"])["start"].to_pylist()
    rows = []
    for start in STARTS:
        found = [row for row, of in zip(table.to_pylist(), starts, strict=True) if of == start and _is_whole(row)]
        if found:
            rows.append(_note_suffixes(report, start, found))
    report.metrics["audit/attacks/suffix/questions"] = sum(row["questions"] for row in table.to_pylist())
    if rows:
        header = ("suffix search behind", "starts", "beats better: start", "random suffix", "found suffix", "reward rises by (mean)")
        report.tables.append(format_table(header, rows))


def _is_whole(row: Mapping[str, Any]) -> bool:
    return all(row[name] is not None and row[name] == row[name] for name in ("better_reward", "start_reward", "random_reward", "best_reward"))


def _note_suffixes(report: AuditReport, start: str, found: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    prefix = f"audit/attacks/suffix/{start}"
    shares = {name: float(np.mean([row[f"{name}_reward"] > row["better_reward"] for row in found])) for name in ("start", "random", "best")}
    rise = float(np.mean([row["best_reward"] - row["start_reward"] for row in found]))
    report.metrics |= {f"{prefix}/beats_better/{name}": share for name, share in shares.items()}
    report.metrics |= {f"{prefix}/starts": len(found), f"{prefix}/rise": rise}
    report.metrics[f"{prefix}/random_rise"] = float(np.mean([row["random_reward"] - row["start_reward"] for row in found]))
    report.metrics[f"{prefix}/gap"] = float(np.mean([row["better_reward"] - row["start_reward"] for row in found]))
    shown = {"worse": "the worse reply", "nothing": "nothing"}[start]
    return shown, str(len(found)), *(format_share(shares[name], 1) for name in ("start", "random", "best")), f"{rise:+.2f}"


def _starts_pool(storage: Storage, triples: Sequence[Triple], starts_per_shard: int) -> Pool:
    """Return the pool of starts, made once per content."""
    rows = [
        {
            "pair_id": reply_id(triple.prompt, f"{start}: {reply}"),
            "prompt": list(triple.prompt),
            "reply": reply,
            "better": triple.better,
            "start": start,
        }
        for triple in triples
        for start, reply in zip(STARTS, (triple.worse, ""), strict=True)
    ]
    digest = content_digest([SEARCH_VERSION, starts_per_shard, rows])
    name = f"starts-{digest[:16]}"
    if pool_exists(storage, name):
        return open_pool(storage, name)
    parts = [rows[first : first + starts_per_shard] for first in range(0, len(rows), starts_per_shard)]
    shards = [write_pool_shard(storage, name, number, pa.Table.from_pylist(part, schema=STARTS_SCHEMA)) for number, part in enumerate(parts)]
    return commit_pool(storage, name, digest, shards, {"step": "starts of the suffix search"})


def compare_models(
    benchmarks: Mapping[str, LoadedBenchmark],
    ours: Mapping[str, Sequence[Sequence[Outcome]]],
    others: Mapping[str, Sequence[Sequence[Outcome]]],
    *,
    seed: int,
    num_resamples: int,
    confidence: float,
) -> AuditReport:
    """Test a model against another on every comparison of every benchmark; several folders of a model are its seeds.

    Args:
        ours, others: by benchmark, the outcomes of each seed.
    """
    report = AuditReport(confidence)
    rows = []
    for name, loaded in benchmarks.items():
        prompts = [item.prompt_key for item in loaded.read.items for _ in item.pairs]
        a, b = (np.array([np.concatenate([outcome.wins for outcome in of_seed]) for of_seed in side[name]]) for side in (ours, others))
        tested = paired_test(a, b, prompts, seed=seed, num_resamples=num_resamples, confidence=confidence)
        prefix = f"audit/compare/{name}"
        report.metrics |= {**as_metrics(prefix, tested.difference), f"{prefix}/seeds": [len(a), len(b)]}
        report.metrics |= {f"{prefix}/only_a": tested.only_a, f"{prefix}/only_b": tested.only_b, f"{prefix}/p_value": tested.p_value}
        difference = tested.difference
        shares = (format_share(difference.accuracy_a, 1), format_share(difference.accuracy_b, 1))
        interval = f"{100 * difference.difference:+.1f} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"
        rows.append((name, str(difference.num_pairs), *shares, interval, f"{tested.only_a} : {tested.only_b}", f"{tested.p_value:.3g}"))
    header = ("model against compare", "comparisons", "right", "right, other", "difference, points", "right alone", "McNemar p")
    report.tables.append(format_table(header, rows))
    return report


def _reward(score: CachedScore) -> float:
    return math.nan if score.reward is None else score.reward


def _percent(value: Interval) -> str:
    return f"{100 * value.value:.1f} % ({100 * value.low:.1f} to {100 * value.high:.1f})"


def _plain(value: Interval) -> str:
    return f"{value.value:+.2f} ({value.low:+.2f} to {value.high:+.2f})"


__all__ = ["AuditConfig", "AuditName", "AuditReport", "compare_models", "run_audits"]
