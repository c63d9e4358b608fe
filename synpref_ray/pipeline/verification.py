"""Human verification as a step: a queue chosen by rule, verdicts from whoever annotates, gold split once and for good.

Paper: Sec. 3.2 (humans verify some pairs of every round; objective, low-controversiality pairs first). Our choice: in a run without people a
simulated annotator reads known truth for a stated budget of pairs, and every output says so.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import astuple
from typing import Literal, Self

import pyarrow as pa
from pydantic import Field, model_validator

from synpref_ray.config import Settings
from synpref_ray.errors import ConfigError
from synpref_ray.human.simulated import SimulatedAnnotator
from synpref_ray.human.verdict_file import import_verdicts
from synpref_ray.human.verdicts import Annotator
from synpref_ray.ingest.readers import open_binary
from synpref_ray.pipeline.steps import Output, ShardKey, Step, StepInput, StepResult, run_step
from synpref_ray.reporting.run import Run
from synpref_ray.rules.gold import GoldConfig, split_gold
from synpref_ray.rules.selection import VerificationConfig, select_for_verification
from synpref_ray.schema import HUMAN_SCHEMA
from synpref_ray.tables.pools import Pool, content_digest
from synpref_ray.tables.sidecars import Sidecar, zip_shard

VERIFY_VERSION = 1


class AnnotatorConfig(Settings):
    """Where human verdicts come from.

    `simulated` reads the truth file `path` for at most the budgeted pairs; `file` takes every verdict of `path` (pair_id, verdict, annotator).
    """

    kind: Literal["simulated", "file"] = "file"
    path: str = ""
    seed_pairs: int = Field(default=0, ge=0)  # simulated only: budget for the seed pool
    round_pairs: int = Field(default=0, ge=0)  # simulated only: budget for each round's selection
    random_fraction: float = Field(default=0.25, ge=0.0, le=1.0)  # ours: gold must not be only what was easy

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "simulated" and not self.seed_pairs:
            raise ValueError("a simulated annotator needs a budget: annotator.seed_pairs")
        return self

    def open(self) -> Annotator:
        """Return the annotator."""
        if not self.path:
            raise ConfigError(f"annotator.path is empty: name the {'truth' if self.kind == 'simulated' else 'verdict'} file (annotator.path=FILE)")
        return SimulatedAnnotator(self.path) if self.kind == "simulated" else import_verdicts(self.path)


class VerifyWorker:
    """Asks the annotator about the selected pairs of a shard, and splits what became gold."""

    def __init__(self, annotator: AnnotatorConfig, selected: Set[str], gold: GoldConfig):
        self._annotator = annotator.open()
        self._selected = selected
        self._gold = gold

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        table = self._annotator.verify(shard, self._selected)
        decided = [verdict in ("chosen", "rejected") for verdict in table["human_verdict"].to_pylist()]
        splits = split_gold(shard["prompt_group"], self._gold).to_pylist()
        values = pa.array([split if is_gold else None for split, is_gold in zip(splits, decided, strict=True)], pa.string())
        column = table.schema.get_field_index("gold_split")
        return table.set_column(column, table.schema.field(column), values), {"verified": float(sum(decided))}


def verify_pool(run: Run, name: str, pool: Pool, attributes: Sidecar, budget: int, config: AnnotatorConfig, gold: GoldConfig) -> StepResult:
    """Make the sidecar `human` of a pool: verdicts on the queue's pairs, null with `not_selected` elsewhere."""
    selected = _queue(pool, attributes, budget, config, gold.seed)
    with open_binary(config.path):  # a missing file is said before any work
        pass
    step = Step(
        name="verify",
        title=name,
        version=VERIFY_VERSION,
        worker=VerifyWorker,
        outputs=(Output("human", HUMAN_SCHEMA),),
        settings={"kind": config.kind, "gold": gold.model_dump(mode="json")},
        digests={"selected": content_digest(sorted(selected)), "verdicts": _digest(config, selected)},
        worker_arguments=lambda _: {"annotator": config, "selected": selected, "gold": gold},
        max_failed_fraction=1.0,  # undecidable pairs are the annotators' honest answer
    )
    result = run_step(step, [StepInput(pool, ("prompt_group",))])
    splits = [result.sidecars[0][0].read(shard.number, ["gold_split"])["gold_split"] for shard in pool.shards]
    verified = sum(len(column) - column.null_count for column in splits)
    notes = {"annotator": "SIMULATED" if config.kind == "simulated" else "verdict file", "gold": verified}
    run.step(name, rows=result.rows, computed=result.rows_computed, rejected={}, seconds=result.seconds, **notes)
    return result


def _queue(pool: Pool, attributes: Sidecar, budget: int, config: AnnotatorConfig, seed: int) -> Set[str]:
    columns = {"objectivity": "objectivity", "controversiality": "controversiality"}
    tables = [zip_shard(pool, shard.number, ["prompt_group"], [(attributes, columns)]) for shard in pool.shards]
    candidates: Sequence[str] = []
    if tables:
        table = pa.concat_tables(tables)
        limit = budget if config.kind == "simulated" else table.num_rows
        queue = VerificationConfig(seed=seed, max_pairs=limit, random_fraction=config.random_fraction)
        candidates = select_for_verification(table, queue)["pair_id"].to_pylist()
    return frozenset(candidates)


def _digest(config: AnnotatorConfig, selected: Set[str]) -> str:
    """Name what the annotator would say of these pairs: verdicts added about other pairs change nothing here."""
    if config.kind == "file":
        answers = import_verdicts(config.path).answers
        return content_digest([[pair_id, *astuple(answers[pair_id])] for pair_id in sorted(selected & set(answers))])
    with open_binary(config.path) as stream:
        return content_digest(stream.read().hex())
