"""One pair's whole story, read from the workspace alone: where it stands, and what every finished table, round and set says of it.

Serves DESIGN 2 (why was this pair kept, flipped or dropped? is a lookup). Nothing is decided here: a decision's reason is the one that was stored,
and the sentence behind it is that of the rule's own table (`rules/gate.py`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from synpref_ray.errors import SchemaError
from synpref_ray.rules.gate import TRUTH_TABLE, GateReason
from synpref_ray.schema import PAIR_FIELDS
from synpref_ray.tables.garbage import ROUND_SOURCES
from synpref_ray.tables.lookup import Place, find_pair
from synpref_ray.tables.pools import shard_path
from synpref_ray.tables.sets import AS_INGESTED
from synpref_ray.tables.storage import Storage

SELECTED_FILE = "selected.parquet"
STAGE2 = "stage 2"
WITHOUT_LEAKS = "-without-leaks"
"""The end of the names of sets and gold that a round begins with where decisions about leaks were made after the round before."""
OMITTED = ("embeddings", "text_keys", "selected")
"""Tables that say nothing a person could read: vectors and hashes, and what other tables repeat."""
_WHY_OUTSIDE = {
    GateReason.UNSCORED.value: "A reward model could not score the pair (see the drop_reason of its rewards).",
    GateReason.GOLD_PROMPT.value: "Gold has this prompt (or a near-duplicate), and gold must stay able to check what trains on curated pairs.",
    GateReason.FLIP_UNSURE.value: "Both reward models reject the label, but not as surely as min_flip_confidence asks.",
    GateReason.CONTAMINATED.value: "Judges confirmed that the pair gives a benchmark item away (sidecar decontamination).",
}


@dataclass
class Told:
    """What one finished table says of the pair; `used_by` names the rounds, stages and sets that rest on it, empty where none does now."""

    pool: str
    table: str
    fingerprint: str
    step: str
    version: int
    settings: Mapping[str, Any]
    values: dict[str, Any]
    beside: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    used_by: list[str] = field(default_factory=list)


def tell_pair(storage: Storage, name: str) -> dict[str, Any]:
    """Return the story as plain values; `name` is a pair_id or its head (see `tables/lookup.py`).

    Raises:
        InputError: no pool holds it, or several pairs begin like that.
    """
    pair_id, places = find_pair(storage, name)
    tables = [told for place in places for told in _tables(storage, place, pair_id)]
    _trace(storage, tables, places)
    row = places[0].pool.read(places[0].shard).slice(places[0].row, 1).to_pylist()[0]
    return {
        **{column.name: row[column.name] for column in PAIR_FIELDS},
        "places": [_place(place) for place in places],
        "tables": [_plain(told) for told in tables if told.table not in OMITTED],
        "people": _people(storage, pair_id, places),
        "retrieved": _retrieved(storage, "pair_id", pair_id),
        "called_for": _called(storage, pair_id),
        "sets": _sets(storage, places),
        "decision": _decision(tables),
    }


def _place(place: Place) -> dict[str, Any]:
    gathered = dict(zip(("pool", "shard", "row"), place.source, strict=True)) if place.source else None
    return {"pool": place.pool.name, "version": place.pool.version, "shard": place.shard, "row": place.row, "gathered_from": gathered}


def _plain(told: Told) -> dict[str, Any]:
    names = ("pool", "table", "fingerprint", "step", "version", "settings", "values", "used_by")
    return {name: getattr(told, name) for name in names}


def _tables(storage: Storage, place: Place, pair_id: str) -> Iterator[Told]:
    """Yield what every sealed table beside a pool says of the pair."""
    root = f"pools/{place.pool.name}"
    for table in storage.list_folders(root):
        for version in storage.list_folders(f"{root}/{table}"):
            folder = f"{root}/{table}/{version}"
            path = shard_path(folder, place.shard)
            if not storage.exists(f"{folder}/manifest.json") or not storage.exists(path):
                continue
            manifest = storage.read_json(f"{folder}/manifest.json")
            values = {"pair_id": pair_id} if table in OMITTED else storage.read_table(path).slice(place.row, 1).to_pylist()[0]
            if values.pop("pair_id", None) != pair_id:
                raise SchemaError(f"shard {place.shard} of {storage.join(folder)} does not hold pair {pair_id} in row {place.row}")
            yield Told(
                place.pool.name,
                table,
                manifest["fingerprint"],
                manifest.get("step", ""),
                int(manifest.get("version", 0)),
                manifest.get("settings", {}),
                values,
                manifest.get("sidecars", {}),
                manifest.get("digests", {}),
            )


def _trace(storage: Storage, tables: Sequence[Told], places: Sequence[Place]) -> None:
    """Say of every table who rests on it: begin with what sets and records name, and go on to what these were made from."""
    by_name = {(told.pool, told.table, told.fingerprint): told for told in tables}
    pools = {place.pool.digest: place.pool.name for place in places}
    for user, key in _roots(storage):
        waiting = [key]
        while waiting:
            told = by_name.get(waiting.pop())
            if told is None or user in told.used_by:
                continue
            told.used_by.append(user)
            waiting += [(told.pool, name, made_from) for name, made_from in told.beside.items()]
            waiting += [(name.removeprefix("source:"), told.table, digest) for name, digest in told.digests.items() if name.startswith("source:")]
            places_of = {name.removeprefix("gathered"): pools.get(digest) for name, digest in told.digests.items() if name.startswith("gathered")}
            scattered = {(gathered, told.digests.get(f"result{place}")) for place, gathered in places_of.items()}
            waiting += [other for other in by_name if (other[0], other[2]) in scattered]


def _roots(storage: Storage) -> Iterator[tuple[str, tuple[str, str, str]]]:
    """Yield who names which table: rounds by their sets and records, Stage 2 by its decision."""
    for path in _round_files(storage, "round.json"):
        record = storage.read_json(path)
        user = f"round {record['round']}"
        for pool, table, fingerprint in [*record.get("tables", ()), *record.get(ROUND_SOURCES, ())]:
            yield user, (pool, table, fingerprint)
        ends = tuple(f"-r{record['round']:02d}{end}.json" for end in ("", WITHOUT_LEAKS))
        for name in (name for name in storage.list_files("sets") if name.endswith(ends)):
            yield from ((user, member) for member in _members(storage, name))
    if storage.exists("rounds/stage2.json"):
        record = storage.read_json("rounds/stage2.json")
        yield STAGE2, (record["pool"], "decision", record["decision"])
        for name in record.get("sets", {}).values():
            yield from ((STAGE2, member) for member in _members(storage, f"sets/{name}.json"))


def _members(storage: Storage, path: str) -> list[tuple[str, str, str]]:
    """Return the tables that a set's members are of."""
    return (
        [(member["pool"], member["sidecar"], member["fingerprint"]) for member in storage.read_json(path)["members"]] if storage.exists(path) else []
    )


