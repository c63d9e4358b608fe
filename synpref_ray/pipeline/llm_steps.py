"""Tagging and judging as steps: an engine per actor, journaled requests, shards in flight together so that the engine never drains.

Paper: Sec. 3.1 (attributes) and Sec. 3.2, Step 3 (preference-aware labelling with gold exemplars in the prompt).
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Annotated, Any, Generic, Self, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import AfterValidator, Field

from synpref_ray.bundled import digest_model, find_model, pin_model, resolve_model
from synpref_ray.config import Settings
from synpref_ray.errors import ConfigError
from synpref_ray.llm.endpoint import EndpointEngine, open_engine
from synpref_ray.llm.endpoint_config import FLUSH_REPLIES, FLUSH_SECONDS, AnyEngineConfig, EndpointConfig
from synpref_ray.llm.engine import Engine, EngineConfig, engine_environment
from synpref_ray.llm.journal import Journal
from synpref_ray.llm.judge import VOTES_SCHEMA, JudgeConfig, judge_pairs
from synpref_ray.llm.prompts import TAG_PROMPT_VERSION, judge_prompt_version
from synpref_ray.llm.spending import Budget, SpendingRecord
from synpref_ray.llm.tagger import TaggerConfig, tag_pairs
from synpref_ray.llm.vllm_engine import VllmEngine
from synpref_ray.pipeline.input_checks import check_each, check_gpus
from synpref_ray.pipeline.shared_budget import SharedBudget
from synpref_ray.pipeline.steps import Output, Resources, ShardKey, Step, StepInput, StepResult, num_workers, plan_sidecars, run_step
from synpref_ray.reporting.run import Run
from synpref_ray.rules.gold import check_exemplars
from synpref_ray.rules.tags import merge_tag_shard
from synpref_ray.schema import ATTRIBUTES_SCHEMA, TAGS_SCHEMA, DropReason
from synpref_ray.tables.leases import Lease
from synpref_ray.tables.pools import Pool, content_digest
from synpref_ray.tables.selection import GATHERED_SHARD_PAIRS
from synpref_ray.tables.sidecars import Sidecar, zip_shard
from synpref_ray.versions import engine_version

TAG_VERSION = 2
MERGE_VERSION = 1
JUDGE_VERSION = 2
ENGINE_SETTINGS = {"dtype", "max_model_len_tokens", "seed", "seed_requests"}  # of the engine, what changes a reply
METERED = ("prompt_tokens", "cached_prompt_tokens", "output_tokens", "retries", "cost")
PAIR_COLUMNS = ("prompt", "chosen", "rejected")
ATTRIBUTE_COLUMNS = {name: name for name in ATTRIBUTES_SCHEMA.names if name not in ("pair_id", "drop_reason")}


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
            return
        check_each(partial(self._check_engine, self.engine), partial(find_model, self.engine.model))

    def _check_engine(self, engine: EngineConfig) -> None:
        check_gpus(engine.model, engine.device, self.num_gpus_per_worker, engine.tensor_parallel_size)
        if self.longest_request_tokens > engine.max_model_len_tokens:
            raise ConfigError(
                f"{engine.model}: max_model_len_tokens={engine.max_model_len_tokens} is less than max_input_tokens and the reply together, "
                f"{self.longest_request_tokens}: the longest requests would not fit"
            )

    @property
    def longest_request_tokens(self) -> int:
        """Tokens of the longest request with its reply, without the chat template's; 0: the step does not bound it."""
        return 0

    def open_engine(self, budget: Budget | None) -> VllmEngine | EndpointEngine:
        """Start one worker's engine."""
        engine = self.engine.share(self.num_workers) if isinstance(self.engine, EndpointConfig) else self.engine
        return open_engine(engine, budget)


class TagStepConfig(LLMStepConfig):
    """One tagger and its engine; `tagger.name` is its name in tables and reports."""

    tagger: TaggerConfig = TaggerConfig()

    @property
    def longest_request_tokens(self) -> int:
        """Of tagging."""
        return self.tagger.max_input_tokens + self.tagger.max_new_tokens


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


Taggers = Annotated[tuple[TagStepConfig, ...], Field(min_length=1), names_differ("tagger", lambda step: step.tagger.name)]
"""The taggers of a job, the best first: ties go to it (`rules/tags.py`)."""


class JudgeStepConfig(LLMStepConfig):
    """One judge and its engine; `name` is the judge's name in votes and reports."""

    judge: JudgeConfig

    @property
    def longest_request_tokens(self) -> int:
        """Of judging, whose reply is one choice."""
        return self.judge.max_input_tokens + 1


