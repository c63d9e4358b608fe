"""The finished runs of a workspace as measurements: their steps with work and seconds, and their metrics. Serves the planner."""

import json
from typing import Any

from synpref_ray.errors import InputError
from synpref_ray.planning.timing import MeasuredRuns, measured_steps
from synpref_ray.tables.storage import Storage


def read_runs(storage: Storage) -> tuple[MeasuredRuns, dict[str, Any]]:
    """Return the steps of a workspace's finished runs (those that computed something), and their metrics laid over each other.

    Raises:
        InputError: there is none.
    """
    steps, seconds, metrics = [], 0.0, {}
    for folder in sorted(storage.list_folders("runs")):
        path = f"runs/{folder}"
        if folder.startswith("plan-") or not storage.exists(f"{path}/metrics.json"):
            continue
        events = [json.loads(line) for line in storage.read_bytes(f"{path}/events.jsonl").decode().splitlines()]
        found = measured_steps(events)
        values = storage.read_json(f"{path}/metrics.json")
        metrics.update(values)
        if found:
            steps += found
            seconds += next((event["seconds"] for event in reversed(events) if event["event"] == "finish"), 0.0)
    if not steps:
        raise InputError(f"{storage.url} has no finished run with a step that computed something: run the demo (make demo) or the jobs first")
    return MeasuredRuns(tuple(steps), seconds), metrics
