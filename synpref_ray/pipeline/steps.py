"""One resumable unit of work over pools: whole shards stream from a source through workers into a sink.

`run_step` reads pending shards only (a listing tells which are done), gives each whole shard to a worker, writes each result atomically, and seals
the sidecar with its manifest last. Killing anything at any moment loses the shards in flight and nothing else.
"""

import json
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset

from synpref_ray.errors import SchemaError, SynprefError
from synpref_ray.llm.engine import EngineDied
from synpref_ray.pipeline.cluster import cpu_bound, data_context, tell_if_no_room
from synpref_ray.pipeline.crashes import MAX_RESTARTS, MAX_TASK_RETRIES, CrashJournal, ShardGuard, end_process
from synpref_ray.pipeline.metrics import export
from synpref_ray.pipeline.progress import Progress
from synpref_ray.pipeline.shard_io import (
    COUNTERS,
    ROWS,
    SHARD,
    TABLE,
    Output,
    ShardKey,
    ShardSink,
    ShardSource,
    ShardWriter,
    StepInput,
    count_values,
    read_shard,
    without_shards,
)
from synpref_ray.pipeline.usage import UsageRecord
from synpref_ray.priority import MODEL_ENVIRONMENT
from synpref_ray.reporting.metrics import ShardWork, shard_samples
from synpref_ray.reporting.usage import OF_JOURNAL, USAGE, read_usage
from synpref_ray.schema import REJECT_REASONS
from synpref_ray.tables.leases import Lease
from synpref_ray.tables.pools import Pool, content_digest
from synpref_ray.tables.reading import read_each
from synpref_ray.tables.sidecars import Sidecar, fingerprint

logger = logging.getLogger(__name__)

CRASHES = "crashes"
"""Folder of a table in the making where its workers write down what they have in hand (`pipeline/crashes.py`)."""
INLINE_ROWS = 20_000  # ours: a rule over so few rows takes well under a second, and starting a Ray Data plan several
TELLING_REJECTS = 1_000  # ours: as many rejected rows of one table speak for themselves, whatever the step's other tables say


class ShardWorker(Protocol):
    """What a step runs: one whole shard in, the same rows in the same order out, plus counters (requests, tokens …) for the record."""

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]: ...


@dataclass(frozen=True)
class Resources:
    """What the workers of a step take: `num_workers` 0 means stateless tasks instead of actors; `environment` is set before they import anything.

    `min_workers` is where a pool of actors begins, and what it falls back to when shards run out; 0: at `num_workers`. A worker that takes longer
    than `max_shard_seconds` over a shard is ended, and the shard is run again (`pipeline/crashes.py`); 0: it may take for ever.
    """

    num_workers: int = 0
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    concurrent_shards: int = 1
    environment: tuple[tuple[str, str], ...] = ()
    min_workers: int = 0
    max_shard_seconds: float = 0.0


@dataclass(frozen=True)
class Step:
    """A worker class with what determines its results; `worker_arguments` gets the sidecars about to be written (for journals).

    `name` is part of the result's fingerprint: the same work has the same name wherever it is done. `title` is what people see, with the round,
    and `model` what metrics call the model that works.
    """

    name: str
    version: int
    worker: Callable[..., ShardWorker]
    outputs: tuple[Output, ...]
    settings: Mapping[str, Any]
    digests: Mapping[str, str] = field(default_factory=dict)
    worker_arguments: Callable[[list[Sidecar]], Mapping[str, Any]] = lambda _: {}
    resources: Resources = Resources()
    title: str = ""
    model: str = ""
    max_failed_fraction: float = 0.5  # ours: more rejects than accepted rows means a wrong model or a wrong input, not bad luck

    @property
    def label(self) -> str:
        """What progress bars, dashboards and metrics call the step."""
        return self.title or self.name


@dataclass(frozen=True)
class StepResult:
    """The sealed sidecars (per input, per output) and what this run did: shards and rows computed, rejects by reason, counters, seconds."""

    sidecars: list[list[Sidecar]]
    shards_computed: int
    rows_computed: int
    rows: int
    rejected: Mapping[str, int]
    counters: Mapping[str, float]
    seconds: float


