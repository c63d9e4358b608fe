"""A growing pool as parts: version 0, and for every later version the shards that it added.

Our choice: a step works on parts, so what is known about the shards of an earlier version stays known when the pool grows: a part's tables are those
that were made when it was all there was, and nothing about them is computed, or named, anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from synpref_ray.errors import InputError
from synpref_ray.tables.pools import Pool, content_digest, open_pool
from synpref_ray.tables.sidecars import Sidecar
from synpref_ray.tables.storage import Storage


def pool_parts(storage: Storage, name: str, version: int) -> list[Pool]:
    """Return the parts of a pool up to a version, in order; a version that added nothing has none (version 0 has one, whatever it holds).

    Raises:
        InputError: there is no such version.
    """
    parts: list[Pool] = []
    known: set[int] = set()
    for number in range(version + 1):
        pool = open_pool(storage, name, number)
        new = tuple(shard for shard in pool.shards if shard.number not in known)
        known.update(shard.number for shard in new)
        if new or not number:
            parts.append(replace(pool, shards=new))
    return parts


@dataclass(frozen=True)
class PartedSidecar:
    """Sidecars of several parts of a pool, read as one; `numbers` are the shards of each. Not a sidecar of any one version of the pool."""

    pool: Pool
    name: str
    fingerprint: str
    parts: tuple[Sidecar, ...]
    numbers: tuple[frozenset[int], ...]

    def read(self, number: int, columns: list[str] | None = None) -> pa.Table:
        """Return shard `number` of the pool, from the part that has it.

        Raises:
            InputError: no part has it.
        """
        for part, numbers in zip(self.parts, self.numbers, strict=True):
            if number in numbers:
                return part.read(number, columns)
        raise InputError(f"no part of {self.name!r} has shard {number} of pool {self.pool.name!r}")


def join_parts(parts: Sequence[Sidecar]) -> Sidecar | PartedSidecar:
    """Return the sidecars of a pool's parts as one to read from; a single part is itself, so that nothing made from it has another name."""
    if len({part.name for part in parts}) != 1:
        raise ValueError(f"expected the same sidecar of every part, found {', '.join(part.name for part in parts) or 'none'}")
    if len(parts) == 1:
        return parts[0]
    light = tuple(replace(part, pool=replace(part.pool, shards=())) for part in parts)
    numbers = tuple(frozenset(shard.number for shard in part.pool.shards) for part in parts)
    return PartedSidecar(light[0].pool, parts[0].name, content_digest([part.fingerprint for part in parts]), light, numbers)
