"""How far a workspace is, read from the workspace alone: any machine that reads it can tell, and nothing is written.

Finished tables are told by their manifests. Only unfinished ones are listed, one folder each, so that a workspace of 40 million pairs takes a few
hundred small requests, sent a few at a time.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from synpref_ray.errors import InputError
from synpref_ray.reporting.usage import USAGE, read_usage
from synpref_ray.schema import REJECT_REASONS
from synpref_ray.tables.garbage import RUN_LEASE
from synpref_ray.tables.leases import is_held
from synpref_ray.tables.models import RECORD_FILE
from synpref_ray.tables.pools import shard_number_of_path
from synpref_ray.tables.storage import Storage

REQUESTS_AT_ONCE = 16  # ours: object storage answers in tens of milliseconds
RATE_WINDOW_SECONDS = 1800.0  # ours: the pace of the last half hour of work says more about the rest than that of the whole run
QUIET_SECONDS = 600.0  # ours: and ten times what its shards took: a table that was written to no more for so long has no pace any more
QUIET_SHARDS = 10
ENDED = {"finish", "stop"}
FILES_BESIDE_TABLES = {"versions"}


@dataclass(frozen=True)
class TableStatus:
    """One version of a sidecar. `rows_per_second` is the pace of its last half hour of work; None with fewer than two finished shards.

    `last_written` is when its last shard was (seconds since 1970), 0 where that is not known.
    """

    pool: str
    name: str
    version: str
    num_shards: int
    num_done: int
    is_sealed: bool
    is_held: bool = False
    rows_left: int = 0
    rows_per_second: float | None = None
    rows_done: int = 0
    last_written: float = 0.0
    rejected: Mapping[str, int] = field(default_factory=dict)
    cost: float = 0.0
    gpu_seconds: float = 0.0

    @property
    def seconds_left(self) -> float | None:
        """How long the rest takes at that pace."""
        return self.rows_left / self.rows_per_second if self.rows_per_second else None

    def is_quiet(self, now: float) -> bool:
        """Whether its last shard is longer ago than its pace explains: its workers hang, or wait for nodes."""
        shard_seconds = self.rows_done / self.num_done / self.rows_per_second if self.rows_per_second else 0.0
        return self.last_written > 0 and now - self.last_written > max(QUIET_SECONDS, QUIET_SHARDS * shard_seconds)


@dataclass(frozen=True)
class PoolStatus:
    """A pool's latest version and every table beside it."""

    name: str
    num_rows: int
    num_shards: int
    tables: tuple[TableStatus, ...]


@dataclass(frozen=True)
class RunStatus:
    """One run folder: its job, its last event (`step`, `finish`, `stop` …), when that was (seconds since 1970), and whether its driver lives."""

    folder: str
    last_event: Mapping[str, Any]
    is_held: bool = False

    @property
    def has_died(self) -> bool:
        """Whether it is gone without a last word: killed, or its machine was lost."""
        return bool(self.last_event) and self.last_event.get("event") not in ENDED and not self.is_held


@dataclass(frozen=True)
class WorkspaceStatus:
    """All that the status job shows; `trainings` are the models being trained now, `num_rounds` the rounds of Stage 1 so far, the seed's included."""

    pools: tuple[PoolStatus, ...]
    runs: tuple[RunStatus, ...]
    models: tuple[str, ...]
    trainings: tuple[str, ...]
    num_rounds: int
    finished_stages: tuple[str, ...]
    cost: float
    gpu_seconds: float

    @property
    def unfinished(self) -> list[TableStatus]:
        """Tables that are not sealed."""
        return [table for pool in self.pools for table in pool.tables if not table.is_sealed]

    @property
    def errors(self) -> list[RunStatus]:
        """Runs that ended before their time, the latest first."""
        return [run for run in self.runs if run.last_event.get("event") == "stop" or run.has_died]


