"""Have people verify pairs in the browser, and export what they said for Stage 1. Verbs: queue, user, serve, status, export,
to_label_studio, from_label_studio.

Paper: Sec. 3.2 (human verification). Guide: docs/annotation.md.
Inputs: `queue` takes a tagged pool of the workspace (Stage 1 says which); the rest works on the annotation database.
Outputs: annotation/ in the workspace: queues; verdicts, votes, attributes, skips and adjudications (Parquet); agreement.json.

Laptop:  python jobs/annotate.py serve --config jobs/configs/annotate.yaml workspace=workspace
Cluster: the same on one node, with TLS files or behind a proxy, and database=postgresql+psycopg://user@host/name where many people work
"""

import sys
from collections.abc import Sequence

from synpref_ray.pipeline.annotation import VERBS, AnnotateConfig, check_annotate
from synpref_ray.pipeline.job import run_verb


def main(argv: Sequence[str]) -> int:
    """Run the job; see `run_job` for the exit codes."""
    return run_verb("annotate", argv, AnnotateConfig, VERBS, check=check_annotate, usage=__doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
