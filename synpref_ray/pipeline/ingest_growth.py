"""Ingest into pools that are there (`add`): what new pairs join, pinned when the job begins, and the ids that they are compared with.

Paper: Sec. 3.2, Step 4 (newly gathered pairs join the unverified pool between iterations) and App. C (deduplication and decontamination again before
every iteration). Our choice: pools are never rewritten, so a pair of theirs always stays where it is, and the new copy is the duplicate, whatever
pool it would feed; a new pair that contradicts an old one is marked, the old one keeps its mark. New pairs must be compared with every benchmark
that the old ones were, in the same way, and an ingest that was cut off must be finished before another adds to what it left.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from synpref_ray.errors import ConfigError, InputError, RunConflictError
from synpref_ray.ingest.accounts import normalise_licence, record_path
from synpref_ray.ingest.benchmark_prompts import DecontaminateConfig, comparison_facts
from synpref_ray.ingest.partition import IdWriter, PairFile
from synpref_ray.ingest.source import Route, SourceConfig
from synpref_ray.pipeline.tasks import run_tasks
from synpref_ray.tables.pools import Pool, open_pool, pool_exists, pool_versions
from synpref_ray.tables.storage import Storage

SHARDS_PER_FILE = 32  # ours: at 8k pairs a shard about the ids of one piece (ingest/partition.py)

Base = Mapping[Route, Pool]
"""The versions of pools that an ingest adds to; a pool that is not there is not among them."""


def find_base(storage: Storage, name: str) -> Base:
    """Return what the ingest `name` adds to: what it pinned when it first began, else the newest versions.

    Raises:
        InputError: there is no pool to add to.
        RunConflictError: another ingest has added to a pool since, or has left one without its record.
    """
    path = _base_path(name)
    if not storage.exists(path):
        base = {route: open_pool(storage, route.value) for route in Route if pool_exists(storage, route.value)}
        if not base:
            raise InputError(f"{storage.url} has no pool to add to; the first ingest into a workspace runs without add=true")
        _refuse_unrecorded(base)
        return base
    base = {Route(route): open_pool(storage, route, version) for route, version in storage.read_json(path).items()}
    for route in Route:
        latest = open_pool(storage, route.value) if pool_exists(storage, route.value) else None
        if latest is not None and latest.fingerprint != name and latest.version != (base[route].version if route in base else None):
            raise RunConflictError(
                f"pool {route.value!r} has grown to version {latest.version} since this ingest began and was cut off; "
                f"delete {storage.join(path)} to compare with it anew"
            )
    return base


def pin_base(storage: Storage, name: str, base: Base) -> None:
    """Keep what the ingest `name` adds to, so that a rerun after a kill adds to the same."""
    if base and not storage.exists(_base_path(name)):
        storage.write_json(_base_path(name), {route.value: pool.version for route, pool in base.items()})


def _base_path(name: str) -> str:
    return f"{record_path(name).removesuffix('.json')}-base.json"


def _refuse_unrecorded(base: Base) -> None:
    """Refuse to add to what an ingest made that was cut off before its record: nobody would know its benchmarks and licences any more."""
    for pool in base.values():
        for version in _versions_of(pool):
            if version.provenance().get("step") == "ingest" and not pool.storage.exists(record_path(version.fingerprint)):
                raise RunConflictError(
                    f"the pool {pool.name!r} holds pairs of an ingest ({version.fingerprint[:8]}) that was cut off before it had written its "
                    "record; run that one again with its config first"
                )


def check_addition(base: Base, config: DecontaminateConfig, sources: Sequence[SourceConfig]) -> None:
    """Refuse an addition that is not compared with the benchmarks as the pools were, or that names a source as another of theirs.

    Raises:
        ConfigError: it lacks a benchmark, has other prompts in one or looks for other overlaps; or a source of its name had another licence or kind
            of labels.
    """
    for pool in base.values():
        for record in read_records(pool):
            _check_benchmarks(pool, record.get("compared", {}), comparison_facts(config) if config.benchmarks else {})
            _check_sources(pool, record["sources"], sources)


def _check_benchmarks(pool: Pool, had: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    benchmarks = given.get("benchmarks", {})
    lacking = sorted(name for name, digest in had.get("benchmarks", {}).items() if benchmarks.get(name) != digest)
    if lacking:
        raise ConfigError(
            f"the pool {pool.name!r} was compared with benchmark {', '.join(lacking)}, and these sources would not be, or with other prompts: give "
            "decontaminate.benchmarks as that ingest had them (more are fine)"
        )
    for setting in ("candidates", "max_candidates"):
        if had and given and had.get(setting) != given.get(setting):
            raise ConfigError(
                f"the pool {pool.name!r} was compared with decontaminate.{setting}={had.get(setting)}, these sources would be with "
                f"{given.get(setting)}: say the same, or overlaps can no longer be judged"
            )


def _check_sources(pool: Pool, had: Mapping[str, Mapping[str, Any]], sources: Sequence[SourceConfig]) -> None:
    for source in sources:
        facts = {"licence": normalise_licence(source.licence), "label_kind": source.label_kind.value}
        for field, value in facts.items():
            if source.name in had and had[source.name].get(field, value) != value:
                raise ConfigError(
                    f"the workspace has a source {source.name!r} already, with {field} {had[source.name][field]!r}; this one's is {value!r}: give it "
                    "another name"
                )


def ingests_of(pool: Pool) -> list[str]:
    """Return the fingerprints of the ingests that made and grew a pool up to this version, oldest first."""
    return list(dict.fromkeys(version.fingerprint for version in _versions_of(pool)))


def _versions_of(pool: Pool) -> list[Pool]:
    numbers = [version for version in pool_versions(pool.storage, pool.name) if version <= pool.version]
    return [open_pool(pool.storage, pool.name, version) for version in numbers]


def read_records(pool: Pool) -> list[dict[str, Any]]:
    """Return the accounts of these ingests; one without a record is left out."""
    paths = [record_path(name) for name in ingests_of(pool)]
    return [pool.storage.read_json(path) for path in paths if pool.storage.exists(path)]


def stage_held(storage: Storage, staging: str, base: Base, *, inline: bool) -> list[PairFile]:
    """Stage the ids of the pools that are there, some shards a task."""
    arguments, files = [], []
    for route, pool in base.items():
        numbers = [shard.number for shard in pool.shards]
        for place, start in enumerate(range(0, len(numbers), SHARDS_PER_FILE)):
            folder = f"{staging}/held-{route.value}-{pool.digest[:8]}-{place:05d}"  # of these shards, whatever a run before it held
            arguments.append((folder, pool, tuple(numbers[start : start + SHARDS_PER_FILE])))
            files.append(PairFile(route, f"pool {route.value}", f"pools/{pool.name}", folder, (), held=True))
    pieces = run_tasks(_stage_shards, storage, arguments, inline=inline, title="read pools")
    return [file._replace(pieces=tuple(map(tuple, found))) for file, found in zip(files, pieces, strict=True)]


def _stage_shards(storage: Storage, folder: str, pool: Pool, numbers: Sequence[int]) -> list[list[int]]:
    """Write the ids of some shards, a chunk each; done when its record is there. A pair's row counts along its pool."""
    record = f"{folder}/done.json"
    if storage.exists(record):
        done: list[list[int]] = storage.read_json(record)["pieces"]
        return done
    ids = IdWriter(storage, folder)
    row = sum(shard.rows for shard in pool.shards if shard.number < numbers[0])
    for number in numbers:
        pairs = pool.read(number, ["pair_id", "comparison_id"])
        pairs = pairs.append_column("row", pa.array(range(row, row + pairs.num_rows), pa.int64()))
        ids.add(pairs.append_column("num_bytes", pa.array([0] * pairs.num_rows, pa.int64())))
        row += pairs.num_rows
    ids.flush()
    storage.write_json(record, {"pieces": ids.pieces})
    return ids.pieces
