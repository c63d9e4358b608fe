"""Run Stage 2: score the wild pool with both reward models, judge the mismatches, and keep, flip or drop every pair.

Paper: Sec. 3.3 and App. H.4.
Inputs: the pool wild, and the result of Stage 1 in the same workspace.
Outputs: the sidecar `decision` with its evidence, the sets curated-wild-kept and curated-wild-kept-and-flipped, and both with Stage 1's judged
silver: curated-wild-silver-kept and curated-wild-silver-kept-and-flipped.

Laptop:  python jobs/stage2.py --config jobs/configs/laptop_stage2.yaml workspace=workspace
Cluster: ray job submit --working-dir . -- python jobs/stage2.py --config jobs/configs/stage2.yaml workspace=s3://bucket/run
"""

import sys
from collections.abc import Sequence

from synpref_ray.pipeline.job import run_job
from synpref_ray.pipeline.stage2 import Stage2Config, check_stage2, plan_stage2, run_stage2


def main(argv: Sequence[str]) -> int:
    """Run the job; see `run_job` for the exit codes."""
    return run_job("stage2", argv, Stage2Config, run_stage2, check=check_stage2, plan=plan_stage2, usage=__doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
