"""Official numbers of a reward model, and of LLM judges, on benchmarks and on files of pairs, with intervals.

Paper: Sec. 4: accuracy is strict, a tie is wrong; each benchmark has its own metrics (`evaluation/benchmarks/`). Our choice: an item that cannot be
scored counts as wrong and is named in the table, so that a model cannot gain by refusing.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import ray
from pydantic import Field, field_validator

from synpref_ray.errors import ConfigError
from synpref_ray.evaluation.accuracy import as_metrics, pair_accuracy
from synpref_ray.evaluation.benchmarks.core import Item, Measured, Outcome, outcome_of_scores
from synpref_ray.evaluation.benchmarks.estimates import NUM_RESAMPLES, Estimate, estimate
from synpref_ray.ingest.readers import open_binary
from synpref_ray.pipeline.audits import AuditConfig, AuditName, compare_models, run_audits
from synpref_ray.pipeline.benchmark_files import FoundBenchmark, LoadedBenchmark, find_benchmarks, load_benchmark
from synpref_ray.pipeline.benchmark_judges import judge_outcomes
from synpref_ray.pipeline.benchmark_overlap import ContaminationConfig, shared_items
from synpref_ray.pipeline.cluster import probe_workspace
from synpref_ray.pipeline.gold_benchmark import AUDIT_GOLD, audit_gold
from synpref_ray.pipeline.job import JobConfig
from synpref_ray.pipeline.judge_steps import JudgeStepConfig
from synpref_ray.pipeline.score_cache import FINAL_REASONS, REPLIES_PER_SHARD, ScoreCache, conversations_of
from synpref_ray.pipeline.score_file import FileScoring, ScoredFile
from synpref_ray.pipeline.scoring import ScoreConfig
from synpref_ray.reporting.run import Run
from synpref_ray.reporting.table import format_share, format_table
from synpref_ray.schema import reply_id
from synpref_ray.tables.models import model_digest, model_folder
from synpref_ray.tables.storage import Storage

MODEL_ROW = "reward model"


class EvaluateConfig(JobConfig):
    """Which model on which benchmarks: known names with their files under `data`, or files of pairs (paths, or names under `data`)."""

    model: str = ""
    """A reward model's folder, or a hub name; empty: judges alone."""
    benchmarks: tuple[str, ...] = Field(min_length=1)
    """Names or paths; a single one may stand alone."""
    data: str = "."
    """The folder of benchmarks: official files in folders by name, and files of pairs."""
    from_hub: bool = False
    """Whether benchmarks without files here are streamed from the Hugging Face hub."""
    judges: tuple[JudgeStepConfig, ...] = ()
    """LLM judges to run on the same comparisons, without exemplars and attributes."""
    cache: str = ""
    """A folder (or an s3:// prefix) for rewards that several workspaces share; empty: `scores` in the workspace."""
    sample_fraction: float = Field(default=1.0, gt=0.0, le=1.0)
    """Take a seeded part of the items only: for a quick look; the numbers are not the official ones then."""
    seed: int = 0
    """Of the sample and of the bootstrap."""
    num_resamples: int = Field(default=NUM_RESAMPLES, ge=1)
    """Resamples of the bootstrap behind each interval."""
    confidence: float = Field(default=0.95, gt=0.0, lt=1.0)  # ours: the usual two-sided level
    """Level of all intervals, those of the audits too."""
    contamination: ContaminationConfig = ContaminationConfig()
    audit_gold: bool = False
    """Also measure on the audit gold of this workspace (as `audit_gold`), which knows its attributes."""
    audits: tuple[AuditName, ...] = ()
    """What is looked at beside the benchmarks' own metrics: calibration, bias, attacks (docs/evaluation.md, Reliability)."""
    audit: AuditConfig = AuditConfig()
    compare: tuple[str, ...] = ()
    """Folders of another model to test this one against, one a seed of its training."""
    model_seeds: tuple[str, ...] = ()
    """Further seeds of `model`, for that test alone."""
    replies_per_shard: int = Field(default=REPLIES_PER_SHARD, ge=1)
    """Replies that are scored between two writes."""
    score: ScoreConfig = ScoreConfig()
    reading: FileScoring = FileScoring()

    @field_validator("benchmarks", "audits", "compare", "model_seeds", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @property
    def cache_storage(self) -> Storage:
        """Where rewards are kept."""
        return Storage(self.cache or self.storage.join("scores"))


def benchmark_files(config: EvaluateConfig) -> Mapping[str, FoundBenchmark]:
    """Return every benchmark with its files, by its name (that of a file: its name without its ending).

    Raises:
        InputError: a benchmark is not there, or two have one name.
    """
    return find_benchmarks(config.benchmarks, config.data, from_hub=config.from_hub)


def check_evaluate(config: EvaluateConfig) -> None:
    """Check the model's folder, the judges' models and the benchmarks' files."""
    names = [judge.judge.judge for judge in config.judges]
    if not config.model and not names:
        raise ConfigError("name a model to evaluate (model=FOLDER), or judges")
    if not config.model and (config.audits or config.compare):
        raise ConfigError("audits and compare are of a reward model's rewards: name a model (model=FOLDER)")
    if config.model_seeds and not config.compare:
        raise ConfigError("model_seeds are for the test against another model alone: name its folders too (compare=[FOLDER])")
    for folder in (*config.compare, *config.model_seeds):
        model_folder(folder, weights=False)
    if len(set(names)) != len(names):
        raise ConfigError(f"every judge needs a name of its own, found {', '.join(names)}")
    if config.model:
        model_folder(config.model, weights=False)
    for judge in config.judges:
        judge.check()
    for found in benchmark_files(config).values():
        for file in found.files:
            with open_binary(file):
                pass


def correct_flags(scored: ScoredFile) -> tuple[npt.NDArray[np.bool_], int]:
    """Return, for every row of a scored file, whether chosen ranks strictly above rejected, and how many rows are unscored: those are wrong."""
    flags, unscored = [np.zeros(0, dtype=bool)], 0
    for table in scored.tables():
        flags.append(np.asarray(pc.fill_null(pc.greater(table["margin"], 0), False), dtype=bool))
        unscored += table["margin"].null_count
    return np.concatenate(flags), unscored


def run_evaluate(config: EvaluateConfig, run: Run) -> str:
    """Evaluate the model and the judges; return the closing tables."""
    found = benchmark_files(config)
    loaded = [load_benchmark(one, config.reading.columns, sample_fraction=config.sample_fraction, seed=config.seed) for one in found.values()]
    if config.audit_gold:
        loaded.append(audit_gold(config))
        found = {**found, AUDIT_GOLD: FoundBenchmark(AUDIT_GOLD, None)}
    shared = shared_items(run, config.storage, loaded, config.contamination)
    scorers: dict[str, dict[str, list[Outcome]]] = {}
    if config.model:
        run.metrics["model_digest"] = model_digest(config.model)
        scorers[MODEL_ROW] = _model_outcomes(config, run, loaded)
    for judge in config.judges:
        scorers[judge.judge.judge] = judge_outcomes(run, config.storage, loaded, judge)
    run.metrics["benchmarks"] = {one.name: _about(one, found[one.name], shared[one.name], config) for one in loaded}
    rows: list[tuple[str, ...]] = []
    notes: list[str] = []
    for benchmark in loaded:
        for scorer, outcomes in scorers.items():
            measured = _measure(benchmark, scorer, outcomes[benchmark.name], config)
            run.metrics.update(measured.metrics)
            rows += measured.rows
            notes += measured.notes
            if shared[benchmark.name]:
                run.metrics.update(_clean_metrics(benchmark, scorer, outcomes[benchmark.name], shared[benchmark.name], config))
        notes += _notes(benchmark, shared[benchmark.name], config)
    header = ("benchmark", "scorer", "metric", "value", f"{config.confidence:.0%} interval", "items", "unscored", "verified")
    notes += _without_reward(run.metrics.get("replies_without_reward", {}))
    return "\n".join([format_table(header, rows), *dict.fromkeys(notes), *_audit_tables(config, run, loaded, scorers.get(MODEL_ROW, {}))])


def _audit_tables(config: EvaluateConfig, run: Run, benchmarks: Sequence[LoadedBenchmark], outcomes: Mapping[str, list[Outcome]]) -> list[str]:
    """Run the audits and the test against another model; return their tables, each after an empty line."""
    reports = []
    by_name = {one.name: one for one in benchmarks}
    if config.audits:
        cache = ScoreCache(config.cache_storage, config.model, config.score)
        audited = {name: (by_name[name], found) for name, found in outcomes.items()}
        reports.append(
            run_audits(run, cache, audited, config.audits, config.audit, confidence=config.confidence, replies_per_shard=config.replies_per_shard)
        )
    if config.compare:
        seeds = [outcomes, *(_outcomes_of(config, run, folder, benchmarks) for folder in config.model_seeds)]
        others = [_outcomes_of(config, run, folder, benchmarks) for folder in config.compare]
        sides = ({name: [one[name] for one in side] for name in by_name} for side in (seeds, others))
        reports.append(compare_models(by_name, *sides, seed=config.seed, num_resamples=config.num_resamples, confidence=config.confidence))
    for report in reports:
        run.metrics.update(report.metrics)
    return [f"\n{table}" for report in reports for table in report.tables]


def _model_outcomes(config: EvaluateConfig, run: Run, benchmarks: Sequence[LoadedBenchmark]) -> dict[str, list[Outcome]]:
    if config.cache and ray.is_initialized():
        probe_workspace(config.cache_storage)
    return _outcomes_of(config, run, config.model, benchmarks, count=True)


def _outcomes_of(
    config: EvaluateConfig, run: Run, model: str, benchmarks: Sequence[LoadedBenchmark], *, count: bool = False
) -> dict[str, list[Outcome]]:
    cache = ScoreCache(config.cache_storage, model, config.score)
    every = conversations_of((item.prompt, reply) for one in benchmarks for item in one.read.items if item.problem is None for reply in item.replies)
    computed = cache.fill(run, every, replies_per_shard=config.replies_per_shard)
    if count:
        run.metrics["replies"] = {"all": len(every), "computed": computed, "from_cache": len(every) - computed}
        reasons = Counter(reason for name in every if (reason := cache.get(name).drop_reason) is not None)
        run.metrics["replies_without_reward"] = dict(sorted(reasons.items()))
    return {one.name: [_outcome(item, cache) for item in one.read.items] for one in benchmarks}


def _outcome(item: Item, cache: ScoreCache) -> Outcome:
    if item.problem is not None:
        return outcome_of_scores(item, np.full(len(item.replies), np.nan))
    rewards = (cache.get(reply_id(item.prompt, reply)).reward for reply in item.replies)
    return outcome_of_scores(item, [np.nan if reward is None else reward for reward in rewards])


class _Report:
    """One scorer's metrics on one benchmark, as metrics, table rows and notes."""

    def __init__(self) -> None:
        self.metrics: dict[str, Any] = {}
        self.rows: list[tuple[str, ...]] = []
        self.notes: list[str] = []


def _measure(loaded: LoadedBenchmark, scorer: str, outcomes: Sequence[Outcome], config: EvaluateConfig) -> _Report:
    benchmark, report = loaded.benchmark, _Report()
    prefix = _prefix(loaded.name, scorer)
    measured = benchmark.measure(loaded.read.items, outcomes)
    estimates = _estimates(measured, config)
    unscored = sum(not outcome.answered for outcome in outcomes)
    report.metrics[f"{prefix}/unscored"] = unscored
    for name, value in estimates.items():
        items, official = benchmark.items_behind(name, loaded.read)
        report.metrics |= _as_metrics(f"{prefix}/{name}", value) | {f"{prefix}/{name}/verified": benchmark.verified_for(name).value}
        report.metrics |= {f"{prefix}/{name}/items": items, f"{prefix}/{name}/official_items": official}
    if measured.missing:
        report.metrics[f"{prefix}/missing"] = dict(measured.missing)
        report.notes += [f"{loaded.name}, {scorer}: no {name}: {reason}" for name, reason in measured.missing.items()]
    if loaded.is_pair_file:
        report.metrics |= dict(as_metrics(prefix, pair_accuracy(np.array([outcome.wins[0] for outcome in outcomes]), confidence=config.confidence)))
    for name in benchmark.headline:
        if name in estimates:
            items, official = benchmark.items_behind(name, loaded.read)
            counts = (f"{items}/{official}" if official else str(items), str(unscored))
            cells = (format_share(estimates[name].value, 1), _interval(estimates[name]), *counts)
            report.rows.append((loaded.name, scorer, name, *cells, benchmark.verified_for(name).value))
    return report


def _clean_metrics(
    loaded: LoadedBenchmark, scorer: str, outcomes: Sequence[Outcome], shared: set[str], config: EvaluateConfig
) -> dict[str, float | None]:
    """Return the headline metrics over the items whose prompt is in no pool that was looked through."""
    clean = [(item, outcome) for item, outcome in zip(loaded.read.items, outcomes, strict=True) if item.name not in shared]
    if not clean:
        return {}
    estimates = _estimates(loaded.benchmark.measure([item for item, _ in clean], [outcome for _, outcome in clean]), config)
    metrics: dict[str, float | None] = {}
    for name in loaded.benchmark.headline:
        if name in estimates:
            metrics |= _as_metrics(f"{_prefix(loaded.name, scorer)}/clean/{name}", estimates[name])
    return metrics


def _estimates(measured: Measured, config: EvaluateConfig) -> dict[str, Estimate]:
    return estimate(measured, seed=config.seed, num_resamples=config.num_resamples, confidence=config.confidence)


def _prefix(benchmark: str, scorer: str) -> str:
    return benchmark if scorer == MODEL_ROW else f"{benchmark}/judge.{scorer}"


def _as_metrics(name: str, value: Estimate) -> dict[str, float | None]:
    return {name: value.value, f"{name}/low": value.low, f"{name}/high": value.high}


def _interval(value: Estimate) -> str:
    return "-" if value.low is None or value.high is None else f"{100 * value.low:.1f} to {100 * value.high:.1f}"


def _about(loaded: LoadedBenchmark, found: FoundBenchmark, shared: set[str], config: EvaluateConfig) -> dict[str, Any]:
    """Return what was read, for the record."""
    return {
        "items": len(loaded.read.items),
        "is_official": bool(loaded.benchmark.folders),
        "official_items": loaded.benchmark.num_items or None,
        "sample_fraction": config.sample_fraction,
        "files": found.places,
        "left_out": dict(loaded.read.left_out),
        "contamination_pools": list(config.contamination.pools),
        "contaminated_items": sorted(shared) if config.contamination.pools else None,
    }


def _without_reward(reasons: Mapping[str, int]) -> list[str]:
    """Return a note of the replies without a reward, by reason, and of which of them the next run asks again."""
    if not reasons:
        return []
    again = sum(count for reason, count in reasons.items() if reason not in FINAL_REASONS)
    counts = ", ".join(f"{reason} {count}" for reason, count in reasons.items())
    return [f"{MODEL_ROW}: replies without a reward: {counts}" + (f"; the next run asks for {again} of them again" if again else "")]


def _notes(loaded: LoadedBenchmark, shared: set[str], config: EvaluateConfig) -> list[str]:
    notes = [f"{loaded.name}: {count} {what} left out" for what, count in loaded.read.left_out.items()]
    if config.contamination.pools:
        pools = ", ".join(config.contamination.pools)
        notes.append(f"{loaded.name}: {len(shared)} of {len(loaded.read.items)} items share their prompt with {pools}")
    if config.sample_fraction < 1.0:
        notes.append(f"{loaded.name}: a sample of {config.sample_fraction:.0%} of the items, not the official set")
    return notes
