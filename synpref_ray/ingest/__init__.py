"""Preference pairs from files into pools: declared sources, the structural filter, ids, exact duplicates and contradictions. Knows no Ray.

Use, in order: `list_source_files`, `read_pair_file` (one call per file; chunks are staged), `index_chunk` and `ingest_plan` over all
chunks, `build_shard` and `duplicate_rejects` per shard and chunk.
"""

from synpref_ray.ingest.chunk import REJECTS_SCHEMA, STAGED_SCHEMA, Chunk, count_reasons, normalise_rows
from synpref_ray.ingest.plan import INDEX_COLUMNS, IngestPlan, build_shard, duplicate_rejects, index_chunk, ingest_plan
from synpref_ray.ingest.readers import read_pair_file, read_source
from synpref_ray.ingest.source import LabelKind, PairColumns, Route, SourceConfig, check_source_names, list_source_files

__all__ = [
    "INDEX_COLUMNS",
    "REJECTS_SCHEMA",
    "STAGED_SCHEMA",
    "Chunk",
    "IngestPlan",
    "LabelKind",
    "PairColumns",
    "Route",
    "SourceConfig",
    "build_shard",
    "check_source_names",
    "count_reasons",
    "duplicate_rejects",
    "index_chunk",
    "ingest_plan",
    "list_source_files",
    "normalise_rows",
    "read_pair_file",
    "read_source",
]