def plan_sidecars(step: Step, inputs: Sequence[StepInput]) -> list[list[Sidecar]]:
    """Return the sidecars that `run_step` would make, without making them."""
    tables = []
    for source in inputs:
        digests = {**step.digests, "pool": source.pool.digest}
        digests |= {f"sidecar:{sidecar.name}": sidecar.fingerprint for sidecar, _ in source.sidecars}
        if source.pool.clusters and "prompt_group" in source.columns:
            digests["clusters"] = source.pool.clusters
        name = fingerprint(step.name, step.version, step.settings, digests)
        tables.append([Sidecar(source.pool, output.name, content_digest([name, output.name])) for output in step.outputs])
    return tables


def run_step(step: Step, inputs: Sequence[StepInput]) -> StepResult:
    """Make the step's sidecars for every input pool; shards and tables that are there already are not computed again.

    Our choice: a table with more rejected rows than `max_failed_fraction` is sealed all the same if it is a small one (fewer than `TELLING_REJECTS`
    rejected rows) and all tables of the step together have fewer than that fraction: of a handful of pairs most may be too long by chance, and no
    rerun would change it.

    Raises:
        RunConflictError: another driver is writing one of the tables.
        SynprefError: more than `max_failed_fraction` of a table's rows were rejected.
    """
    started = time.monotonic()
    tables = plan_sidecars(step, inputs)
    open_tables = [index for index, outputs in enumerate(tables) if not all(sidecar.is_sealed for sidecar in outputs)]
    counters: Counter[str] = Counter()
    shards_computed = rows_computed = 0
    with ExitStack() as leases:
        held = {index: leases.enter_context(Lease(inputs[index].pool.storage, f"{tables[index][0].folder}/lease.json")) for index in open_tables}
        pending = [key for index in open_tables for key in _pending(index, inputs[index].pool, step.outputs, tables[index])]
        inline = step.resources.num_workers == 0 and sum(rows for _, rows in _with_rows(inputs, pending)) <= INLINE_ROWS
        reasons: dict[ShardKey, list[Mapping[str, int]]] = {}
        for result in (_run_inline if inline else _run_on_ray)(step, inputs, tables, pending):
            counters.update(result["counters"])
            reasons[ShardKey(*result["key"])] = result["reasons"]
            shards_computed += 1
            rows_computed += result["rows"]
        made = {i: {key.number: found for key, found in reasons.items() if key.table == i} for i in open_tables}
        counted = {index: _count_rejected(step, inputs[index], tables[index], made[index]) for index in open_tables}
        done = _Done(counters, time.monotonic() - started, sum(source.pool.num_rows for source in inputs), _all_failed(tables, counted))
        for index in open_tables:
            held[index].check()
            for sidecar in tables[index]:
                sidecar.pool.storage.delete_folder(f"{sidecar.folder}/{CRASHES}")
            _seal(step, inputs[index], tables[index], counted[index], done)
            tables[index][0].pool.storage.delete_folder(f"{tables[index][0].folder}/{USAGE}")  # not before: a next run seals all outputs again
    rejected: Counter[str] = Counter()
    for outputs in tables:
        rejected.update(outputs[0].manifest["rejected"])
    rows = sum(source.pool.num_rows for source in inputs)
    return StepResult(tables, shards_computed, rows_computed, rows, dict(rejected), dict(counters), time.monotonic() - started)


def _pending(index: int, pool: Pool, outputs: Sequence[Output], sidecars: list[Sidecar]) -> list[ShardKey]:
    """Return the shards still to compute; those without a row are written here, since Ray Data may drop an empty block."""
    finished = set.intersection(*(sidecar.finished() for sidecar in sidecars))
    pending = [shard for shard in pool.shards if shard.number not in finished]
    for shard in pending:
        if shard.rows == 0:
            for output, sidecar in zip(outputs, sidecars, strict=True):
                sidecar.write(shard.number, output.schema.empty_table())
    return [ShardKey(index, shard.number) for shard in pending if shard.rows > 0]


@dataclass(frozen=True)
class _Done:
    """What holds for all tables of a step when they are sealed: what the last run did, the rows of all, and how many of them failed, by output."""

    counters: Mapping[str, float]
    seconds: float
    rows: int
    failed: Sequence[int]


