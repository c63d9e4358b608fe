"""Ingest on Ray: pair files become staged chunks, tasks compare their ids in parts, pool shards are written; every row read is in a pool or a reject.

Paper: Sec. 3.1 and App. C (structural filter, global exact dedup on conversation and both replies, decontamination, pools by source). Our choice:
four passes of tasks that hold some chunks or some 300,000 ids each (docs/ingest.md); the driver holds counts, one piece's sizes and the list of
shards. Pairs that hold a benchmark's prompt are taken out in the first pass, before duplicates, so that each pair is counted once.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import pyarrow as pa

from synpref_ray.errors import InputError, RunConflictError
from synpref_ray.ingest.accounts import StagedFile, account, record_path, refresh_accounts
from synpref_ray.ingest.benchmark_prompts import (
    MATCHER_VERSION,
    Action,
    DecontaminateConfig,
    candidate_settings,
    comparison_facts,
    count_benchmark_items,
    read_benchmarks,
)
from synpref_ray.ingest.chunk import Chunk, count_reasons, write_staged
from synpref_ray.ingest.decontamination import (
    BenchmarkIndex,
    MatchKind,
    count_matches,
    drop_contaminated,
    find_matches,
    limit_candidates,
    matches_table,
)
from synpref_ray.ingest.hub import hub_address, pin_revision, read_hub_chunks
from synpref_ray.ingest.partition import Comparison, IdWriter, Layout, PairFile
from synpref_ray.ingest.plan import pairs_path
from synpref_ray.ingest.readers import MAX_CHUNK_BYTES, MAX_CHUNK_ROWS, digest_file, read_pair_file
from synpref_ray.ingest.source import Route, SourceConfig, list_source_files
from synpref_ray.pipeline.ingest_growth import Base, check_addition, find_base, pin_base, stage_held
from synpref_ray.pipeline.ingest_sources import IngestConfig, passed_over_hint, resolve_sources
from synpref_ray.pipeline.pools import make_pools, timed
from synpref_ray.pipeline.tasks import run_tasks
from synpref_ray.reporting.run import Run
from synpref_ray.reporting.table import format_table
from synpref_ray.schema import DropReason
from synpref_ray.tables.files import file_size
from synpref_ray.tables.leases import Hold, Lease
from synpref_ray.tables.pools import content_digest, open_pool, pool_exists
from synpref_ray.tables.sidecars import fingerprint
from synpref_ray.tables.storage import Storage

INGEST_VERSION = 1
_MAX_NAMED_COLUMNS = 20  # ours: enough to see which column is meant
INLINE_FILES = 4  # ours: so few files,
INLINE_BYTES = 32 * 2**20  # ours: and so small, are done before Ray has started its workers
EXPECTED_REASONS = (
    DropReason.TIED,
    DropReason.NO_COMPARISON,
    DropReason.CONTAMINATED,
    DropReason.NOT_IN_SPLIT,
    DropReason.BEYOND_MAX_PAIRS,
)
"""Reasons that say nothing about a wrong format, however many rows have them."""


def check_ingest(config: IngestConfig) -> None:
    """Check that every source has files and every benchmark prompts, without reading the sources."""
    for source in resolve_sources(config):
        if source.path:
            list_source_files(source)
    read_benchmarks(config.decontaminate)
    if config.add and not any(pool_exists(config.storage, route.value) for route in Route):
        raise InputError(f"{config.storage.url} has no pool to add to; the first ingest into a workspace runs without add=true")


def run_ingest(config: IngestConfig, run: Run) -> str:
    """Read all sources into the pools seed, unverified and wild; return the closing table."""
    storage = config.storage
    sources = tuple(source if source.path else source.model_copy(update={"hub": pin_revision(source.hub)}) for source in resolve_sources(config))
    files = [(number, file) for number, source in enumerate(sources) for file in _files_of(source)]
    started = time.monotonic()
    inline = _are_small([file if sources[number].path else "" for number, file in files])
    digests = run_tasks(_digest, None, [(sources[number], file) for number, file in files], inline=inline, title="digests")
    phases = {"digest": time.monotonic() - started}
    settings = config.model_dump(mode="json", include={"max_pairs_per_shard", "max_bytes_per_shard"})
    for_llms = any(source.route is not Route.WILD for source in sources)
    if for_llms and config.max_pairs_per_llm_shard < config.max_pairs_per_shard:  # else shards, and so names, are those of earlier versions
        settings["max_pairs_per_llm_shard"] = config.max_pairs_per_llm_shard
    settings["sources"] = [_result_settings(source) for source in sources]
    if config.add:
        settings["add"] = True
    if config.decontaminate.benchmarks:
        settings["decontaminate"] = _decontamination_settings(config.decontaminate)
    name = fingerprint(
        "ingest", INGEST_VERSION, settings, {f"{number}:{i}": d for i, ((number, _), d) in enumerate(zip(files, digests, strict=True))}
    )
    record = record_path(name)
    if not storage.exists(record):
        with Lease(storage, "pools/ingest.lease.json") as lease:
            if not storage.exists(record):  # or another driver made the pools before the lease was ours
                if not config.add:
                    _refuse_other_pools(storage, name)
                base = find_base(storage, name) if config.add else {}
                check_addition(base, config.decontaminate, sources)
                pin_base(storage, name, base)
                summary = _ingest(storage, name, lease.hold, base, sources, files, config, run, phases, inline=inline)
                lease.check()
                storage.write_json(record, summary)
                run.metrics["phase_seconds"] = {phase: round(seconds, 3) for phase, seconds in phases.items()}
    corrected = _correct_record(storage, record, sources, config.decontaminate)
    summary = storage.read_json(record)
    run.metrics.update(summary)
    return "\n".join([_closing_table(summary), *corrected, *passed_over_hint(config)])


def _correct_record(storage: Storage, path: str, sources: Sequence[SourceConfig], benchmarks: DecontaminateConfig) -> list[str]:
    """Bring what decides no pair (licences, kinds of labels, names of benchmarks) up to date in a record; return lines that say what changed."""

    def corrected(old: dict[str, Any]) -> dict[str, Any]:
        new = refresh_accounts(old, sources)
        if benchmarks.benchmarks and "compared" not in old:  # as earlier versions wrote it
            new["compared"] = comparison_facts(benchmarks)
        return new

    if corrected(storage.read_json(path)) == storage.read_json(path):
        return []
    with Lease(storage, "pools/ingest.lease.json"):
        old = storage.read_json(path)  # again: another driver may have corrected it meanwhile
        new = corrected(old)
        storage.write_json(path, new)
    return [
        f"record corrected, {name}: {field} {counts.get(field)} is now {new['sources'][name][field]}"
        for name, counts in old["sources"].items()
        for field in ("licence", "label_kind")
        if counts.get(field) != new["sources"][name].get(field)
    ]


def _files_of(source: SourceConfig) -> tuple[str, ...]:
    return list_source_files(source) if source.path else (hub_address(source.hub),)


def _are_small(files: Sequence[str]) -> bool:
    """Whether files are so few and small that the driver reads them itself; an empty name stands for a data set of the hub."""
    if len(files) > INLINE_FILES or not all(files):
        return False
    return sum(file_size(file) for file in files) <= INLINE_BYTES


def _digest(_: None, source: SourceConfig, file: str) -> str:
    return digest_file(file) if source.path else file  # a data set of the hub is named by its commit


def _result_settings(source: SourceConfig) -> dict[str, Any]:
    """Return what of a source decides its pairs; settings of later versions only where they are used, so that older pools stay valid."""
    settings = source.model_dump(mode="json", include={"name", "format", "columns", "route"})
    if source.where:
        settings["where"] = source.where
    if source.adapter is not None:
        settings["adapter"] = source.adapter.model_dump(mode="json")
    return settings


def _decontamination_settings(config: DecontaminateConfig) -> dict[str, Any]:
    """Return what of a decontamination decides its result: the prompts themselves, wherever their files lie."""
    items = [[item.benchmark, item.item, list(item.words)] for item in read_benchmarks(config)]
    return {"matcher": MATCHER_VERSION, "prompts": content_digest(items), "action": config.action.value, **candidate_settings(config)}


def _refuse_other_pools(storage: Storage, name: str) -> None:
    for route in Route:
        if pool_exists(storage, route.value) and open_pool(storage, route.value).fingerprint != name:
            raise RunConflictError(
                f"{storage.url} holds a pool {route.value!r} made from other files or settings; pools are never overwritten: "
                "add=true adds to them, another workspace begins anew, and the config that made them has nothing to do"
            )


def _ingest(
    storage: Storage,
    name: str,
    hold: Hold,
    base: Base,
    sources: Sequence[SourceConfig],
    files: Sequence[tuple[int, str]],
    config: IngestConfig,
    run: Run,
    phases: dict[str, float],
    *,
    inline: bool,
) -> dict[str, Any]:
    started = time.monotonic()
    staging = f"staging/{name[:8]}"
    stager = _Stager(storage, config.decontaminate, _benchmarks_digest(config.decontaminate), config.max_rejected_fraction)
    arguments = [(f"{staging}/file-{i:05d}", sources[n], n, file) for i, (n, file) in enumerate(files)]
    with timed(phases, "read"):
        staged = [StagedFile.model_validate(entry) for entry in run_tasks(_stage_file, stager, arguments, inline=inline, title="read files")]
    _refuse_pairless_sources(storage, name, sources, staged)
    with timed(phases, "read pools"):
        held = stage_held(storage, staging, base, inline=inline)
    found = [
        PairFile(sources[entry.source].route, sources[entry.source].name, entry.file, folder, entry.pieces)
        for (folder, *_), entry in zip(arguments, staged, strict=True)
    ]
    layout = Layout.of([*held, *found])
    comparison = Comparison.of(storage, f"{staging}/compared-{layout.digest[:8]}", layout)
    plan, pools = make_pools(
        comparison,
        name,
        hold,
        phases,
        grown=base,
        max_pairs_per_shard=config.pairs_per_shard,
        max_bytes_per_shard=config.max_bytes_per_shard,
    )
    summary = account(sources, staged, plan, {route: made.num_written for route, made in pools.items()})
    if base:
        summary["added_to"] = {route.value: pool.version for route, pool in base.items()}
        summary["pools_in_all"] = {route.value: made.pool.num_rows for route, made in pools.items()}
    if config.decontaminate.benchmarks:
        summary["benchmark_items"] = count_benchmark_items(config.decontaminate)
        summary["compared"] = comparison_facts(config.decontaminate)
    with timed(phases, "clean up"):
        hold.check()  # the successor of a driver that was taken for dead works on the same staged files
        _clear(storage, staging)
    rejected = {reason: count for reason, count in summary["rejected"].items() if count}
    run.step("ingest", rows=summary["rows_read"], computed=summary["rows_read"], rejected=rejected, seconds=time.monotonic() - started)
    return summary


def _clear(storage: Storage, staging: str) -> None:
    """Remove what was staged, the records of what is done first: a kill in between leaves no record without its files."""
    for path in storage.list_files(staging):
        if path.endswith(".json"):
            storage.delete(path)
    storage.delete_folder(staging)


def _refuse_pairless_sources(storage: Storage, name: str, sources: Sequence[SourceConfig], staged: Sequence[StagedFile]) -> None:
    """Raise InputError for a source with an adapter that gives records but not one pair: its columns are others than the adapter names."""
    for number, source in enumerate(sources):
        mine = [(i, entry) for i, entry in enumerate(staged) if entry.source == number]
        rejected: Counter[str] = Counter()
        for _, entry in mine:
            rejected.update(entry.rejected)
        records = sum(entry.records for _, entry in mine)
        pairs = records - rejected.total() + rejected[DropReason.CONTAMINATED.value]
        if pairs or not records or (source.adapter is None and not source.where):
            continue
        first = next(i for i, entry in mine if entry.records)
        texts = storage.read_table(f"rejects/ingest/{name[:8]}/file-{first:05d}-00000.parquet", ["row_json", "reason"]).to_pylist()
        unread = (DropReason.INVALID_JSON, DropReason.INVALID_UTF8, DropReason.WRONG_TYPE)
        row = next((json.loads(text["row_json"]) for text in texts if text["reason"] not in unread), None)
        found = ", ".join(sorted(row)[:_MAX_NAMED_COLUMNS]) if isinstance(row, dict) else ""
        raise InputError(
            f"source {source.name!r}: {records} rows and not one pair ({dict(rejected)}); the columns of a row: {found or 'none can be read'}; "
            f"see what its adapter names, and the rows under {storage.join('rejects/ingest')}"
        )


@dataclass(frozen=True)
class _Stager:
    """What every task of the first pass needs to know."""

    storage: Storage
    decontaminate: DecontaminateConfig
    benchmarks: str
    """A digest of the benchmark files' bytes."""
    max_rejected_fraction: float