def _round_files(storage: Storage, name: str) -> list[str]:
    return [path for path in storage.list_files("rounds") if path.endswith(f"/{name}")]


def _retrieved(storage: Storage, column: str, pair_id: str) -> list[dict[str, Any]]:
    """Return the rows of the rounds' selections that have this pair in `column`, with their round."""
    found = []
    for path in _round_files(storage, SELECTED_FILE):
        table = storage.read_table(path)
        rows = table.filter(pc.fill_null(pc.equal(table[column], pair_id), False)).to_pylist()
        found += [{"round": int(path.split("/")[1]), **row} for row in rows]
    return found


def _called(storage: Storage, pair_id: str) -> list[dict[str, Any]]:
    """Return, for a gold pair, what the best RM's confidence in it called for, round by round."""
    found: dict[int, dict[str, Any]] = {}
    for row in _retrieved(storage, "gold_pair_id", pair_id):
        mine = found.setdefault(row["round"], {"round": row["round"], "gold_confidence": row["gold_confidence"], "k": row["k"], "pair_ids": []})
        mine["pair_ids"].append(row["pair_id"])
    return list(found.values())


def _sets(storage: Storage, places: Sequence[Place]) -> list[dict[str, Any]]:
    """Return the sets that hold the pair, with the table that they filter and whether the label is turned round there."""
    found = []
    by_pool = {place.pool.name: place for place in places}
    for path in storage.list_files("sets"):
        manifest = storage.read_json(path)
        for member in manifest["members"]:
            place = by_pool.get(member["pool"])
            shard = shard_path(f"pools/{member['pool']}/{member['sidecar']}/{member['fingerprint'][:8]}", place.shard) if place else ""
            if place is None or not storage.exists(shard):
                continue
            row = storage.read_table(shard, ["flipped", *member["where"]]).slice(place.row, 1)
            if all(row[name].cast(pa.string())[0].as_py() in values for name, values in member["where"].items()):
                flipped = bool(row["flipped"][0].as_py()) and member.get("labels") != AS_INGESTED
                found.append({"set": manifest["name"], "pool": member["pool"], "sidecar": member["sidecar"], "flipped": flipped})
    return found


def _people(storage: Storage, pair_id: str, places: Sequence[Place]) -> dict[str, list[dict[str, Any]]]:
    """Return what the annotation queue holds of the pair: its rank, single votes, the verdict, edited attributes, skips, settled disputes."""
    files = {name: f"annotation/{name}.parquet" for name in ("votes", "verdicts", "attributes", "skips", "adjudications")}
    files |= {f"queue of {place.pool.name}": f"annotation/queues/{place.pool.name}.parquet" for place in places}
    found = {}
    for name, path in files.items():
        if storage.exists(path):
            table = storage.read_table(path)
            if rows := table.filter(pc.equal(table["pair_id"], pair_id)).drop_columns(["pair_id"]).to_pylist():
                found[name] = rows
    return found


def _decision(tables: Sequence[Told]) -> dict[str, Any] | None:
    """Return Stage 2's decision with its evidence, the rule's version and settings, and why."""
    for told in tables:
        if told.table == "decision" and STAGE2 in told.used_by:
            rule = {"step": told.step, "version": told.version, **told.settings}
            return {**told.values, "rule": rule, "why": why_decided(told.values), "fingerprint": told.fingerprint}
    return None


def why_decided(values: Mapping[str, Any]) -> str:
    """Return the sentence behind a stored decision.

    Args:
        values: a row of DECISION_SCHEMA.
    """
    for cell in TRUTH_TABLE:
        evidence = (cell.best, cell.gold, cell.judge.value if cell.judge else None)
        outcome = (cell.decision.value, cell.reason.value)
        stored = tuple(values[name] for name in ("best_agrees", "gold_agrees", "judge_verdict", "decision", "decision_reason"))
        if (*evidence, *outcome) == stored:
            return cell.why
    return _WHY_OUTSIDE.get(values["decision_reason"], "")
