"""Ingest on Ray: pair files become staged chunks, one plan over all ids decides, pool shards are written; every row read is in a pool or a reject.

Paper: Sec. 3.1 and App. C (structural filter, global exact dedup on conversation and both replies, pools by source). Our choice: three passes, of
which only the plan runs on the driver, over 128-bit ids and sizes (32 bytes a pair).
"""

import glob
import posixpath
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import ray
from fsspec.core import url_to_fs
from pydantic import Field

from synpref_ray.config import Settings
from synpref_ray.errors import ConfigError, InputError, RunConflictError, SynprefError
from synpref_ray.ingest.chunk import count_reasons
from synpref_ray.ingest.plan import (
    INDEX_COLUMNS,
    DuplicatePart,
    IngestPlan,
    ShardPlan,
    build_shard,
    duplicate_rejects,
    index_chunk,
    ingest_plan,
)
from synpref_ray.ingest.readers import digest_file, read_pair_file
from synpref_ray.ingest.source import PairColumns, Route, SourceConfig, check_source_names, list_source_files
from synpref_ray.pipeline.job import JobConfig
from synpref_ray.pipeline.steps import unwrap
from synpref_ray.reporting.run import Run
from synpref_ray.reporting.table import format_table
from synpref_ray.tables.leases import Lease
from synpref_ray.tables.pools import MAX_BYTES_PER_SHARD, MAX_PAIRS_PER_SHARD, Pool, Shard, commit_pool, open_pool, pool_exists, write_pool_shard
from synpref_ray.tables.sidecars import fingerprint
from synpref_ray.tables.storage import Storage

INGEST_VERSION = 1
INLINE_TASKS = 4  # ours: so few files or shards are done before Ray has started its workers


class IngestConfig(JobConfig):
    """What to read, and how pools are cut. Give `sources`, or `data`: a folder whose file names begin with the pool they feed."""

    data: str = ""
    sources: tuple[SourceConfig, ...] = ()
    columns: PairColumns = PairColumns()
    """Which columns hold what, for `data`; a source of `sources` says it itself."""
    max_pairs_per_shard: int = Field(default=MAX_PAIRS_PER_SHARD, ge=1)
    max_bytes_per_shard: int = Field(default=MAX_BYTES_PER_SHARD, ge=1)
    max_rejected_fraction: float = Field(default=0.5, ge=0.0, le=1.0)  # ours: duplicates aside, most rows refused means a wrong format


class _Staged(Settings):
    """One file after pass 1."""

    source: int
    file: str
    rows: int
    chunks: int
    rejected: dict[str, int]


def resolve_sources(config: IngestConfig) -> tuple[SourceConfig, ...]:
    """Return the sources of a config, those under `data` found by name.

    Our choice: a file (or the first folder under `data`) whose name begins with seed, unverified or wild feeds that pool; any other feeds wild.
    A source is named by its file's path under `data` (under the last folder before the first wildcard of a pattern), never by where `data` lies.

    Raises:
        ConfigError: neither or both of `data` and `sources` are given.
        InputError: nothing is there.
    """
    if bool(config.data) == bool(config.sources):
        raise ConfigError("give either data=FOLDER or a list of sources, not both and not neither")
    if config.sources:
        check_source_names(config.sources)
        return config.sources
    found = list_source_files(SourceConfig(name="data", path=config.data))
    folder = _data_folder(config.data)
    sources = []
    for file in found:
        name = posixpath.relpath(url_to_fs(file)[1], folder)
        route = next((route for route in Route if name.startswith(route.value)), Route.WILD)
        sources.append(SourceConfig(name=name, path=file, route=route, columns=config.columns))
    return tuple(sources)


def _data_folder(data: str) -> str:
    """Return the folder that source names are relative to, as the file system itself writes it (absolute, `~` resolved)."""
    filesystem, root = url_to_fs(data)
    if not filesystem.isfile(root):
        if filesystem.isdir(root):
            return str(root)
        while glob.has_magic(posixpath.dirname(root)):
            root = posixpath.dirname(root)
    return str(posixpath.dirname(root))


def check_ingest(config: IngestConfig) -> None:
    """Check that every source has files, without reading them."""
    for source in resolve_sources(config):
        list_source_files(source)


