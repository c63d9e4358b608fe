"""Read pair files into the pools seed, unverified and wild, with every row accounted for.

Paper: Sec. 3.1 and App. C (sources, structural filter, exact dedup, decontamination).
Inputs: Parquet or JSONL files of (prompt, chosen, rejected), by `data=FOLDER` (file names begin with the pool they feed: seed…, unverified…, wild…)
or by a list of sources in a config file: your own, and published sets of the catalogue (docs/sources.md; jobs/configs/ingest_synpref.yaml has all).
Benchmark files by `decontaminate`. Any number of pairs, in bounded memory (docs/ingest.md).
Outputs: `pools/`, `rejects/ingest/` with every refused row and its reason, and `decontamination/` with every benchmark prompt that a pair meets.

`--dry-run` opens the files, reads the first rows of each source, and says what they would give; nothing is written.

Laptop:  python jobs/ingest.py --config jobs/configs/laptop_ingest.yaml data=examples/data/pools workspace=workspace
Cluster: ray job submit --working-dir . -- python jobs/ingest.py --config jobs/configs/ingest.yaml workspace=s3://bucket/run
"""

import sys
from collections.abc import Sequence

from synpref_ray.pipeline.ingest import check_ingest, run_ingest
from synpref_ray.pipeline.ingest_preview import preview_ingest
from synpref_ray.pipeline.ingest_sources import IngestConfig
from synpref_ray.pipeline.job import run_job


def main(argv: Sequence[str]) -> int:
    """Run the job; see `run_job` for the exit codes."""
    return run_job("ingest", argv, IngestConfig, run_ingest, check=check_ingest, preview=preview_ingest, usage=__doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
