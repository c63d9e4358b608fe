"""Run the chaos suite, print its table, and write it as JSON: `python -m tests.chaos.run report=chaos.json [only=stage2-laptop-3,…] [folder=DIR]`."""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from synpref_ray.reporting.table import format_table
from tests.chaos.suite import SCENARIOS, Suite, summarise

MIN_KILLS = 50


def main(arguments: list[str]) -> int:
    """Run the named scenarios, or all; 1 if one fails or all together delivered too few kills."""
    given = dict(argument.split("=", 1) for argument in arguments)
    only = {name for name in given.get("only", "").split(",") if name}
    os.environ["HF_HUB_OFFLINE"] = "1"
    began, lines, failed = time.monotonic(), [], []
    parent = given.get("folder")
    with tempfile.TemporaryDirectory(prefix="chaos-", dir=parent) as folder, Suite.started(Path(folder) / "loop") as suite:
        print(f"quiet run: {time.monotonic() - began:.0f} s", flush=True)
        for scenario in SCENARIOS:
            if only and scenario.name not in only:
                continue
            try:
                lines.append(suite.run(scenario))
            except AssertionError as error:
                failed.append({"scenario": scenario.name, "error": str(error)})
                print(f"FAILED {scenario.name}: {error}", flush=True)
            else:
                print(json.dumps(lines[-1]), flush=True)
    report = {**summarise(lines), "failed": failed, "seconds": round(time.monotonic() - began, 1)}
    if "report" in given:
        Path(given["report"]).write_text(json.dumps(report, indent=1) + "\n")
    again = ("rows_scored_embedded_trained_again", "requests_asked_again")
    columns = ("kills", "storage_faults", "driver_starts", *again, "tables_and_records", "seconds")
    rows = [(line["scenario"], *(_cell(line[column]) for column in columns)) for line in lines]
    header = ("scenario", "kills", "storage faults", "starts", "rows again", "requests again", "tables equal", "seconds")
    print(format_table(header, rows))
    print(f"{report['kills']} kills {report['kills_by_kind']}, {len(failed)} scenarios failed, {report['seconds']:.0f} s")
    return 1 if failed or (not only and report["kills"] < MIN_KILLS) else 0


def _cell(value: object) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in value.items()) if isinstance(value, dict) else str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