def _count_rejected(
    step: Step, source: StepInput, outputs: Sequence[Sidecar], made: Mapping[int, Sequence[Mapping[str, int]]]
) -> list[Mapping[str, int]]:
    """Return the drop reasons in a table whose shards are all there, by output.

    Args:
        made: those in the shards that this run made, by number and output; the other shards are read.
    """
    counted: list[Mapping[str, int]] = []
    earlier = [shard.number for shard in source.pool.shards if shard.number not in made and shard.rows]
    for place, (output, sidecar) in enumerate(zip(step.outputs, outputs, strict=True)):
        rejected: Counter[str] = Counter()
        for shard in source.pool.shards:
            rejected.update(made[shard.number][place] if shard.number in made else {})
        if "drop_reason" in output.schema.names:
            for table in read_each(partial(sidecar.read, columns=["drop_reason"]), earlier):
                rejected.update(count_values(table["drop_reason"]))
        counted.append(rejected)
    return counted


def _num_failed(rejected: Mapping[str, int]) -> int:
    return sum(count for reason, count in rejected.items() if reason in REJECT_REASONS)


def _all_failed(tables: Sequence[Sequence[Sidecar]], counted: Mapping[int, Sequence[Mapping[str, int]]]) -> list[int]:
    """Return how many rows of all tables failed, by output; what was not counted now was sealed before, and its manifest says it."""
    by_table = [counted.get(index) or [sidecar.manifest["rejected"] for sidecar in outputs] for index, outputs in enumerate(tables)]
    return [sum(map(_num_failed, of_output)) for of_output in zip(*by_table, strict=True)] if counted else []


def _check_rejected(step: Step, outputs: Sequence[Sidecar], rejected: Mapping[str, int], done: _Done, place: int) -> None:
    """Refuse one output of a table with too many rejected rows (see `run_step`)."""
    pool, failed, most = outputs[place].pool, _num_failed(rejected), step.max_failed_fraction
    if failed <= most * pool.num_rows:
        return
    found = f"step {step.name!r} rejected {failed} of {pool.num_rows} rows of pool {pool.name!r} ({dict(rejected)}), more than {most:.0%}"
    if failed < TELLING_REJECTS and done.failed[place] <= most * done.rows:
        logger.warning("%s, but of all its pools together %d of %d: the pool is taken", found, done.failed[place], done.rows)
        return
    made = " and ".join(pool.storage.join(sidecar.folder) for sidecar in outputs)
    raise SynprefError(
        f"{found}; the rows and reasons are under {pool.storage.join(f'rejects/{step.name}')}. If they are right, raise the step's "
        "max_failed_fraction: nothing is computed again. If the cause is outside of the settings (a server, say), mend it, delete the "
        f"shard-*.parquet files in {made} (and the journal/ there, which keeps replies that could not be read), and start the job again"
    )


def _seal(step: Step, source: StepInput, outputs: Sequence[Sidecar], counted: Sequence[Mapping[str, int]], done: _Done) -> None:
    usage = read_usage(source.pool.storage, outputs[0].folder)
    for place, (rejected, sidecar) in enumerate(zip(counted, outputs, strict=True)):
        _check_rejected(step, outputs, rejected, done, place)
        source.pool.storage.write_json(
            f"{sidecar.folder}/manifest.json",
            {
                "step": step.name,
                "version": step.version,
                "fingerprint": sidecar.fingerprint,
                "settings": dict(step.settings),
                "digests": dict(step.digests),
                "pool": source.pool.name,
                "pool_version": source.pool.version,
                "pool_digest": source.pool.digest,
                "sidecars": {beside.name: beside.fingerprint for beside, _ in source.sidecars},
                "rows": source.pool.num_rows,
                "shards": len(source.pool.shards),
                "rejected": dict(sorted(rejected.items())),
                "counters_of_last_run": dict(done.counters),
                "seconds_of_last_run": round(done.seconds, 3),
                "usage": usage if place == 0 else {},  # of all outputs of the step, over all runs
            },
        )


def _run_inline(step: Step, inputs: Sequence[StepInput], tables: list[list[Sidecar]], pending: Sequence[ShardKey]) -> list[dict[str, Any]]:
    if not pending:
        return []
    task, writer = _ShardTask(step, tables), ShardWriter(step.name, step.outputs, tables)
    return [writer.write(task(read_shard(inputs[key.table], key, rows))) for key, rows in _with_rows(inputs, pending)]


