"""What a round of Stage 1 selected, kept so that a restart finds it: the record with what determined it, and the gathered pool of the pairs.

Paper: Sec. 3.2, Step 2. Our choice: `rounds/NN/selected.parquet` names in its metadata the digest of all that the selection was made from and the
pool that was gathered. While these are the same, a run that begins again reads this one file; it searches nothing, and reads neither pair_ids nor
vectors of the unverified pool.
"""

import json
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from synpref_ray.pipeline.gathering import GATHER_POOL_VERSION, gather_pool
from synpref_ray.pipeline.gold_tables import GoldTables
from synpref_ray.pipeline.leak_marks import leaked_pairs
from synpref_ray.pipeline.query_selection import Candidates, select_pairs
from synpref_ray.reporting.pair_story import SELECTED_FILE
from synpref_ray.reporting.run import Run
from synpref_ray.retrieval.index import INDEX_RESOURCES, IndexConfig
from synpref_ray.retrieval.select import RetrievalConfig
from synpref_ray.rules.query_selection import SelectionConfig
from synpref_ray.tables.parts import join_parts
from synpref_ray.tables.pools import Pool, content_digest, open_pool, pool_exists
from synpref_ray.tables.sidecars import Sidecar, fingerprint
from synpref_ray.tables.storage import Storage
from synpref_ray.versions import faiss_version

SELECT_VERSION = 1
INPUTS_KEY, COUNTS_KEY, POOL_KEY = b"synpref_ray.inputs", b"synpref_ray.counts", b"synpref_ray.pool"
"""Metadata of the record: a digest of what was selected from and how, the counts (JSON) and the gathered pool's name."""


@dataclass(frozen=True)
class SelectionSettings:
    """How rounds select, and how large the files of the gathered pool are."""

    selection: SelectionConfig
    retrieval: RetrievalConfig
    index: IndexConfig
    max_pairs: int
    gathered_shard_pairs: int


@dataclass(frozen=True)
class RoundSource:
    """What a round selects from: working gold with its rewards, the unverified pool, and the pairs that may not be selected (again)."""

    gold: GoldTables
    rewards: Sidecar
    candidates: Candidates
    already: Set[str]
    leaks: Sequence[Sidecar]


@dataclass(frozen=True)
class RoundSelection:
    """What a round selected: the record (SELECTION_SCHEMA), counts, the gathered pool, and the rewards of unverified pairs that the rule read."""

    record: pa.Table
    counts: Mapping[str, Any]
    pool: Pool
    tables: tuple[Sidecar, ...]

    @property
    def pair_ids(self) -> set[str]:
        """The selected pairs."""
        return set(self.record["pair_id"].to_pylist())


def selected_path(number: int) -> str:
    """Return where round `number` keeps what it selected and why (SELECTION_SCHEMA)."""
    return f"rounds/{number:02d}/{SELECTED_FILE}"


def select_round(storage: Storage, run: Run, number: int, source: RoundSource, settings: SelectionSettings) -> RoundSelection:
    """Select the round's pairs and gather them, or return what is stored of the same selection."""
    started = time.monotonic()
    inputs = _inputs_digest(source, settings)
    tables = tuple(sidecar for of_part in source.candidates.rewards for sidecar in of_part)
    stored = _read_stored(storage, number, inputs)
    if stored is None:
        chosen = select_pairs(
            source.gold,
            source.rewards,
            source.candidates,
            source.already | frozenset().union(*(leaked_pairs(table) for table in source.leaks)),
            config=settings.selection,
            retrieval=settings.retrieval,
            index=settings.index,
            max_pairs=settings.max_pairs,
        )
        names = _names_of_pool(source, settings)
        pool = gather_pool(storage, f"round-{number:02d}-selected", chosen.pieces, inputs=names, max_pairs=settings.gathered_shard_pairs)
        notes = {INPUTS_KEY: inputs, COUNTS_KEY: json.dumps(dict(chosen.counts)), POOL_KEY: pool.name}
        storage.write_table(selected_path(number), chosen.record.replace_schema_metadata(notes))
        found = RoundSelection(chosen.record, chosen.counts, pool, tables)
    else:
        record, counts, pool = stored
        found = RoundSelection(record, counts, pool, tables)
    rows = sum(part.num_rows for part in source.candidates.parts)
    told = {name: found.counts[name] for name in ("selected", "called_for", "gold_errors")}
    run.step(f"retrieve, round {number}", rows=rows, computed=0, rejected={}, seconds=time.monotonic() - started, **told)
    return found


def _names_of_pool(source: RoundSource, settings: SelectionSettings) -> dict[str, str]:
    """Return what names the gathered pool beside its rows."""
    embeddings = join_parts(source.candidates.embeddings).fingerprint
    inputs = {"gold": source.gold.digest, "rewards": source.rewards.fingerprint, "embeddings": embeddings}
    if settings.selection != SelectionConfig():
        inputs["selection"] = content_digest(settings.selection.model_dump(mode="json"))
    return inputs


def _inputs_digest(source: RoundSource, settings: SelectionSettings) -> str:
    """Name all that determines the selection and the gathered pool."""
    gold, candidates = source.gold, source.candidates
    values = {
        **{name: getattr(settings, name).model_dump(mode="json") for name in ("selection", "retrieval")},
        "index": settings.index.model_dump(mode="json", exclude=INDEX_RESOURCES),
        "max_pairs": settings.max_pairs,
        "gather": [GATHER_POOL_VERSION, settings.gathered_shard_pairs],
        "parts": [[part.digest, part.clusters] for part in candidates.parts],
        "tables": [table.fingerprint for table in (*candidates.embeddings, *(sidecar for of_part in candidates.rewards for sidecar in of_part))],
        "leaks": [table.fingerprint for table in source.leaks],
        "already": content_digest(sorted(source.already)),
        "versions": faiss_version(),
    }
    digests = {"gold": gold.digest, "embeddings": gold.embeddings.fingerprint, "human": gold.human.fingerprint}
    return fingerprint("select", SELECT_VERSION, values, {**digests, "rewards": source.rewards.fingerprint})


def _read_stored(storage: Storage, number: int, inputs: str) -> tuple[pa.Table, dict[str, Any], Pool] | None:
    """Return the stored record, its counts and pool; None where there is none, or one of other inputs."""
    path = selected_path(number)
    if not storage.exists(path):
        return None
    table = storage.read_table(path)
    notes = table.schema.metadata or {}
    if notes.get(INPUTS_KEY) != inputs.encode() or not pool_exists(storage, notes[POOL_KEY].decode()):
        return None
    return table.replace_schema_metadata(), json.loads(notes[COUNTS_KEY]), open_pool(storage, notes[POOL_KEY].decode())
