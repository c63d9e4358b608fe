"""Say how far a workspace is: stages, shards done and pending, pairs per second, time left, last errors, cost so far (status); tell
one pair's whole story (explain); compare labels with a known truth (labels). Verbs: status, explain, labels.

Inputs: the workspace (a folder or s3://), and nothing else; no Ray, no GPU, nothing is written. Guide: docs/operations.md.
Outputs: the tables on standard output (format=json for explain and labels).

Laptop:  python jobs/report.py status workspace=workspace
         python jobs/report.py explain workspace=workspace pair=PAIR_ID
         python jobs/report.py labels workspace=workspace truth=truth.parquet
Cluster: the same on any machine that can read the workspace: python jobs/report.py status workspace=s3://bucket/run gpu_hour_price=2.5
"""

import sys
from collections.abc import Sequence

from synpref_ray.pipeline.job import run_reader
from synpref_ray.pipeline.report import VERBS, ReportConfig


def main(argv: Sequence[str]) -> int:
    """Run the job; see `run_reader` for the exit codes."""
    return run_reader("report", argv, ReportConfig, VERBS, usage=__doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
