"""Plant injections in the worse reply of gold pairs, judge them with every judge, and report what that does to verdicts.

Paper: none of it; docs/judges.md says what the figures mean.
Inputs: a workspace in which Stage 1 has finished, and the judges' settings as Stage 1 had them (then gold itself is not judged again).
Outputs: metrics.json with `attack/judges/<judge>/{overall,by_kind,by_injection}`; the pool attacked-<content>, which nothing else reads.

Laptop:  python jobs/attack_judges.py --config jobs/configs/laptop_attack.yaml workspace=workspace
Cluster: ray job submit --working-dir . -- python jobs/attack_judges.py --config jobs/configs/attack.yaml workspace=s3://bucket/run
"""

import sys
from collections.abc import Sequence

from synpref_ray.pipeline.attack import AttackConfig, check_attack, run_attack
from synpref_ray.pipeline.job import run_job


def main(argv: Sequence[str]) -> int:
    """Run the job; see `run_job` for the exit codes."""
    return run_job("attack_judges", argv, AttackConfig, run_attack, check=check_attack, usage=__doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
