"""A real job in a process of its own, with stand-ins for its models: `run_job.py LOG TRUTH INLINE_ROWS JOB ARGUMENTS…`, exit codes as of the job."""

import importlib
import sys

from synpref_ray.pipeline import gathering, steps
from tests.chaos.stand_ins import use_stand_ins

if __name__ == "__main__":
    log, truth, inline_rows, job, *arguments = sys.argv[1:]
    use_stand_ins(log, truth)
    steps.INLINE_ROWS = gathering.INLINE_ROWS = int(inline_rows)  # few rows: rules run as tasks of the cluster, as they do at scale
    sys.exit(importlib.import_module(f"jobs.{job}").main(arguments))
