"""Sets: named selections of labelled pairs, kept as (pool version, verdict sidecar, filter) and never as copies."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from synpref_ray.errors import InputError, RunConflictError
from synpref_ray.rules.flip import flip_pairs
from synpref_ray.tables.pools import content_digest, open_pool
from synpref_ray.tables.sidecars import Sidecar, open_sidecar, zip_shard
from synpref_ray.tables.storage import Storage

AS_INGESTED = "as ingested"
SET_COLUMNS = ("comparison_id", "prompt_group", "prompt", "chosen", "rejected", "source")


@dataclass(frozen=True)
class Member:
    """The rows of one sealed sidecar whose columns have the wanted values (a boolean's are `true` and `false`).

    `sidecar` has a boolean column `flipped`; with `as_ingested` it is not applied, and every pair keeps the label that it came with.
    """

    sidecar: Sidecar
    where: tuple[tuple[str, tuple[str, ...]], ...]
    as_ingested: bool = False

    @property
    def identity(self) -> list[object]:
        """What names these rows."""
        return [self.sidecar.pool.digest, self.sidecar.fingerprint, self.where, *(["as ingested"] if self.as_ingested else [])]

    @property
    def columns(self) -> list[str]:
        """The columns of the sidecar that `wants` and `flips` read."""
        return list(dict.fromkeys(["flipped", *(name for name, _ in self.where)]))

    def wants(self, labels: Mapping[str, pa.ChunkedArray]) -> pa.ChunkedArray:
        """Return which rows are the member's, booleans, from the sidecar's `columns` by name."""
        wanted = pa.chunked_array([pa.repeat(pa.scalar(True), len(labels["flipped"]))])
        for name, values in self.where:
            wanted = pc.and_(wanted, pc.is_in(labels[name].cast(pa.string()), value_set=pa.array(values, pa.string())))
        return wanted

    def flips(self, labels: Mapping[str, pa.ChunkedArray]) -> pa.ChunkedArray:
        """Return of which rows the replies are swapped, booleans without nulls, from the sidecar's `columns` by name."""
        flips = pc.fill_null(labels["flipped"], False)
        return pc.and_(flips, pa.scalar(False)) if self.as_ingested else flips


@dataclass(frozen=True)
class PairSet:
    """Members read one after the other; `digest` names exactly these rows."""

    name: str
    members: tuple[Member, ...]

    @property
    def digest(self) -> str:
        """32 hex digits over the members' identities and filters."""
        return content_digest([member.identity for member in self.members])

    def read(self) -> pa.Table:
        """Return all pairs with `chosen` the preferred reply (flips applied): pair_id, SET_COLUMNS, flipped.

        A comparison whose contradicting labels were settled the same way (one kept, one flipped) is one pair; the first row stays.
        """
        tables = [read_member(member, shard.number) for member in self.members for shard in member.sidecar.pool.shards]
        if not tables:
            raise InputError(f"set {self.name!r} has no shards to read")
        table = pa.concat_tables(tables).combine_chunks()
        first: dict[tuple[str, str], int] = {}
        for row, key in enumerate(zip(table["comparison_id"].to_pylist(), table["chosen"].to_pylist(), strict=True)):
            first.setdefault(key, row)
        return table if len(first) == table.num_rows else table.take(pa.array(first.values(), pa.int64()))

    def count(self) -> int:
        """Return how many pairs `read` gives; texts are read only of comparisons that come more than once."""
        names = [ids for table in iter_shards(self, ["comparison_id"]) for ids in table["comparison_id"].to_pylist()]
        repeated = {name for name, times in Counter(names).items() if times > 1}
        if not repeated:
            return len(names)
        wanted = pa.array(sorted(repeated), pa.string())
        kept: set[tuple[str, str]] = set()
        for member in self.members:
            for shard in member.sidecar.pool.shards:
                table = read_member(member, shard.number, ("comparison_id", "chosen", "rejected"))
                table = table.filter(pc.is_in(table["comparison_id"], value_set=wanted))
                kept.update(zip(table["comparison_id"].to_pylist(), table["chosen"].to_pylist(), strict=True))
        return len([name for name in names if name not in repeated]) + len(kept)


def iter_shards(pairs: PairSet, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yield pair_id and some columns of the set's pairs, shard by shard and as ingested: flips are not applied, repeated comparisons not merged."""
    for member in pairs.members:
        for shard in member.sidecar.pool.shards:
            yield _selected(member, shard.number, columns)[0].select(["pair_id", *columns])


def read_member(member: Member, number: int, columns: Sequence[str] = SET_COLUMNS) -> pa.Table:
    """Return the selected pairs of one shard, flips applied: pair_id, `columns` (the replies among them), flipped."""
    table, flips = _selected(member, number, columns)
    return flip_pairs(table, flips)


def _selected(member: Member, number: int, columns: Sequence[str]) -> tuple[pa.Table, pa.ChunkedArray]:
    """Return the selected pairs of one shard as ingested (pair_id, `columns`), and of which of them the replies are swapped."""
    labels = {name: f"label.{name}" for name in member.columns}
    table = zip_shard(member.sidecar.pool, number, columns, [(member.sidecar, labels)])
    found = {name: table[label] for name, label in labels.items()}
    wanted = member.wants(found)
    return table.drop_columns(list(labels.values())).filter(wanted), member.flips(found).filter(wanted)


def save_set(storage: Storage, name: str, members: Sequence[Member]) -> PairSet:
    """Write `sets/<name>.json` and return the set."""
    pairs = PairSet(name, tuple(members))
    storage.write_json(
        f"sets/{name}.json",
        {
            "name": name,
            "digest": pairs.digest,
            "members": [
                {
                    "pool": m.sidecar.pool.name,
                    "version": m.sidecar.pool.version,
                    "sidecar": m.sidecar.name,
                    "fingerprint": m.sidecar.fingerprint,
                    "where": {key: list(values) for key, values in m.where},
                    **({"clusters": m.sidecar.pool.clusters} if m.sidecar.pool.clusters else {}),
                    **({"labels": AS_INGESTED} if m.as_ingested else {}),
                }
                for m in members
            ],
        },
    )
    return pairs


def load_set(storage: Storage, name: str, digest: str | None = None) -> PairSet:
    """Return the set of that name.

    Raises:
        InputError: there is none.
        RunConflictError: it is not the one with this digest any more: a later run with other settings replaced it.
    """
    if not storage.exists(f"sets/{name}.json"):
        there = sorted(path.removeprefix("sets/").removesuffix(".json") for path in storage.list_files("sets"))
        raise InputError(
            f"there is no set {name!r} in {storage.url}; there are: {', '.join(there) or 'none yet (jobs/stage1.py and stage2.py make them)'}"
        )
    manifest = storage.read_json(f"sets/{name}.json")
    members = []
    for entry in manifest["members"]:
        pool = replace(open_pool(storage, entry["pool"], entry["version"]), clusters=entry.get("clusters", ""))
        where = tuple((key, tuple(values)) for key, values in entry["where"].items())
        members.append(Member(open_sidecar(pool, entry["sidecar"], entry["fingerprint"]), where, entry.get("labels") == AS_INGESTED))
    pairs = PairSet(name, tuple(members))
    if digest is not None and pairs.digest != digest:
        raise RunConflictError(
            f"set {name!r} was replaced since it was recorded ({digest[:8]}, now {pairs.digest[:8]}): run the job that made it again"
        )
    return pairs
