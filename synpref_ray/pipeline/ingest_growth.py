"""Ingest into pools that are there (`add`): what new pairs join, pinned when the job begins, and the ids that they are compared with.

Paper: Sec. 3.2, Step 4 (newly gathered pairs join the unverified pool between iterations) and App. C (deduplication and decontamination again before
every iteration). Our choice: pools are never rewritten, so a pair of theirs always stays where it is, and the new copy is the duplicate, whatever
pool it would feed; a new pair that contradicts an old one is marked, the old one keeps its mark. New pairs must be compared with every benchmark
that the old ones were.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from synpref_ray.errors import ConfigError, InputError, RunConflictError
from synpref_ray.ingest.accounts import record_path
from synpref_ray.ingest.decontamination import DecontaminateConfig, comparison_facts
from synpref_ray.ingest.partition import IdWriter, PairFile
from synpref_ray.ingest.source import Route
from synpref_ray.pipeline.tasks import run_tasks
from synpref_ray.tables.pools import Pool, open_pool, pool_exists, pool_versions
from synpref_ray.tables.storage import Storage

SHARDS_PER_FILE = 32  # ours: at 8k pairs a shard about the ids of one piece (ingest/partition.py)

Base = Mapping[Route, Pool]
"""The versions of pools that an ingest adds to; a pool that is not there is not among them."""


def pin_base(storage: Storage, name: str) -> Base:
    """Return what the ingest `name` adds to: the newest versions when it first began, so that a rerun after a kill adds to the same.

    Raises:
        InputError: there is no pool to add to.
        RunConflictError: another ingest has added to a pool since.
    """
    path = f"{record_path(name).removesuffix('.json')}-base.json"
    if not storage.exists(path):
        there = {route.value: open_pool(storage, route.value).version for route in Route if pool_exists(storage, route.value)}
        if not there:
            raise InputError(f"{storage.url} has no pool to add to; the first ingest into a workspace runs without add=true")
        storage.write_json(path, there)
    base = {Route(route): open_pool(storage, route, version) for route, version in storage.read_json(path).items()}
    for route in Route:
        latest = open_pool(storage, route.value) if pool_exists(storage, route.value) else None
        if latest is not None and latest.fingerprint != name and latest.version != (base[route].version if route in base else None):
            raise RunConflictError(
                f"pool {route.value!r} has grown to version {latest.version} since this ingest began and was cut off; "
                f"delete {storage.join(path)} to compare with it anew"
            )
    return base


def check_added_benchmarks(storage: Storage, base: Base, config: DecontaminateConfig) -> None:
    """Refuse an addition that is not compared with every benchmark that the pools were compared with.

    Raises:
        ConfigError: it lacks one of them, or has other prompts in it.
    """
    given = comparison_facts(config)["benchmarks"] if config.benchmarks else {}
    for pool in base.values():
        for record in read_records(pool):
            had = record.get("compared", {}).get("benchmarks", {})
            lacking = sorted(name for name, digest in had.items() if given.get(name) != digest)
            if lacking:
                raise ConfigError(
                    f"the pool {pool.name!r} was compared with benchmark {', '.join(lacking)}, and these sources would not be, or with other "
                    "prompts: give decontaminate.benchmarks as that ingest had them (more are fine)"
                )


def ingests_of(pool: Pool) -> list[str]:
    """Return the fingerprints of the ingests that made and grew a pool up to this version, oldest first."""
    versions = [version for version in pool_versions(pool.storage, pool.name) if version <= pool.version]
    return list(dict.fromkeys(open_pool(pool.storage, pool.name, version).fingerprint for version in versions))


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
            folder = f"{staging}/held-{route.value}-{place:05d}"
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