Judges = Annotated[tuple[JudgeStepConfig, ...], Field(min_length=1), names_differ("judge", lambda step: step.judge.judge)]
"""The judges of a job."""


@dataclass(frozen=True)
class JudgedPool:
    """A pool to judge, with its attributes, its exemplars, and (except for gold itself) its human verdicts, which need no judge."""

    pool: Pool
    attributes: Sidecar
    exemplars: Sidecar
    human: Sidecar | None


@dataclass(frozen=True)
class GoldTables:
    """All gold so far: a gathered pool and its sidecars. `tagged`: the same gold before people's edits of attributes; None: nobody edited any."""

    pool: Pool
    attributes: Sidecar
    embeddings: Sidecar
    human: Sidecar
    tagged: "GoldTables | None" = None

    @property
    def as_targets(self) -> "GoldTables":
        """Gold as a judge meets any other pair, when it is measured on gold: with the taggers' attributes, and embeddings that follow from them."""
        return self.tagged or self

    def prompt_groups(self) -> frozenset[str]:
        """Return the prompt groups of all gold: no pair of theirs may train anything that gold checks."""
        return _prompt_groups(self.pool)

    def splits(self) -> pa.Table:
        """Return pair_id, prompt_group and gold_split of all gold: what the checks of `rules/gold.py` go by."""
        beside = [(self.human, {"gold_split": "gold_split"})]
        return pa.concat_tables([zip_shard(self.pool, shard.number, ["prompt_group"], beside) for shard in self.pool.shards]).combine_chunks()

    def read(self) -> pa.Table:
        """Return gold with its attributes and verdicts: pool columns, ATTRIBUTE_COLUMNS, human_verdict, gold_split."""
        columns = [name for name in self.pool.read(0).column_names if name != "pair_id"]
        beside = [(self.attributes, ATTRIBUTE_COLUMNS), (self.human, {"human_verdict": "human_verdict", "gold_split": "gold_split"})]
        return pa.concat_tables([zip_shard(self.pool, shard.number, columns, beside) for shard in self.pool.shards]).combine_chunks()


@lru_cache(maxsize=1)
def _prompt_groups(pool: Pool) -> frozenset[str]:
    """Return a gold pool's prompt groups, read once for all pools that a round labels."""
    return frozenset(pool.read_all(["prompt_group"])["prompt_group"].to_pylist())


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


class TagWorker(LLMWorker[TagStepConfig]):
    """Tags pairs."""

    def ask(self, shard: pa.Table, journal: Journal) -> tuple[pa.Table, Mapping[str, float]]:
        """Return TAGS_SCHEMA."""
        return tag_pairs(shard, self._engine, self._config.tagger, journal), {}


def pairs_to_judge(shard: pa.Table, gold_groups: Set[str]) -> pa.Array | pa.ChunkedArray:
    """Return which pairs of a shard a judge is asked about, a boolean each: where people verify, those that no person has judged (one that they
    could not decide was judged: it is discarded, never passed to an LLM) and that share no prompt with gold.
    """
    if "human_drop_reason" not in shard.column_names:
        return pa.array([True] * shard.num_rows)
    free = pc.fill_null(pc.equal(shard["human_drop_reason"], DropReason.NOT_SELECTED.value), False)
    return pc.and_(free, pc.invert(pc.is_in(shard["prompt_group"], value_set=pa.array(sorted(gold_groups), pa.string()))))


class JudgeWorker(LLMWorker[JudgeStepConfig]):
    """Judges pairs by the gold exemplars that it holds."""

    def __init__(self, config: JudgeStepConfig, gold: GoldTables, tables: list[Sidecar], budget: Budget | None = None):
        self._gold = gold.read()
        self._groups = frozenset(self._gold["prompt_group"].to_pylist())
        super().__init__(config, tables, budget)

    def ask(self, shard: pa.Table, journal: Journal) -> tuple[pa.Table, Mapping[str, float]]:
        """Return VOTES_SCHEMA; rows that no judge is asked about are null."""
        check_exemplars(shard, self._gold)
        asked = pairs_to_judge(shard, self._groups)
        votes = judge_pairs(shard.filter(asked), self._gold, self._engine, self._config.judge, journal)
        return spread_rows(shard["pair_id"], asked, votes), {"judged": float(votes.num_rows)}


class PlainJudgeWorker(LLMWorker[JudgeStepConfig]):
    """Judges pairs as they are: no gold, no exemplars, no attributes."""

    def ask(self, shard: pa.Table, journal: Journal) -> tuple[pa.Table, Mapping[str, float]]:
        """Return VOTES_SCHEMA."""
        votes = judge_pairs(shard, shard.slice(0, 0), self._engine, self._config.judge, journal)
        return votes, {"judged": float(votes.num_rows)}


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


