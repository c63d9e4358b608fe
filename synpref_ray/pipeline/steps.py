"""One resumable unit of work over pools: whole shards stream from a source through workers into a sink.

`run_step` reads pending shards only (a listing tells which are done), gives each whole shard to a worker, writes each result atomically, and seals
the sidecar with its manifest last. Killing anything at any moment loses the shards in flight and nothing else.
"""

import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import ActorPoolStrategy, Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasink, ReadTask, WriteResult

from synpref_ray.errors import SchemaError, SynprefError
from synpref_ray.llm.engine import EngineDied
from synpref_ray.pipeline.crashes import MAX_RESTARTS, MAX_TASK_RETRIES, CrashJournal, ShardGuard, end_process
from synpref_ray.pipeline.metrics import export
from synpref_ray.pipeline.progress import Progress
from synpref_ray.reporting.metrics import ShardWork, shard_samples
from synpref_ray.schema import REJECT_REASONS
from synpref_ray.tables.leases import Lease
from synpref_ray.tables.pools import Pool, content_digest, shard_path, with_shard_number
from synpref_ray.tables.sidecars import Sidecar, fingerprint, zip_shard

_TABLE = "_table"
_SHARD = "_shard"
_ROWS = "_rows"
_COUNTERS = "_counters"
CRASHES = "crashes"
"""Folder of a table in the making where its workers write down what they have in hand (`pipeline/crashes.py`)."""
RAW_COLUMNS = ("raw", "votes")
"""What a step's worker got back for a row; kept with the row where it was refused."""
INLINE_ROWS = 20_000  # ours: a rule over so few rows takes well under a second, and starting a Ray Data plan several


@dataclass(frozen=True)
class ShardKey:
    """Which shard a worker holds: the index of its pool among the step's inputs, and the shard's number."""

    table: int
    number: int


class ShardWorker(Protocol):
    """What a step runs: one whole shard in, the same rows in the same order out, plus counters (requests, tokens …) for the record."""

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]: ...


@dataclass(frozen=True)
class Output:
    """A sidecar that a step writes; `prefix` marks its columns when one pass makes several sidecars."""

    name: str
    schema: pa.Schema
    prefix: str = ""


@dataclass(frozen=True)
class StepInput:
    """A pool, the columns a worker needs of it, and the sidecars beside it ({sidecar column: name in the shard})."""

    pool: Pool
    columns: tuple[str, ...]
    sidecars: tuple[tuple[Sidecar, Mapping[str, str]], ...] = ()


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
        seconds = time.monotonic() - started
        done = _LastRun(counters, seconds, seconds * step.resources.num_gpus * min(step.resources.num_workers, shards_computed))
        for index in open_tables:
            held[index].check()
            for sidecar in tables[index]:
                sidecar.pool.storage.delete_folder(f"{sidecar.folder}/{CRASHES}")
            share = sum(key.table == index for key in pending) / max(1, len(pending))
            of_table = {key.number: found for key, found in reasons.items() if key.table == index}
            _seal(step, inputs[index], tables[index], replace(done, share=share, reasons=of_table))
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
class _LastRun:
    """What the run that seals a step's tables did for all of them; seconds are of the wall clock, GPU seconds those of all workers.

    Of one table: its share of the shards, and the drop reasons in each of its shards that this run made, by output.
    """

    counters: Mapping[str, float]
    seconds: float
    gpu_seconds: float
    share: float = 0.0
    reasons: Mapping[int, Sequence[Mapping[str, int]]] = field(default_factory=dict)


def _seal(step: Step, source: StepInput, outputs: list[Sidecar], done: _LastRun) -> None:
    for place, (output, sidecar) in enumerate(zip(step.outputs, outputs, strict=True)):
        rejected: Counter[str] = Counter()
        for shard in source.pool.shards:
            if shard.number in done.reasons:
                rejected.update(done.reasons[shard.number][place])
            elif shard.rows and "drop_reason" in output.schema.names:  # made by an earlier run
                rejected.update(_count(sidecar.read(shard.number, ["drop_reason"])["drop_reason"]))
        failed = sum(count for reason, count in rejected.items() if reason in REJECT_REASONS)
        if failed > step.max_failed_fraction * source.pool.num_rows:
            raise SynprefError(
                f"step {step.name!r} rejected {failed} of {source.pool.num_rows} rows of pool {source.pool.name!r} ({dict(rejected)}), more than "
                f"{step.max_failed_fraction:.0%}; the rows and reasons are under {source.pool.storage.join(f'rejects/{step.name}')}"
            )
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
                "gpu_seconds_of_last_run": round(done.gpu_seconds, 3),
                "share_of_last_run": round(done.share / len(outputs), 6),  # of that run's shards: what costs of several tables add up by
            },
        )


def _count(reasons: pa.ChunkedArray) -> dict[str, int]:
    """Return how often each value comes, nulls left out."""
    return {entry["values"]: entry["counts"] for entry in pc.value_counts(reasons).to_pylist() if entry["values"] is not None}


