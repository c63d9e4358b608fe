"""A set of the workspace as a data set for others: Parquet files with a card, filtered by licence, read by `datasets` and TRL as they are.

Paper: the data statement (licences that permit it, attribution). Our choice: a pair goes out only if the licence of its source is known and among
those asked for, and (where they have been looked at) if it gives no benchmark item away and holds no personal data above a score. Whatever is left
out is counted. The set is streamed: the driver holds one shard, the pairs of one file that is to be written (`max_pairs_per_file`, and for a moment
twice that), and 16 bytes (some 100 in Python's memory) for each contradicted comparison that went out.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from synpref_ray.errors import ConfigError, InputError, RunConflictError
from synpref_ray.ingest.accounts import normalise_licence
from synpref_ray.pipeline.clusters import AUTO
from synpref_ray.pipeline.growth import pinned_leaks
from synpref_ray.pipeline.job import JobConfig
from synpref_ray.pipeline.leak_marks import leaked_pairs, leaks_of_set
from synpref_ray.pipeline.pair_facts import PII, TOKEN_LENGTHS
from synpref_ray.reporting.dataset_card import UNKNOWN, CardFacts, dataset_card
from synpref_ray.reporting.histograms import count_lengths, length_histogram
from synpref_ray.reporting.run import Run
from synpref_ray.reporting.table import format_table
from synpref_ray.schema import MESSAGE, PROMPT, Role
from synpref_ray.tables.pools import Pool, content_digest
from synpref_ray.tables.sets import SET_COLUMNS, Member, PairSet, load_set, read_member
from synpref_ray.tables.sidecars import Sidecar, list_sidecars, zip_shard
from synpref_ray.tables.storage import Storage

EXPORT_VERSION = 1
RECORD = "export.json"
STARTED = "export-started.json"
"""Stands in the folder while an export is being written: only where it stands are files of an export that was cut off removed."""
CARD = "README.md"
_OWN_FILES = re.compile(r"data/train-\d{5}\.parquet|README\.md|export-started\.json")
EXPORT_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("prompt", PROMPT, nullable=False),
        pa.field("chosen", pa.list_(MESSAGE), nullable=False),
        pa.field("rejected", pa.list_(MESSAGE), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("licence", pa.string(), nullable=False),
        pa.field("flipped", pa.bool_(), nullable=False),
        pa.field("task_category", pa.string()),
        pa.field("language", pa.string()),
        pa.field("pii_score", pa.int8()),
        pa.field("prompt_tokens", pa.int32()),
        pa.field("chosen_tokens", pa.int32()),
        pa.field("rejected_tokens", pa.int32()),
    ]
)
"""TRL's conversational preference format (prompt, chosen and rejected as messages) and what is known of each pair; null where nobody has looked."""
_HIGHEST_PII = 3
_BESIDE: Mapping[str, tuple[str, ...]] = {
    "attributes": ("task_category",),
    "hygiene": ("language",),
    PII: ("pii_score", "pii_scanned_whole"),
    TOKEN_LENGTHS: ("prompt_tokens", "chosen_tokens", "rejected_tokens"),
}


class ExportConfig(JobConfig):
    """What goes out, and where to."""

    set: str
    """A name under sets/, as in curated-wild-silver-kept (the 26M kind) and curated-wild-silver-kept-and-flipped (the 40M kind)."""
    where: dict[str, tuple[str, ...]] = Field(default={})
    """Only pairs for which a column of the set's own table (the decisions: decision_reason, judge_verdict, …) has one of these values."""
    at_least: dict[str, float] = Field(default={})
    """Only pairs for which a number of the set's own table (margin_best, margin_gold) is no smaller; a missing number is."""
    at_most: dict[str, float] = Field(default={})
    """Likewise, no greater."""
    out: str = ""
    """A folder, local or any fsspec URL; empty: exports/<set>-<digest> in the workspace."""
    licences: tuple[str, ...] = ()
    """Only sources under these; none named means every licence that is known."""
    unknown_licences: bool = False  # ours: what nobody has licensed cannot be passed on
    licence_of: dict[str, str] = Field(default={})
    """Licences by source, where you know better than the record of ingest."""
    max_pii_score: int = Field(default=_HIGHEST_PII, ge=-1, le=_HIGHEST_PII)  # ours: 3 leaves nothing out; -1 all that the scan found anything in
    """Below 3, pairs that were not scanned whole stay here too (`not_scanned_whole`)."""
    decontamination: str = AUTO  # ours: pairs that jobs/decontaminate.py drops stay here where it was run; off, or the head of a fingerprint
    sidecars: dict[str, str] = Field(default={})
    """Heads of fingerprints by name (attributes, hygiene, pii, token_lengths), where a pool has several of one."""
    title: str = ""
    """The heading of the dataset card; empty: the set's name."""
    max_pairs_per_file: int = Field(default=100_000, ge=1)  # ours: some 200 MB of typical text

    @field_validator("licences")
    @classmethod
    def _normalise_licences(cls, licences: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(normalise_licence(licence) for licence in licences)

    @field_validator("licence_of")
    @classmethod
    def _normalise_licence_of(cls, licence_of: dict[str, str]) -> dict[str, str]:
        return {source: normalise_licence(licence) for source, licence in licence_of.items()}


@dataclass
class _Counts:
    """What went out and what did not."""

    left_out: Counter[str] = field(default_factory=Counter)
    left_out_licences: Counter[str] = field(default_factory=Counter)
    columns: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in ("source", "licence", "task_category", "language")})
    lengths: dict[str, Counter[int]] = field(default_factory=dict)
    pairs: int = 0
    flipped: int = 0

    def add(self, table: pa.Table) -> None:
        """Count exported pairs."""
        self.pairs += table.num_rows
        self.flipped += sum(table["flipped"].to_pylist())
        for name, counts in self.columns.items():
            counts.update(value or UNKNOWN for value in table[name].to_pylist())
        for name in _BESIDE[TOKEN_LENGTHS]:
            self.lengths.setdefault(name, Counter()).update(count_lengths(value for value in table[name].to_pylist() if value is not None))


