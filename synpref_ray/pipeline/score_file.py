"""Scoring a file of pairs: rows out == rows in, in input order, null with a reason where there is no reward. For jobs/score.py and evaluation.

The file becomes a scratch pool in the workspace, so that scoring runs on the same workers, resumes after a kill and never scores a file twice.
Results are read and written shard by shard: this process's memory does not grow with the file.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from synpref_ray.config import Settings
from synpref_ray.errors import ConfigError, InputError
from synpref_ray.ingest.readers import digest_file, open_binary, read_pair_file
from synpref_ray.ingest.source import PairColumns, SourceConfig
from synpref_ray.pipeline.job import JobConfig
from synpref_ray.pipeline.scoring import ScoreConfig, score_pools
from synpref_ray.reporting.run import Run
from synpref_ray.reporting.table import format_table
from synpref_ray.schema import POOL_SCHEMA, REWARDS_SCHEMA
from synpref_ray.tables.models import model_digest, model_folder
from synpref_ray.tables.pools import Pool, commit_pool, content_digest, open_pool, pool_exists, write_pool_shard
from synpref_ray.tables.sidecars import Sidecar
from synpref_ray.tables.storage import Storage

FILE_POOL_VERSION = 1
SCORED_SCHEMA = pa.schema([("pair_id", pa.string()), ("source_id", pa.string()), *list(REWARDS_SCHEMA)[1:]])
ROWS_PER_GROUP = 65_536  # ours: of the Parquet file, some MB; whatever the size of shards, so that it does not change the file
PLACES_SCHEMA = pa.schema([("row", pa.int64()), ("pair_id", pa.string()), ("source_id", pa.string()), ("reason", pa.string())])


class ScoreJobConfig(JobConfig):
    """What to score with what."""

    model: str
    """A reward model's folder, local or on S3, or a hub name."""
    pairs: str
    """A Parquet or JSONL file of pairs."""
    out: str
    """Where the rewards go: .parquet or .jsonl."""
    dtype: Literal["", "checkpoint", "float32", "bfloat16"] = ""
    """The same as `score.dtype`, in short; empty: what that says."""
    columns: PairColumns = PairColumns()
    pairs_per_shard: int = Field(default=2048, ge=1)  # ours: minutes of work on a small machine, seconds on a GPU
    score: ScoreConfig = ScoreConfig()

    @model_validator(mode="after")
    def _says_one_dtype(self) -> "ScoreJobConfig":
        if self.dtype and "dtype" in self.score.model_fields_set and self.dtype != self.score.dtype:
            raise ValueError(f"dtype={self.dtype}, but score.dtype={self.score.dtype}: give one of them")
        return self


class FileScoring(Settings):
    """How a file of pairs is read."""

    columns: PairColumns = PairColumns()
    pairs_per_shard: int = 2048
    """Pairs that are scored between two writes."""


@dataclass(frozen=True)
class ScoredFile:
    """The rewards of one model for every row of a pair file, in the workspace."""

    pool: Pool
    rewards: Sidecar

    def tables(self) -> Iterator[pa.Table]:
        """Yield the rows in input order, SCORED_SCHEMA, one shard at a time."""
        for shard in self.pool.shards:
            yield _in_input_order(self.pool, shard.number, self.rewards)


def check_score(config: ScoreJobConfig) -> None:
    """Check the model's folder, the file and the output's name."""
    model_folder(config.model, weights=False)
    with open_binary(config.pairs):
        pass
    if not config.out.endswith((".parquet", ".jsonl")):
        raise ConfigError(f"out must end in .parquet or .jsonl, found {config.out}")


def run_score(config: ScoreJobConfig, run: Run) -> str:
    """Score a file and write the rewards beside their rows; return the closing table."""
    reading = FileScoring(columns=config.columns, pairs_per_shard=config.pairs_per_shard)
    score = config.score.model_copy(update={"dtype": config.dtype}) if config.dtype else config.score
    scored = score_file(run, config.storage, config.pairs, [config.model], reading, score)[0]
    counted: Counter[str | None] = Counter()
    write_scored(_counting(scored.tables(), counted), config.out)
    num_scored = counted.pop(None, 0)
    reasons = sorted((str(reason), count) for reason, count in counted.items())
    num_rows = num_scored + counted.total()
    run.metrics.update({"rows": num_rows, "scored": num_scored, "rejected": dict(reasons)})
    rows = [("rows", str(num_rows)), ("scored", str(num_scored))]
    rows += [(f"no reward: {reason}", str(count)) for reason, count in reasons]
    return format_table(("pairs", "count"), rows)


def _counting(tables: Iterable[pa.Table], counted: Counter[str | None]) -> Iterator[pa.Table]:
    """Pass tables on and count their rows by drop reason, None for a row with a reward."""
    for table in tables:
        counted.update({entry["values"]: entry["counts"] for entry in pc.value_counts(table["drop_reason"]).to_pylist()})
        yield table


def score_file(run: Run, storage: Storage, file: str, models: Sequence[str], reading: FileScoring, config: ScoreConfig) -> list[ScoredFile]:
    """Score every row of a pair file with every model folder; the file is read once."""
    pool = _file_pool(storage, file, reading)
    names = [model_digest(model)[:8] for model in models]
    every_row = config.model_copy(update={"max_failed_fraction": 1.0})  # a pair without a reward is an answer here, however many there are
    rewards = score_pools(run, f"score {file.rsplit('/', 1)[-1]}", [pool], dict(zip(names, models, strict=True)), every_row).sidecars[0]
    sidecar_of = dict(zip(dict.fromkeys(names), rewards, strict=True))
    return [ScoredFile(pool, sidecar_of[name]) for name in names]


