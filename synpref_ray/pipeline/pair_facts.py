"""Facts about single pairs beside pools, with their counts: personal data (`pii`) and lengths in tokens (`token_lengths`).

Paper: the scan for personal data (data statement). Both are columns and nothing is dropped; exports may filter by them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from pydantic import Field, field_validator

from synpref_ray.config import Settings
from synpref_ray.ingest.pii import PHONE_REGIONS, PII_SCHEMA, PII_VERSION, scan_pairs
from synpref_ray.ingest.token_lengths import FIELDS, TOKEN_LENGTHS_SCHEMA, load_tokenizer, token_lengths, tokenizer_file
from synpref_ray.pipeline.steps import Output, ShardKey, Step, StepInput, run_step
from synpref_ray.reporting.histograms import count_lengths, length_histogram
from synpref_ray.reporting.run import Run
from synpref_ray.tables.pools import Pool, content_digest
from synpref_ray.tables.sidecars import Sidecar, zip_shard
from synpref_ray.versions import versions_of

TOKEN_LENGTHS_VERSION = 1
PII = "pii"
TOKEN_LENGTHS = "token_lengths"
_TEXTS = ("prompt", "chosen", "rejected")


class PiiConfig(Settings):
    """How personal data is looked for."""

    scan: bool = True
    """Whether pairs are scanned for personal data."""
    phone_regions: tuple[str, ...] = Field(default=PHONE_REGIONS)  # ours: where a number without a country code may be from

    @field_validator("phone_regions")
    @classmethod
    def _are_regions(cls, regions: tuple[str, ...]) -> tuple[str, ...]:
        from phonenumbers import SUPPORTED_REGIONS

        if unknown := sorted(set(regions) - set(SUPPORTED_REGIONS)):
            raise ValueError(f"no region {', '.join(unknown)}: give two capital letters each, as in US or IN")
        return regions


class PiiWorker:
    """Looks for personal data."""

    def __init__(self, regions: tuple[str, ...]):
        self._regions = regions

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        return scan_pairs(shard, self._regions), {}


def scan_pools(pools: Sequence[Pool], config: PiiConfig, run: Run) -> list[Sidecar]:
    """Make the sidecar `pii` of every pool, and count by source in the metrics."""
    step = Step(
        name="scan for personal data",
        version=PII_VERSION,
        worker=PiiWorker,
        outputs=(Output(PII, PII_SCHEMA),),
        settings={"regions": list(config.phone_regions), "versions": versions_of("phonenumbers", "python-stdnum", "email-validator")},
        worker_arguments=lambda _: {"regions": config.phone_regions},
    )
    tables = _run(step, pools, run)
    run.metrics["pii"] = count_pii(tables)
    return tables


def count_pii(tables: Sequence[Sidecar]) -> dict[str, dict[str, Any]]:
    """Return by source: pairs, pairs by highest score (`score_0` … `score_3`), pairs that hold each kind, pairs that were not scanned whole."""
    counts: dict[str, Counter[str]] = {}
    for table in tables:
        for shard in table.pool.shards:
            names = {"pii_score": "score", "pii": "pii", "pii_scanned_whole": "is_whole"}
            for row in zip_shard(table.pool, shard.number, ["source"], [(table, names)]).to_pylist():
                mine = counts.setdefault(row["source"], Counter())
                mine["pairs"] += 1
                mine["not_scanned_whole"] += not row["is_whole"]
                if row["score"] is not None:
                    mine[f"score_{row['score']}"] += 1
                mine.update({finding["kind"] for finding in row["pii"]})
    return {source: {name: count for name, count in sorted(found.items()) if count} for source, found in sorted(counts.items())}


class TokenLengthsWorker:
    """Holds a tokenizer."""

    def __init__(self, name: str):
        self._tokenizer = load_tokenizer(tokenizer_file(name))

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        return token_lengths(shard, self._tokenizer), {}


def measure_pools(pools: Sequence[Pool], tokenizer: str, run: Run) -> list[Sidecar]:
    """Make the sidecar `token_lengths` of every pool, with histograms in the metrics."""
    digest = content_digest(tokenizer_file(tokenizer).read_text(encoding="utf-8"))
    step = Step(
        name="token lengths",
        version=TOKEN_LENGTHS_VERSION,
        worker=TokenLengthsWorker,
        outputs=(Output(TOKEN_LENGTHS, TOKEN_LENGTHS_SCHEMA),),
        settings={"versions": versions_of("tokenizers")},
        digests={"tokenizer": digest},
        worker_arguments=lambda _: {"name": tokenizer},
    )
    tables = _run(step, pools, run)
    run.metrics["token_lengths"] = {"tokenizer": tokenizer, **{table.pool.name: token_histograms(table) for table in tables}}
    return tables


def token_histograms(table: Sidecar) -> dict[str, list[dict[str, int]]]:
    """Return the histograms of a pool's prompts, chosen and rejected replies."""
    counts: dict[str, Counter[int]] = {name: Counter() for name in FIELDS}
    for shard in table.pool.shards:
        columns = table.read(shard.number, list(FIELDS))
        for name in FIELDS:
            counts[name].update(count_lengths(columns[name].to_pylist()))
    return {name: length_histogram(counts[name]) for name in FIELDS}


def _run(step: Step, pools: Sequence[Pool], run: Run) -> list[Sidecar]:
    result = run_step(step, [StepInput(pool, _TEXTS) for pool in pools])
    run.step(step.name, rows=result.rows, computed=result.rows_computed, rejected={}, seconds=result.seconds)
    return [outputs[0] for outputs in result.sidecars]
