"""Train a Bradley-Terry reward model on a set of the workspace, or on a file of pairs.

Paper: Sec. 4 and App. E.
Inputs: `set` (a name under sets/) or `pairs` (a file); gold pairs that pick the checkpoint, if any; a backbone.
Outputs: `models/<name>-<fingerprint>/`, which plain AutoModelForSequenceClassification loads, with its training record, parity record and model card.
Exit 2 if the engines disagree about the model (docs/serving.md): it is stored, and refused for curation.

Laptop:  python jobs/train.py --config jobs/configs/laptop_train.yaml set=curated-wild-kept-and-flipped
Cluster: ray job submit --working-dir . -- python jobs/train.py --config jobs/configs/family/llama-3.1-8b.yaml workspace=s3://bucket/run
"""

import sys
from collections.abc import Sequence

from synpref_ray.pipeline.job import run_job
from synpref_ray.pipeline.train_set import TrainJobConfig, check_train, plan_train, run_train


def main(argv: Sequence[str]) -> int:
    """Run the job; see `run_job` for the exit codes."""
    return run_job("train", argv, TrainJobConfig, run_train, check=check_train, plan=plan_train, usage=__doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
