"""Score a file of pairs with a reward model: rows out == rows in, in input order.

Inputs: `model` (a folder), `pairs` (Parquet or JSONL; formats in the README).
Outputs: `out` with pair_id, source_id, reward_chosen, reward_rejected, margin, p_chosen (float32 raw logits), and drop_reason for null rows.
The model is not gated by parity: here rewards are an answer, not a filter (docs/serving.md).

Laptop:  python jobs/score.py model=workspace/models/best-r03-0a1b2c3d pairs=pairs.jsonl out=rewards.parquet
Cluster: ray job submit --working-dir . -- python jobs/score.py model=/shared/model pairs=s3://bucket/pairs.parquet out=s3://bucket/rewards.parquet
"""

import sys
from collections.abc import Sequence

from synpref_ray.pipeline.job import run_job
from synpref_ray.pipeline.score_file import ScoreJobConfig, check_score, run_score


def main(argv: Sequence[str]) -> int:
    """Run the job; see `run_job` for the exit codes."""
    return run_job("score", argv, ScoreJobConfig, run_score, check=check_score, usage=__doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