def run_ingest(config: IngestConfig, run: Run) -> str:
    """Read all sources into the pools seed, unverified and wild; return the closing table."""
    storage = config.storage
    sources = resolve_sources(config)
    files = [(number, file) for number, source in enumerate(sources) for file in list_source_files(source)]
    digests = _map(digest_file, [(file,) for _, file in files])
    settings = config.model_dump(mode="json", include={"max_pairs_per_shard", "max_bytes_per_shard"})
    settings["sources"] = [source.model_dump(mode="json", exclude={"path", "label_kind"}) for source in sources]
    name = fingerprint(
        "ingest", INGEST_VERSION, settings, {f"{number}:{i}": d for i, ((number, _), d) in enumerate(zip(files, digests, strict=True))}
    )
    record = f"pools/ingest-{name[:8]}.json"
    if not storage.exists(record):
        with Lease(storage, "pools/ingest.lease.json") as lease:
            if not storage.exists(record):  # or another driver made the pools before the lease was ours
                _refuse_other_pools(storage, name)
                summary = _ingest(storage, name, sources, files, config, run)
                lease.check()
                storage.write_json(record, summary)
    summary = storage.read_json(record)
    run.metrics.update(summary)
    return _closing_table(summary)


def _refuse_other_pools(storage: Storage, name: str) -> None:
    for route in Route:
        if pool_exists(storage, route.value) and open_pool(storage, route.value).fingerprint != name:
            raise RunConflictError(
                f"{storage.url} holds a pool {route.value!r} made from other files or settings; pools are never overwritten: "
                "use another workspace, or the config that made it"
            )


def _ingest(
    storage: Storage, name: str, sources: Sequence[SourceConfig], files: Sequence[tuple[int, str]], config: IngestConfig, run: Run
) -> dict[str, Any]:
    started = time.monotonic()
    staging = f"staging/{name[:8]}"
    arguments = [(storage, f"{staging}/file-{i:05d}", sources[n], n, file, config.max_rejected_fraction) for i, (n, file) in enumerate(files)]
    staged = [_Staged.model_validate(entry) for entry in _map(_stage_file, arguments)]
    chunks = [(i, entry, chunk) for i, entry in enumerate(staged) for chunk in range(entry.chunks)]
    paths = [f"{staging}/file-{i:05d}/pairs-{chunk:05d}.parquet" for i, _, chunk in chunks]
    index = []
    for path, (_, entry, _) in zip(paths, chunks, strict=True):
        source = sources[entry.source]
        index.append(index_chunk(storage.read_table(path, list(INDEX_COLUMNS)), source.route, source.name, entry.file))
    plan = ingest_plan(index, max_pairs_per_shard=config.max_pairs_per_shard, max_bytes_per_shard=config.max_bytes_per_shard)
    pools = {route: _write_pool(storage, name, route, plan.shards[route], paths) for route in Route}
    for number, part in enumerate(plan.duplicates):
        _write_duplicates(storage, name, number, part, paths)
    summary = _account(sources, staged, plan, {route: pool for route, pool in pools.items() if pool is not None})
    for path in storage.list_files(staging):
        storage.delete(path)
    rejected = {reason: count for reason, count in summary["rejected"].items() if count}
    run.step("ingest", rows=summary["rows_read"], computed=summary["rows_read"], rejected=rejected, seconds=time.monotonic() - started)
    return summary