def _run_on_ray(step: Step, inputs: Sequence[StepInput], tables: list[list[Sidecar]], pending: Sequence[ShardKey]) -> list[dict[str, Any]]:
    if not pending:
        return []
    tables = [[without_shards(sidecar) for sidecar in outputs] for outputs in tables]
    sink = ShardSink(ShardWriter(step.name, step.outputs, tables))
    tell_if_no_room(step.label, step.resources.num_cpus, step.resources.num_gpus)
    with data_context(step.resources.num_gpus):
        dataset, writing = plan_dataset(step, tables, ShardSource(inputs, _with_rows(inputs, pending)), pending)
    rows = _with_rows(inputs, pending)
    of_table = [(outputs[-1], {key.number: count for key, count in rows if key.table == index}) for index, outputs in enumerate(tables)]
    try:
        with Progress(step.label, [(sidecar, shards) for sidecar, shards in of_table if shards]):
            dataset.write_datasink(sink, ray_remote_args=writing)
    except ray.exceptions.RayError as error:
        raise unwrap(error) from error
    return sink.results


def plan_dataset(step: Step, tables: list[list[Sidecar]], source: ShardSource, pending: Sequence[ShardKey]) -> tuple[Dataset, dict[str, Any]]:
    """Return the dataset that reads shards and works on them, not begun yet, and the remote arguments for writing its blocks.

    Ray Data runs operators in one process, and saves a pass of every shard through the object store, only where their remote arguments are the very
    same (Ray 2.60, `operator_fusion.py`). So stateless work has those of reading and writing. Actors have not, and read apart: their restarts are
    bounded by `max_restarts` and `max_task_retries`, which Ray refuses for a task, as it refuses `max_retries` for an actor, and the plan makes a
    task of reading before it fuses anything. Without bounds reading would be fused, and a pair that kills its process would be tried for ever. For a
    GPU it is better so: its next shards are fetched while it works.

    Args:
        tables: the sidecars to write, by input and output.
        pending: what the source reads.
    """
    resources = step.resources
    retries: dict[str, Any] = {"max_retries": MAX_TASK_RETRIES}
    place: dict[str, Any] = {"num_cpus": resources.num_cpus}
    if resources.num_gpus:
        place["num_gpus"] = resources.num_gpus
    if environment := {**(MODEL_ENVIRONMENT if resources.num_workers else {}), **dict(resources.environment)}:
        place["runtime_env"] = {"env_vars": environment}
    around = retries if resources.num_workers else {**place, **retries}
    dataset = ray.data.read_datasource(source, override_num_blocks=len(pending), ray_remote_args=around)
    # `map_batches` refuses whole blocks for workers with GPUs, since it cannot know that a block is a shard; it is this function after that check.
    whole: dict[str, Any] = {"batch_format": "pyarrow", "batch_size": None, **place}
    if resources.num_workers == 0:
        return dataset.map_batches_internal(_StatelessTask(step, tables), **whole, **retries), around
    most = min(num_workers(step), len(pending))
    compute = ActorPoolStrategy(
        min_size=min(resources.min_workers or most, most),
        max_size=most,
        max_tasks_in_flight_per_actor=max(2, 2 * resources.concurrent_shards),
        max_concurrent_calls_per_actor=resources.concurrent_shards,
        enable_true_multi_threading=resources.concurrent_shards > 1,
    )
    named = type(step.label, (_ShardTask,), {})  # the operator's name in progress bars and on the dashboard
    made_of = (step, tables, uuid.uuid4().hex[:8], pending[0].table)
    bounds = {"max_restarts": MAX_RESTARTS, "max_task_retries": MAX_RESTARTS}
    return dataset.map_batches_internal(named, fn_constructor_args=made_of, compute=compute, **whole, **bounds), around


