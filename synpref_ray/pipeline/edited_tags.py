"""Attributes that people edited, in the place of the taggers' on gold: in exemplars, in retrieval and in reported agreement by category.

Paper: Sec. 3.1 (attributes of gold pairs are edited and verified by people, those of others are an LLM's alone). Our choice: only where somebody
changed something is anything computed; a gold pair that a judge is measured on keeps the taggers' attributes, as the pairs have that the judge will
decide, or the measure would be better than the judge.
"""

import time
from collections.abc import Mapping
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from synpref_ray.evaluation.tag_report import FIELDS, read_tag_edits
from synpref_ray.pipeline.gathering import gather_pool, gather_sidecars
from synpref_ray.pipeline.gold_tables import GoldTables
from synpref_ray.pipeline.retrieval import EmbedStepConfig, embed_pools, pieces_of
from synpref_ray.pipeline.steps import Output, ShardKey, Step, StepInput, run_step
from synpref_ray.pipeline.verification import ANNOTATION, EDITED_TAGS
from synpref_ray.reporting.run import Run
from synpref_ray.rules.tags import edit_tag_shard
from synpref_ray.schema import ATTRIBUTES_SCHEMA
from synpref_ray.tables.pools import Pool, content_digest
from synpref_ray.tables.sidecars import Sidecar
from synpref_ray.tables.storage import Storage

EDIT_VERSION = 1
Edits = Mapping[str, Mapping[str, str]]


def human_tags_file(storage: Storage, named: str) -> str:
    """Return the file of human-edited attributes: the one that the settings name, else the workspace's own export (jobs/annotate.py) if people
    changed any attribute in it, else "".
    """
    own = f"{ANNOTATION}/{EDITED_TAGS}"
    if named or not storage.exists(own):
        return named
    changed = pc.list_value_length(storage.read_table(own, ["changed"])["changed"])
    return storage.join(own) if pc.any(pc.greater(changed, 0)).as_py() else ""


class EditWorker:
    """Puts the fields that people changed in the place of the taggers'."""

    def __init__(self, edits: Edits):
        self._edits = edits

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        return edit_tag_shard(shard, self._edits), {}


class ReplaceWorker:
    """Puts the rows of a small pool's sidecar in the place of those of the same pairs."""

    def __init__(self, rows: Sidecar, schema: pa.Schema):
        self._rows = rows.read_all(schema.names).cast(schema)

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        pair_ids = shard["pair_id"].to_pylist()
        both = pa.concat_tables([shard.select(self._rows.column_names).cast(self._rows.schema), self._rows]).combine_chunks()
        places = {pair_id: place for place, pair_id in enumerate(both["pair_id"].to_pylist())}  # of a pair that is there twice, the later one
        return both.take(pa.array([places[pair_id] for pair_id in pair_ids], pa.int64())), {}


def use_edited_tags(run: Run, name: str, gold: GoldTables, human_tags: str, config: EmbedStepConfig) -> GoldTables:
    """Return gold with the attributes that people edited, and embeddings that follow from them; where nobody edited any, gold as it was.

    Args:
        human_tags: a file for `read_human_tags`, or "" for none; what it says of other pairs than gold changes nothing.

    Raises:
        InputError, SchemaError: the file cannot be read.
    """
    started = time.monotonic()
    edits = _edits_of(gold, read_tag_edits(human_tags)) if human_tags else {}
    if not edits:
        return gold
    digest = content_digest([[pair_id, dict(edits[pair_id])] for pair_id in sorted(edits)])
    attributes = _edit(gold, edits, digest)
    edited = gather_pool(gold.pool.storage, f"{gold.pool.name}-edited", pieces_of(gold.pool, set(edits)), inputs={"edits": digest})
    tags = gather_sidecars("attributes", ATTRIBUTES_SCHEMA, [(edited, {gold.pool.name: attributes})])[0]
    vectors = embed_pools(run, f"embed edited, {name}", [(edited, tags)], config)[0]
    embeddings = _replace(gold.pool, gold.embeddings, vectors, config.schema)
    run.step(f"edited attributes, {name}", rows=gold.pool.num_rows, computed=0, rejected={}, seconds=time.monotonic() - started, edited=len(edits))
    return replace(gold, attributes=attributes, embeddings=embeddings, tagged=gold)


def _edits_of(gold: GoldTables, edits: Edits) -> dict[str, dict[str, str]]:
    """Return the edits of gold pairs that say something else than the taggers (white space around a text aside)."""
    changes = {}
    for row in gold.attributes.read_all(["pair_id", *FIELDS]).to_pylist():
        given = edits.get(row["pair_id"], {})
        new = {field: value for field, value in given.items() if value != (row[field] or "").strip()}
        if new:
            changes[row["pair_id"]] = new
    return changes


def _edit(gold: GoldTables, edits: Edits, digest: str) -> Sidecar:
    step = Step(
        name="edit tags",
        version=EDIT_VERSION,
        worker=EditWorker,
        outputs=(Output("attributes", ATTRIBUTES_SCHEMA),),
        settings={},
        digests={"edits": digest},
        worker_arguments=lambda _: {"edits": edits},
        max_failed_fraction=1.0,  # the rejects were counted where they happened
    )
    columns = {name: name for name in ATTRIBUTES_SCHEMA.names if name != "pair_id"}
    return run_step(step, [StepInput(gold.pool, (), ((gold.attributes, columns),))]).sidecars[0][0]


def _replace(pool: Pool, sidecar: Sidecar, rows: Sidecar, schema: pa.Schema) -> Sidecar:
    step = Step(
        name="replace rows",
        version=EDIT_VERSION,
        worker=ReplaceWorker,
        outputs=(Output(sidecar.name, schema),),
        settings={},
        digests={"rows": rows.fingerprint, "of": rows.pool.digest},
        worker_arguments=lambda _: {"rows": rows, "schema": schema},
        max_failed_fraction=1.0,
    )
    columns = {name: name for name in schema.names if name != "pair_id"}
    return run_step(step, [StepInput(pool, (), ((sidecar, columns),))]).sidecars[0][0]