def check_export(config: ExportConfig) -> None:
    """Check the set, its filters, the licences of its sources, and the sidecars, without reading a pair.

    Raises:
        ConfigError: a filter names a column that the set's table does not have.
    """
    pairs = load_set(config.storage, config.set)
    read_licences(config)
    _leaks(pairs, config)
    for member in pairs.members:
        _beside(member.sidecar.pool, config)
        schema = member.sidecar.read(member.sidecar.pool.shards[0].number).schema if member.sidecar.pool.shards else EXPORT_SCHEMA
        for name in _filters(config):
            if name not in schema.names:
                raise ConfigError(f"{config.set} has no column {name} to filter by; there are {', '.join(schema.names)}")
            if name not in config.where and not pa.types.is_floating(schema.field(name).type):
                raise ConfigError(f"at_least and at_most are for numbers, and {name} of {config.set} is none")


def _filters(config: ExportConfig) -> list[str]:
    return list(dict.fromkeys([*config.where, *config.at_least, *config.at_most]))


def read_licences(config: ExportConfig) -> dict[str, str]:
    """Return the licence of every source that ingest recorded, and of those that the settings name.

    Raises:
        ConfigError: a licence asked for is no source's.
    """
    storage = config.storage
    records = [path for path in storage.list_files("pools", deep=False) if path.startswith("pools/ingest-") and path.endswith(".json")]
    found = {
        name: normalise_licence(str(counts["licence"])) for path in records for name, counts in storage.read_json(path).get("sources", {}).items()
    }
    found |= config.licence_of
    if strangers := sorted(set(config.licences) - set(found.values())):
        raise ConfigError(f"licences: no source has {', '.join(strangers)}; there are {', '.join(sorted(set(found.values()))) or 'none'}")
    return found


def _beside(pool: Pool, config: ExportConfig) -> dict[str, Sidecar]:
    """Return the sidecars that a pool has of those that an export reads.

    Raises:
        ConfigError: there are several of a name, or a pool was not scanned for the personal data that is to stay here.
    """
    found: dict[str, Sidecar] = {}
    for name in _BESIDE:
        there = list_sidecars(pool, name, config.sidecars.get(name))
        if len(there) > 1:
            heads = ", ".join(sidecar.fingerprint[:8] for sidecar in there)
            raise ConfigError(f"pool {pool.name!r} has {len(there)} sidecars {name!r} ({heads}): say sidecars.{name}=HEAD")
        found |= {name: there[0]} if there else {}
    if config.max_pii_score < _HIGHEST_PII and PII not in found:
        raise ConfigError(f"max_pii_score={config.max_pii_score}: pool {pool.name!r} was not scanned for personal data; run jobs/hygiene.py first")
    return found


def _leaks(pairs: PairSet, config: ExportConfig) -> list[list[Sidecar]]:
    """Return the decisions about leaks that the export goes by, by the set's members (errors: `leaks_of_set`)."""
    return leaks_of_set([member.sidecar.pool for member in pairs.members], config.decontamination, pinned_leaks(config.storage))


def run_export(config: ExportConfig, run: Run) -> str:
    """Write the files and the card; return the closing table.

    Raises:
        InputError: no pair may go out.
        RunConflictError: another data set is there.
    """
    pairs, licences = load_set(config.storage, config.set), read_licences(config)
    digest = _digest(config, pairs, licences)
    target = Storage(config.out or config.storage.join(f"exports/{config.set}-{digest[:8]}"))
    if target.exists(RECORD):
        record = target.read_json(RECORD)
        if record["digest"] != digest:
            raise RunConflictError(f"{target.url} holds another export ({record['set']}); give another folder: out=FOLDER")
    else:
        _clear_cut_off(target)
        target.write_json(STARTED, {"digest": digest})
        record = _export(config, pairs, licences, target, digest)
    if target.exists(STARTED):
        target.delete(STARTED)
    run.metrics["export"] = {"folder": target.url, **record}
    return _closing_table(record, target.url)


