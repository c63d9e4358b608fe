"""Everything that a report reads of a workspace: its status, the records of rounds and stages, training records, and what its runs measured.

Read only, and bounded: records are small files, one request each; of the runs the latest `max_runs` are read.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import yaml

from synpref_ray.errors import InputError
from synpref_ray.reporting.status import REQUESTS_AT_ONCE, WorkspaceStatus, latest_runs, read_status
from synpref_ray.tables.models import RECORD_FILE
from synpref_ray.tables.storage import Storage

Values = Mapping[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """One run of a job: what it was asked, what happened, and what it measured (nothing before it ends)."""

    name: str
    config: Values
    events: tuple[Values, ...]
    metrics: Values

    @property
    def job(self) -> str:
        """The job's name."""
        return self.name.rsplit("-", 3)[0]

    @property
    def time(self) -> float:
        """When it began, in seconds since 1970; 0 where it left no event."""
        return float(self.events[0]["time"]) if self.events else 0.0


@dataclass(frozen=True)
class Records:
    """A workspace's records; `runs` begin with the latest, `trainings` are by model name in the order of their stages."""

    status: WorkspaceStatus
    runs: tuple[RunRecord, ...]
    rounds: tuple[Values, ...]
    stage1: Values | None
    stage2: Values | None
    trainings: Mapping[str, Values]

    @property
    def is_simulated(self) -> bool:
        """Whether gold came from an annotator that reads known truth."""
        return any(record.get("simulated_gold") for record in (*self.rounds, self.stage1 or {}, self.stage2 or {}))

    def latest(self, key: str) -> tuple[RunRecord, Any] | None:
        """Return the latest run that measured `key`, with what it measured."""
        return next(((run, run.metrics[key]) for run in self.runs if run.metrics.get(key)), None)


def read_records(storage: Storage, *, max_runs: int, current: Mapping[str, Values] | None = None) -> Records:
    """Read a workspace.

    Args:
        max_runs: how many of the latest runs are looked into.
        current: metrics of runs that are still going on, by run folder.

    Raises:
        InputError: there is no workspace.
    """
    status = read_status(storage, max_runs=1)
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as threads:
        runs = list(threads.map(lambda folder: _read_run(storage, folder, current or {}), latest_runs(storage, max_runs)))
        trainings = dict(zip(status.models, threads.map(lambda name: _json(storage, f"models/{name}/{RECORD_FILE}"), status.models), strict=True))
    rounds = sorted(entry.name for entry in storage.list_entries("rounds") if entry.is_folder and entry.name.isdigit())
    records = [_json(storage, f"rounds/{name}/round.json") for name in rounds]
    return Records(
        status=status,
        runs=tuple(sorted(runs, key=lambda run: run.time, reverse=True)),
        rounds=tuple(record for record in records if record is not None),
        stage1=_json(storage, "rounds/stage1.json"),
        stage2=_json(storage, "rounds/stage2.json"),
        trainings={name: record for name, record in trainings.items() if record is not None},
    )


def _read_run(storage: Storage, folder: str, current: Mapping[str, Values]) -> RunRecord:
    metrics = current.get(folder) or _json(storage, f"{folder}/metrics.json") or {}
    config = yaml.safe_load(_bytes(storage, f"{folder}/config.yaml") or b"{}")
    events = (json.loads(line) for line in (_bytes(storage, f"{folder}/events.jsonl") or b"").decode().splitlines())
    return RunRecord(folder.rsplit("/", 1)[-1], config if isinstance(config, dict) else {}, tuple(events), metrics)


def _bytes(storage: Storage, path: str) -> bytes | None:
    try:
        return storage.read_bytes(path)
    except InputError:  # a run that has just begun, a stage that has not
        return None


def _json(storage: Storage, path: str) -> Any:
    return storage.read_json(path) if storage.exists(path) else None


def steps_of(runs: Sequence[RunRecord]) -> Iterator[Values]:
    """Yield the events of finished steps, the oldest first."""
    for run in reversed(runs):
        yield from (event for event in run.events if event.get("event") == "step")


def numbers_in(value: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield every number in nested values with its path, keys joined by `/`; lists longer than 16 are left out."""
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield prefix, float(value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from numbers_in(inner, f"{prefix}/{key}" if prefix else str(key))
    elif isinstance(value, list) and len(value) <= 16:
        for place, inner in enumerate(value):
            yield from numbers_in(inner, f"{prefix}/{place}")
