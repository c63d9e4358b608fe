"""What all steps that ask an LLM share: an engine per actor, journaled requests, shards in flight together so that the engine never drains, and one
budget for all that a tagger or judge does in the workspace.

The steps themselves: `tag_steps.py`, `judge_steps.py`, `leaks.py` and `preverify.py`.
"""

import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Generic, Self, TypeVar

import pyarrow as pa
from pydantic import AfterValidator, Field

from synpref_ray.bundled import digest_model, find_model, pin_model, resolve_model
from synpref_ray.config import Settings
from synpref_ray.errors import ConfigError
from synpref_ray.llm.endpoint import EndpointEngine, open_engine
from synpref_ray.llm.endpoint_config import FLUSH_REPLIES, FLUSH_SECONDS, AnyEngineConfig, EndpointConfig
from synpref_ray.llm.engine import Engine, EngineConfig, engine_environment
from synpref_ray.llm.journal import Journal
from synpref_ray.llm.spending import Budget, SpendingRecord
from synpref_ray.llm.vllm_engine import VllmEngine
from synpref_ray.pipeline.input_checks import check_each, check_gpus
from synpref_ray.pipeline.shard_io import count_values
from synpref_ray.pipeline.shared_budget import SharedBudget
from synpref_ray.pipeline.steps import Resources, ShardKey, Step, StepInput, StepResult, num_workers, plan_sidecars, run_step
from synpref_ray.reporting.run import Run
from synpref_ray.schema import REJECT_REASONS, DropReason
from synpref_ray.tables.leases import Lease
from synpref_ray.tables.reading import read_each
from synpref_ray.tables.selection import GATHERED_SHARD_PAIRS
from synpref_ray.tables.sidecars import Sidecar
from synpref_ray.versions import engine_version

ENGINE_SETTINGS = {"dtype", "max_model_len_tokens", "seed", "seed_requests"}  # of the engine, what changes a reply
METERED = ("prompt_tokens", "cached_prompt_tokens", "output_tokens", "retries", "cost")
PAIR_COLUMNS = ("prompt", "chosen", "rejected")


class LLMStepConfig(Settings):
    """What the LLM steps of a job share."""

    engine: AnyEngineConfig
    num_workers: int = Field(default=1, ge=1)  # ours: engines; one per GPU (or per tensor-parallel group), or one client of an endpoint each
    min_workers: int = Field(default=0, ge=0)  # ours: 0 starts all engines at once; a cluster that grows with its load begins with fewer
    """Workers that a pool begins with and falls back to; 0: all of them from the start."""
    num_gpus_per_worker: float = 0.0
    """GPUs that Ray sets aside for each engine."""
    max_shard_seconds: float = Field(default=6 * 3600.0, ge=0)  # ours: what takes longer hangs; its finished requests are in the journal
    """Seconds after which a worker that is still at one shard of up to 512 pairs is ended and the shard run again; larger shards get in
    proportion more. 0: never (docs/faults.md)."""
    concurrent_shards: int = 2  # ours: while one shard's last replies come in, the next one keeps the engine full
    max_failed_fraction: float = 0.5  # ours: more failures than replies means a wrong model or prompt

    @property
    def resources(self) -> Resources:
        """What Ray is asked for."""
        environment = () if isinstance(self.engine, EndpointConfig) else tuple(sorted(engine_environment(self.engine).items()))
        return Resources(
            self.num_workers, 1.0, self.num_gpus_per_worker, self.concurrent_shards, environment, self.min_workers, self.max_shard_seconds
        )

    @property
    def settings(self) -> dict[str, object]:
        """What changes replies."""
        if isinstance(self.engine, EndpointConfig):
            return self.engine.settings()
        return {**self.engine.model_dump(mode="json", include=ENGINE_SETTINGS), "engine": engine_version()}

    @property
    def digests(self) -> dict[str, str]:
        """Digest of the engine's model; of one behind an endpoint nothing is known but its name, which is among the settings."""
        return {} if isinstance(self.engine, EndpointConfig) else {"model": digest_model(self.engine.model)}

    def pinned(self) -> Self:
        """Return the settings for workers, which load what the digests name; the driver needs no weights."""
        name = "tokenizer" if isinstance(self.engine, EndpointConfig) else "model"
        value = getattr(self.engine, name)
        return self.model_copy(update={"engine": self.engine.model_copy(update={name: pin_model(value)})}) if value else self

    def check(self) -> None:
        """Check that the model can be found, or the endpoint's key and tokenizer, that it gets its GPUs and that the longest request fits, without
        loading or asking anything.

        Raises:
            InputError, ConfigError: one of these is not so.
        """
        if isinstance(self.engine, EndpointConfig):
            self.engine.api_key()
            if self.engine.tokenizer:
                resolve_model(self.engine.tokenizer, weights=False)
            self._check_context(self.engine)
            return
        check_each(partial(self._check_engine, self.engine), partial(find_model, self.engine.model))

    def _check_engine(self, engine: EngineConfig) -> None:
        check_gpus(engine.model, engine.device, self.num_gpus_per_worker, engine.tensor_parallel_size)
        if self.longest_request_tokens > engine.max_model_len_tokens:
            raise ConfigError(
                f"{engine.model}: max_model_len_tokens={engine.max_model_len_tokens} is less than max_input_tokens and the reply together, "
                f"{self.longest_request_tokens}: the longest requests would not fit"
            )

    def _check_context(self, engine: EndpointConfig) -> None:
        longest = self.longest_request_tokens + engine.extra_output_tokens
        if 0 < engine.max_context_tokens < longest:
            raise ConfigError(
                f"{engine.model}: max_context_tokens={engine.max_context_tokens} is less than max_input_tokens and the reply together, {longest}: "
                "requests that would not fit are never sent; set it to the server's context, or lower max_input_tokens"
            )

    @property
    def longest_request_tokens(self) -> int:
        """Tokens of the longest request with its reply, without the chat template's; 0: the step does not bound it."""
        return 0

    def open_engine(self, budget: Budget | None) -> VllmEngine | EndpointEngine:
        """Start one worker's engine."""
        engine = self.engine.share(self.num_workers) if isinstance(self.engine, EndpointConfig) else self.engine
        return open_engine(engine, budget)


