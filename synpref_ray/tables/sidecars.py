"""Sidecars: what is learned later about a pool's pairs, one shard beside each pool shard, row for row.

Layout: `pools/<pool>/<sidecar>/<fp8>/shard-00000.parquet … manifest.json`, where fp8 is the head of the fingerprint of everything that determines the
content. The manifest is written last, as a seal. Joining is a zip of files checked by `pair_id`; there is no shuffle at any size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from synpref_ray.errors import InputError, SchemaError
from synpref_ray.tables.pools import Pool, content_digest, shard_number_of_path, shard_path, with_shard_number


@dataclass(frozen=True)
class Sidecar:
    """A table that has, for every shard of `pool`, a shard with exactly its pairs in its order. Identity is (pool version, name, fingerprint)."""

    pool: Pool
    name: str
    fingerprint: str

    @property
    def folder(self) -> str:
        """Path of the table under the workspace."""
        return f"pools/{self.pool.name}/{self.name}/{self.fingerprint[:8]}"

    @property
    def is_sealed(self) -> bool:
        """Whether every shard is there and the manifest has been written."""
        return self.pool.storage.exists(f"{self.folder}/manifest.json")

    @property
    def manifest(self) -> dict[str, Any]:
        """The seal: settings, inputs, rows, rejects by reason, counters."""
        if not self.is_sealed:
            raise InputError(f"{self.pool.storage.join(self.folder)} is not complete; run the step that makes {self.name!r} again")
        manifest: dict[str, Any] = self.pool.storage.read_json(f"{self.folder}/manifest.json")
        return manifest

    def has(self, number: int) -> bool:
        """Whether shard `number` has been written, by one look."""
        return self.pool.storage.exists(shard_path(self.folder, number))

    def finished(self) -> set[int]:
        """Return the numbers of the shards that have been written, by one listing."""
        numbers = (shard_number_of_path(path) for path in self.pool.storage.list_files(self.folder, deep=False))
        return {number for number in numbers if number is not None}

    def read(self, number: int, columns: list[str] | None = None) -> pa.Table:
        """Return shard `number`."""
        return self.pool.storage.read_table(shard_path(self.folder, number), columns)

    def read_all(self, columns: list[str] | None = None) -> pa.Table:
        """Return every shard as one table, in shard order; for small tables and narrow columns."""
        self._require_shards()
        return pa.concat_tables([self.read(shard.number, columns) for shard in self.pool.shards]).replace_schema_metadata()

    def _require_shards(self) -> None:
        if not self.pool.shards:
            raise InputError(f"pool {self.pool.name!r} has no shards, so {self.name!r} has none")

    def write(self, number: int, table: pa.Table) -> int:
        """Write one shard atomically and return its size in bytes; called by sinks alone."""
        return len(self.pool.storage.write_table(shard_path(self.folder, number), with_shard_number(table, number)))


def fingerprint(step: str, version: int, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Name a table's content: 32 hex digits over the step, its version, the settings that change results and the digests of every input."""
    return content_digest({"step": step, "version": version, "settings": dict(settings), "inputs": dict(inputs)})


def open_sidecar(pool: Pool, name: str, fingerprint_head: str | None = None) -> Sidecar:
    """Return a sealed sidecar of this pool version: the one whose fingerprint begins as given, or the only one there is.

    Raises:
        InputError: none is sealed for this pool version, or several are and none was named.
    """
    found = list_sidecars(pool, name, fingerprint_head)
    if len(found) == 1:
        return found[0]
    state = "no finished" if not found else f"{len(found)} versions of"
    raise InputError(f"pool {pool.name!r} version {pool.version} has {state} sidecar {name!r}; run the step that makes it, or name a fingerprint")


def list_sidecars(pool: Pool, name: str, fingerprint_head: str | None = None) -> list[Sidecar]:
    """Return the sealed sidecars of that name of this pool version, those whose fingerprint begins as given."""
    found = []
    for folder in pool.storage.list_folders(f"pools/{pool.name}/{name}"):
        path = f"pools/{pool.name}/{name}/{folder}/manifest.json"
        if not pool.storage.exists(path) or (fingerprint_head is not None and not folder.startswith(fingerprint_head[:8])):
            continue
        manifest = pool.storage.read_json(path)
        if manifest["pool_digest"] == pool.digest:
            found.append(Sidecar(pool, name, manifest["fingerprint"]))
    return found


def zip_shard(pool: Pool, number: int, pool_columns: Sequence[str], sidecars: Sequence[tuple[Sidecar, Mapping[str, str]]]) -> pa.Table:
    """Return a pool shard with columns of sidecars beside it; each mapping is {sidecar column: name in the result}.

    Raises:
        SchemaError: a sidecar's pair_ids are not exactly the pool's, in order.
    """
    table = pool.read(number, list(dict.fromkeys(["pair_id", *pool_columns])))
    for sidecar, columns in sidecars:
        beside = sidecar.read(number, ["pair_id", *columns])
        if not beside["pair_id"].equals(table["pair_id"]):
            raise SchemaError(f"shard {number} of {pool.storage.join(sidecar.folder)} does not hold the pairs of pool {pool.name!r} in their order")
        for column, name in columns.items():
            table = table.append_column(pa.field(name, beside.schema.field(column).type), beside[column])
    return table.replace_schema_metadata()