def _clear_cut_off(target: Storage) -> None:
    """Remove the files of an export that was cut off, its mark last.

    Raises:
        RunConflictError: there are files, and not both the mark of an export and names that exports give.
    """
    there = target.list_files("")
    if there and (STARTED not in there or not all(_OWN_FILES.fullmatch(path) for path in there)):
        raise RunConflictError(f"{target.url} holds other files; give another folder: out=FOLDER")
    for path in sorted(there, key=lambda path: path == STARTED):
        target.delete(path)


def _digest(config: ExportConfig, pairs: PairSet, licences: Mapping[str, str]) -> str:
    settings = config.model_dump(mode="json", include={"licences", "unknown_licences", "max_pii_score", "max_pairs_per_file", "title"})
    settings |= config.model_dump(mode="json", include={"where", "at_least", "at_most"}, exclude_defaults=True)
    settings |= {"scanned_whole": True} if config.max_pii_score < _HIGHEST_PII else {}  # earlier versions let others out
    beside = []
    for member, leaks in zip(pairs.members, _leaks(pairs, config), strict=True):
        named = {name: sidecar.fingerprint for name, sidecar in _beside(member.sidecar.pool, config).items()}
        beside.append(named | ({"leaks": ",".join(sorted(found.fingerprint for found in leaks))} if leaks else {}))
    return content_digest([EXPORT_VERSION, pairs.name, pairs.digest, settings, dict(sorted(licences.items())), beside])


def _export(config: ExportConfig, pairs: PairSet, licences: Mapping[str, str], target: Storage, digest: str) -> dict[str, Any]:
    counts = _Counts()
    waiting: list[pa.Table] = []
    num_files = 0
    for table in _tables(config, pairs, licences, counts):
        waiting.append(table)
        while sum(part.num_rows for part in waiting) >= config.max_pairs_per_file:
            whole = pa.concat_tables(waiting)
            target.write_table(f"data/train-{num_files:05d}.parquet", whole.slice(0, config.max_pairs_per_file))
            waiting, num_files = [whole.slice(config.max_pairs_per_file)], num_files + 1
    rest = pa.concat_tables([EXPORT_SCHEMA.empty_table(), *waiting])
    if rest.num_rows:
        target.write_table(f"data/train-{num_files:05d}.parquet", rest)
        num_files += 1
    if not counts.pairs:
        target.delete(STARTED)
        raise InputError(
            f"no pair of {config.set} may go out: left out {dict(counts.left_out)}, by licence {dict(counts.left_out_licences)}; name licences "
            "(licence_of.SOURCE=LICENCE where you know them), or say unknown_licences=true"
        )
    record = {
        "set": config.set,
        **config.model_dump(mode="json", include={"where", "at_least", "at_most"}, exclude_defaults=True),
        "digest": digest,
        "pairs": counts.pairs,
        "flipped": counts.flipped,
        "files": num_files,
        "sources": _sorted(counts.columns["source"]),
        "licences": _sorted(counts.columns["licence"]),
        "task_categories": _sorted(counts.columns["task_category"]),
        "languages": _sorted(counts.columns["language"]),
        "token_lengths": {name: bars for name, found in counts.lengths.items() if (bars := length_histogram(found))},
        "left_out": _sorted(counts.left_out),
        "left_out_by_licence": _sorted(counts.left_out_licences),
        "simulated_gold": _is_simulated(config.storage),
    }
    target.write_bytes(CARD, dataset_card(CardFacts(config.title or config.set, record)).encode())
    target.write_json(RECORD, record)
    return record