def _stage_file(stager: _Stager, folder: str, source: SourceConfig, number: int, file: str) -> dict[str, Any]:
    """Pass 1: one file's rows as staged chunks, ids and rejects; done when its `done.json` is there."""
    storage = stager.storage
    if storage.exists(f"{folder}/done.json"):
        done: dict[str, Any] = storage.read_json(f"{folder}/done.json")
        if "pieces" in done:  # else an earlier version staged it, without ids
            return done
    rejected: Counter[str] = Counter()
    matches: dict[str, Counter[str]] = {}
    rows = records = beyond = 0
    name = folder.replace("staging/", "")
    ids = IdWriter(storage, folder)
    for number_of_chunk, (chunk, found, report) in enumerate(_cleaned(_read_chunks(source, file), stager.decontaminate, stager.benchmarks)):
        write_staged(storage, pairs_path(folder, number_of_chunk), chunk.pairs)
        ids.add(chunk.pairs)
        if chunk.rejects.num_rows:
            storage.write_table(f"rejects/ingest/{name}-{number_of_chunk:05d}.parquet", chunk.rejects)
        if report.num_rows:
            storage.write_table(f"decontamination/{name}-{number_of_chunk:05d}.parquet", report)
        rejected.update(count_reasons(chunk.rejects))
        rows += chunk.num_rows_read
        records += chunk.num_records
        beyond += found.beyond
        for (benchmark, kind), count in found.pairs.items():
            matches.setdefault(benchmark, Counter())[kind] += count
    ids.flush()
    unexpected = rejected.total() - sum(rejected[reason.value] for reason in EXPECTED_REASONS)
    if records and unexpected > stager.max_rejected_fraction * records:
        raise InputError(
            f"{file}: {unexpected} of {records} rows refused ({dict(rejected)}), more than {stager.max_rejected_fraction:.0%}; "
            f"the rows are under {storage.join('rejects/ingest')}; see the formats in the README, or raise max_rejected_fraction"
        )
    done = {"source": number, "file": file, "rows": rows, "records": records, "pieces": ids.pieces, "rejected": dict(rejected)}
    done["matches"] = {benchmark: dict(sorted(counts.items())) for benchmark, counts in sorted(matches.items())}
    done["candidates_beyond_max"] = beyond
    storage.write_json(f"{folder}/done.json", done)
    return done


