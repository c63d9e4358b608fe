"""A look at what an ingest would read: `--dry-run` opens a file of each source and says what its first rows give."""

from collections import Counter
from collections.abc import Sequence

from synpref_ray.errors import InputError
from synpref_ray.ingest.chunk import count_reasons
from synpref_ray.ingest.readers import read_first_rows
from synpref_ray.ingest.source import SourceConfig, find_source_files
from synpref_ray.pipeline.ingest import EXPECTED_REASONS
from synpref_ray.pipeline.ingest_sources import IngestConfig, passed_over_hint, resolve_sources
from synpref_ray.reporting.table import format_table

MAX_LOOKED_AT = 200  # ours: files; on object storage a look takes a few requests


def preview_ingest(config: IngestConfig) -> str:
    """Read the first rows of the first file of each source, and return a table of what they give.

    Raises:
        InputError, SchemaError: a file cannot be read, lacks a column, or has only rows that cannot be pairs.
    """
    sources = resolve_sources(config)
    lines = [_look(source) if number < MAX_LOOKED_AT else _unseen(source) for number, source in enumerate(sources)]
    table = format_table(("source", "pool", "files", "rows looked at", "pairs", "refused"), lines)
    unseen = [f"only the first {MAX_LOOKED_AT} of {len(sources)} sources were opened"] if len(sources) > MAX_LOOKED_AT else []
    return "\n".join([table, *unseen, *passed_over_hint(config)])


def _look(source: SourceConfig) -> Sequence[str]:
    if not source.path:
        return (source.name, source.route.value, "hub", "0", "", "not opened: streamed from the hub")
    files = find_source_files(source).files
    chunks = read_first_rows(files[0], source)
    refused: Counter[str] = Counter()
    for chunk in chunks:
        refused.update(count_reasons(chunk.rejects))
    rows, pairs = (sum(counts) for counts in ([chunk.num_rows_read for chunk in chunks], [chunk.pairs.num_rows for chunk in chunks]))
    if refused and not pairs and not refused.keys() & {reason.value for reason in EXPECTED_REASONS}:
        raise InputError(
            f"source {source.name!r}: the first {rows} rows of {files[0]} give not one pair ({_told(refused)}); see the formats in the README and "
            "docs/sources.md"
        )
    return (source.name, source.route.value, str(len(files)), str(rows), str(pairs), _told(refused))


def _unseen(source: SourceConfig) -> Sequence[str]:
    return (source.name, source.route.value, "", "0", "", "not opened")


def _told(refused: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(refused.items()))
