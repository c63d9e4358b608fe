"""What of a workspace nothing refers to any more: old table versions, gathered pools, indexes, models of earlier rounds, leftovers of trainings.

Tables live under their fingerprint and nothing is overwritten, so every new setting leaves a version beside the old. What is still referred to is
found from the records: a table is in use if a record (`rounds/`, `sets/`, `hygiene/`, `annotation/notes/`) or the manifest of a table in use names
its fingerprint, a gathered pool if one of them names it or its digest, a model if one names it. All strings of a record count as names, so that a
reference of a kind not thought of here errs on the side of keeping; where a round's record is of before rounds named what they select from, all
tables that it may have read are kept, and so are all that a pool's notes may be from, where no record says it.

Kept whatever refers to it: pools that were not gathered (ingest's and those of other jobs), the newest version of each of their tables (of a grown
pool: beside each of its parts; of decisions about leaks: for each of its versions), models that are not of Stage 1's rounds, journals, spending,
human verdicts, runs, and every file of a kind that is not listed here.
What a job that has not finished may still need is not garbage either: unfinished tables and trainings, and all that was written since that job began.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from synpref_ray.errors import InputError
from synpref_ray.rules.leaks import LEAKS
from synpref_ray.tables.leases import is_held
from synpref_ray.tables.models import model_is_stored
from synpref_ray.tables.parts import pool_parts
from synpref_ray.tables.pools import list_pools, open_pool
from synpref_ray.tables.storage import Storage

RUN_LEASE = "lease.json"
"""In a run's folder: its job is alive."""
ROUND_RECORD = re.compile(r"rounds/\d+/round\.json")
ROUND_SOURCES = "candidates"
"""In a round's record: the tables that it selected from, as [pool, table, fingerprint]; records of earlier versions do not have it."""
NOTES = "annotation/notes"
"""What jobs/preverify.py noted of a pool's replies, and (not of earlier versions) the record of the gathered pool and tables that it is from."""
NOTED = "-preverified-"
"""In the name of a gathered pool whose replies were noted: between the pool's name and the digest."""
STAGE1_MODEL = re.compile(r"(best-r\d+|gold|gold-r\d+)-[0-9a-f]{8}")
ROUND_GOLD_MODEL = re.compile(r"gold-r\d+-.*")
BESIDE_TABLES = {"versions"}
ItemKind = Literal["table", "unfinished table", "gathered pool", "index", "unfinished index", "index parts", "model", "training"]


@dataclass(frozen=True)
class Item:
    """One thing that could be removed: its folder, and why it is kept (empty: nothing refers to it)."""

    kind: ItemKind
    path: str
    kept: str = ""
    num_bytes: int = 0

    @property
    def may_go(self) -> bool:
        """Whether nothing keeps it."""
        return not self.kept


@dataclass(frozen=True)
class _Table:
    path: str
    pool: str
    name: str
    written: float  # of its manifest; of its newest file where there is none
    manifest: Mapping[str, Any] | None

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"]) if self.manifest else ""


@dataclass(frozen=True)
class _PoolFacts:
    name: str
    digests: frozenset[str]
    is_gathered: bool
    current: frozenset[str]  # digests of the latest version and of its parts
    names: frozenset[str]  # all that its provenance names
    written: float


def live_runs(storage: Storage) -> list[str]:
    """Return the folders of the jobs that run in this workspace now."""
    folders = [f"runs/{entry.name}" for entry in storage.list_entries("runs") if entry.is_folder]
    return [folder for folder in folders if is_held(storage, f"{folder}/{RUN_LEASE}")]


