"""The planner's estimate of the demo against the demo: a demo on a part of the data is run and measured, the whole one is estimated from it.

    python -m benchmarks.planning --work DIR                       # runs both demos: about 10 and 20 to 25 minutes on two quiet cores
    python -m benchmarks.planning --work DIR --demo workspace/demo # the whole demo has run already, on this machine, as quiet as now

Both demos are `jobs/demo.py` with the same configs; the part takes every third pair of each pool and a third of the annotator's budget. The estimate
is what `jobs/plan.py like=demo` says of the part's workspace. Times go with whatever else the machine does: run it on a quiet one, or say what ran.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

REPOSITORY = Path(__file__).parents[1]
DATA = REPOSITORY / "examples" / "data"
PART = 3
SEED_GOLD, ROUND_GOLD = 76, 33  # of jobs/configs/demo.yaml
BOUND = 0.3
"""The estimate may miss the measured time by this share of it."""


def make_part(folder: Path) -> Path:
    """Write every third pair of the demo's data."""
    (folder / "pools").mkdir(parents=True, exist_ok=True)
    for file in sorted((DATA / "pools").glob("*.jsonl")):
        lines = file.read_text(encoding="utf-8").splitlines()
        (folder / "pools" / file.name).write_text("\n".join(lines[::PART]) + "\n", encoding="utf-8")
    held_out = pq.read_table(DATA / "held_out.parquet")
    pq.write_table(held_out.take(list(range(0, held_out.num_rows, PART))), folder / "held_out.parquet")
    shutil.copyfile(DATA / "truth.parquet", folder / "truth.parquet")
    return folder


def run_job(name: str, *words: str) -> dict[str, Any]:
    """Run a job and return its metrics."""
    done = subprocess.run(
        [sys.executable, f"jobs/{name}.py", *words], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=sys.stderr, text=True, check=True
    )
    folder = Path(done.stdout.strip().splitlines()[-1].removeprefix("run: "))
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return metrics


def measured_seconds(workspace: Path) -> float:
    """Return the seconds of the first demo that ran in a workspace: later ones compute nothing."""
    runs = sorted((workspace / "runs").glob("demo-*/metrics.json"))
    if not runs:
        raise SystemExit(f"{workspace} has no finished demo")
    return float(json.loads(runs[0].read_text(encoding="utf-8"))["seconds"])


def main() -> int:
    """Run the comparison; 1 where the estimate misses the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="an empty folder for the demos")
    parser.add_argument("--demo", type=Path, help="the workspace of a whole demo that ran before")
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    arguments = parser.parse_args()
    config = ("--config", "jobs/configs/demo.yaml")
    work = arguments.work.resolve()
    part = work / "part"
    data = make_part(work / "data")
    budget = (f"seed_gold_pairs={SEED_GOLD // PART}", f"round_gold_pairs={ROUND_GOLD // PART}")
    run_job("demo", *config, f"workspace={part}", f"data={data}", *budget)
    whole = arguments.demo.resolve() if arguments.demo else work / "whole"
    if not arguments.demo:
        run_job("demo", *config, f"workspace={whole}")
    seconds = measured_seconds(whole)
    time = run_job("plan", f"workspace={part}", "like=demo", f"expected_seconds={seconds}")["time"]
    found = {"part_seconds": measured_seconds(part), "estimated": time["seconds"], "measured": seconds, "ratio": time["ratio"]}
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2), encoding="utf-8")
    print(f"part {found['part_seconds']:.0f} s; whole: estimated {found['estimated']:.0f} s, measured {seconds:.0f} s, ratio {found['ratio']:.2f}")
    return int(abs(time["ratio"] - 1) > BOUND)


if __name__ == "__main__":
    sys.exit(main())
