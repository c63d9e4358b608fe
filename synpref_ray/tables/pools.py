"""Pools: immutable lists of Parquet shards of preference pairs, grown by writing a new version that lists more shards.

Layout: `pools/<pool>/shard-00000.parquet …` and `pools/<pool>/versions/<n>.json`. A version is committed last; a shard that no version lists does not
exist. Shard numbers are also kept in the Parquet schema's metadata, so a shard knows its number even with zero rows.
"""

import hashlib
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from synpref_ray.errors import InputError, RunConflictError, SchemaError
from synpref_ray.schema import canonical_json
from synpref_ray.tables.prompt_clusters import cluster_groups
from synpref_ray.tables.storage import Storage, encode_json, encode_table

SHARD_NUMBER_KEY = b"synpref_ray.shard"
MAX_PAIRS_PER_SHARD = 8192  # ours: 8k pairs of typical text are a few tens of MB, one task's worth of memory
MAX_EXCLUSIVE_BYTES = 32 * 2**20  # ours: from there on object stores want uploads in parts (docs/storage.md)
MAX_BYTES_PER_SHARD = 64 * 2**20  # ours: a shard is read, held and written whole by a worker


@dataclass(frozen=True)
class Shard:
    """One Parquet file of a pool: its number, row count, size and BLAKE2b digest (32 hex digits) of the file's bytes."""

    number: int
    rows: int
    num_bytes: int
    digest: str


@dataclass(frozen=True)
class Pool:
    """One version of a pool. `fingerprint` names what made the version (step, settings, inputs); `digest` its content.

    `clusters` names the near-duplicate clusters that its prompt groups are read by (`tables/prompt_clusters.py`); empty: as stored.
    """

    storage: Storage
    name: str
    version: int
    fingerprint: str
    shards: tuple[Shard, ...]
    clusters: str = ""

    @property
    def num_rows(self) -> int:
        """Pairs in this version."""
        return sum(shard.rows for shard in self.shards)

    @cached_property
    def digest(self) -> str:
        """32 hex digits over the shards in order: two versions with this digest hold the same bytes."""
        return content_digest([[shard.number, shard.digest] for shard in self.shards])

    def provenance(self) -> dict[str, Any]:
        """Return what was kept with this version about how it was made."""
        found: dict[str, Any] = self.storage.read_json(f"pools/{self.name}/versions/{self.version}.json")["provenance"]
        return found

    def read(self, number: int, columns: list[str] | None = None) -> pa.Table:
        """Return shard `number`, rows in their fixed order."""
        table = self.storage.read_table(shard_path(f"pools/{self.name}", number), columns)
        if not self.clusters or "prompt_group" not in table.column_names:
            return table
        place = table.schema.get_field_index("prompt_group")
        return table.set_column(place, table.schema.field(place), cluster_groups(self.storage, self.clusters, table.column(place)))

    def read_all(self, columns: list[str] | None = None) -> pa.Table:
        """Return every shard as one table; for small pools and for id columns."""
        if not self.shards:
            raise InputError(f"pool {self.name!r} has no shards")
        return pa.concat_tables([self.read(shard.number, columns) for shard in self.shards]).replace_schema_metadata()


def content_digest(value: Any) -> str:
    """Return BLAKE2b-128 (32 hex digits) of a JSON value's canonical text."""
    return hashlib.blake2b(canonical_json(value).encode(), digest_size=16).hexdigest()


def shard_path(folder: str, number: int) -> str:
    """Return the path of shard `number` in a table's folder."""
    return f"{folder}/shard-{number:05d}.parquet"


def shard_number_of_path(path: str) -> int | None:
    """Return the number in a shard's file name, or None for any other file."""
    name = path.rsplit("/", 1)[-1]
    number = name.removeprefix("shard-").removesuffix(".parquet")
    return int(number) if name.startswith("shard-") and name.endswith(".parquet") and number.isdigit() else None


def with_shard_number(table: pa.Table, number: int) -> pa.Table:
    """Return the table with its shard number in the schema metadata (and no other metadata)."""
    return table.replace_schema_metadata({SHARD_NUMBER_KEY: str(number).encode()})


