"""Whole shards in and out of Ray Data: a source with one read task a shard, and a sink that writes each block as the shard that the block names.

A block carries, in columns of its own, which shard of which table it is and how many rows that has. Order between blocks means nothing, and a block
that is not exactly one whole shard is an error. The same reading and writing serves steps that run in one process.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.data import Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasink, ReadTask, WriteResult

from synpref_ray.errors import SchemaError
from synpref_ray.schema import REJECT_REASONS
from synpref_ray.tables.pools import Pool, shard_path, with_shard_number
from synpref_ray.tables.sidecars import Sidecar, zip_shard

TABLE, SHARD, ROWS, COUNTERS = "_table", "_shard", "_rows", "_counters"
"""Columns of a block: the index of its pool among the step's inputs, the shard's number and rows, and (in the first row) what the worker counted."""
RAW_COLUMNS = ("raw", "votes")
"""What a step's worker got back for a row; kept with the row where it was refused."""


@dataclass(frozen=True)
class ShardKey:
    """Which shard a worker holds: the index of its pool among the step's inputs, and the shard's number."""

    table: int
    number: int


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


def count_values(reasons: pa.ChunkedArray) -> dict[str, int]:
    """Return how often each value comes, nulls left out."""
    return {entry["values"]: entry["counts"] for entry in pc.value_counts(reasons).to_pylist() if entry["values"] is not None}


def without_shards(sidecar: Sidecar) -> Sidecar:
    """Return what a task is sent of a sidecar: at 40M pairs its pool's list of shards is thousands of entries, and every task would carry it."""
    return replace(sidecar, pool=replace(sidecar.pool, shards=()))


def _light(source: StepInput) -> StepInput:
    sidecars = tuple((without_shards(sidecar), columns) for sidecar, columns in source.sidecars)
    return replace(source, pool=replace(source.pool, shards=()), sidecars=sidecars)


def read_shard(source: StepInput, key: ShardKey, rows: int) -> pa.Table:
    """Return one whole shard with the columns that say which one it is.

    Raises:
        SchemaError: it has not `rows` rows, as its pool's manifest says, or a sidecar beside it holds other pairs.
    """
    shard = zip_shard(source.pool, key.number, source.columns, [(s, dict(columns)) for s, columns in source.sidecars])
    if shard.num_rows != rows:
        raise SchemaError(f"shard {key.number} of pool {source.pool.name!r} has {shard.num_rows} rows where its manifest says {rows}")
    for name, value in ((TABLE, key.table), (SHARD, key.number), (ROWS, rows)):
        shard = shard.append_column(name, pa.array(np.full(rows, value, dtype=np.int32)))
    return shard


@dataclass(frozen=True)
class ShardWriter:
    """Writes one whole shard of every output; used by the sink, wherever Ray runs it, and by steps that run in one process."""

    step: str
    outputs: tuple[Output, ...]
    tables: list[list[Sidecar]]

    def write(self, block: pa.Table) -> dict[str, Any]:
        """Write the one whole shard that a block must be, its rejects first.

        A shard that is there already stays as it is, and is what the driver is told of: Ray does a task again whose process died between its last
        write and its return, and a driver that died between two outputs left the first.
        """
        keys = block.select([TABLE, SHARD, ROWS]).group_by([TABLE, SHARD, ROWS]).aggregate([]).to_pylist()
        if len(keys) != 1:
            raise SchemaError(f"step {self.step!r}: a block reached the sink with rows of {len(keys)} shards; blocks must be whole shards")
        table_index, number, rows = (keys[0][name] for name in (TABLE, SHARD, ROWS))
        if block.num_rows != rows:
            raise SchemaError(f"step {self.step!r}: {block.num_rows} of {rows} rows of shard {number} reached the sink together")
        reasons: list[dict[str, int]] = []
        for output, sidecar in zip(self.outputs, self.tables[table_index], strict=True):
            counted = "drop_reason" in output.schema.names
            if sidecar.has(number):
                reasons.append(count_values(sidecar.read(number, ["drop_reason"])["drop_reason"]) if counted else {})
                continue
            names = [name if name == "pair_id" else output.prefix + name for name in output.schema.names]
            table = block.select(names).rename_columns(output.schema.names).cast(output.schema)
            self._write_rejects(number, sidecar, table)
            sidecar.write(number, table)
            reasons.append(count_values(table["drop_reason"]) if counted else {})
        return {"key": (table_index, number), "counters": json.loads(block[COUNTERS][0].as_py()), "rows": block.num_rows, "reasons": reasons}

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


class ShardSource(Datasource):
    """One read task per pending shard, so that every block is a whole shard."""

    def __init__(self, inputs: Sequence[StepInput], pending: Sequence[tuple[ShardKey, int]]):
        Datasource.__init__(self)  # type: ignore[no-untyped-call]
        self._inputs = [_light(source) for source in inputs]
        self._pending = pending

    def get_name(self) -> str:
        """Return what progress bars call reading."""
        return "Shards"

    def estimate_inmemory_data_size(self) -> int | None:
        """Return None: sizes are known shard by shard, when they are read."""
        return None

    def get_read_tasks(self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None) -> list[ReadTask]:
        """Return a task for each pending shard, whatever Ray asks for."""
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
        return [read_shard(self.source, self.key, self.rows)]


class ShardSink(Datasink[list[dict[str, Any]]]):
    """Writes each block as the shard that the block itself names; never by task number, never by order."""

    def __init__(self, writer: ShardWriter):
        self._writer = writer
        self.results: list[dict[str, Any]] = []

    def get_name(self) -> str:
        """Return what progress bars call writing."""
        return "Sidecar"

    def write(self, blocks: Iterable[pa.Table], ctx: Any) -> list[dict[str, Any]]:
        """Write some blocks, each a whole shard; return what the driver is told of them."""
        return [self._writer.write(block) for block in blocks if block.num_rows > 0]

    def on_write_complete(self, write_result: WriteResult[list[dict[str, Any]]]) -> None:
        """Keep in `results` what all writes returned."""
        self.results = [result for results in write_result.write_returns for result in results]
