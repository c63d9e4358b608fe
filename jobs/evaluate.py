"""Measure a reward model's accuracy on files of pairs, with 95 % intervals.

Paper: Sec. 4 (pairwise accuracy, strict).
Inputs: `model` (a folder), `benchmarks` (pair files, or names under `data`).
Outputs: metrics.json with <benchmark>/accuracy, its interval and the number of pairs.

Laptop:  python jobs/evaluate.py model=workspace/models/best-r03-0a1b2c3d "benchmarks=[held_out]" data=examples/data
Cluster: ray job submit --working-dir . -- python jobs/evaluate.py model=/shared/model benchmarks=[held_out] data=/shared/data
"""

import sys
from collections.abc import Sequence

from synpref_ray.pipeline.evaluate import EvaluateConfig, check_evaluate, run_evaluate
from synpref_ray.pipeline.job import run_job


def main(argv: Sequence[str]) -> int:
    """Run the job; see `run_job` for the exit codes."""
    return run_job("evaluate", argv, EvaluateConfig, run_evaluate, check=check_evaluate, usage=__doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