def _map(function: Any, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    if len(arguments) <= INLINE_TASKS:
        return [function(*values) for values in arguments]
    remote = ray.remote(function)
    try:
        results: list[Any] = ray.get([remote.remote(*values) for values in arguments])
    except ray.exceptions.RayError as error:
        raise unwrap(error) from error
    return results


def _stage_file(storage: Storage, folder: str, source: SourceConfig, number: int, file: str, max_rejected_fraction: float) -> dict[str, Any]:
    """Pass 1: one file's rows as staged chunks and rejects; done when its `done.json` is there."""
    if storage.exists(f"{folder}/done.json"):
        done: dict[str, Any] = storage.read_json(f"{folder}/done.json")
        return done
    rejected: Counter[str] = Counter()
    rows = chunks = 0
    for chunk in read_pair_file(file, source):
        storage.write_table(f"{folder}/pairs-{chunks:05d}.parquet", chunk.pairs)
        if chunk.rejects.num_rows:
            storage.write_table(f"rejects/ingest/{folder.replace('staging/', '')}-{chunks:05d}.parquet", chunk.rejects)
        rejected.update(count_reasons(chunk.rejects))
        rows += chunk.pairs.num_rows + chunk.rejects.num_rows
        chunks += 1
    if rows and rejected.total() > max_rejected_fraction * rows:
        raise InputError(
            f"{file}: {rejected.total()} of {rows} rows refused ({dict(rejected)}), more than {max_rejected_fraction:.0%}; "
            f"the rows are under {storage.join('rejects/ingest')}; see the formats in the README, or raise max_rejected_fraction"
        )
    done = {"source": number, "file": file, "rows": rows, "chunks": chunks, "rejected": dict(rejected)}
    storage.write_json(f"{folder}/done.json", done)
    return done


def _write_pool(storage: Storage, name: str, route: Route, shards: Sequence[ShardPlan], paths: Sequence[str]) -> Pool | None:
    """Pass 3 for one pool; a pool without pairs is not made."""
    if pool_exists(storage, route.value):
        return open_pool(storage, route.value)
    if not shards:
        return None
    wanted = [(storage, route.value, shard, {part.chunk: paths[part.chunk] for part in shard.parts}) for shard in shards]
    return commit_pool(storage, route.value, name, _map(_write_shard, wanted), {"step": "ingest"})


def _write_shard(storage: Storage, pool: str, plan: ShardPlan, paths: dict[int, str]) -> Shard:
    return write_pool_shard(storage, pool, plan.number, build_shard(plan, lambda chunk: storage.read_table(paths[chunk])))


def _write_duplicates(storage: Storage, name: str, number: int, part: DuplicatePart, paths: Sequence[str]) -> None:
    rejects = duplicate_rejects(part, lambda chunk: storage.read_table(paths[chunk]))
    storage.write_table(f"rejects/ingest/{name[:8]}/duplicates-{number:05d}.parquet", rejects)


def _account(sources: Sequence[SourceConfig], staged: Sequence[_Staged], plan: IngestPlan, pools: dict[Route, Pool]) -> dict[str, Any]:
    rejected: Counter[str] = Counter()
    for entry in staged:
        rejected.update(entry.rejected)
    rejected["duplicate"] += sum(plan.num_duplicates().values())
    rows_read = sum(entry.rows for entry in staged)
    pooled = {route.value: pool.num_rows for route, pool in pools.items()}
    if rows_read != sum(pooled.values()) + rejected.total():
        raise SynprefError(f"ingest lost rows: {rows_read} read, {sum(pooled.values())} in pools, {rejected.total()} rejected; please report this")
    contradicted = {route.value: sum(shard.num_contradicted for shard in plan.shards[route]) for route in pools}
    per_source = {}
    for number, source in enumerate(sources):
        mine = [entry for entry in staged if entry.source == number]
        per_source[source.name] = {"rows": sum(entry.rows for entry in mine), "route": source.route.value}
    return {
        "rows_read": rows_read,
        "pools": pooled,
        "rejected": dict(sorted(rejected.items())),
        "contradicted": contradicted,
        "sources": per_source,
    }


def _closing_table(summary: dict[str, Any]) -> str:
    rows = [("read", str(summary["rows_read"]))]
    rows += [(f"pool {name}", str(count)) for name, count in summary["pools"].items()]
    rows += [(f"  of them contradicted, {name}", str(count)) for name, count in summary["contradicted"].items() if count]
    rows += [(f"rejected: {reason}", str(count)) for reason, count in summary["rejected"].items() if count]
    absent = [route.value for route in (Route.SEED, Route.UNVERIFIED) if not summary["pools"].get(route.value)]
    hints = [f"no file fed the pool {name}, which Stage 1 needs: give it files whose names begin with {name}, in a new workspace" for name in absent]
    return "\n".join([format_table(("pairs", "count"), rows), *hints])