def write_pool_shard(storage: Storage, pool: str, number: int, table: pa.Table) -> Shard:
    """Write one shard of a pool that is being made; it comes into being when `commit_pool` lists it.

    Our choice: what fits into one request is made by one that does nothing where a file of that name is; more goes up in parts, after a look.
    A file of that name may be there: of a driver that was killed, which is replaced; or the same bytes, which stay. So a driver that was taken for
    dead cannot change what its successor has committed.

    Raises:
        RunConflictError: the shard is part of a committed version, with other bytes.
    """
    path, data = shard_path(f"pools/{pool}", number), encode_table(with_shard_number(table, number))
    shard = Shard(number, table.num_rows, len(data), hashlib.blake2b(data, digest_size=16).hexdigest())
    if len(data) <= MAX_EXCLUSIVE_BYTES and storage.create_exclusive(path, data):
        return shard
    if storage.exists(path) and storage.read_bytes(path) == data:
        return shard
    if pool_exists(storage, pool) and any(listed.number == number for listed in open_pool(storage, pool).shards):
        raise RunConflictError(f"{storage.join(path)} is part of the pool {pool!r}, and shards are never rewritten: another driver made it meanwhile")
    storage.write_bytes(path, data)
    return shard


def commit_pool(storage: Storage, name: str, fingerprint: str, shards: list[Shard], provenance: dict[str, Any]) -> Pool:
    """Write the next version of a pool, which must list every shard of the version before.

    Raises:
        RunConflictError: an earlier shard is missing from `shards` or differs, two have one number, or another driver committed first.
    """
    latest = open_pool(storage, name) if pool_exists(storage, name) else None
    if latest is not None and set(latest.shards) - set(shards):
        raise RunConflictError(f"pool {name!r}: a new version must keep every shard of version {latest.version}; use another pool name or workspace")
    if len({shard.number for shard in shards}) != len(shards):
        raise RunConflictError(f"pool {name!r}: a shard's number is there twice; use another pool name or workspace")
    pool = Pool(storage, name, 0 if latest is None else latest.version + 1, fingerprint, tuple(sorted(shards, key=lambda shard: shard.number)))
    manifest = {
        "pool": name,
        "version": pool.version,
        "fingerprint": fingerprint,
        "digest": pool.digest,
        "rows": pool.num_rows,
        "provenance": provenance,
        "shards": [asdict(shard) for shard in pool.shards],
    }
    if not storage.create_exclusive(f"pools/{name}/versions/{pool.version}.json", encode_json(manifest)):
        raise RunConflictError(f"pool {name!r}: version {pool.version} was committed by another driver meanwhile")
    return pool


def pool_versions(storage: Storage, name: str) -> list[int]:
    """Return the numbers of a pool's committed versions, in order; none where there is no such pool."""
    files = (path.rsplit("/", 1)[-1] for path in storage.list_files(f"pools/{name}/versions"))
    return sorted(int(file.removesuffix(".json")) for file in files if file.removesuffix(".json").isdigit())


def pool_exists(storage: Storage, name: str) -> bool:
    """Whether any version of the pool has been committed."""
    return bool(pool_versions(storage, name))


def open_pool(storage: Storage, name: str, version: int | None = None) -> Pool:
    """Return the latest (or the named) version of a pool; a pool that is not there is an `InputError`."""
    versions = pool_versions(storage, name)
    if not versions or (version is not None and version not in versions):
        wanted = f"pool {name!r}" + (f" version {version}" if version is not None else "")
        there = ", ".join(list_pools(storage)) or "no pool"
        raise InputError(
            f"{wanted} does not exist in {storage.url} (there: {there}); jobs/ingest.py makes it from files whose names begin with {name}"
        )
    manifest = storage.read_json(f"pools/{name}/versions/{versions[-1] if version is None else version}.json")
    shards = tuple(Shard(**shard) for shard in manifest["shards"])
    return Pool(storage, name, manifest["version"], manifest["fingerprint"], shards)


def list_pools(storage: Storage) -> list[str]:
    """Return the names of all committed pools, sorted."""
    return [name for name in storage.list_folders("pools") if pool_exists(storage, name)]


def require_columns(table: pa.Table, columns: tuple[str, ...], *, step: str) -> None:
    """Raise `SchemaError` naming the step and the columns that the table lacks."""
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise SchemaError(f"step {step!r} needs the column {', '.join(missing)}; the shard has {', '.join(table.column_names)}")