StepConfig = TypeVar("StepConfig", bound=LLMStepConfig)
Models = TypeVar("Models", bound=tuple[LLMStepConfig, ...])


def names_differ(kind: str, name: Callable[[Any], str]) -> AfterValidator:
    """Return the check that every model of a list has a name of its own: tables and reports go by it."""

    def check(models: Models) -> Models:
        names = [name(model) for model in models]
        if len(set(names)) != len(names):
            raise ValueError(f"every {kind} needs a name of its own, found {', '.join(names)}")
        return models

    return AfterValidator(check)


class LLMWorker(ABC, Generic[StepConfig]):
    """Holds one engine, and asks it about shards, each with a journal of its own; what is asked is the subclass's `ask`."""

    def __init__(self, config: StepConfig, tables: list[Sidecar], budget: Budget | None = None):
        self._config = config
        self._tables = tables
        self._engine = config.open_engine(budget)
        self._meter = EngineMeter(self._engine)

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        journal = open_journal(self._tables, key, self._config.engine)
        table, counters = self.ask(shard, journal)
        return table, {**counters, **journal_counters(journal), **self._meter.take()}

    @abstractmethod
    def ask(self, shard: pa.Table, journal: Journal) -> tuple[pa.Table, Mapping[str, float]]:
        """Return the step's rows for a shard, and what else is counted of it."""