def read_status(storage: Storage, *, max_runs: int) -> WorkspaceStatus:
    """Read the workspace; `max_runs` is how many of the latest run folders are looked into.

    Raises:
        InputError: there is no workspace.
    """
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as threads:
        top = {entry.name for entry in storage.list_entries("")}
        if not top & {"pools", "runs"}:
            raise InputError(f"{storage.url} is no workspace: it has neither pools/ nor runs/")
        names = [entry.name for entry in storage.list_entries("pools") if entry.is_folder]
        manifests = list(threads.map(lambda name: _read_pool(storage, name), names))
        pools = tuple(_with_tables(storage, manifest, threads) for manifest in manifests if manifest is not None)
        runs = sorted(threads.map(lambda folder: _read_run(storage, folder), latest_runs(storage, max_runs)), key=_last_word, reverse=True)
        models = tuple(entry.name for entry in storage.list_entries("models") if entry.is_folder)
        model_seconds = sum(threads.map(lambda name: _training_gpu_seconds(storage, name), models))
        spent = dict(threads.map(lambda name: _spent(storage, name), [entry.name for entry in storage.list_entries("spending")]))
    rounds = {entry.name for entry in storage.list_entries("rounds")}
    tables = [table for pool in pools for table in pool.tables]
    return WorkspaceStatus(
        pools=pools,
        runs=tuple(runs),
        models=models,
        trainings=tuple(_trainings(storage)),
        num_rounds=sum(name.isdigit() and storage.exists(f"rounds/{name}/round.json") for name in rounds),  # else it has begun and is not done
        finished_stages=tuple(stage for stage in ("stage1", "stage2") if f"{stage}.json" in rounds),
        cost=_total_cost(tables, spent),
        gpu_seconds=model_seconds + sum(table.gpu_seconds for table in tables),
    )


def _total_cost(tables: Sequence[TableStatus], spent: Mapping[str, float]) -> float:
    """Return what paid endpoints have cost: of each tagger or judge what its tables used, or its spending record if that knows of more."""
    used: defaultdict[str, float] = defaultdict(float)
    for table in tables:
        used[table.name] += table.cost
    return sum(max(spent.get(name, 0.0), used[name]) for name in {*spent, *used})


@dataclass(frozen=True)
class _PoolManifest:
    name: str
    rows: Mapping[int, int]  # by shard number


def _read_pool(storage: Storage, name: str) -> _PoolManifest | None:
    """Return the latest version of a pool; None while it is being made."""
    versions = [int(entry.name.removesuffix(".json")) for entry in storage.list_entries(f"pools/{name}/versions") if entry.name[:-5].isdigit()]
    if not versions:
        return None
    shards = storage.read_json(f"pools/{name}/versions/{max(versions)}.json")["shards"]
    return _PoolManifest(name, {shard["number"]: shard["rows"] for shard in shards})


def _with_tables(storage: Storage, pool: _PoolManifest, threads: ThreadPoolExecutor) -> PoolStatus:
    sidecars = [entry.name for entry in storage.list_entries(f"pools/{pool.name}") if entry.is_folder and entry.name not in FILES_BESIDE_TABLES]
    versions = threads.map(lambda name: [entry.name for entry in storage.list_entries(f"pools/{pool.name}/{name}") if entry.is_folder], sidecars)
    places = [(name, version) for name, found in zip(sidecars, versions, strict=True) for version in found]
    tables = threads.map(lambda place: _read_table(storage, pool, *place), places)
    return PoolStatus(pool.name, sum(pool.rows.values()), len(pool.rows), tuple(tables))


