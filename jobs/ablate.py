"""Compare training sets of one size (curated, raw, filtered, corrected, random, matched controls; the paper's ladder) and fit the scaling curve.

Paper: Figs. 5 and 6. Every set is trained on with several seeds and tested on held-out pairs; all sets are selections of the workspace, never copies.
Inputs: a workspace with Stage 1 and Stage 2 finished; `held_out`, a file of pairs; training settings.
Outputs: sets/ablation-….json, models/ablation-seed…, tables, metrics.json (arms with rules and intervals, balance, scaling points for jobs/plan.py).
Goes on where it stopped; a second run trains nothing.

Laptop:  python jobs/ablate.py --config jobs/configs/laptop_ablate.yaml workspace=workspace/demo
         python jobs/ablate.py --config jobs/configs/laptop_ablate.yaml workspace=workspace/demo "parts=[ladder]"
Cluster: ray job submit --working-dir . -- python jobs/ablate.py --config jobs/configs/ablate.yaml workspace=s3://bucket/run held_out=FILE
"""

import sys
from collections.abc import Sequence

from synpref_ray.pipeline.ablate import AblateConfig, check_ablate, run_ablate
from synpref_ray.pipeline.job import run_job


def main(argv: Sequence[str]) -> int:
    """Run the job; see `run_job` for the exit codes."""
    return run_job("ablate", argv, AblateConfig, run_ablate, check=check_ablate, usage=__doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
