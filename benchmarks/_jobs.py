"""Runs jobs of the checkout as a user does, one process each, for benchmarks of what the jobs decide."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from synpref_ray.errors import SynprefError
from synpref_ray.tables.storage import Storage

ROOT = Path(__file__).parents[1]


def run_job(job: str, *arguments: str) -> dict[str, Any]:
    """Run a job and return its metrics; its own messages go to standard error.

    Raises:
        SynprefError: it did not end with exit code 0.
    """
    output = _run(job, *arguments)
    folder = Storage(output.strip().splitlines()[-1].removeprefix("run: "))
    metrics: dict[str, Any] = folder.read_json("metrics.json")
    return {**metrics, "summary": output}


def read_report(*arguments: str) -> Any:
    """Run `jobs/report.py` and return its JSON."""
    return json.loads(_run("report", *arguments, "format=json"))


def write_page(workspace: str, truth: Path, out: Path) -> None:
    """Write the report of a workspace (`workspace=DIR`) as a page, with labels and flips by source.

    Raises:
        SynprefError: the job did not end with exit code 0.
    """
    _run("report", "html", workspace, f"truth={truth}", f"out={out}")


def _run(job: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment, check=False)
    if done.returncode:
        raise SynprefError(f"jobs/{job}.py {' '.join(arguments)} ended with exit code {done.returncode}")
    return done.stdout


def simulated(data: Path, *, seed_pairs: int, round_pairs: int) -> list[str]:
    """Return the settings of an annotator that reads the truth of a data folder, for a budget of pairs."""
    return [
        "annotator.kind=simulated",
        f"annotator.path={data / 'truth.parquet'}",
        f"annotator.seed_pairs={seed_pairs}",
        f"annotator.round_pairs={round_pairs}",
    ]
