"""Plan a curation run before it is paid for: its cost, the split of a budget, the size a target needs, when to stop, and how long it takes.

Paper: App. F (B ≈ c_H gold + c_L1 silver + c_L2 Stage 2), with GPU hours as lines of their own; a plan that does not add up is refused with the sum.
Inputs: prices and sizes, a budget or a target with a scaling curve; or finished runs of a workspace, for times (like=demo).
Outputs: tables, and metrics.json (cost, curve, stop, target, time). No Ray, no model.

Laptop:  python jobs/plan.py --config jobs/configs/plan_paper.yaml workspace=workspace
         python jobs/plan.py workspace=workspace/demo like=demo
Cluster: python jobs/plan.py --config jobs/configs/plan_40m.yaml workspace=s3://bucket/run   (on any machine that reads the workspace)
"""

import sys
from collections.abc import Sequence

from synpref_ray.pipeline.job import run_verb
from synpref_ray.pipeline.plan import PlanConfig, check_plan, run_plan


def main(argv: Sequence[str]) -> int:
    """Run the job; see `run_job` for the exit codes."""
    return run_verb("plan", argv, PlanConfig, {"": run_plan}, check=check_plan, usage=__doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