def _sorted(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _is_simulated(storage: Storage) -> bool:
    """Whether any label behind the workspace's curated pairs is of the simulated annotator."""
    return any(bool(storage.read_json(path).get("simulated_gold")) for path in ("rounds/stage1.json", "rounds/stage2.json") if storage.exists(path))


def _tables(config: ExportConfig, pairs: PairSet, licences: Mapping[str, str], counts: _Counts) -> Iterator[pa.Table]:
    """Yield the pairs that may go out, shard by shard; a comparison whose contradicting labels were settled the same way goes out once."""
    settled: set[bytes] = set()
    for member, leaks in zip(pairs.members, _leaks(pairs, config), strict=True):
        beside = _beside(member.sidecar.pool, config)
        leaked = frozenset().union(*map(leaked_pairs, leaks))
        for shard in member.sidecar.pool.shards:
            table = _with_facts(member, shard.number, beside)
            wanted = _wanted(member, shard.number, config, table["pair_id"])
            counts.left_out.update({"filter": wanted.false_count} if wanted.false_count else {})
            rows = table.filter(wanted).to_pylist()
            reasons = [_left_out(row, licences, config, leaked, settled) for row in rows]
            counts.left_out.update(reason for reason in reasons if reason)
            counts.left_out_licences.update(
                licences.get(row["source"], UNKNOWN) for row, reason in zip(rows, reasons, strict=True) if reason == "licence"
            )
            kept = [_row(row, licences) for row, reason in zip(rows, reasons, strict=True) if reason is None]
            exported = pa.Table.from_pylist(kept, schema=EXPORT_SCHEMA)
            counts.add(exported)
            yield exported


def _with_facts(member: Member, number: int, beside: Mapping[str, Sidecar]) -> pa.Table:
    """Return the selected pairs of a shard with all that their sidecars say."""
    table = read_member(member, number, (*SET_COLUMNS, "contradicted"))
    columns: list[tuple[Sidecar, Mapping[str, str]]] = [(sidecar, {name: name for name in _BESIDE[kind]}) for kind, sidecar in beside.items()]
    facts = zip_shard(member.sidecar.pool, number, (), columns)
    rows = pc.index_in(table["pair_id"], value_set=facts["pair_id"].combine_chunks())
    for name in facts.column_names[1:]:
        table = table.append_column(name, facts[name].take(rows))
    return table


def _wanted(member: Member, number: int, config: ExportConfig, pair_ids: pa.ChunkedArray) -> pa.BooleanArray:
    """Return which of these pairs of a shard the filters let through."""
    names = _filters(config)
    wanted = pa.repeat(pa.scalar(True), len(pair_ids))
    if not names:
        return wanted
    table = member.sidecar.read(number, ["pair_id", *names])
    table = table.take(pc.index_in(pair_ids, value_set=table["pair_id"].combine_chunks()))
    for name, values in config.where.items():
        wanted = pc.and_(wanted, pc.is_in(table[name].cast(pa.string()), value_set=pa.array(values, pa.string())))
    for name, bound in config.at_least.items():
        wanted = pc.and_(wanted, pc.fill_null(pc.greater_equal(table[name], bound), False))
    for name, bound in config.at_most.items():
        wanted = pc.and_(wanted, pc.fill_null(pc.less_equal(table[name], bound), False))
    return wanted.combine_chunks()


def _left_out(row: Mapping[str, Any], licences: Mapping[str, str], config: ExportConfig, leaked: Set[str], settled: set[bytes]) -> str | None:
    """Return why a pair stays here, None if it goes out; `settled` has the digests of the contradicted comparisons that went out."""
    licence = licences.get(row["source"], UNKNOWN)
    allowed = config.unknown_licences if licence == UNKNOWN else not config.licences or licence in config.licences
    if not allowed:
        return "licence"
    if row["pair_id"] in leaked:
        return "contaminated"
    if row.get("pii_score") is not None and row["pii_score"] > config.max_pii_score:
        return "personal_data"
    if config.max_pii_score < _HIGHEST_PII and not row["pii_scanned_whole"]:
        return "not_scanned_whole"
    if row["contradicted"]:
        key = hashlib.blake2b(f"{row['comparison_id']} {row['chosen']}".encode(), digest_size=16).digest()
        if key in settled:
            return "settled_twice"
        settled.add(key)
    return None


def _row(row: Mapping[str, Any], licences: Mapping[str, str]) -> dict[str, Any]:
    replies = {name: [{"role": Role.ASSISTANT.value, "content": row[name]}] for name in ("chosen", "rejected")}
    exported = {**{name: row.get(name) for name in EXPORT_SCHEMA.names}, **replies, "licence": licences.get(row["source"], UNKNOWN)}
    if row["flipped"]:  # sidecars speak of the replies as ingested
        exported |= {"chosen_tokens": exported["rejected_tokens"], "rejected_tokens": exported["chosen_tokens"]}
    return exported


def _closing_table(record: Mapping[str, Any], folder: str) -> str:
    rows = [("pairs", str(record["pairs"])), ("  of them flipped", str(record["flipped"])), ("files", str(record["files"]))]
    rows += [(f"licence {name}", str(count)) for name, count in record["licences"].items()]
    rows += [(f"left out: {reason.replace('_', ' ')}", str(count)) for reason, count in record["left_out"].items()]
    rows += [(f"  of licence {name}", str(count)) for name, count in record["left_out_by_licence"].items()]
    lines = [format_table(("export", "count"), rows), f"data set: {folder} (datasets.load_dataset reads the folder)"]
    return "\n".join([*lines, "gold is SIMULATED, and the card says so"] if record["simulated_gold"] else lines)
