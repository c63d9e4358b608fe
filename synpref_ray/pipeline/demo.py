"""The whole loop once, on data with known truth: ingest, Stage 1, Stage 2, train, evaluate, and a final report that may look at the truth.

Truth is read in two places only: by the simulated annotator, for the budgeted pairs, and by the final report at the end of this module. Both say so.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from synpref_ray.config import load_config
from synpref_ray.errors import InputError
from synpref_ray.evaluation.accuracy import Accuracy, Difference, bootstrap_accuracy, paired_bootstrap
from synpref_ray.evaluation.label_quality import LabelQuality, label_quality
from synpref_ray.human.simulated import read_truth
from synpref_ray.ingest.source import Route, SourceConfig
from synpref_ray.pipeline.evaluate import correct_flags
from synpref_ray.pipeline.ingest import check_ingest, run_ingest
from synpref_ray.pipeline.ingest_sources import IngestConfig
from synpref_ray.pipeline.job import JobConfig
from synpref_ray.pipeline.licences import with_source_licences
from synpref_ray.pipeline.report_page import write_report
from synpref_ray.pipeline.score_file import FileScoring, score_file
from synpref_ray.pipeline.scoring import ScoreConfig
from synpref_ray.pipeline.stage1 import STAGE1_RECORD, Stage1Config, run_stage1
from synpref_ray.pipeline.stage2 import STAGE2_RECORD, Stage2Config, load_stage1, run_stage2
from synpref_ray.pipeline.train_set import TrainJobConfig
from synpref_ray.pipeline.training import train_model
from synpref_ray.reporting.run import Run
from synpref_ray.reporting.table import format_share, format_table
from synpref_ray.rules.gold import check_best_rm_training
from synpref_ray.schema import stable_hash
from synpref_ray.tables.models import StoredModel
from synpref_ray.tables.pools import Pool, content_digest, open_pool
from synpref_ray.tables.sets import load_set
from synpref_ray.tables.sidecars import open_sidecar, zip_shard

SHARD_PAIRS = 64  # ours: the demo's pools are hundreds of pairs, and a kill should lose little of them


class DemoConfig(JobConfig):
    """Where the demo's data and the configs of its jobs are, the simulated annotator's budget, and the seeds of the comparison."""

    data: str = "examples/data"
    """The folder with the embedded example."""
    stage1_config: str = "jobs/configs/laptop_stage1.yaml"
    """Settings of Stage 1."""
    stage2_config: str = "jobs/configs/laptop_stage2.yaml"
    """Settings of Stage 2."""
    train_config: str = "jobs/configs/laptop_train.yaml"
    """Settings of the final trainings."""
    seed_gold_pairs: int = Field(default=80, ge=1)
    """Pairs of the seed that the simulated annotator may look up."""
    round_gold_pairs: int = Field(default=40, ge=0)
    """Retrieved pairs that it may look up in each round."""
    comparison_seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    """Seeds of the final trainings on curated and on raw pairs."""

    @property
    def truth(self) -> str:
        """The truth file; handed to the simulated annotator and the final report, and to nothing else."""
        return f"{self.data}/truth.parquet"

    @property
    def held_out(self) -> str:
        """Pairs whose prompts are of the pools' kinds and share no topic, word, category or number with theirs."""
        return f"{self.data}/held_out.parquet"

    def ingest(self) -> IngestConfig:
        """Return the ingest job's config."""
        sources = tuple(SourceConfig(name=f"demo-{route.value}", path=f"{self.data}/pools/{route.value}.jsonl", route=route) for route in Route)
        return IngestConfig(workspace=self.workspace, ray=self.ray, sources=sources, max_pairs_per_shard=SHARD_PAIRS)

    def stage1(self) -> Stage1Config:
        """Return Stage 1's config, with the simulated annotator."""
        annotator = [
            "annotator.kind=simulated",
            f"annotator.path={self.truth}",
            f"annotator.seed_pairs={self.seed_gold_pairs}",
            f"annotator.round_pairs={self.round_gold_pairs}",
        ]
        return load_config(Stage1Config, self.stage1_config, [f"workspace={json.dumps(self.workspace)}", *annotator])

    def stage2(self) -> Stage2Config:
        """Return Stage 2's config."""
        return load_config(Stage2Config, self.stage2_config, [f"workspace={json.dumps(self.workspace)}"])

    def training(self) -> TrainJobConfig:
        """Return the training job's config."""
        return load_config(TrainJobConfig, self.train_config, [f"workspace={json.dumps(self.workspace)}"])