def _file_pool(storage: Storage, file: str, reading: FileScoring) -> Pool:
    """Return the scratch pool of a file, made once per content; duplicates stay, since every row wants an answer."""
    name_of_content = content_digest([FILE_POOL_VERSION, reading.model_dump(mode="json"), digest_file(file)])
    name = f"file-{name_of_content[:8]}"
    if pool_exists(storage, name):
        return open_pool(storage, name)
    shards = []
    for number, (pairs, places) in enumerate(_read(file, reading)):
        shards.append(write_pool_shard(storage, name, number, pairs))
        storage.write_table(f"pools/{name}/places-{number:05d}.parquet", places)
    if not shards:
        raise InputError(f"{file} holds no rows")
    return commit_pool(storage, name, name_of_content, shards, {"step": "file", "file": file})


def _read(file: str, reading: FileScoring) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Yield (pairs of pool shape, places) per chunk; a place is a row's number, its ids, and the reason if it is no pair."""
    given = SourceConfig(name="file", path=file, columns=reading.columns.model_copy(update={"source_id": ("pair_id",)}))
    other = SourceConfig(name="file", path=file, columns=reading.columns)
    size = reading.pairs_per_shard
    for with_given, with_other in zip(read_pair_file(file, given, max_rows=size), read_pair_file(file, other, max_rows=size), strict=True):
        pairs = with_other.pairs
        computed = zip(with_given.pairs["source_id"].to_pylist(), pairs["pair_id"].to_pylist(), strict=True)
        rows: list[dict[str, Any]] = [
            {"row": row, "pair_id": own or name, "source_id": source_id, "reason": None}
            for row, (own, name), source_id in zip(pairs["row"].to_pylist(), computed, pairs["source_id"].to_pylist(), strict=True)
        ]
        for reject in with_other.rejects.to_pylist():
            ids = _own_ids(reject["row_json"], reading.columns)
            rows.append({"row": reject["row"], "pair_id": ids[0], "source_id": ids[1], "reason": reject["reason"]})
        yield pairs.select(POOL_SCHEMA.names), pa.Table.from_pylist(rows, schema=PLACES_SCHEMA)


def _own_ids(row_json: str, columns: PairColumns) -> tuple[str | None, str | None]:
    try:
        row = json.loads(row_json)
    except ValueError:
        return None, None
    if not isinstance(row, dict):
        return None, None
    found = next((row[name] for name in columns.source_id if row.get(name) is not None), None)
    texts = [None if value is None else str(value) for value in (row.get("pair_id"), found)]
    return texts[0], texts[1]


def _in_input_order(pool: Pool, number: int, rewards: Sidecar) -> pa.Table:
    """Return one shard's rows: first come the places of its pairs, in the sidecar's order, then those of the rows that are no pairs."""
    places = pool.storage.read_table(f"pools/{pool.name}/places-{number:05d}.parquet")
    values = rewards.read(number, REWARDS_SCHEMA.names).replace_schema_metadata()
    no_pairs = places.num_rows - values.num_rows
    nulls = pa.table([pa.nulls(no_pairs, field.type) for field in values.schema], schema=values.schema)
    padded = pa.concat_tables([values, nulls])
    ids = {"pair_id": places["pair_id"], "source_id": places["source_id"]}
    reasons = pc.coalesce(places["reason"], padded["drop_reason"])
    columns = {name: padded[name] for name in SCORED_SCHEMA.names if name not in ids}
    table = pa.table({**columns, **ids, "drop_reason": reasons}).select(SCORED_SCHEMA.names).cast(SCORED_SCHEMA)
    return table.take(pc.sort_indices(places["row"])).combine_chunks()


def write_scored(tables: Iterable[pa.Table], out: str) -> None:
    """Write tables as one file, whole or not at all: by way of a local spool.

    Raises:
        InputError: it cannot be written.
    """
    write = _write_parquet if out.endswith(".parquet") else _write_lines
    try:
        name = out.rpartition("/")[2]
        with tempfile.TemporaryDirectory(prefix="synpref_ray-score-") as spool:
            write(tables, f"{spool}/{name}")
            Storage(out.removesuffix(name) or ".").upload(f"{spool}/{name}", name)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"cannot write {out}: {error}") from None


def _write_parquet(tables: Iterable[pa.Table], file: str) -> None:
    with open(file, "wb") as stream, pq.ParquetWriter(stream, SCORED_SCHEMA, compression="zstd") as writer:
        for group in _groups_of(tables, ROWS_PER_GROUP):
            writer.write_table(group)


def _groups_of(tables: Iterable[pa.Table], num_rows: int) -> Iterator[pa.Table]:
    """Yield the same rows in tables of `num_rows`, the last one shorter."""
    waiting = SCORED_SCHEMA.empty_table()
    for table in tables:
        waiting = pa.concat_tables([waiting, table]) if waiting.num_rows else table
        while waiting.num_rows >= num_rows:
            yield waiting.slice(0, num_rows)
            waiting = waiting.slice(num_rows)
    if waiting.num_rows:
        yield waiting


def _write_lines(tables: Iterable[pa.Table], file: str) -> None:
    with open(file, "wb") as stream:
        for table in tables:
            stream.writelines((json.dumps(row) + "\n").encode() for row in table.to_pylist())
