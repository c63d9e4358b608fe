"""Tagging as a step: every tagger writes the attributes of each pair, and a second step merges what several wrote.

Paper: Sec. 3.1 (attributes).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import pyarrow as pa
from pydantic import Field

from synpref_ray.llm.journal import Journal
from synpref_ray.llm.prompts import TAG_PROMPT_VERSION
from synpref_ray.llm.tagger import TaggerConfig, tag_pairs
from synpref_ray.pipeline.llm_steps import PAIR_COLUMNS, LLMStepConfig, LLMWorker, names_differ, run_llm_step
from synpref_ray.pipeline.steps import Output, ShardKey, Step, StepInput, plan_sidecars, run_step
from synpref_ray.reporting.run import Run
from synpref_ray.rules.tags import merge_tag_shard
from synpref_ray.schema import ATTRIBUTES_SCHEMA, TAGS_SCHEMA
from synpref_ray.tables.pools import Pool
from synpref_ray.tables.sidecars import Sidecar

TAG_VERSION = 2
MERGE_VERSION = 1


class TagStepConfig(LLMStepConfig):
    """One tagger and its engine; `tagger.name` is its name in tables and reports."""

    tagger: TaggerConfig = TaggerConfig()

    @property
    def longest_request_tokens(self) -> int:
        """Of tagging."""
        return self.tagger.max_input_tokens + self.tagger.max_new_tokens


Taggers = Annotated[tuple[TagStepConfig, ...], Field(min_length=1), names_differ("tagger", lambda step: step.tagger.name)]
"""The taggers of a job, the best first: ties go to it (`rules/tags.py`)."""


class TagWorker(LLMWorker[TagStepConfig]):
    """Tags pairs."""

    def ask(self, shard: pa.Table, journal: Journal) -> tuple[pa.Table, Mapping[str, float]]:
        """Return TAGS_SCHEMA."""
        return tag_pairs(shard, self._engine, self._config.tagger, journal), {}


class MergeTagsWorker:
    """Merges what several taggers wrote."""

    def __init__(self, num_taggers: int):
        self._num_taggers = num_taggers

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        return merge_tag_shard(shard, self._num_taggers), {}


@dataclass(frozen=True)
class TaggedPools:
    """The attributes of some pools, in their order: merged, and as each tagger wrote them."""

    merged: list[Sidecar]
    by_tagger: Mapping[str, list[Sidecar]]


def tag_pools(run: Run, name: str, pools: Sequence[Pool], taggers: Sequence[TagStepConfig]) -> TaggedPools:
    """Make the sidecar `attributes.<tagger>` of every pool for each tagger, and of these `attributes`, merged by `rules/tags.py`.

    A tagger that is added later tags alone; what the others wrote stays.
    """
    tags = {config.tagger.name: _tag_pools(run, f"{name} ({config.tagger.name})", pools, config) for config in taggers}
    result = run_step(_merge_tags_step(f"{name}, merge", taggers), _tags_to_merge(pools, list(tags.values())))
    return TaggedPools([sidecars[0] for sidecars in result.sidecars], tags)


def plan_tags(pools: Sequence[Pool], taggers: Sequence[TagStepConfig]) -> TaggedPools:
    """Return the attributes that `tag_pools` would make, without making them."""
    sources = [StepInput(pool, PAIR_COLUMNS) for pool in pools]
    tags = {config.tagger.name: [sidecars[0] for sidecars in plan_sidecars(_tag_step("", config), sources)] for config in taggers}
    merged = plan_sidecars(_merge_tags_step("", taggers), _tags_to_merge(pools, list(tags.values())))
    return TaggedPools([sidecars[0] for sidecars in merged], tags)


def _merge_tags_step(title: str, taggers: Sequence[TagStepConfig]) -> Step:
    return Step(
        name="merge tags",
        title=title,
        version=MERGE_VERSION,
        worker=MergeTagsWorker,
        outputs=(Output("attributes", ATTRIBUTES_SCHEMA),),
        settings={"taggers": [config.tagger.name for config in taggers]},  # in order: ties go to the first
        worker_arguments=lambda _: {"num_taggers": len(taggers)},
        max_failed_fraction=max(config.max_failed_fraction for config in taggers),
    )


def _tags_to_merge(pools: Sequence[Pool], by_tagger: Sequence[Sequence[Sidecar]]) -> list[StepInput]:
    inputs = []
    for index, pool in enumerate(pools):
        columns = [name for name in ATTRIBUTES_SCHEMA.names if name != "pair_id"]
        beside = tuple((tables[index], {column: f"{n}.{column}" for column in columns}) for n, tables in enumerate(by_tagger))
        inputs.append(StepInput(pool, (), beside))
    return inputs


def _tag_pools(run: Run, name: str, pools: Sequence[Pool], config: TagStepConfig) -> list[Sidecar]:
    sources = [StepInput(pool, PAIR_COLUMNS) for pool in pools]
    return [sidecars[0] for sidecars in run_llm_step(run, name, _tag_step(name, config), sources, config)]


def _tag_step(title: str, config: TagStepConfig) -> Step:
    return Step(
        name="tag",
        title=title,
        version=TAG_VERSION,
        worker=TagWorker,
        outputs=(Output(f"attributes.{config.tagger.name}", TAGS_SCHEMA),),
        settings={**config.settings, "tagger": config.tagger.model_dump(mode="json"), "prompt": TAG_PROMPT_VERSION},
        digests=config.digests,
        worker_arguments=lambda tables: {"config": config, "tables": tables},
        resources=config.resources,
        model=config.engine.model,
        max_failed_fraction=config.max_failed_fraction,
    )