def check_demo(config: DemoConfig) -> None:
    """Check that the data and the configs are there."""
    for file in (config.truth, config.held_out):
        if not Path(file).is_file():
            raise InputError(f"the demo's data is incomplete: there is no {file}; examples/make_pool.py makes it")
    check_ingest(config.ingest())
    config.stage1()
    config.stage2()
    config.training()


def run_demo(config: DemoConfig, run: Run) -> str:
    """Run every job once; return the closing table."""
    stage1, stage2, training = config.stage1(), config.stage2(), config.training()  # now: a file that changes meanwhile changes nothing
    run_ingest(config.ingest(), run)
    stage1_table = run_stage1(stage1, run)
    stage2_table = run_stage2(stage2, run)
    models = _train_pair(config, training, run)
    final = _final_report(config, stage2.score, run, models)
    page, *_ = write_report(config.storage, config.storage.join(f"{run.folder}/report.html"), current={run.folder: run.metrics}, truth=config.truth)
    return "\n\n".join([stage1_table, stage2_table, final, f"report: {page}"])


def _train_pair(config: DemoConfig, training: TrainJobConfig, run: Run) -> dict[str, list[StoredModel]]:
    """Train on curated pairs, and on as many raw pairs with the same steps and seeds; gold is in neither."""
    storage = config.storage
    record = storage.read_json(STAGE2_RECORD)
    curated = load_set(storage, record["sets"]["kept_and_flipped"])
    pairs = curated.read()
    raw = _raw_pairs(open_pool(storage, record["pool"]), pairs.num_rows)
    gold = load_stage1(config).gold.read()
    data = {"curated": (pairs, curated.digest), "raw": (raw, content_digest(raw["pair_id"].to_pylist()))}
    models: dict[str, list[StoredModel]] = {}
    for name, (table, digest) in data.items():
        check_best_rm_training(table, gold)
        for seed in config.comparison_seeds:
            model, _ = train_model(
                run,
                storage,
                f"{name}-seed{seed}",
                train=(table, digest),
                gold=None,
                config=training.train.model_copy(update={"seed": seed}),
                parity=training.parity,
                card=with_source_licences(training.card, storage),
                data_name=curated.name if name == "curated" else f"pairs of {record['pool']}, drawn by chance",
            )
            models.setdefault(name, []).append(model)
    return models


def _raw_pairs(pool: Pool, count: int) -> pa.Table:
    """Return `count` pairs of the pool with their source labels, drawn by stable chance."""
    table = pool.read_all()
    ids = table["pair_id"].to_pylist()
    drawn = sorted(range(len(ids)), key=lambda row: stable_hash(0, ids[row], "raw_comparison"))[:count]
    return table.take(pa.array(sorted(drawn), pa.int64()))


