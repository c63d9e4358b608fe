"""Run every job once on the project's own data, and report against the known truth.

Paper: Sec. 3 and 4, in small.
Inputs: examples/data (pools, held-out pairs, and the truth that only the simulated annotator and the final report open).
Outputs: a workspace as every job leaves it, and a table that says what curation did to the labels and to a reward model.

Laptop:  make demo        (or: python jobs/demo.py --config jobs/configs/demo.yaml)
Cluster: ray job submit --working-dir . -- python jobs/demo.py --config jobs/configs/demo.yaml workspace=/shared/demo
"""

import sys
from collections.abc import Sequence

from synpref_ray.pipeline.demo import DemoConfig, check_demo, run_demo
from synpref_ray.pipeline.job import run_job


def main(argv: Sequence[str]) -> int:
    """Run the job; see `run_job` for the exit codes."""
    return run_job("demo", argv, DemoConfig, run_demo, check=check_demo, usage=__doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
