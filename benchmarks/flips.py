"""How well wrong labels are found: rounds of Stage 1, then Stage 2, over pairs whose truth is known; precision, recall, accuracy before and after.

Paper: Table 19. The data is the demo's pool, or a slice of real human pairs with a share of the labels turned round by seed (made here, see
`examples/make_flipped_slice.py`). The truth is read by the simulated annotator for the budgeted pairs, and by the report at the end.

    python -m benchmarks.flips --workspace DIR                        # the demo's pool
    python -m benchmarks.flips --workspace DIR --real-data DATA       # DATA/hh_rlhf and DATA/human_extra: 600 pairs, 30 % turned round
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks._common import machine
from benchmarks._jobs import ROOT, read_report, run_job, simulated, write_page
from examples.make_flipped_slice import main as make_slice
from synpref_ray.errors import SynprefError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the jobs and print the report."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    made.add_argument("--workspace", type=Path, required=True, help="a folder of its own; run again after a kill, it goes on")
    made.add_argument("--data", type=Path, default=ROOT / "examples" / "data", help="folder with pools/*.jsonl and truth.parquet")
    made.add_argument("--real-data", type=Path, help="make a slice of these pairs instead")
    made.add_argument("--pairs", type=int, default=600)
    made.add_argument("--flipped", type=float, default=0.3)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--seed-gold", type=int, default=70, help="seed pairs that the simulated annotator verifies")
    made.add_argument("--round-gold", type=int, default=25, help="pairs of each round that it verifies")
    made.add_argument("--config", default="laptop", help="which configs of both stages: laptop")
    made.add_argument("--out", type=Path, help="JSON of all that was measured")
    arguments = made.parse_args(argv)
    data, workspace = arguments.data, f"workspace={arguments.workspace / 'ws'}"
    if arguments.real_data:
        data = arguments.workspace / "data"
        some = [f"--pairs={arguments.pairs}", f"--flipped={arguments.flipped}", f"--seed={arguments.seed}"]
        if make_slice([f"--data={arguments.real_data}", f"--output={data}", *some]):
            return 2
    configs = {stage: ["--config", f"jobs/configs/{arguments.config}_{stage}.yaml", workspace] for stage in ("ingest", "stage1", "stage2")}
    started = time.monotonic()
    try:
        run_job("ingest", *configs["ingest"], f"data={data.resolve() / 'pools'}")
        annotator = simulated(data.resolve(), seed_pairs=arguments.seed_gold, round_pairs=arguments.round_gold)
        stage1 = run_job("stage1", *configs["stage1"], f"stop.max_rounds={arguments.rounds}", *annotator)
        print(stage1["summary"])
        stage2 = run_job("stage2", *configs["stage2"])
        print(stage2["summary"])
        truth, page = data.resolve() / "truth.parquet", arguments.workspace / "report.html"
        evidence = read_report("labels", workspace, f"truth={truth}")
        write_page(workspace, truth, page)
    except SynprefError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(_table(evidence))
    seconds = time.monotonic() - started
    print(f"\n{seconds / 60:.1f} minutes (what an earlier run had computed was not computed again); report: {page}")
    if arguments.out:
        found = {"machine": machine(), "arguments": {k: str(v) for k, v in vars(arguments).items()}, "seconds": seconds, "labels": evidence}
        arguments.out.write_text(json.dumps({**found, "stage1": stage1["stage1"], "stage2": stage2["stage2"]}, indent=2) + "\n")
    return 0


def _table(evidence: Sequence[dict[str, dict[str, dict[str, float]]]]) -> str:
    """Return a Markdown table of the report."""
    lines = ["| labels | source | wrong | flips | precision | recall | right before | right after |", "|---|---|---|---|---|---|---|---|"]
    for entry in evidence:
        flips, quality = entry["flips"], entry["quality"]
        cells = [_share(flips["precision"]), _share(flips["recall"]), _share(quality["raw"]), _share(quality["kept_and_flipped"])]
        counts = [str(flips["recall"]["num_pairs"]), str(flips["precision"]["num_pairs"])]
        lines.append(f"| {' | '.join([str(entry['stage']), str(entry['source']), *counts, *cells])} |")
    return "\n".join(lines)


def _share(value: dict[str, float]) -> str:
    if not value["num_pairs"]:
        return "-"
    return f"{100 * value['accuracy']:.1f} % ({100 * value['low']:.0f} to {100 * value['high']:.0f}) of {value['num_pairs']}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