def _run_inline(step: Step, inputs: Sequence[StepInput], tables: list[list[Sidecar]], pending: Sequence[ShardKey]) -> list[dict[str, Any]]:
    if not pending:
        return []
    task, writer = _ShardTask(step, tables), _ShardWriter(step.name, step.outputs, tables)
    return [writer.write(task(_read_shard(inputs[key.table], key, rows))) for key, rows in _with_rows(inputs, pending)]


def _run_on_ray(step: Step, inputs: Sequence[StepInput], tables: list[list[Sidecar]], pending: Sequence[ShardKey]) -> list[dict[str, Any]]:
    if not pending:
        return []
    # Workers get pools without their lists of shards: at 40M pairs a list is thousands of entries, and every task would carry it.
    light = [replace(source, pool=_without_shards(source.pool)) for source in inputs]
    tables = [[replace(sidecar, pool=_without_shards(sidecar.pool)) for sidecar in outputs] for outputs in tables]
    resources = step.resources
    sink = _ShardSink(_ShardWriter(step.name, step.outputs, tables))
    # The same bound for reading, stateless work and writing, so that Ray Data still fuses them into one task a shard.
    retries = {"max_retries": MAX_TASK_RETRIES}
    source = _ShardSource(light, _with_rows(inputs, pending))
    dataset = ray.data.read_datasource(source, override_num_blocks=len(pending), ray_remote_args=retries)
    # `map_batches` wants a number of rows where a worker asks for GPUs; we want whole shards, and the one of Ray's developer API gives them.
    arguments: dict[str, Any] = {"batch_format": "pyarrow", "batch_size": None, "num_cpus": resources.num_cpus}
    if resources.num_gpus:
        arguments["num_gpus"] = resources.num_gpus
    if resources.environment:
        arguments["runtime_env"] = {"env_vars": dict(resources.environment)}
    if resources.num_workers == 0:
        dataset = dataset.map_batches_internal(_StatelessTask(step, tables), **arguments, **retries)
    else:
        most = min(resources.num_workers, len(pending))
        compute = ActorPoolStrategy(
            min_size=min(resources.min_workers or most, most),
            max_size=most,
            max_tasks_in_flight_per_actor=max(2, 2 * resources.concurrent_shards),
            max_concurrent_calls_per_actor=resources.concurrent_shards,
            enable_true_multi_threading=resources.concurrent_shards > 1,
        )
        named = type(step.label, (_ShardTask,), {})  # the operator's name in progress bars and on the dashboard
        bounded = {"max_restarts": MAX_RESTARTS, "max_task_retries": MAX_RESTARTS}
        made_of = (step, tables, uuid.uuid4().hex[:8], pending[0].table)
        dataset = dataset.map_batches_internal(named, fn_constructor_args=made_of, compute=compute, **arguments, **bounded)
    rows = _with_rows(inputs, pending)
    of_table = [(outputs[-1], {key.number: count for key, count in rows if key.table == index}) for index, outputs in enumerate(tables)]
    try:
        with Progress(step.label, [(sidecar, shards) for sidecar, shards in of_table if shards]):
            dataset.write_datasink(sink, ray_remote_args=retries)
    except ray.exceptions.RayError as error:
        raise unwrap(error) from error
    return sink.results


def _without_shards(pool: Pool) -> Pool:
    return replace(pool, shards=())


def _with_rows(inputs: Sequence[StepInput], pending: Sequence[ShardKey]) -> list[tuple[ShardKey, int]]:
    rows = {ShardKey(index, shard.number): shard.rows for index, source in enumerate(inputs) for shard in source.pool.shards}
    return [(key, rows[key]) for key in pending]


def _read_shard(source: StepInput, key: ShardKey, rows: int) -> pa.Table:
    shard = zip_shard(source.pool, key.number, source.columns, [(s, dict(columns)) for s, columns in source.sidecars])
    if shard.num_rows != rows:
        raise SchemaError(f"shard {key.number} of pool {source.pool.name!r} has {shard.num_rows} rows where its manifest says {rows}")
    for name, value in ((_TABLE, key.table), (_SHARD, key.number), (_ROWS, rows)):
        shard = shard.append_column(name, pa.array(np.full(rows, value, dtype=np.int32)))
    return shard