def _read_chunks(source: SourceConfig, file: str) -> Iterator[Chunk]:
    if source.path:
        return read_pair_file(file, source)
    return read_hub_chunks(source, max_rows=MAX_CHUNK_ROWS, max_bytes=MAX_CHUNK_BYTES)


class _Found(NamedTuple):
    """Meetings with benchmarks in a chunk: pairs by (benchmark, kind), and candidates beyond the limit."""

    pairs: dict[tuple[str, str], int]
    beyond: int


def _cleaned(chunks: Iterator[Chunk], config: DecontaminateConfig, benchmarks: str) -> Iterator[tuple[Chunk, _Found, pa.Table]]:
    """Yield chunks without contaminated pairs (where they are to be dropped), what was found in each, and the report on it."""
    index = _benchmark_index(config, benchmarks)
    for chunk in chunks:
        every = find_matches(chunk.pairs, index) if config.benchmarks else [[] for _ in range(chunk.pairs.num_rows)]
        found, beyond = limit_candidates(every, config.max_candidates)
        clean = drop_contaminated(chunk, found) if config.action is Action.DROP else chunk
        yield clean, _Found(count_matches(found), beyond), matches_table(chunk.pairs, found)


def _benchmarks_digest(config: DecontaminateConfig) -> str:
    """Return a digest of the benchmark files' bytes, empty where there are none."""
    sources = [SourceConfig(name=benchmark.name or benchmark.path, path=benchmark.path, format=benchmark.format) for benchmark in config.benchmarks]
    return content_digest([digest_file(file) for source in sources for file in list_source_files(source)]) if sources else ""


