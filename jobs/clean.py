"""Remove what of a workspace nothing refers to any more: old table versions, gathered pools, models of earlier rounds, leftovers of trainings.

Inputs: the workspace, and nothing else; no Ray, no GPU. `--dry-run` lists what would go, how big it is, and what is kept and why, and writes nothing.
Outputs: the same list, in `metrics.json` of its run folder what was removed. It refuses while a job runs in the workspace. Guide: docs/faults.md.

Laptop:  python jobs/clean.py workspace=workspace --dry-run, then without --dry-run; unfinished=true takes what a stopped job would go on from, too
Cluster: the same on any machine that can write to the workspace: python jobs/clean.py workspace=s3://bucket/run --dry-run
"""

import sys
from collections.abc import Sequence

from synpref_ray.pipeline.clean import CleanConfig, list_garbage, remove_garbage
from synpref_ray.pipeline.job import run_reader, run_verb

DRY_RUN = "--dry-run"


def main(argv: Sequence[str]) -> int:
    """Run the job; see `run_job` for the exit codes."""
    if DRY_RUN in argv or "--help" in argv or "-h" in argv:
        return run_reader("clean", [word for word in argv if word != DRY_RUN], CleanConfig, {"": list_garbage}, usage=__doc__)
    return run_verb("clean", argv, CleanConfig, {"": remove_garbage}, usage=__doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