def _final_report(config: DemoConfig, score: ScoreConfig, run: Run, models: Mapping[str, list[StoredModel]]) -> str:
    """Compare decisions and models with the truth: the only place besides the simulated annotator that opens the truth file."""
    storage = config.storage
    record, before = storage.read_json(STAGE2_RECORD), load_stage1(config)
    pool = open_pool(storage, record["pool"])
    columns = {"decision": "decision"}
    decision = open_sidecar(pool, "decision", record["decision"])
    table = pa.concat_tables([zip_shard(pool, shard.number, ["prompt_group"], [(decision, columns)]) for shard in pool.shards])
    truth = read_truth(config.truth, table["pair_id"].to_pylist())
    known = [truth.get(pair_id) for pair_id in table["pair_id"].to_pylist()]
    quality = label_quality(table["decision"].to_pylist(), known, groups=table["prompt_group"].to_pylist())
    flags = _held_out_flags(config, score, run, {**models, "best": [before.best], "gold": [before.gold_rm]})
    prompts = [json.dumps(prompt) for prompt in pq.read_table(config.held_out, columns=["prompt"])["prompt"].to_pylist()]
    difference = paired_bootstrap(flags["curated"], flags["raw"], groups=prompts)
    accuracies = {name: [bootstrap_accuracy(of_seed, groups=prompts) for of_seed in values] for name, values in flags.items()}
    sets = storage.read_json(STAGE1_RECORD)["sets"]
    num_gold = sum(load_set(storage, **sets[name]).read().num_rows for name in ("gold-working", "gold-audit"))
    num_pairs = sum(open_pool(storage, route.value).num_rows for route in Route)
    run.metrics["demo"] = {
        "labels": asdict(quality),
        "held_out": {name: [asdict(value) for value in values] for name, values in accuracies.items()},
        "curated_minus_raw": asdict(difference),
        "gold_share": num_gold / num_pairs,
    }
    header = f"Final report (the truth is known here; gold is SIMULATED: {num_gold} of {num_pairs} pairs, {format_share(num_gold, num_pairs)})"
    return "\n\n".join([header, _label_table(quality), _model_table(accuracies, difference, config.comparison_seeds)])


def _held_out_flags(config: DemoConfig, score: ScoreConfig, run: Run, models: Mapping[str, list[StoredModel]]) -> dict[str, npt.NDArray[np.bool_]]:
    """Return by name, shape (seeds, pairs), whether each model is right about each held-out pair."""
    folders = [model.local_folder() for found in models.values() for model in found]
    scored = iter(score_file(run, config.storage, config.held_out, folders, FileScoring(), score))
    return {name: np.array([correct_flags(next(scored))[0] for _ in found]) for name, found in models.items()}


def _label_table(quality: LabelQuality) -> str:
    total = quality.raw.num_pairs
    named = {
        "wild pairs as they came": quality.raw,
        "kept": quality.kept,
        "flipped": quality.flipped,
        "kept and flipped": quality.kept_and_flipped,
        "dropped (source label)": quality.dropped,
    }
    rows = [(name, str(a.num_pairs), format_share(a.num_pairs, total), *_cells(a)) for name, a in named.items()]
    return format_table(("wild pairs, gold excluded", "pairs", "share", "labels right", "95 % interval"), rows)


def _model_table(accuracies: Mapping[str, Sequence[Accuracy]], difference: Difference, seeds: Sequence[int]) -> str:
    names = {
        "curated": "trained on curated pairs",
        "raw": "trained on as many raw pairs",
        "best": "best RM of Stage 1",
        "gold": "gold RM of Stage 1",
    }
    rows = []
    for name, values in accuracies.items():
        for seed, accuracy in zip(seeds, values, strict=False):
            rows.append((names[name] + (f", seed {seed}" if len(values) > 1 else ""), str(accuracy.num_pairs), *_cells(accuracy)))
    interval = f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f}"
    over = f", mean of {difference.num_seeds} seeds" if difference.num_seeds > 1 else ""
    rows.append((f"curated minus raw{over}", str(difference.num_pairs), f"{100 * difference.difference:+.1f} points", interval))
    return format_table(("reward models on held-out prompts", "pairs", "accuracy", "95 % interval"), rows)


def _cells(accuracy: Accuracy) -> tuple[str, str]:
    if not accuracy.num_pairs:
        return "-", "-"
    return format_share(accuracy.accuracy, 1), f"{100 * accuracy.low:.1f} to {100 * accuracy.high:.1f}"