def open_journal(tables: list[Sidecar], key: ShardKey, engine: EngineConfig | EndpointConfig) -> Journal:
    """Open the journal of one shard, beside the table that it feeds; replies that cost money are written sooner."""
    sidecar = tables[key.table]
    folder = f"{sidecar.folder}/journal/{key.number:05d}"
    if isinstance(engine, EndpointConfig):
        return Journal(sidecar.pool.storage, folder, flush_replies=FLUSH_REPLIES, flush_seconds=FLUSH_SECONDS)
    return Journal(sidecar.pool.storage, folder)


def spread_rows(pair_ids: pa.ChunkedArray, selected: pa.Array | pa.ChunkedArray, rows: pa.Table) -> pa.Table:
    """Return `rows` (of the selected pairs) laid out over all pairs; the others are null with reason `not_selected`."""
    flags = selected.to_pylist()
    places = iter(range(rows.num_rows))
    indices = pa.array([next(places) if flag else None for flag in flags], pa.int64())
    columns = []
    for field in rows.schema:
        if field.name == "pair_id":
            columns.append(pair_ids.combine_chunks())
        elif field.name == "drop_reason":
            missing = pa.array([None if flag else DropReason.NOT_SELECTED.value for flag in flags], pa.string())
            columns.append(pc.coalesce(rows[field.name].take(indices).combine_chunks(), missing) if rows.num_rows else missing)
        else:
            columns.append(rows[field.name].take(indices).combine_chunks() if rows.num_rows else pa.nulls(len(flags), field.type))
    return pa.table(columns, schema=rows.schema)


class MergeTagsWorker:
    """Merges what several taggers wrote."""

    def __init__(self, num_taggers: int):
        self._num_taggers = num_taggers

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        return merge_tag_shard(shard, self._num_taggers), {}


@dataclass(frozen=True)
class TaggedPools:
    """The attributes of some pools, in their order: merged, and as each tagger wrote them."""

    merged: list[Sidecar]
    by_tagger: Mapping[str, list[Sidecar]]


def tag_pools(run: Run, name: str, pools: Sequence[Pool], taggers: Sequence[TagStepConfig]) -> TaggedPools:
    """Make the sidecar `attributes.<tagger>` of every pool for each tagger, and of these `attributes`, merged by `rules/tags.py`.

    A tagger that is added later tags alone; what the others wrote stays.
    """
    tags = {config.tagger.name: _tag_pools(run, f"{name} ({config.tagger.name})", pools, config) for config in taggers}
    result = run_step(_merge_tags_step(f"{name}, merge", taggers), _tags_to_merge(pools, list(tags.values())))
    return TaggedPools([sidecars[0] for sidecars in result.sidecars], tags)


def plan_tags(pools: Sequence[Pool], taggers: Sequence[TagStepConfig]) -> list[Sidecar]:
    """Return the merged attributes that `tag_pools` would make, without making them."""
    sources = [StepInput(pool, PAIR_COLUMNS) for pool in pools]
    tags = [[sidecars[0] for sidecars in plan_sidecars(_tag_step("", config), sources)] for config in taggers]
    return [sidecars[0] for sidecars in plan_sidecars(_merge_tags_step("", taggers), _tags_to_merge(pools, tags))]


def _merge_tags_step(title: str, taggers: Sequence[TagStepConfig]) -> Step:
    return Step(
        name="merge tags",
        title=title,
        version=MERGE_VERSION,
        worker=MergeTagsWorker,
        outputs=(Output("attributes", ATTRIBUTES_SCHEMA),),
        settings={"taggers": [config.tagger.name for config in taggers]},  # in order: ties go to the first
        worker_arguments=lambda _: {"num_taggers": len(taggers)},
        max_failed_fraction=max(config.max_failed_fraction for config in taggers),
    )


def _tags_to_merge(pools: Sequence[Pool], by_tagger: Sequence[Sequence[Sidecar]]) -> list[StepInput]:
    inputs = []
    for index, pool in enumerate(pools):
        columns = [name for name in ATTRIBUTES_SCHEMA.names if name != "pair_id"]
        beside = tuple((tables[index], {column: f"{n}.{column}" for column in columns}) for n, tables in enumerate(by_tagger))
        inputs.append(StepInput(pool, (), beside))
    return inputs