@lru_cache(maxsize=1)
def _benchmark_index(config: DecontaminateConfig, digest: str) -> BenchmarkIndex:
    """Return the index of a worker; every process that stages files builds it once, and anew when a benchmark's file has other bytes."""
    return BenchmarkIndex(read_benchmarks(config), candidates=config.candidates)


def _closing_table(summary: dict[str, Any]) -> str:
    rows = [("read", str(summary["rows_read"]))]
    if summary.get("records", summary["rows_read"]) != summary["rows_read"]:
        rows.append(("  pairs and rejects that these rows make", str(summary["records"])))
    in_all = summary.get("pools_in_all", {})
    rows += [(f"added to pool {name}" if in_all else f"pool {name}", str(count)) for name, count in summary["pools"].items()]
    rows += [(f"  pairs of {name} in all", str(count)) for name, count in in_all.items()]
    rows += [(f"  of them contradicted, {name}", str(count)) for name, count in summary["contradicted"].items() if count]
    rows += [(f"rejected: {reason}", str(count)) for reason, count in summary["rejected"].items() if count]
    for benchmark, counts in summary.get("benchmark_items", {}).items():
        rows.append((f"{benchmark}: items read", str(counts["read"])))
        rows += [(f"{benchmark}: items without a prompt", str(counts["skipped"]))] if counts["skipped"] else []
    for benchmark, counts in summary.get("benchmarks", {}).items():
        rows += [(f"{benchmark}: {_MATCH_WORDS[MatchKind(kind)]}", str(count)) for kind, count in counts.items()]
    if beyond := summary.get("candidates_beyond_max"):
        rows.append(("overlaps of 5 to 12 words beyond max_candidates", str(beyond)))
    absent = [route.value for route in (Route.SEED, Route.UNVERIFIED) if not in_all and not summary["pools"].get(route.value)]
    hints = [f"no file fed the pool {name}, which Stage 1 needs: give it files whose names begin with {name}, in a new workspace" for name in absent]
    return "\n".join([format_table(("pairs", "count"), rows), *hints])


_MATCH_WORDS = {
    MatchKind.OVERLAP: "share 13 words",
    MatchKind.EXACT: "equal a short prompt",
    MatchKind.CANDIDATE: "share 5 to 12 words (for a judge)",
}
