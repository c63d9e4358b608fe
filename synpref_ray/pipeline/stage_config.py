"""What Stage 1 and Stage 2 are told alike: who tags and judges, how pairs are embedded, searched and scored, and when a judge may decide."""

from pydantic import Field

from synpref_ray.pipeline.clusters import AUTO
from synpref_ray.pipeline.job import JobConfig
from synpref_ray.pipeline.judge_steps import Judges
from synpref_ray.pipeline.retrieval import EmbedStepConfig
from synpref_ray.pipeline.scoring import ScoreConfig
from synpref_ray.pipeline.step_plan import StagePlan
from synpref_ray.pipeline.tag_steps import Taggers
from synpref_ray.retrieval.index import IndexConfig
from synpref_ray.rules.judges import TrustConfig
from synpref_ray.rules.verdicts import MergeConfig
from synpref_ray.tables.selection import GATHERED_SHARD_PAIRS


class StageConfig(JobConfig):
    """Settings that both stages have."""

    taggers: Taggers
    judges: Judges
    embed: EmbedStepConfig = EmbedStepConfig()
    index: IndexConfig = IndexConfig()
    score: ScoreConfig = ScoreConfig()
    trust: TrustConfig = TrustConfig()
    merge: MergeConfig = MergeConfig()
    decontamination: str = AUTO  # ours: pairs that jobs/decontaminate.py drops are left out where it was run; off, or the head of its report's name
    gathered_shard_pairs: int = Field(default=GATHERED_SHARD_PAIRS, ge=1)
    """Pairs in a file of a gathered pool: what an LLM step finishes at once."""
    plan: StagePlan = StagePlan()
    """What the plan of `--dry-run` supposes."""