def num_workers(step: Step) -> int:
    """Return how many actors may work at once: of those without GPUs as many as leave a CPU to reading (see `RayConfig.max_cpus`)."""
    asked, num_cpus = step.resources.num_workers, step.resources.num_cpus
    if step.resources.num_gpus or asked * num_cpus + 1 <= cpu_bound():
        return asked
    most = max(1, int((cpu_bound() - 1) // num_cpus))
    if most < asked:
        logger.warning("%s: %d workers instead of %d, for more would ask for more than ray.max_cpus=%d", step.label, most, asked, cpu_bound())
    return most


def _with_rows(inputs: Sequence[StepInput], pending: Sequence[ShardKey]) -> list[tuple[ShardKey, int]]:
    rows = {ShardKey(index, shard.number): shard.rows for index, source in enumerate(inputs) for shard in source.pool.shards}
    return [(key, rows[key]) for key in pending]


class _ShardTask:
    """A worker on the cluster: made once per actor, checks the contract of every shard that it returns.

    Args:
        run: names this run of the step, and makes the worker one that writes down what it has in hand (`pipeline/crashes.py`); empty: it does not.
        first: the number of a table that this run writes.
    """

    def __init__(self, step: Step, tables: list[list[Sidecar]], run: str = "", first: int = 0):
        self._step = step
        self._journals: list[CrashJournal] = []
        arguments = step.worker_arguments([outputs[0] for outputs in tables])
        if not run:
            self._worker = step.worker(**arguments)
            return
        self._journals = [CrashJournal(outputs[0].pool.storage, f"{outputs[0].folder}/{CRASHES}", run) for outputs in tables]
        self._guard = ShardGuard(step.name, [(output.prefix, output.schema) for output in step.outputs], step.resources.max_shard_seconds)
        self._usage = UsageRecord([outputs[0] for outputs in tables], step.resources.num_gpus, uuid.uuid4().hex[:12])
        with self._journals[first].starting(ray.get_runtime_context().get_actor_id() or "driver"):
            self._worker = step.worker(**arguments)

    def _run(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        if not self._journals:
            return self._worker(shard, key)
        try:
            with self._usage.working(key.table, key.number) as used:
                return self._guard(shard, key.number, self._journals[key.table], lambda rows: self._work(rows, key, used))
        except EngineDied as error:
            end_process(f"step {self._step.name}: {error}")
            raise

    def _work(self, rows: pa.Table, key: ShardKey, used: dict[str, float]) -> tuple[pa.Table, Mapping[str, float]]:
        """Return what the worker makes of a range of a shard; what its journal adds up to goes into `used`, the range's own counters are returned."""
        table, counters = self._worker(rows, key)
        used.update(counters)
        return table, {name: value for name, value in counters.items() if name not in OF_JOURNAL}

    def __call__(self, block: pa.Table) -> pa.Table:
        if block.num_rows == 0:
            return block
        places = block.select([TABLE, SHARD, ROWS])
        key = ShardKey(places[TABLE][0].as_py(), places[SHARD][0].as_py())
        started = time.perf_counter()
        result, counters = self._run(block.drop_columns(places.column_names).combine_chunks(), key)
        if not result["pair_id"].combine_chunks().equals(block["pair_id"].combine_chunks()):
            raise SchemaError(f"step {self._step.name!r} changed the rows or the order of shard {key.number}")
        self._export(result, counters, time.perf_counter() - started)
        for name in places.column_names:
            result = result.append_column(name, places[name])
        note = pa.chunked_array([pa.array([json.dumps(dict(counters))]), pa.nulls(block.num_rows - 1, pa.string())])
        return result.append_column(COUNTERS, note.combine_chunks())

    def _export(self, result: pa.Table, counters: Mapping[str, float], seconds: float) -> None:
        step, resources = self._step, self._step.resources
        rejected: Counter[str] = Counter()
        for column in {output.prefix + "drop_reason" for output in step.outputs} & {*result.column_names}:
            rejected.update({reason: count for reason, count in count_values(result[column]).items() if reason in REJECT_REASONS})
        shares = resources.concurrent_shards
        cpus, gpus = resources.num_cpus / shares, resources.num_gpus / shares
        export(shard_samples(ShardWork(step.label, step.model, result.num_rows, rejected, seconds, counters, cpus, gpus)))


@dataclass(frozen=True)
class _StatelessTask:
    step: Step
    tables: list[list[Sidecar]]

    def __call__(self, block: pa.Table) -> pa.Table:
        return _ShardTask(self.step, self.tables)(block)


def unwrap(error: BaseException) -> BaseException:
    """Return the `SynprefError` behind a Ray error, if there is one, else the error itself.

    Ray keeps the error of a task in `cause`; of an actor whose constructor failed, it keeps the task's error as the only argument of an
    ActorDiedError (Ray 2.60).
    """
    open_errors, seen = [error], set()
    while open_errors:
        found = open_errors.pop(0)
        if isinstance(found, SynprefError) and not isinstance(found, ray.exceptions.RayError):  # not Ray's double, whose text is a traceback
            return found
        seen.add(id(found))
        behind = (getattr(found, "cause", None), found.__cause__, *found.args)
        open_errors += [other for other in behind if isinstance(other, BaseException) and id(other) not in seen]
    return error


__all__ = [
    "CRASHES",
    "INLINE_ROWS",
    "Output",
    "Resources",
    "ShardKey",
    "ShardWorker",
    "Step",
    "StepInput",
    "StepResult",
    "num_workers",
    "plan_dataset",
    "plan_sidecars",
    "run_step",
    "unwrap",
]
