"""Reward models over pools: one pass, one or two models, one sidecar of rewards each.

Paper: Sec. 3.2 Step 2 (p on gold) and Sec. 3.3 (best and gold RM over the wild pool). Our choice: with two models a worker holds both, so that the
pool is read and tokenised once. A model of the workspace that has not passed parity is refused; one named by path is the user's own affair.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import pyarrow as pa
import torch
from pydantic import Field

from synpref_ray.llm.engine import EngineDied
from synpref_ray.pipeline.parity import require_parity
from synpref_ray.pipeline.steps import Output, Resources, ShardKey, Step, StepInput, StepResult, run_step
from synpref_ray.reporting.run import Run
from synpref_ray.reward.parity_record import DEFAULT_PARITY, ParityConfig
from synpref_ray.reward.render import RENDER_VERSION
from synpref_ray.reward.scorer import PairScorer, ScorerConfig, add_rewards_of_all
from synpref_ray.schema import REWARDS_SCHEMA
from synpref_ray.tables.models import StoredModel, model_digest, model_folder, pinned_model
from synpref_ray.tables.pools import Pool
from synpref_ray.versions import versions_of

SCORE_VERSION = 2
RESULT_SETTINGS = {"dtype", "max_length_tokens", "over_long"}
FAULT_COUNTERS = ("halved_batches", "worker_crashes", "crashed_pairs")
"""Counters of shards that a run's events tell of where there is something to tell (docs/faults.md)."""
SCORE_COLUMNS = ("prompt", "chosen", "rejected")


class ScoreConfig(ScorerConfig):
    """How pools are scored; which model is the caller's business."""

    num_workers: int = 1  # ours: one per GPU; on a laptop one process with all its threads
    min_workers: int = Field(default=0, ge=0)  # ours: 0 asks for all workers at once; a cluster that grows with its load begins with fewer
    """Workers that a pool begins with and falls back to; 0: all of them from the start."""
    num_gpus_per_worker: float = 0.0
    """GPUs that Ray sets aside for each worker."""
    max_shard_seconds: float = Field(default=6 * 3600.0, ge=0)  # ours: a shard takes minutes; what takes hours hangs, and is run again elsewhere
    """Seconds after which a worker that is still at one shard is ended and the shard run again; 0: never (docs/faults.md)."""
    max_failed_fraction: float = 0.5  # ours: more than half unscorable means the wrong data or length limit

    @property
    def resources(self) -> Resources:
        """What Ray is asked for."""
        return Resources(self.num_workers, num_gpus=self.num_gpus_per_worker, min_workers=self.min_workers, max_shard_seconds=self.max_shard_seconds)


def parity_for(config: ScorerConfig, parity: ParityConfig) -> ParityConfig:
    """Return the parity that a model must pass before it scores as `config` says."""
    return parity.model_copy(update={"compile_layers": parity.compile_layers or config.compile_layers})


class ScoreWorker:
    """Loads its models once per actor."""

    def __init__(self, models: Sequence[tuple[str, StoredModel | str]], config: ScoreConfig):
        folders = [model_folder(model) if isinstance(model, str) else model.local_folder() for _, model in models]
        self._prefixes = [prefix for prefix, _ in models]
        self._scorers = [PairScorer.load(folder, config) for folder in folders]

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        result = shard.select(["pair_id"])
        try:
            scored = add_rewards_of_all(shard, self._scorers)
        except torch.AcceleratorError as error:  # a kernel failed, and with it the process's hold of the device: nothing works in it any more
            raise EngineDied(f"{type(error).__name__}: {error}") from error
        for prefix, rewards in zip(self._prefixes, scored, strict=True):
            for field in REWARDS_SCHEMA:
                if field.name != "pair_id":
                    result = result.append_column(prefix + field.name, rewards[field.name])
        counters = Counter({"scored_pairs": float(shard.num_rows * len(self._scorers))})
        for scorer in self._scorers:
            counters.update(scorer.take_counters())
        return result, counters


def score_pools(
    run: Run,
    name: str,
    pools: Sequence[Pool],
    models: Mapping[str, StoredModel | str],
    config: ScoreConfig,
    parity: ParityConfig = DEFAULT_PARITY,
) -> StepResult:
    """Score every pair of every pool with every model; the sidecar of model `m` is called `rewards.<m>`.

    Args:
        models: short name (best, gold, …) to a stored model, or the name of any other model (a folder, local or on S3), which is not gated.
        parity: what stored models must have passed; with compiled layers, if they score so.

    Raises:
        ParityError: a stored model has not.
    """
    for model in models.values():
        if isinstance(model, StoredModel):
            require_parity(model, parity_for(config, parity))
    pinned = {short: pinned_model(model) if isinstance(model, str) else model for short, model in models.items()}
    prefixes = [(f"{short}." if len(models) > 1 else "", model) for short, model in pinned.items()]
    digests = {short: model_digest(model) if isinstance(model, str) else model.digest for short, model in models.items()}
    versions = versions_of("torch", "transformers", "tokenizers")
    step = Step(
        name="score",
        title=name,
        version=SCORE_VERSION,
        worker=ScoreWorker,
        outputs=tuple(Output(f"rewards.{short}", REWARDS_SCHEMA, prefix) for (prefix, _), short in zip(prefixes, models, strict=True)),
        settings={**config.model_dump(mode="json", include=RESULT_SETTINGS), "render_version": RENDER_VERSION, "versions": versions},
        digests=digests,
        worker_arguments=lambda _: {"models": prefixes, "config": config},
        resources=config.resources,
        model=", ".join(models),
        max_failed_fraction=config.max_failed_fraction,
    )
    result = run_step(step, [StepInput(pool, SCORE_COLUMNS) for pool in pools])
    told = {"shortened_pairs": "shortened", **{name: name for name in FAULT_COUNTERS}}
    more = {told[name]: int(result.counters[name]) for name in told if result.counters.get(name)}
    num_models = len(models)
    run.step(name, rows=result.rows, computed=result.rows_computed, rejected=result.rejected, seconds=result.seconds, models=num_models, **more)
    return result
