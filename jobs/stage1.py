"""Run Stage 1: rounds of tag, verify, train, retrieve and judge, ending in a best RM and a gold RM.

Paper: Sec. 3.2.
Inputs: the pools seed and unverified of the workspace (jobs/ingest.py); human verdicts, imported or simulated (`annotator.*`).
Outputs: gold, silver and reward models per round (`rounds/`, `sets/`, `models/`), and `rounds/stage1.json` for Stage 2.

Laptop:  python jobs/stage1.py --config jobs/configs/laptop_stage1.yaml workspace=workspace annotator.path=verdicts.jsonl
Cluster: ray job submit --working-dir . -- python jobs/stage1.py --config jobs/configs/stage1.yaml workspace=s3://bucket/run
"""

import sys
from collections.abc import Sequence

from synpref_ray.pipeline.job import run_job
from synpref_ray.pipeline.stage1 import Stage1Config, check_stage1, run_stage1
from synpref_ray.pipeline.stage1_plan import plan_stage1


def main(argv: Sequence[str]) -> int:
    """Run the job; see `run_job` for the exit codes."""
    return run_job("stage1", argv, Stage1Config, run_stage1, check=check_stage1, plan=plan_stage1, usage=__doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