def _read_table(storage: Storage, pool: _PoolManifest, name: str, version: str) -> TableStatus:
    folder = f"pools/{pool.name}/{name}/{version}"
    if storage.exists(f"{folder}/manifest.json"):
        manifest = storage.read_json(f"{folder}/manifest.json")
        rejected = {reason: count for reason, count in manifest.get("rejected", {}).items() if reason in REJECT_REASONS}
        share = float(manifest.get("share_of_last_run", 0.0))  # these three: in tables of before their usage was kept
        cost = share * float(manifest.get("counters_of_last_run", {}).get("cost", 0.0))
        gpu_seconds = share * float(manifest.get("gpu_seconds_of_last_run", 0.0))
        if kept := manifest.get("usage"):
            cost, gpu_seconds = float(kept["cost"]), float(kept["gpu_seconds"])
        shards = int(manifest.get("shards", len(pool.rows)))
        return TableStatus(pool.name, name, version, shards, shards, True, rejected=rejected, cost=cost, gpu_seconds=gpu_seconds)
    written: dict[int, float] = {}
    usage: Mapping[str, float] = {}
    for entry in storage.list_entries(folder):
        if entry.name == USAGE:
            usage = read_usage(storage, folder)
        number = shard_number_of_path(entry.name)
        if number is not None and number in pool.rows:
            written[number] = entry.written
    return TableStatus(
        pool.name,
        name,
        version,
        num_shards=len(pool.rows),
        num_done=len(written),
        is_sealed=False,
        is_held=is_held(storage, f"{folder}/lease.json"),
        rows_left=sum(rows for number, rows in pool.rows.items() if number not in written),
        rows_per_second=pace([(when, pool.rows[number]) for number, when in written.items()]),
        rows_done=sum(pool.rows[number] for number in written),
        last_written=max(written.values(), default=0.0),
        cost=usage.get("cost", 0.0),
        gpu_seconds=usage.get("gpu_seconds", 0.0),
    )


def pace(finished: Sequence[tuple[float, int]]) -> float | None:
    """Return rows per second from (time of writing, rows) of finished shards, over their last `RATE_WINDOW_SECONDS`; None where times do not tell."""
    latest = max((when for when, _ in finished), default=0.0)
    recent = sorted(shard for shard in finished if shard[0] >= latest - RATE_WINDOW_SECONDS)
    seconds = latest - recent[0][0] if recent else 0.0
    return sum(rows for _, rows in recent[1:]) / seconds if seconds > 0 else None


def latest_runs(storage: Storage, max_runs: int) -> list[str]:
    """Return the run folders, the latest first; their names end in the time of their start."""
    names = [entry.name for entry in storage.list_entries("runs") if entry.is_folder]
    return [f"runs/{name}" for name in sorted(names, key=lambda name: name.split("-")[-3:], reverse=True)[:max_runs]]


def _read_run(storage: Storage, folder: str) -> RunStatus:
    try:
        lines = storage.read_bytes(f"{folder}/events.jsonl").decode().splitlines()
    except InputError:  # it has just begun
        return RunStatus(folder, {})
    last = json.loads(lines[-1]) if lines else {}
    return RunStatus(folder, last, last.get("event") not in ENDED and is_held(storage, f"{folder}/{RUN_LEASE}"))


def _last_word(run: RunStatus) -> float:
    return float(run.last_event.get("time", 0.0))


def _training_gpu_seconds(storage: Storage, name: str) -> float:
    path = f"models/{name}/{RECORD_FILE}"
    if not storage.exists(path):
        return 0.0
    record = storage.read_json(path)
    return float(record["num_workers"] * record["seconds"].get("total", 0.0)) if record["config"].get("use_gpu") else 0.0


def _trainings(storage: Storage) -> Iterator[str]:
    for entry in storage.list_entries("models", hidden=True):
        if entry.name.startswith(".lease-") and entry.name.endswith(".json") and is_held(storage, f"models/{entry.name}"):
            yield entry.name.removeprefix(".lease-").removesuffix(".json")


def _spent(storage: Storage, name: str) -> tuple[str, float]:
    try:
        return name, float(storage.read_json(f"spending/{name}/spent.json")["spent"])
    except InputError:
        return name, 0.0


def count_rejects(pool: PoolStatus) -> Counter[str]:
    """Return the pool's rejected rows by reason, over all its finished tables."""
    return sum((Counter(table.rejected) for table in pool.tables), Counter())
