"""Human verification as a step: a queue chosen by rule, verdicts from whoever annotates, gold split once and for good.

Paper: Sec. 3.2 (humans verify some pairs of every round; objective, low-controversiality pairs first). Our choice: in a run without people a
simulated annotator reads known truth for a stated budget of pairs, and every output says so.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import astuple
from typing import Literal, Self

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from synpref_ray.config import Settings
from synpref_ray.errors import ConfigError, WaitingError
from synpref_ray.human.simulated import SimulatedAnnotator
from synpref_ray.human.verdict_file import ImportedVerdicts, import_verdicts
from synpref_ray.human.verdicts import Annotator
from synpref_ray.ingest.readers import open_binary
from synpref_ray.pipeline.steps import Output, ShardKey, Step, StepInput, StepResult, run_step
from synpref_ray.reporting.run import Run
from synpref_ray.rules.gold import GoldConfig, split_gold
from synpref_ray.rules.selection import VerificationConfig, select_for_verification
from synpref_ray.schema import HUMAN_SCHEMA
from synpref_ray.tables.garbage import NOTES
from synpref_ray.tables.pools import Pool, content_digest
from synpref_ray.tables.sidecars import Sidecar, zip_shard
from synpref_ray.tables.storage import Storage

VERIFY_VERSION = 1
ANNOTATION = "annotation"
VERDICTS = "verdicts.parquet"
EDITED_TAGS = "attributes.parquet"


def queue_path(pool: str) -> str:
    """Return where the workspace says which pairs of a pool people are asked about (jobs/annotate.py queue)."""
    return f"{ANNOTATION}/queues/{pool}.parquet"


def notes_path(pool: str) -> str:
    """Return where the workspace keeps what LLMs noted of a pool's replies, for people to see (jobs/preverify.py)."""
    return f"{NOTES}/{pool}.parquet"


def notes_record_path(pool: str) -> str:
    """Return where the workspace says from which gathered pool and tables a pool's notes are."""
    return f"{NOTES}/{pool}.json"


class AnnotatorConfig(Settings):
    """Where human verdicts come from.

    `simulated` reads the truth file `path` for at most the budgeted pairs; `file` takes every verdict of `path` (pair_id, verdict, annotator).
    `queue` takes what jobs/annotate.py exported for the pairs it queued (`path` empty: annotation/verdicts.parquet in the workspace).
    """

    kind: Literal["simulated", "file", "queue"] = "file"
    """Where verdicts come from: a file, the queue of the pages, or known truth looked up (simulated)."""
    path: str = ""
    """The file of verdicts, or of truth."""
    wait: bool = True  # queue only: stop until every queued pair is settled; false takes what is there, unsettled pairs as undecidable
    seed_pairs: int = Field(default=0, ge=0)  # simulated only: budget for the seed pool
    round_pairs: int = Field(default=0, ge=0)  # simulated only: budget for each round's selection
    random_fraction: float = Field(default=0.25, ge=0.0, le=1.0)  # ours: gold must not be only what was easy

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "simulated" and not self.seed_pairs:
            raise ValueError("a simulated annotator needs a budget: annotator.seed_pairs")
        return self

    def located(self, storage: Storage) -> "AnnotatorConfig":
        """Return the settings with the path that an empty one stands for."""
        return self.model_copy(update={"path": storage.join(f"{ANNOTATION}/{VERDICTS}")}) if self.kind == "queue" and not self.path else self

    def open(self) -> Annotator:
        """Return the annotator."""
        if not self.path:
            raise ConfigError(f"annotator.path is empty: name the {'truth' if self.kind == 'simulated' else 'verdict'} file (annotator.path=FILE)")
        return SimulatedAnnotator(self.path) if self.kind == "simulated" else import_verdicts(self.path)


class VerifyWorker:
    """Asks the annotator about the selected pairs of a shard, and splits what became gold."""

    def __init__(self, annotator: Annotator | AnnotatorConfig, selected: Set[str], gold: GoldConfig):
        self._annotator = annotator.open() if isinstance(annotator, AnnotatorConfig) else annotator
        self._selected = selected
        self._gold = gold

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        table = self._annotator.verify(shard, self._selected)
        decided = [verdict in ("chosen", "rejected") for verdict in table["human_verdict"].to_pylist()]
        splits = split_gold(shard["prompt_group"], self._gold).to_pylist()
        values = pa.array([split if is_gold else None for split, is_gold in zip(splits, decided, strict=True)], pa.string())
        column = table.schema.get_field_index("gold_split")
        return table.set_column(column, table.schema.field(column), values), {"verified": float(sum(decided))}


