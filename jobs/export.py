"""Write a set of the workspace as a data set for others: Parquet and a card, filtered by licence; read by `datasets`, TRL and OpenRLHF as it is.

Paper: the data statement (sources whose licences permit it, attribution).
Inputs: a set (curated-wild-kept, curated-wild-silver-kept-and-flipped …) and, where they are there, the sidecars attributes, hygiene, pii,
token_lengths and decontamination of its pools.
Outputs: a folder with data/train-*.parquet, README.md (the card) and export.json (all counts). Nothing leaves this machine but by the verb push,
which uploads an export that has been made to a repository of the Hugging Face Hub (the token comes from HF_TOKEN or `hf auth login`).

Laptop:  python jobs/export.py workspace=workspace set=curated-wild-kept out=FOLDER "licences=[mit, apache-2.0, cc-by-4.0]"
         python jobs/export.py workspace=workspace set=curated-wild-kept where.decision_reason=[both_rms_agree] at_least.margin_gold=1.0
         python jobs/export.py push folder=FOLDER repo=me/my-pairs --dry-run
Cluster: ray job submit --working-dir . -- python jobs/export.py workspace=s3://bucket/run set=curated-wild-kept out=s3://bucket/curated
"""

import sys
from collections.abc import Sequence

from synpref_ray.pipeline.export import ExportConfig, check_export, run_export
from synpref_ray.pipeline.job import run_verb
from synpref_ray.pipeline.push import PushConfig, check_push, run_push


def main(argv: Sequence[str]) -> int:
    """Run the job; see `run_job` for the exit codes."""
    if argv[:1] == ["push"]:
        return run_verb("export", argv[1:], PushConfig, {"": run_push}, check=check_push, usage=__doc__)
    return run_verb("export", argv, ExportConfig, {"": run_export}, check=check_export, usage=__doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