def _tag_pools(run: Run, name: str, pools: Sequence[Pool], config: TagStepConfig) -> list[Sidecar]:
    sources = [StepInput(pool, PAIR_COLUMNS) for pool in pools]
    return [sidecars[0] for sidecars in run_llm_step(run, name, _tag_step(name, config), sources, config)]


def _tag_step(title: str, config: TagStepConfig) -> Step:
    return Step(
        name="tag",
        title=title,
        version=TAG_VERSION,
        worker=TagWorker,
        outputs=(Output(f"attributes.{config.tagger.name}", TAGS_SCHEMA),),
        settings={**config.settings, "tagger": config.tagger.model_dump(mode="json"), "prompt": TAG_PROMPT_VERSION},
        digests=config.digests,
        worker_arguments=lambda tables: {"config": config, "tables": tables},
        resources=config.resources,
        model=config.engine.model,
        max_failed_fraction=config.max_failed_fraction,
    )


def judge_pools(run: Run, name: str, pools: Sequence[JudgedPool], gold: GoldTables, config: JudgeStepConfig) -> list[Sidecar]:
    """Make the sidecar `votes.<judge>` of every pool; gold pairs are judged leave-one-out, since no exemplar shares their prompt.

    Our choice: gold is part of the fingerprint also where a judge is shown no exemplars, since it decides which pairs are asked about (none of a gold
    prompt), and what is judged follows from it anyway: the selected pairs and the mismatches are other ones when gold is.
    """
    return [sidecars[0] for sidecars in run_llm_step(run, name, _judge_step(name, gold, config), [_to_judge(judged) for judged in pools], config)]


def plan_votes(judged: JudgedPool, gold: GoldTables, config: JudgeStepConfig) -> Sidecar:
    """Return the votes that `judge_pools` would make of a pool, without making them."""
    return plan_sidecars(_judge_step("", gold, config), [_to_judge(judged)])[0][0]


def _judge_step(title: str, gold: GoldTables, config: JudgeStepConfig) -> Step:
    exemplars = content_digest([gold.pool.digest, gold.attributes.fingerprint, gold.human.fingerprint])
    return Step(
        name="judge",
        title=title,
        version=JUDGE_VERSION,
        worker=JudgeWorker,
        outputs=(Output(f"votes.{config.judge.judge}", VOTES_SCHEMA),),
        settings={**config.settings, "judge": config.judge.model_dump(mode="json"), "prompt": judge_prompt_version(config.judge.guideline)},
        digests={**config.digests, "gold": exemplars},
        worker_arguments=lambda tables: {"config": config, "gold": gold, "tables": tables},
        resources=config.resources,
        model=config.engine.model,
        max_failed_fraction=config.max_failed_fraction,
    )


def _to_judge(judged: JudgedPool) -> StepInput:
    beside: list[tuple[Sidecar, Mapping[str, str]]] = [(judged.attributes, ATTRIBUTE_COLUMNS), (judged.exemplars, {"exemplar_ids": "exemplar_ids"})]
    if judged.human is not None:
        beside.append((judged.human, {"drop_reason": "human_drop_reason"}))
    return StepInput(judged.pool, (*PAIR_COLUMNS, "prompt_group"), tuple(beside))


def without_exemplars(config: JudgeStepConfig) -> JudgeStepConfig:
    """Return a judge that needs nothing but a pair: without exemplars and attributes, and so without the guideline that goes by attributes."""
    guideline = "general" if config.judge.guideline == "full" else config.judge.guideline
    judge = config.judge.model_copy(update={"max_exemplars": 0, "attributes": (), "guideline": guideline})
    return config.model_copy(update={"judge": judge})


def judge_plain_pools(run: Run, name: str, pools: Sequence[Pool], config: JudgeStepConfig) -> list[Sidecar]:
    """Make the sidecar `votes.<judge>` of pools that nothing is known about (benchmarks), in both orders; see `without_exemplars`."""
    plain = without_exemplars(config)
    step = Step(
        name="judge without gold",
        title=name,
        version=JUDGE_VERSION,
        worker=PlainJudgeWorker,
        outputs=(Output(f"votes.{plain.judge.judge}", VOTES_SCHEMA),),
        settings={**plain.settings, "judge": plain.judge.model_dump(mode="json"), "prompt": judge_prompt_version(plain.judge.guideline)},
        digests=plain.digests,
        worker_arguments=lambda tables: {"config": plain, "tables": tables},
        resources=plain.resources,
        max_failed_fraction=1.0,  # a pair without a verdict is an answer here: it is counted, and wrong
    )
    return [sidecars[0] for sidecars in run_llm_step(run, name, step, [StepInput(pool, PAIR_COLUMNS) for pool in pools], plain)]


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
