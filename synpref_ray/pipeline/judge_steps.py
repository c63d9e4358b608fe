"""Judging as a step: every judge votes on each pair that no person has judged, with gold exemplars in the prompt, or on benchmarks without any.

Paper: Sec. 3.2, Step 3 (preference-aware labelling).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from synpref_ray.llm.journal import Journal
from synpref_ray.llm.judge import VOTES_SCHEMA, JudgeConfig, judge_pairs
from synpref_ray.llm.prompts import judge_prompt_version
from synpref_ray.llm.spending import Budget
from synpref_ray.pipeline.gold_tables import ATTRIBUTE_COLUMNS, GoldTables
from synpref_ray.pipeline.llm_steps import PAIR_COLUMNS, LLMStepConfig, LLMWorker, names_differ, run_llm_step
from synpref_ray.pipeline.steps import Output, Step, StepInput, plan_sidecars
from synpref_ray.reporting.run import Run
from synpref_ray.rules.gold import check_exemplars
from synpref_ray.schema import DropReason
from synpref_ray.tables.pools import Pool, content_digest
from synpref_ray.tables.sidecars import Sidecar

JUDGE_VERSION = 2


class JudgeStepConfig(LLMStepConfig):
    """One judge and its engine; `name` is the judge's name in votes and reports."""

    judge: JudgeConfig

    @property
    def longest_request_tokens(self) -> int:
        """Of judging, whose reply is one choice."""
        return self.judge.max_input_tokens + 1


Judges = Annotated[tuple[JudgeStepConfig, ...], Field(min_length=1), names_differ("judge", lambda step: step.judge.judge)]
"""The judges of a job."""


@dataclass(frozen=True)
class JudgedPool:
    """A pool to judge, with its attributes, its exemplars, and (except for gold itself) its human verdicts, which need no judge."""

    pool: Pool
    attributes: Sidecar
    exemplars: Sidecar
    human: Sidecar | None


def pairs_to_judge(shard: pa.Table, gold_groups: pa.Array) -> pa.Array | pa.ChunkedArray:
    """Return which pairs of a shard a judge is asked about, a boolean each: where people verify, those that no person has judged (one that they
    could not decide was judged: it is discarded, never passed to an LLM) and that share no prompt with gold.
    """
    if "human_drop_reason" not in shard.column_names:
        return pa.array([True] * shard.num_rows)
    free = pc.fill_null(pc.equal(shard["human_drop_reason"], DropReason.NOT_SELECTED.value), False)
    return pc.and_(free, pc.invert(pc.is_in(shard["prompt_group"], value_set=gold_groups)))


class JudgeWorker(LLMWorker[JudgeStepConfig]):
    """Judges pairs by the gold exemplars that it holds."""

    def __init__(self, config: JudgeStepConfig, gold: GoldTables, tables: list[Sidecar], budget: Budget | None = None):
        self._gold = gold.read()
        self._groups = self._gold["prompt_group"].unique()
        super().__init__(config, tables, budget)

    def ask(self, shard: pa.Table, journal: Journal) -> tuple[pa.Table, Mapping[str, float]]:
        """Return VOTES_SCHEMA; rows that no judge is asked about are null."""
        check_exemplars(shard, self._gold)
        asked = pairs_to_judge(shard, self._groups)
        votes = judge_pairs(shard.filter(asked), self._gold, self._engine, self._config.judge, journal)
        return spread_rows(shard["pair_id"], asked, votes), {"judged": float(votes.num_rows)}


class PlainJudgeWorker(LLMWorker[JudgeStepConfig]):
    """Judges pairs as they are: no gold, no exemplars, no attributes."""

    def ask(self, shard: pa.Table, journal: Journal) -> tuple[pa.Table, Mapping[str, float]]:
        """Return VOTES_SCHEMA."""
        votes = judge_pairs(shard, shard.slice(0, 0), self._engine, self._config.judge, journal)
        return votes, {"judged": float(votes.num_rows)}