def find_items(storage: Storage, *, unfinished: bool = False) -> list[Item]:
    """Return all that could be removed, with what keeps it, sizes included for what nothing keeps.

    Args:
        unfinished: unfinished tables and trainings may go too, and what was written since a job began that has not finished.

    Raises:
        InputError: there is no workspace.
    """
    if not {entry.name for entry in storage.list_entries("")} & {"pools", "models", "tmp"}:
        raise InputError(f"{storage.url} is no workspace: it has no pools/, models/ or tmp/")
    pools = [_read_pool(storage, name) for name in list_pools(storage)]
    tables = [table for pool in pools for table in _read_tables(storage, pool.name)]
    reached = _reach(storage, pools, tables)
    pinned = _newest_of_base_pools(pools, tables)
    untold, untold_notes = _read_by_untold_rounds(storage, pools), _noted_untold(storage, pools)
    began, whose = (float("inf"), "") if unfinished else _pending_since(storage)
    items: list[Item] = []
    for table in tables:
        kept = "its lease is held" if is_held(storage, f"{table.path}/lease.json") else ""
        if table.manifest is None:
            items.append(Item("unfinished table", table.path, kept or ("" if unfinished else "its job may go on from it")))
            continue
        if table.fingerprint in reached:
            kept = kept or "a record refers to it"
        elif table.path in pinned:
            kept = kept or "the newest version of its kind"
        elif table.pool in untold:
            kept = kept or f"{untold[table.pool]} does not say what it selected from: jobs/stage1.py writes it anew"
        elif table.pool in untold_notes:
            kept = kept or f"{untold_notes[table.pool]} may be from it: jobs/preverify.py writes which tables it is from"
        elif table.written >= began:
            kept = kept or f"written since {whose} began, which has not finished"
        items.append(Item("table", table.path, kept))
    keeping = {item.path.split("/")[1] for item in items if item.kept}
    for pool in pools:
        if pool.is_gathered:
            named = pool.name in reached or bool(pool.digests & reached)
            kept = "a record refers to it" if named else "a table of it is kept" if pool.name in keeping else ""
            kept = kept or (f"written since {whose} began, which has not finished" if pool.written >= began else "")
            items.append(Item("gathered pool", f"pools/{pool.name}", kept))
    going = {item.path for item in items if item.kind == "gathered pool" and item.may_go}
    items = [item for item in items if "table" not in item.kind or "/".join(item.path.split("/")[:2]) not in going]  # they go with their pool
    embeddings = {table.fingerprint for table in tables if table.path in {item.path for item in items if item.kept}} - {""}
    items += [*_indexes(storage, embeddings, began, whose, unfinished)]
    items += [*_models(storage, reached, began, whose, told=not untold), *_trainings(storage, unfinished)]
    return [replace(item, num_bytes=sum(storage.sizes(item.path).values())) if item.may_go else item for item in items]


def names_in(value: Any) -> Iterator[str]:
    """Yield every string of a JSON value, keys too; of `kind:name` the name as well."""
    if isinstance(value, str):
        yield value
        if ":" in value:
            yield value.rpartition(":")[2]
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from names_in(key)
            yield from names_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from names_in(inner)


def _read_pool(storage: Storage, name: str) -> _PoolFacts:
    digests, names, gathered, written = set(), set[str](), False, 0.0
    for entry in storage.list_entries(f"pools/{name}/versions"):
        manifest = storage.read_json(f"pools/{name}/versions/{entry.name}")
        digests.add(str(manifest["digest"]))
        gathered |= manifest["provenance"].get("step") == "gather"
        names |= {*names_in(manifest["provenance"])}
        written = max(written, entry.written)
    latest = open_pool(storage, name)
    current = {latest.digest, *(part.digest for part in pool_parts(storage, name, latest.version))}
    return _PoolFacts(name, frozenset(digests), gathered, frozenset(current), frozenset(names), written)


def _read_tables(storage: Storage, pool: str) -> Iterator[_Table]:
    for sidecar in storage.list_folders(f"pools/{pool}"):
        if sidecar in BESIDE_TABLES:
            continue
        for version in storage.list_folders(f"pools/{pool}/{sidecar}"):
            path = f"pools/{pool}/{sidecar}/{version}"
            entries = {entry.name: entry.written for entry in storage.list_entries(path) if not entry.is_folder}
            manifest = storage.read_json(f"{path}/manifest.json") if "manifest.json" in entries else None
            written = entries["manifest.json"] if manifest else max(entries.values(), default=0.0)
            yield _Table(path, pool, sidecar, written, manifest if manifest and "fingerprint" in manifest else None)


def _reach(storage: Storage, pools: Iterable[_PoolFacts], tables: Iterable[_Table]) -> set[str]:
    """Return all names that the records name, and what these in turn name."""
    reached: set[str] = set()
    records = [path for folder in ("rounds", "sets") for path in storage.list_files(folder) if path.endswith(".json")]
    records += [path for path in storage.list_files("hygiene") if path.endswith("/done.json")]
    records += [path for path in storage.list_files(NOTES) if path.endswith(".json")]
    for path in records:
        reached |= {*names_in(storage.read_json(path))}
    for pool in pools:
        if not pool.is_gathered:
            reached |= pool.names
    open_tables = [table for table in tables if table.manifest is not None]
    open_pools = [pool for pool in pools if pool.is_gathered]
    while True:  # ends: each turn closes a table or a pool
        in_use = [table for table in open_tables if table.fingerprint in reached]
        named = [pool for pool in open_pools if pool.name in reached or pool.digests & reached]
        if not in_use and not named:
            return reached
        for table in in_use:
            manifest = {key: value for key, value in (table.manifest or {}).items() if key != "settings"}
            reached |= {*names_in(manifest), table.pool}
        for pool in named:
            reached |= {pool.name, *pool.digests, *pool.names}
        open_tables = [table for table in open_tables if table not in in_use]
        open_pools = [pool for pool in open_pools if pool not in named]


