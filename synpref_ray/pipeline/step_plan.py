"""What a stage would do, before it does anything: its steps with pairs, shards, workers, GPUs and, by stated paces, hours. For `--dry-run`.

Sizes are those of the workspace's pools, or stated ones for pools that are not there yet. What only a run can tell (what a round retrieves, how many
pairs the best RM disagrees with) is counted at its ceiling, or by a stated share. Our choice throughout; prices and budgets are jobs/plan.py's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pydantic import Field, NonNegativeInt, PositiveFloat

from synpref_ray.config import Settings
from synpref_ray.ingest.source import Route
from synpref_ray.llm.endpoint_config import EndpointConfig
from synpref_ray.pipeline.judge_steps import JudgeStepConfig
from synpref_ray.pipeline.llm_steps import LLMStepConfig
from synpref_ray.pipeline.retrieval import EmbedStepConfig
from synpref_ray.pipeline.scoring import ScoreConfig
from synpref_ray.pipeline.tag_steps import TagStepConfig
from synpref_ray.planning.cost import Throughputs
from synpref_ray.planning.derived import PairTokens
from synpref_ray.reporting.table import format_table
from synpref_ray.reward.training_config import TrainConfig
from synpref_ray.tables.pools import MAX_PAIRS_PER_SHARD, open_pool, pool_exists
from synpref_ray.tables.selection import GATHERED_SHARD_PAIRS
from synpref_ray.tables.storage import Storage


class StagePlan(Settings):
    """What `--dry-run` supposes; no setting here changes what a run computes."""

    pool_pairs: dict[str, NonNegativeInt] = Field(default_factory=dict)
    """Sizes of pools that are not in the workspace yet."""
    throughputs: Throughputs = Throughputs()
    """Pairs per GPU hour (per worker hour where workers have no GPU); without one, a step has no hours."""
    taggers: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Pairs per GPU hour of taggers on GPUs by name; of others it is `throughputs.tag`."""
    judges: dict[str, PositiveFloat] = Field(default_factory=dict)
    """The same of judges; of others it is `throughputs.judge`."""
    tag_tokens: PairTokens = PairTokens()
    """What tagging a pair takes of an endpoint; hours and costs follow from the endpoint's own limits and prices."""
    judge_tokens: PairTokens = PairTokens()
    """What judging a pair takes of an endpoint."""
    embed: float = Field(default=0.0, ge=0.0)
    """The same as `throughputs` of the embedder."""
    gold_pairs: NonNegativeInt = 0
    """Gold at the end of Stage 1, where people's verdicts come from a file or a queue."""
    mismatch_fraction: float = Field(default=0.35, ge=0.0, le=1.0)  # ours: the paper does not say; the 14M of 40M that it discards


@dataclass(frozen=True)
class PoolSize:
    """A pool's pairs and shards; `is_stated`: it is not in the workspace."""

    pairs: int
    shards: int
    is_stated: bool = False


@dataclass(frozen=True)
class PlannedWork:
    """One step: at most so many pairs in so many shards, its workers, the GPUs of each, and pairs per GPU hour (0: not known)."""

    step: str
    pairs: int
    shards: int
    workers: int
    gpus_per_worker: float
    pairs_per_hour: float = 0.0
    passes: int = 1
    cost: float = 0.0
    """What an endpoint asks for it."""
    spending_limit: float = 0.0
    """Of the endpoint; 0: none."""

    @property
    def gpus(self) -> float:
        """GPUs at work at once."""
        return self.workers * self.gpus_per_worker

    @property
    def hours(self) -> float | None:
        """Wall time with all workers at work; None where the pace is not known."""
        if not self.pairs_per_hour:
            return None
        busy = min(self.workers, self.shards) if self.shards else self.workers
        return self.passes * self.pairs / (self.pairs_per_hour * busy * (self.gpus_per_worker or 1))


def pool_size(storage: Storage, name: str, plan: StagePlan) -> PoolSize:
    """Return the size of a pool: of its latest version, or as stated (0 where nothing is), in shards as ingest cuts them by default."""
    if pool_exists(storage, name):
        pool = open_pool(storage, name)
        return PoolSize(pool.num_rows, len(pool.shards))
    pairs = plan.pool_pairs.get(name, 0)
    per_shard = GATHERED_SHARD_PAIRS if name in (Route.SEED, Route.UNVERIFIED) else MAX_PAIRS_PER_SHARD
    return PoolSize(pairs, math.ceil(pairs / per_shard), is_stated=True)


def gathered(pairs: int, shard_pairs: int) -> PoolSize:
    """Return the size of a pool that a step gathers."""
    return PoolSize(pairs, math.ceil(pairs / shard_pairs))