@dataclass(frozen=True)
class _ShardWriter:
    """Writes one whole shard of every output; used by the sink, wherever Ray runs it."""

    step: str
    outputs: tuple[Output, ...]
    tables: list[list[Sidecar]]

    def write(self, block: pa.Table) -> dict[str, Any]:
        """Write the one whole shard that a block must be, its rejects first."""
        keys = block.select([_TABLE, _SHARD, _ROWS]).group_by([_TABLE, _SHARD, _ROWS]).aggregate([]).to_pylist()
        if len(keys) != 1:
            raise SchemaError(f"step {self.step!r}: a block reached the sink with rows of {len(keys)} shards; blocks must be whole shards")
        table_index, number, rows = (keys[0][name] for name in (_TABLE, _SHARD, _ROWS))
        if block.num_rows != rows:
            raise SchemaError(f"step {self.step!r}: {block.num_rows} of {rows} rows of shard {number} reached the sink together")
        reasons: list[dict[str, int]] = []
        for output, sidecar in zip(self.outputs, self.tables[table_index], strict=True):
            names = [name if name == "pair_id" else output.prefix + name for name in output.schema.names]
            table = block.select(names).rename_columns(output.schema.names).cast(output.schema)
            self._write_rejects(number, sidecar, table)
            sidecar.write(number, table)
            reasons.append(_count(table["drop_reason"]) if "drop_reason" in table.column_names else {})
        return {"key": (table_index, number), "counters": json.loads(block[_COUNTERS][0].as_py()), "rows": block.num_rows, "reasons": reasons}

    def _write_rejects(self, number: int, sidecar: Sidecar, table: pa.Table) -> None:
        if "drop_reason" not in table.column_names:
            return
        refused = pc.is_in(table["drop_reason"], value_set=pa.array(sorted(REJECT_REASONS)))
        if not pc.any(refused).as_py():
            return
        pool = sidecar.pool
        rows = pool.read(number).filter(refused)
        for name in [name for name in ("drop_reason", *RAW_COLUMNS) if name in table.column_names]:
            rows = rows.append_column(name, table[name].filter(refused))
        folder = f"rejects/{self.step}/{pool.name}-{sidecar.name}-{sidecar.fingerprint[:8]}"
        pool.storage.write_table(shard_path(folder, number), with_shard_number(rows, number))


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
        with self._journals[first].starting(ray.get_runtime_context().get_actor_id() or "driver"):
            self._worker = step.worker(**arguments)

    def _run(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        if not self._journals:
            return self._worker(shard, key)
        try:
            return self._guard(shard, key.number, self._journals[key.table], lambda rows: self._worker(rows, key))
        except EngineDied as error:
            end_process(f"step {self._step.name}: {error}")
            raise

    def __call__(self, block: pa.Table) -> pa.Table:
        if block.num_rows == 0:
            return block
        places = block.select([_TABLE, _SHARD, _ROWS])
        key = ShardKey(places[_TABLE][0].as_py(), places[_SHARD][0].as_py())
        started = time.perf_counter()
        result, counters = self._run(block.drop_columns(places.column_names).combine_chunks(), key)
        if not result["pair_id"].combine_chunks().equals(block["pair_id"].combine_chunks()):
            raise SchemaError(f"step {self._step.name!r} changed the rows or the order of shard {key.number}")
        self._export(result, counters, time.perf_counter() - started)
        for name in places.column_names:
            result = result.append_column(name, places[name])
        note = pa.chunked_array([pa.array([json.dumps(dict(counters))]), pa.nulls(block.num_rows - 1, pa.string())])
        return result.append_column(_COUNTERS, note.combine_chunks())

    def _export(self, result: pa.Table, counters: Mapping[str, float], seconds: float) -> None:
        step, resources = self._step, self._step.resources
        rejected: Counter[str] = Counter()
        for column in {output.prefix + "drop_reason" for output in step.outputs} & {*result.column_names}:
            rejected.update({reason: count for reason, count in _count(result[column]).items() if reason in REJECT_REASONS})
        shares = resources.concurrent_shards
        cpus, gpus = resources.num_cpus / shares, resources.num_gpus / shares
        export(shard_samples(ShardWork(step.label, step.model, result.num_rows, rejected, seconds, counters, cpus, gpus)))


@dataclass(frozen=True)
class _StatelessTask:
    step: Step
    tables: list[list[Sidecar]]

    def __call__(self, block: pa.Table) -> pa.Table:
        return _ShardTask(self.step, self.tables)(block)


class _ShardSource(Datasource):
    """One read task per pending shard, so that every block is a whole shard."""

    def __init__(self, inputs: Sequence[StepInput], pending: Sequence[tuple[ShardKey, int]]):
        Datasource.__init__(self)  # type: ignore[no-untyped-call]
        self._inputs = inputs
        self._pending = pending

    def get_name(self) -> str:
        return "Shards"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None) -> list[ReadTask]:
        tasks = []
        for key, rows in self._pending:
            metadata = BlockMetadata(num_rows=rows, size_bytes=None, input_files=None, exec_stats=None)
            tasks.append(ReadTask(_ReadOne(self._inputs[key.table], key, rows), metadata))
        return tasks


@dataclass(frozen=True)
class _ReadOne:
    source: StepInput
    key: ShardKey
    rows: int

    def __call__(self) -> list[pa.Table]:
        return [_read_shard(self.source, self.key, self.rows)]


class _ShardSink(Datasink[list[dict[str, Any]]]):
    """Writes each block as the shard that the block itself names; never by task number, never by order."""

    def __init__(self, writer: _ShardWriter):
        self._writer = writer
        self.results: list[dict[str, Any]] = []

    def get_name(self) -> str:
        return "Sidecar"

    def write(self, blocks: Iterable[pa.Table], ctx: Any) -> list[dict[str, Any]]:
        return [self._writer.write(block) for block in blocks if block.num_rows > 0]

    def on_write_complete(self, write_result: WriteResult[list[dict[str, Any]]]) -> None:
        self.results = [result for results in write_result.write_returns for result in results]


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