def _newest_of_base_pools(pools: Iterable[_PoolFacts], tables: Iterable[_Table]) -> set[str]:
    base = {pool.name: pool for pool in pools if not pool.is_gathered}
    newest: dict[tuple[str, str, str], _Table] = {}
    for table in tables:
        if table.manifest is None or table.pool not in base:
            continue
        pool, digest = base[table.pool], str(table.manifest.get("pool_digest"))
        place = (table.pool, table.name, digest)
        if digest not in (pool.digests if table.name == LEAKS else pool.current):  # what leaks of an earlier version holds for the later ones
            continue
        if place not in newest or table.written > newest[place].written:
            newest[place] = table
    return {table.path for table in newest.values()}


def _read_by_untold_rounds(storage: Storage, pools: Iterable[_PoolFacts]) -> dict[str, str]:
    """Return the pools that were not gathered and that a round read without naming the tables, each with the round's record."""
    found: dict[str, str] = {}
    for path in storage.list_files("rounds"):
        if ROUND_RECORD.fullmatch(path):
            record = storage.read_json(path)
            if ROUND_SOURCES not in record:
                found |= {pool.name: path for pool in pools if not pool.is_gathered and pool.name in record.get("pools", [pool.name])}
    return found


def _noted_untold(storage: Storage, pools: Iterable[_PoolFacts]) -> dict[str, str]:
    """Return the gathered pools that notes may be from of which no record says it, each with these notes."""
    files = {*storage.list_files(NOTES)}
    untold = {path.removeprefix(f"{NOTES}/").removesuffix(".parquet"): path for path in files if path.endswith(".parquet")}
    untold = {name: path for name, path in untold.items() if f"{NOTES}/{name}.json" not in files}
    return {pool.name: untold[name] for pool in pools if pool.is_gathered and (name := pool.name.rpartition(NOTED)[0]) in untold}


def _pending_since(storage: Storage) -> tuple[float, str]:
    """Return when the earliest job began whose latest run has not finished, and that run; infinity where all have."""
    latest: dict[str, str] = {}
    for entry in storage.list_entries("runs"):
        job = entry.name.rsplit("-", 3)[0]
        if entry.is_folder and entry.name > latest.get(job, ""):
            latest[job] = entry.name
    began, whose = float("inf"), ""
    for job, name in latest.items():
        path = f"runs/{name}/events.jsonl"
        if job == "clean" or not storage.exists(path):
            continue
        events = [json.loads(line) for line in storage.read_bytes(path).decode().splitlines()]
        kinds = {event["event"] for event in events}
        if events and ("finish" not in kinds or "wait" in kinds) and events[0]["time"] < began:  # one that waits for people goes on later
            began, whose = float(events[0]["time"]), name
    return began, whose


def _indexes(storage: Storage, kept_tables: set[str], began: float, whose: str, unfinished: bool) -> Iterator[Item]:
    """An index stays with the embeddings that it was built from; without them it cannot even be searched (`pipeline/pool_index.py`)."""
    for name in storage.list_folders("indexes"):
        path = f"indexes/{name}"
        kept = "its lease is held" if is_held(storage, f"{path}/lease.json") else ""
        files = {entry.name: entry.written for entry in storage.list_entries(path)}
        if "manifest.json" not in files:
            yield Item("unfinished index", path, kept or ("" if unfinished else "its job may go on from it"))
            continue
        if not kept and storage.read_json(f"{path}/manifest.json").get("embeddings") in kept_tables:
            kept = "its embeddings are kept"
        if not kept and files["manifest.json"] >= began:
            kept = f"written since {whose} began, which has not finished"
        yield Item("index", path, kept)
        if kept and "parts" in files:
            yield Item("index parts", f"{path}/parts", "its lease is held" if is_held(storage, f"{path}/lease.json") else "")


def _models(storage: Storage, reached: set[str], began: float, whose: str, *, told: bool) -> Iterator[Item]:
    for entry in storage.list_entries("models"):
        if not entry.is_folder:
            continue
        if not STAGE1_MODEL.fullmatch(entry.name):
            yield Item("model", f"models/{entry.name}", "not of a round of Stage 1: remove it by hand if you want")
            continue
        files = [file.written for file in storage.list_entries(f"models/{entry.name}")]
        kept = "a record refers to it" if entry.name in reached else ""
        if not kept and not told and ROUND_GOLD_MODEL.fullmatch(entry.name):
            kept = "a round's record does not say by which models it selected"
        if not kept and is_held(storage, f"models/.lease-{entry.name}.json"):
            kept = "its lease is held"
        if not kept and max(files, default=0.0) >= began:
            kept = f"written since {whose} began, which has not finished"
        yield Item("model", f"models/{entry.name}", kept)


def _trainings(storage: Storage, unfinished: bool) -> Iterator[Item]:
    for entry in storage.list_entries("tmp"):
        if not entry.is_folder or not entry.name.startswith("train-"):
            continue
        model = entry.name.removeprefix("train-")
        kept = "its lease is held" if is_held(storage, f"models/.lease-{model}.json") else ""
        if not kept and not unfinished and not model_is_stored(storage, model):
            kept = "its training may go on from it"
        yield Item("training", f"tmp/{entry.name}", kept)