class EngineMeter:
    """Shares out what one engine counts among the shards that it serves at once: `take` returns what came since the last call, so that the
    sums over a run's shards are the engine's own (what one shard gets may be another's).
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._lock = threading.Lock()
        self._taken = dict.fromkeys(METERED, 0.0)

    def take(self) -> dict[str, float]:
        """Return what came since the last call, by name: tokens, attempts beyond the first of each request, and their cost."""
        with self._lock:
            now = {name: float(getattr(self._engine.counts(), name)) for name in METERED}
            news = {name: now[name] - self._taken[name] for name in METERED}
            self._taken = now
            return news


def journal_counters(journal: Journal) -> dict[str, float]:
    """Return what a shard asked of the engine in this run, and what an earlier run had paid for; equal requests count once. What its whole journal
    adds up to goes into the table's usage (`pipeline/usage.py`).
    """
    return {
        "requests_sent": float(journal.num_requests_sent),
        "from_journal": float(journal.num_replies_found),
        "asked_again": float(journal.num_retries),
        **{f"shard_{name}": value for name, value in journal.totals().items()},
    }


def open_journal(tables: list[Sidecar], key: ShardKey, engine: EngineConfig | EndpointConfig) -> Journal:
    """Open the journal of one shard, beside the table that it feeds; replies that cost money are written sooner."""
    sidecar = tables[key.table]
    folder = f"{sidecar.folder}/journal/{key.number:05d}"
    if isinstance(engine, EndpointConfig):
        return Journal(sidecar.pool.storage, folder, flush_replies=FLUSH_REPLIES, flush_seconds=FLUSH_SECONDS)
    return Journal(sidecar.pool.storage, folder)


def run_llm_step(run: Run, name: str, step: Step, inputs: Sequence[StepInput], config: LLMStepConfig) -> list[list[Sidecar]]:
    """Run a step of engines; if its endpoint has a spending limit, under one budget for all that this tagger or judge does in the workspace.

    Raises:
        RunConflictError: another job spends this budget now.
    """
    engine = config.engine
    unfinished = not all(sidecar.is_sealed for sidecars in plan_sidecars(step, inputs) for sidecar in sidecars)
    if unfinished:
        step = with_time_for_shards(prepare_workers(step), inputs)
    if not (isinstance(engine, EndpointConfig) and engine.spending_limit and unfinished):
        return _report(run, run_step(step, inputs), name).sidecars
    storage, folder = inputs[0].pool.storage, f"spending/{step.outputs[0].name}"
    record = SpendingRecord(storage, folder)
    with Lease(storage, f"{folder}/lease.json"), SharedBudget.start(engine.spending_limit, record, engine.reservation_seconds) as budget:
        pinned = step.worker_arguments
        limited = replace(step, worker_arguments=lambda tables: {**pinned(tables), "budget": budget})
        return _report(run, run_step(limited, inputs), name).sidecars


def prepare_workers(step: Step) -> Step:
    """Return a step of engines whose workers load what the digests name, and are as many as may work at once; those share an endpoint's limits."""
    workers, arguments = num_workers(step), step.worker_arguments  # counted here: a worker does not know the job's bounds
    shared = {"num_workers": max(1, workers)}  # a step without workers of its own runs in one process

    def prepared(tables: list[Sidecar]) -> dict[str, Any]:
        values = arguments(tables)
        return {**values, "config": values["config"].pinned().model_copy(update=shared)}

    return replace(step, worker_arguments=prepared, resources=replace(step.resources, num_workers=workers))


def with_time_for_shards(step: Step, inputs: Sequence[StepInput]) -> Step:
    """Return a step whose workers have `max_shard_seconds` for 512 pairs, and where its largest shard has more, in proportion more.

    Our choice: pools cut for other work (`wild` under `tag_scope: all`, pools of earlier versions) hold shards of 16 times as many pairs, and a
    worker that is 16 times as long at one is not hanging.
    """
    largest = max((shard.rows for source in inputs for shard in source.pool.shards), default=0)
    seconds = step.resources.max_shard_seconds * max(1.0, largest / GATHERED_SHARD_PAIRS)
    return replace(step, resources=replace(step.resources, max_shard_seconds=seconds))


def _report(run: Run, result: StepResult, name: str) -> StepResult:
    rejected = {reason: count for reason, count in result.rejected.items() if reason != DropReason.NOT_SELECTED}
    notes = {key: int(value) if value == int(value) else round(value, 6) for key, value in result.counters.items()}
    run.step(name, rows=result.rows, computed=result.rows_computed, rejected=rejected, seconds=result.seconds, **notes)
    return result


def num_unanswered(table: Sidecar, max_failed_fraction: float) -> int:
    """Return how many pairs of a table's pool have no answer in it yet; what a shard in flight has in its journal does not count.

    0 where every shard is there and only the seal is not: a step seals its tables together, so one that was cut off leaves such tables. But all pairs
    where more than `max_failed_fraction` were rejected: finishing the table may end in the same error, and what failed is better asked anew.
    """
    if table.is_sealed:
        return 0
    finished = table.finished()
    missing = sum(shard.rows for shard in table.pool.shards if shard.number not in finished)
    if missing:
        return missing
    counted = Counter[str]()
    for shard in read_each(lambda shard: table.read(shard.number, ["drop_reason"]), [shard for shard in table.pool.shards if shard.rows]):
        counted.update(count_values(shard["drop_reason"]))
    failed = sum(count for reason, count in counted.items() if reason in REJECT_REASONS)
    return table.pool.num_rows if failed > max_failed_fraction * table.pool.num_rows else 0
