"""Which pairs give benchmark items away, as the sidecar `decontamination` says: what Stage 1, Stage 2 and exports leave out.

Paper: App. C (v3): a judge looks at overlaps. Our choice: what it confirms is dropped; the decision is a column, written by jobs/decontaminate.py; a
pool that has none is taken as it is.
"""

from collections.abc import Iterator, Sequence, Set
from functools import lru_cache

import pyarrow.compute as pc

from synpref_ray.errors import ConfigError, InputError
from synpref_ray.pipeline.clusters import AUTO, OFF
from synpref_ray.pipeline.gathering import SOURCES
from synpref_ray.rules.leaks import LEAKS
from synpref_ray.schema import Decision
from synpref_ray.tables.pools import Pool, open_pool, pool_versions
from synpref_ray.tables.reading import read_each
from synpref_ray.tables.sidecars import Sidecar, list_sidecars


def open_leaks(pool: Pool, wanted: str) -> Sidecar | None:
    """Return the decisions about a pool's overlaps with benchmarks.

    Args:
        wanted: `auto` (those that are there for this version of the pool, None if there are none), `off` (None), or the head of a name: that of a
            run's report (`decontamination/judged/NAME.parquet`), which serves all pools that it judged, or that of this pool's own sidecar.

    Raises:
        ConfigError: there are several.
        InputError: the named ones are not there.
    """
    found = find_leaks(pool, wanted)
    if found is None and wanted not in (AUTO, OFF):
        raise no_such_leaks(pool, wanted)
    return found


def leaks_of_set(pools: Sequence[Pool], wanted: str, pinned: Set[str] = frozenset()) -> list[list[Sidecar]]:
    """Return, for the pool of each member of a set, all decisions about its pairs: its own, or for a gathered pool those about any version of the
    pools that its pairs come from.

    Our choice: where `auto` finds several of one version, those that rounds of Stage 1 go by count; a named run need not have judged every pool.

    Args:
        wanted: see `open_leaks`.
        pinned: fingerprints of the decisions that Stage 1's last round goes by.

    Raises:
        ConfigError: there are several of one version, and no round goes by one of them.
        InputError: none of the pools has the named ones.
    """
    found = [list({leaks.fingerprint: leaks for leaks in _all_about(pool, wanted, pinned)}.values()) for pool in pools]
    if pools and wanted not in (AUTO, OFF) and not any(found):
        sources = _sources(pools[0])
        raise no_such_leaks(open_pool(pools[0].storage, sources[0]) if sources else pools[0], wanted)
    return found


def _all_about(pool: Pool, wanted: str, pinned: Set[str]) -> Iterator[Sidecar]:
    sources = _sources(pool)
    for name in sources:
        for version in pool_versions(pool.storage, name):
            yield from _all_about(open_pool(pool.storage, name, version), wanted, pinned)
    if sources:
        return
    there = list_leaks(pool, wanted)
    kept = [leaks for leaks in there if leaks.fingerprint in pinned] if len(there) > 1 and wanted == AUTO else there
    one = kept[0] if len(kept) == 1 else find_leaks(pool, wanted)
    if one is not None:
        yield one


def _sources(pool: Pool) -> list[str]:
    """Return the names of the pools that a gathered pool's pairs come from; none of another pool."""
    return sorted({name for places in pool.provenance().get(SOURCES, ()) for name, _ in places})


def find_leaks(pool: Pool, wanted: str) -> Sidecar | None:
    """Return what `open_leaks` does, None also where the named decisions are not there.

    Raises:
        ConfigError: there are several.
    """
    found = list_leaks(pool, wanted)
    if len(found) > 1:
        heads = ", ".join(_name_of(sidecar)[:8] for sidecar in found)
        raise ConfigError(
            f"pool {pool.name!r} has {len(found)} decisions about overlaps with benchmarks ({heads}): say decontamination=NAME, or off; "
            f"the names are those of the reports in {pool.storage.join('decontamination/judged')}"
        )
    return found[0] if found else None


def list_leaks(pool: Pool, wanted: str) -> list[Sidecar]:
    """Return all decisions about this version of a pool that the setting could mean."""
    if wanted == OFF:
        return []
    found = list_sidecars(pool, LEAKS)
    return [sidecar for sidecar in found if wanted == AUTO or _name_of(sidecar).startswith(wanted) or sidecar.fingerprint.startswith(wanted)]


def no_such_leaks(pool: Pool, wanted: str) -> InputError:
    """Return the error of a name under which nothing was decided about a pool."""
    there = ", ".join(_name_of(sidecar)[:8] for sidecar in list_sidecars(pool, LEAKS)) or "none"
    return InputError(
        f"decontamination={wanted}: pool {pool.name!r} version {pool.version} has no decisions of that name (there are: {there}); "
        "run jobs/decontaminate.py over this pool, name another, or say off"
    )


def _name_of(leaks: Sidecar) -> str:
    """Return the name that the decisions of one run share across its pools."""
    return str(leaks.manifest.get("digests", {}).get("decisions", leaks.fingerprint))


def leaked_pairs(leaks: Sidecar | None) -> frozenset[str]:
    """Return the pair_ids that the decisions drop; for pools whose ids one process can hold."""
    return _read_leaked(leaks) if leaks else frozenset()


@lru_cache(maxsize=256)
def _read_leaked(leaks: Sidecar) -> frozenset[str]:
    """Read a table once in a process: it is sealed, and every round goes by those of the rounds before."""
    dropped: set[str] = set()
    for table in read_each(lambda shard: leaks.read(shard.number, ["pair_id", "leak_decision"]), leaks.pool.shards):
        dropped.update(table["pair_id"].filter(pc.equal(table["leak_decision"], Decision.DROP.value)).to_pylist())
    return frozenset(dropped)
