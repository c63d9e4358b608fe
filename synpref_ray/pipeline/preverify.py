"""Pre-verification: LLMs note of each single reply whether it is correct, for the pairs that people are about to be asked about.

Paper: Sec. 3.2, human verification (objective pairs are noted in batches ahead of time; people still read and judge). The notes go into the queue
when it is filled (jobs/annotate.py queue), so this job is run before; they decide nothing, and no judge sees them.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated

import pyarrow as pa
from pydantic import Field

from synpref_ray.llm.journal import Journal
from synpref_ray.llm.noter import NOTES_SCHEMA, NoterConfig, note_pairs
from synpref_ray.llm.prompts import NOTE_PROMPT_VERSION
from synpref_ray.pipeline.annotation import open_attributes, plan_queue
from synpref_ray.pipeline.gathering import gather_pool
from synpref_ray.pipeline.job import JobConfig
from synpref_ray.pipeline.llm_steps import PAIR_COLUMNS, LLMStepConfig, LLMWorker, names_differ, run_llm_step
from synpref_ray.pipeline.retrieval import pieces_of
from synpref_ray.pipeline.steps import Output, Step, StepInput
from synpref_ray.pipeline.verification import notes_path, notes_record_path
from synpref_ray.reporting.run import Run
from synpref_ray.reporting.table import format_table
from synpref_ray.rules.annotation_queue import QueueConfig
from synpref_ray.schema import Objectivity
from synpref_ray.tables.pools import Pool, open_pool
from synpref_ray.tables.selection import GATHERED_SHARD_PAIRS
from synpref_ray.tables.sidecars import Sidecar

NOTE_VERSION = 1
SHOWN_SCHEMA = pa.schema([pa.field("pair_id", pa.string(), nullable=False), pa.field("chosen", pa.string()), pa.field("rejected", pa.string())])


class NoteStepConfig(LLMStepConfig):
    """One noter and its engine; `noter.name` is its name in tables and in the notes."""

    noter: NoterConfig = NoterConfig()


class PreverifyConfig(JobConfig):
    """Everything pre-verification needs."""

    noters: Annotated[tuple[NoteStepConfig, ...], Field(min_length=1), names_differ("noter", lambda step: step.noter.name)]
    pool: str = "seed"
    """The pool whose pairs get notes."""
    attributes: str = ""  # fingerprint of the pool's attributes; empty: the only finished ones
    queue: QueueConfig = QueueConfig()  # as jobs/annotate.py queue will have it: which pairs people are asked about
    objective_only: bool = True  # Sec. 3.2: of a matter of taste there is no correct and incorrect
    gathered_shard_pairs: int = Field(default=GATHERED_SHARD_PAIRS, ge=1)
    """Pairs in a file of a gathered pool: what an LLM step finishes at once."""


class NoteWorker(LLMWorker[NoteStepConfig]):
    """Notes of each reply whether it is correct."""

    def ask(self, shard: pa.Table, journal: Journal) -> tuple[pa.Table, Mapping[str, float]]:
        """Return NOTES_SCHEMA."""
        return note_pairs(shard, self._engine, self._config.noter, journal), {}


def check_preverify(config: PreverifyConfig) -> None:
    """Check the pool, its attributes and the noters' models, without loading one."""
    open_attributes(open_pool(config.storage, config.pool), config.attributes)
    for step in config.noters:
        step.check()


def run_preverify(config: PreverifyConfig, run: Run) -> str:
    """Note the replies of the pairs that the queue will ask about; return the closing table."""
    pool = open_pool(config.storage, config.pool)
    pairs, order = plan_queue(pool, open_attributes(pool, config.attributes), config.queue)
    objective = {row["pair_id"] for row in pairs.select(["pair_id", "objectivity"]).to_pylist() if row["objectivity"] == Objectivity.OBJECTIVE}
    asked = [pair_id for pair_id in order["pair_id"].to_pylist() if pair_id in objective or not config.objective_only]
    gathered = gather_pool(config.storage, f"{pool.name}-preverified", pieces_of(pool, set(asked)), inputs={}, max_pairs=config.gathered_shard_pairs)
    tables = {step.noter.name: _note(run, gathered, step) for step in config.noters} if asked else {}
    notes = {name: table.read_all() for name, table in tables.items()}
    config.storage.write_table(notes_path(pool.name), shown_notes(notes))
    record = {"pool": pool.name, "gathered": gathered.name, "tables": {name: table.fingerprint for name, table in tables.items()}}
    config.storage.write_json(notes_record_path(pool.name), record)  # jobs/clean.py keeps what it names
    counts = {
        name: {value: [*table["chosen"].to_pylist(), *table["rejected"].to_pylist()].count(value) for value in ("correct", "incorrect")}
        for name, table in notes.items()
    }
    run.metrics["preverify"] = {"pool": pool.name, "queued": order.num_rows, "asked": len(asked), "notes": counts}
    rows = [(name, str(len(asked)), *(str(count) for count in found.values())) for name, found in counts.items()]
    return format_table(("noter", "pairs", "replies noted correct", "incorrect"), rows) + f"\nnotes: {config.storage.join(notes_path(pool.name))}"


def _note(run: Run, pool: Pool, config: NoteStepConfig) -> Sidecar:
    name = config.noter.name
    step = Step(
        name="note",
        title=f"note ({name})",
        version=NOTE_VERSION,
        worker=NoteWorker,
        outputs=(Output(f"notes.{name}", NOTES_SCHEMA),),
        settings={**config.settings, "noter": config.noter.model_dump(mode="json"), "prompt": NOTE_PROMPT_VERSION},
        digests=config.digests,
        worker_arguments=lambda tables: {"config": config, "tables": tables},
        resources=config.resources,
        max_failed_fraction=config.max_failed_fraction,
    )
    return run_llm_step(run, f"note ({name})", step, [StepInput(pool, PAIR_COLUMNS)], config)[0][0]


def shown_notes(notes: Mapping[str, pa.Table]) -> pa.Table:
    """Return what people are shown of each reply (SHOWN_SCHEMA): every noter's word (NOTES_SCHEMA) with its name; null where there is none."""
    said: dict[str, dict[str, list[str]]] = {}
    for name, table in notes.items():
        for row in table.to_pylist():
            sides = said.setdefault(row["pair_id"], {"chosen": [], "rejected": []})
            for side, words in sides.items():
                words += [f"{row[side]} ({name})"] if row[side] is not None else []
    rows: Sequence[Mapping[str, str | None]] = [
        {"pair_id": pair_id, **{side: "; ".join(words) or None for side, words in sides.items()}} for pair_id, sides in said.items()
    ]
    return pa.Table.from_pylist(rows, schema=SHOWN_SCHEMA)