def llm_work(step: LLMStepConfig, title: str, size: PoolSize, pairs_per_hour: float, tokens: PairTokens) -> PlannedWork:
    """Return the work of a tagger or judge: at a pace on GPUs, or as fast as an endpoint's limits let it."""
    engine = step.engine
    if isinstance(engine, EndpointConfig):
        limits = [(engine.requests_per_minute, tokens.requests), (engine.tokens_per_minute, tokens.prompt + tokens.output)]
        an_hour = min((60 * limit / each for limit, each in limits if limit and each), default=0.0)
        cost = size.pairs * engine.cost(tokens.prompt, tokens.output)
        work = PlannedWork(title, size.pairs, size.shards, step.num_workers, 0.0, an_hour / step.num_workers)
        return replace(work, cost=cost, spending_limit=engine.spending_limit)
    return PlannedWork(title, size.pairs, size.shards, step.num_workers, step.num_gpus_per_worker, pairs_per_hour)


def tag_work(taggers: Sequence[TagStepConfig], size: PoolSize, plan: StagePlan) -> list[PlannedWork]:
    """Return the work of every tagger on a pool."""
    paces = ((step, step.tagger.name, plan.taggers.get(step.tagger.name, plan.throughputs.tag)) for step in taggers)
    return [llm_work(step, f"tag ({name})", size, pace, plan.tag_tokens) for step, name, pace in paces]


def judge_work(judges: Sequence[JudgeStepConfig], size: PoolSize, plan: StagePlan) -> list[PlannedWork]:
    """Return the work of every judge on a pool."""
    paces = ((step, step.judge.judge, plan.judges.get(step.judge.judge, plan.throughputs.judge)) for step in judges)
    return [llm_work(step, f"judge ({name})", size, pace, plan.judge_tokens) for step, name, pace in paces]


def embed_work(config: EmbedStepConfig, size: PoolSize, plan: StagePlan) -> PlannedWork:
    """Return the embedder's work."""
    return PlannedWork("embed", size.pairs, size.shards, config.num_workers, config.num_gpus_per_worker, plan.embed)


def score_work(config: ScoreConfig, title: str, size: PoolSize, plan: StagePlan, *, models: int) -> PlannedWork:
    """Return the work of scoring a pool with so many reward models."""
    pace = plan.throughputs.score
    return PlannedWork(title, size.pairs, size.shards, config.num_workers, config.num_gpus_per_worker, pace, passes=models)


def train_work(config: TrainConfig, title: str, pairs: int, plan: StagePlan) -> PlannedWork:
    """Return the work of a training; its shards are optimizer steps."""
    steps = math.ceil(pairs / config.global_batch_pairs) * config.num_epochs
    gpus = 1.0 if config.use_gpu else 0.0
    work = PlannedWork(title, pairs, steps, config.num_workers, gpus, plan.throughputs.train, passes=config.num_epochs)
    return work


def total(works: Sequence[PlannedWork], title: str) -> PlannedWork:
    """Return the same step done several times (rounds) as one line."""
    pairs, shards, cost = sum(w.pairs for w in works), sum(w.shards for w in works), sum(w.cost for w in works)
    return replace(works[0], step=title, pairs=pairs, shards=shards, cost=cost)


def describe_plan(works: Sequence[PlannedWork], sizes: Mapping[str, PoolSize], notes: Sequence[str] = ()) -> str:
    """Return the plan as a table, what it supposes, and its sums."""
    rows, paid = [], sum(work.cost for work in works)
    for work in works:
        hours = work.hours
        cells = (f"{work.pairs:,}", f"{work.shards:,}", str(work.workers or "-"), f"{work.gpus:g}" if work.gpus else "-")
        rows.append(
            (
                work.step,
                *cells,
                "-" if hours is None else f"{hours:,.1f}",
                "-" if hours is None or not work.gpus else f"{hours * work.gpus:,.0f}",
                *((f"{work.cost:,.0f}" if work.cost else "-",) if paid else ()),
            )
        )
    header = ("step", "pairs, at most", "shards", "workers", "GPUs", "hours", "GPU hours", *(("endpoint",) if paid else ()))
    lines = [format_table(header, rows)]
    known = [work for work in works if work.hours is not None]
    if known:
        hours, gpu_hours = sum(work.hours or 0.0 for work in known), sum((work.hours or 0.0) * work.gpus for work in known)
        unknown = [work.step for work in works if work.hours is None]
        rest = f", without {', '.join(unknown)} (no pace is stated)" if unknown else ""
        sums = f"one after the other: {hours:,.1f} hours, {gpu_hours:,.0f} GPU hours{rest}"
        lines.append(f"{sums}; paces are those of `plan`, without the starts of nodes and engines")
    else:
        lines.append("no hours: `plan.throughputs` states no pace")
    lines.append(f"workers are processes of Ray (actors), each with its part of the GPUs; at most {max(work.gpus for work in works):g} GPUs at once")
    if paid:
        lines.append(f"endpoints: {paid:,.0f} by their prices and `plan`'s tokens a pair, nothing cached and nothing asked twice")
    for work in works:
        if work.spending_limit and work.cost > work.spending_limit:
            lines.append(f"{work.step}: {work.cost:,.0f} is more than its spending_limit of {work.spending_limit:,.0f}, where the job would end")
    stated = [f"{name} {size.pairs:,}" for name, size in sizes.items() if size.is_stated]
    if stated:
        lines.append(f"not in the workspace, so sizes are those of `plan.pool_pairs`: {', '.join(stated)}")
    return "\n".join([*lines, *notes])
