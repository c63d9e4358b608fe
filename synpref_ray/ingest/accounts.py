"""What became of every row: per source, records read == kept + rejected by reason + duplicates + contaminated, checked; and the licences.

A record is a pair that a row proposes, or a refused row: a row, where a row is a pair.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from synpref_ray.config import Settings
from synpref_ray.errors import SynprefError
from synpref_ray.ingest.plan import IngestPlan
from synpref_ray.ingest.source import Route, SourceConfig
from synpref_ray.schema import DropReason

UNKNOWN_LICENCE = "unknown"
_NO_LICENCE = frozenset({"", "-", "?", "cc", "n-a", "n.a.", "n/a", "na", "no licence", "no license", "none", "null", "other", "tbd", "unspecified"})
"""Ours: words that publishers put where a licence should stand. `cc` is the hub's tag for a whole family of licences."""


def record_path(fingerprint: str) -> str:
    """Return where a workspace keeps the accounts of the ingest that made pools of this fingerprint."""
    return f"pools/ingest-{fingerprint[:8]}.json"


def normalise_licence(stated: str) -> str:
    """Return a licence as it is compared and recorded: without case and outer space, `unknown` where the words name none."""
    licence = " ".join(stated.split()).casefold()
    return UNKNOWN_LICENCE if licence in _NO_LICENCE else licence


def refresh_accounts(accounts: Mapping[str, Any], sources: Sequence[SourceConfig]) -> dict[str, Any]:
    """Return accounts with the licence and the kind of labels that each source has now: they decide no pair, so that they may be corrected later."""
    stated = {source.name: {"label_kind": source.label_kind.value, "licence": normalise_licence(source.licence)} for source in sources}
    per_source = {name: {**counts, **stated.get(name, {})} for name, counts in accounts["sources"].items()}
    return {**accounts, "sources": per_source, "licences": _licence_table(per_source)}


def recorded_licences(accounts: Mapping[str, Any]) -> dict[str, str]:
    """Return the licence of every source for which the accounts of an ingest know one."""
    stated = {name: normalise_licence(counts.get("licence", "")) for name, counts in accounts["sources"].items()}
    return {name: licence for name, licence in stated.items() if licence != UNKNOWN_LICENCE}


class StagedFile(Settings):
    """What reading one file gave: its source (by number), rows, records, staged pairs, and rejects by reason."""

    source: int
    file: str
    rows: int
    records: int
    pieces: tuple[tuple[int, ...], ...]
    """Staged pairs of each chunk, by piece (see `ingest/partition.py`)."""
    rejected: dict[str, int]
    matches: dict[str, dict[str, int]] = Field(default={})
    """By benchmark, the pairs that match it, by kind; equal pairs count each."""
    candidates_beyond_max: int = 0
    """Overlaps of 5 to 12 words that were not reported, since their pairs had more of them than may be."""


def account(sources: Sequence[SourceConfig], staged: Sequence[StagedFile], plan: IngestPlan, pools: Mapping[Route, int]) -> dict[str, Any]:
    """Count what became of everything that was read.

    Args:
        staged: all files.
        plan: says what became of the staged pairs.
        pools: the pools that were made, and how many pairs each holds.

    Raises:
        SynprefError: counts do not add up, for a source or in all: a fault of ours.
    """
    per_source = {
        source.name: _account_source(
            source, [entry for entry in staged if entry.source == number], plan.kept.get(source.name, 0), plan.duplicates.get(source.name, 0)
        )
        for number, source in enumerate(sources)
    }
    rejected: Counter[str] = Counter()
    for counts in per_source.values():
        rejected.update(counts["rejected"])
        rejected.update({DropReason.CONTAMINATED.value: counts["contaminated"], DropReason.DUPLICATE.value: counts["duplicates"]})
    pooled = {route.value: count for route, count in pools.items()}
    records = sum(entry.records for entry in staged)
    if records != sum(pooled.values()) + rejected.total():
        raise SynprefError(f"ingest lost rows: {records} records, {sum(pooled.values())} in pools, {rejected.total()} rejected; please report this")
    summary = {
        "rows_read": sum(entry.rows for entry in staged),
        "records": records,
        "pools": pooled,
        "rejected": {reason: count for reason, count in sorted(rejected.items()) if count or reason == DropReason.DUPLICATE},
        "contradicted": {route.value: plan.contradicted[route] for route in pools},
        "sources": per_source,
        "licences": _licence_table(per_source),
    }
    matches = _sum_matches(staged)
    return {**summary, "benchmarks": matches, "candidates_beyond_max": sum(entry.candidates_beyond_max for entry in staged)} if matches else summary


def _account_source(source: SourceConfig, staged: Sequence[StagedFile], kept: int, duplicates: int) -> dict[str, Any]:
    rejected: Counter[str] = Counter()
    for entry in staged:
        rejected.update(entry.rejected)
    contaminated = rejected.pop(DropReason.CONTAMINATED.value, 0)
    records = sum(entry.records for entry in staged)
    if records != kept + rejected.total() + duplicates + contaminated:
        raise SynprefError(
            f"ingest lost rows of source {source.name!r}: {records} records, {kept} kept, {rejected.total()} rejected, {duplicates} duplicates, "
            f"{contaminated} contaminated; please report this"
        )
    counts: dict[str, Any] = {
        "rows": sum(entry.rows for entry in staged),
        "records": records,
        "kept": kept,
        "rejected": dict(sorted(rejected.items())),
        "duplicates": duplicates,
        "contaminated": contaminated,
        "route": source.route.value,
        "label_kind": source.label_kind.value,
        "licence": normalise_licence(source.licence),
    }
    published = {"catalogue": source.catalogue, "hub": source.hub.dataset, "revision": source.hub.revision}
    return {**counts, **{name: value for name, value in published.items() if value}}


def _licence_table(per_source: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the pairs kept and the sources, by licence."""
    table: dict[str, dict[str, Any]] = {}
    for name, counts in per_source.items():
        entry = table.setdefault(counts["licence"], {"pairs": 0, "sources": []})
        entry["pairs"] += counts["kept"]
        entry["sources"].append(name)
    return dict(sorted(table.items()))


def _sum_matches(staged: Sequence[StagedFile]) -> dict[str, dict[str, int]]:
    """Return by benchmark how many staged pairs match it, by kind."""
    totals: dict[str, Counter[str]] = {}
    for entry in staged:
        for benchmark, counts in entry.matches.items():
            totals.setdefault(benchmark, Counter()).update(counts)
    return {benchmark: dict(sorted(counts.items())) for benchmark, counts in sorted(totals.items())}