def verify_pool(
    run: Run, name: str, pool: Pool, attributes: Sidecar, budget: int, config: AnnotatorConfig, gold: GoldConfig, leaked: Set[str] = frozenset()
) -> StepResult:
    """Make the sidecar `human` of a pool: verdicts on the queue's pairs, null with `not_selected` elsewhere.

    Args:
        leaked: pair_ids that give benchmark items away; they become no gold, whoever has judged them.

    Raises:
        WaitingError: the verdicts come from the annotation queue, and people have not settled all of the round's pairs yet.
    """
    config = config.located(pool.storage)
    # Read once: an export while this runs must not give a table whose name says what an earlier one held.
    imported = _import(config, pool.storage)
    if config.kind == "queue":
        selected = _queued(pool, attributes, config, imported, leaked)
    else:
        selected = _queue(pool, attributes, budget, config, gold.seed, leaked)
    if imported is None:
        with open_binary(config.path):  # a missing file is said before any work
            pass
    said = None if imported is None else imported.about(selected)
    step = Step(
        name="verify",
        title=name,
        version=VERIFY_VERSION,
        worker=VerifyWorker,
        outputs=(Output("human", HUMAN_SCHEMA),),
        settings={"kind": config.kind, "gold": gold.model_dump(mode="json")},
        digests={"selected": content_digest(sorted(selected)), "verdicts": _digest(config, said)},
        worker_arguments=lambda _: {"annotator": config if said is None else said, "selected": selected, "gold": gold},
        max_failed_fraction=1.0,  # undecidable pairs are the annotators' honest answer
    )
    result = run_step(step, [StepInput(pool, ("prompt_group",))])
    splits = [result.sidecars[0][0].read(shard.number, ["gold_split"])["gold_split"] for shard in pool.shards]
    verified = sum(len(column) - column.null_count for column in splits)
    notes = {"annotator": {"simulated": "SIMULATED", "file": "verdict file", "queue": "annotation queue"}[config.kind], "gold": verified}
    run.step(name, rows=result.rows, computed=result.rows_computed, rejected={}, seconds=result.seconds, **notes)
    return result


def _queue(pool: Pool, attributes: Sidecar, budget: int, config: AnnotatorConfig, seed: int, leaked: Set[str]) -> Set[str]:
    columns = {"objectivity": "objectivity", "controversiality": "controversiality"}
    tables = [zip_shard(pool, shard.number, ["prompt_group"], [(attributes, columns)]) for shard in pool.shards]
    candidates: Sequence[str] = []
    if tables:
        table = pa.concat_tables(tables)
        if leaked:
            table = table.filter(pc.invert(pc.is_in(table["pair_id"], value_set=pa.array(sorted(leaked), pa.string()))))
        limit = budget if config.kind == "simulated" else table.num_rows
        queue = VerificationConfig(seed=seed, max_pairs=limit, random_fraction=config.random_fraction)
        candidates = select_for_verification(table, queue)["pair_id"].to_pylist()
    return frozenset(candidates)


def _import(config: AnnotatorConfig, storage: Storage) -> ImportedVerdicts | None:
    """Return the verdicts of people; None where there are none: a simulated annotator, or a queue of which nothing was exported yet."""
    if config.kind == "simulated":
        return None
    exported = f"{ANNOTATION}/{VERDICTS}"
    is_export = config.kind == "queue" and config.path == storage.join(exported)
    if is_export and not storage.exists(exported):
        return None
    found = config.open()
    assert isinstance(found, ImportedVerdicts)
    return found


def _queued(pool: Pool, attributes: Sidecar, config: AnnotatorConfig, imported: ImportedVerdicts | None, leaked: Set[str]) -> Set[str]:
    """Return the pairs of a pool that people were asked about, once the verdicts that the settings wait for are there."""
    storage = pool.storage
    at = f"workspace={storage.url}"
    if not storage.exists(queue_path(pool.name)):
        raise WaitingError(
            f"nobody has been asked about pool {pool.name}: run `python jobs/annotate.py queue {at} pool={pool.name} "
            f"attributes={attributes.fingerprint[:8]}`, have people judge (`annotate.py serve {at}`), then `annotate.py export {at}`, "
            "and run this job again"
        )
    asked = set(storage.read_table(queue_path(pool.name), ["pair_id"])["pair_id"].to_pylist())
    ours = frozenset(asked & set(pool.read_all(["pair_id"])["pair_id"].to_pylist()) - leaked)
    missing = len(ours)
    if imported is not None:
        missing -= len(imported.known(ours) - imported.unsettled)
    if missing and (config.wait or imported is None):
        raise WaitingError(
            f"{missing} of {len(ours)} queued pairs of pool {pool.name} have no verdict in {config.path}: have people judge them, and an admin "
            f"settle disputes (`python jobs/annotate.py serve {at}`), then `python jobs/annotate.py export {at}`, and run this job again "
            "(annotator.wait=false takes the verdicts at hand)"
        )
    return ours


def _digest(config: AnnotatorConfig, said: ImportedVerdicts | None) -> str:
    """Name what the annotator says of the selected pairs: verdicts added about other pairs change nothing here."""
    if said is not None:
        answers = sorted(said.answers.items())
        if config.kind == "queue":  # one more person who says the same changes no gold, and nothing is to be computed anew for them
            return content_digest([[pair_id, answer.verdict] for pair_id, answer in answers])
        return content_digest([[pair_id, *astuple(answer)] for pair_id, answer in answers])
    with open_binary(config.path) as stream:
        return content_digest(stream.read().hex())