def spread_rows(pair_ids: pa.ChunkedArray, selected: pa.Array | pa.ChunkedArray, rows: pa.Table) -> pa.Table:
    """Return `rows` (of the selected pairs) laid out over all pairs; the others are null with reason `not_selected`."""
    flags = selected.to_pylist()
    places = iter(range(rows.num_rows))
    indices = pa.array([next(places) if flag else None for flag in flags], pa.int64())
    columns = []
    for field in rows.schema:
        if field.name == "pair_id":
            columns.append(pair_ids.combine_chunks())
        elif field.name == "drop_reason":
            missing = pa.array([None if flag else DropReason.NOT_SELECTED.value for flag in flags], pa.string())
            columns.append(pc.coalesce(rows[field.name].take(indices).combine_chunks(), missing) if rows.num_rows else missing)
        else:
            columns.append(rows[field.name].take(indices).combine_chunks() if rows.num_rows else pa.nulls(len(flags), field.type))
    return pa.table(columns, schema=rows.schema)


def judge_pools(run: Run, name: str, pools: Sequence[JudgedPool], gold: GoldTables, config: JudgeStepConfig) -> list[Sidecar]:
    """Make the sidecar `votes.<judge>` of every pool; gold pairs are judged leave-one-out, since no exemplar shares their prompt.

    Our choice: gold is part of the fingerprint also where a judge is shown no exemplars, since it decides which pairs are asked about (none of a gold
    prompt), and what is judged follows from it anyway: the selected pairs and the mismatches are other ones when gold is.
    """
    return [sidecars[0] for sidecars in run_llm_step(run, name, _judge_step(name, gold, config), [_to_judge(judged) for judged in pools], config)]


def plan_votes(judged: JudgedPool, gold: GoldTables, config: JudgeStepConfig) -> Sidecar:
    """Return the votes that `judge_pools` would make of a pool, without making them."""
    return plan_sidecars(_judge_step("", gold, config), [_to_judge(judged)])[0][0]


def _judge_step(title: str, gold: GoldTables, config: JudgeStepConfig) -> Step:
    exemplars = content_digest([gold.pool.digest, gold.attributes.fingerprint, gold.human.fingerprint])
    return Step(
        name="judge",
        title=title,
        version=JUDGE_VERSION,
        worker=JudgeWorker,
        outputs=(Output(f"votes.{config.judge.judge}", VOTES_SCHEMA),),
        settings={**config.settings, "judge": config.judge.model_dump(mode="json"), "prompt": judge_prompt_version(config.judge.guideline)},
        digests={**config.digests, "gold": exemplars},
        worker_arguments=lambda tables: {"config": config, "gold": gold, "tables": tables},
        resources=config.resources,
        model=config.engine.model,
        max_failed_fraction=config.max_failed_fraction,
    )


def _to_judge(judged: JudgedPool) -> StepInput:
    beside: list[tuple[Sidecar, Mapping[str, str]]] = [(judged.attributes, ATTRIBUTE_COLUMNS), (judged.exemplars, {"exemplar_ids": "exemplar_ids"})]
    if judged.human is not None:
        beside.append((judged.human, {"drop_reason": "human_drop_reason"}))
    return StepInput(judged.pool, (*PAIR_COLUMNS, "prompt_group"), tuple(beside))


def without_exemplars(config: JudgeStepConfig) -> JudgeStepConfig:
    """Return a judge that needs nothing but a pair: without exemplars and attributes, and so without the guideline that goes by attributes."""
    guideline = "general" if config.judge.guideline == "full" else config.judge.guideline
    judge = config.judge.model_copy(update={"max_exemplars": 0, "attributes": (), "guideline": guideline})
    return config.model_copy(update={"judge": judge})


def judge_plain_pools(run: Run, name: str, pools: Sequence[Pool], config: JudgeStepConfig) -> list[Sidecar]:
    """Make the sidecar `votes.<judge>` of pools that nothing is known about (benchmarks), in both orders; see `without_exemplars`."""
    plain = without_exemplars(config)
    step = Step(
        name="judge without gold",
        title=name,
        version=JUDGE_VERSION,
        worker=PlainJudgeWorker,
        outputs=(Output(f"votes.{plain.judge.judge}", VOTES_SCHEMA),),
        settings={**plain.settings, "judge": plain.judge.model_dump(mode="json"), "prompt": judge_prompt_version(plain.judge.guideline)},
        digests=plain.digests,
        worker_arguments=lambda tables: {"config": plain, "tables": tables},
        resources=plain.resources,
        max_failed_fraction=1.0,  # a pair without a verdict is an answer here: it is counted, and wrong
    )
    return [sidecars[0] for sidecars in run_llm_step(run, name, step, [StepInput(pool, PAIR_COLUMNS) for pool in pools], plain)]
