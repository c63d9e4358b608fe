"""Look at a workspace: how far it is, its report, one pair's story, labels against a known truth. Verbs: status, html, explain, labels.

Inputs: the workspace (a folder or s3://), and nothing else; no Ray, no GPU, nothing in it is changed. Guides: docs/operations.md, docs/report.md,
docs/stage1.md.
Outputs: status: stages, shards done and pending, pairs per second, time left, last errors and cost so far, on standard output. html: one file that
opens without a server and loads nothing (rounds, yields, judges, training, benchmarks beside the paper's, audits, costs, pairs), and its numbers as
JSON and CSV beside it. explain and labels: tables on standard output (format=json).

Laptop:  python jobs/report.py status workspace=workspace
         python jobs/report.py html workspace=workspace out=report.html
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
