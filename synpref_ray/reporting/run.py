"""A run folder: resolved config, versions, events as JSON lines, metrics; one per invocation of a job."""

import json
import logging
import time
from collections.abc import Mapping
from typing import Any

import yaml

from synpref_ray.config import Settings
from synpref_ray.credentials import redact
from synpref_ray.tables.storage import Storage
from synpref_ray.versions import package_versions

logger = logging.getLogger(__name__)
MAX_MESSAGE_CHARACTERS = 1000  # ours: Ray's errors carry whole tracebacks, which are in the job's log


class Run:
    """One run of one job: where it writes its record, and the steps it has reported."""

    def __init__(self, storage: Storage, job: str, settings: Settings):
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + f"-{time.time_ns() % 1_000_000:06d}"
        self.storage = storage
        self.job = job
        self.folder = f"runs/{job}-{stamp}"
        self.metrics: dict[str, Any] = {}
        self.steps: list[dict[str, Any]] = []
        self._events: list[str] = []
        self._stopped = False
        self._started = time.monotonic()
        storage.write_bytes(f"{self.folder}/config.yaml", yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False).encode())
        storage.write_json(f"{self.folder}/versions.json", package_versions())
        self.event("start", job=job)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds since the run began."""
        return time.monotonic() - self._started

    def event(self, kind: str, **fields: Any) -> None:
        """Record what happened; the file is rewritten whole, since object storage cannot append."""
        self._events.append(json.dumps({"time": time.time(), "event": kind, **fields}, ensure_ascii=False))
        self.storage.write_bytes(f"{self.folder}/events.jsonl", ("\n".join(self._events) + "\n").encode())

    def step(self, name: str, *, rows: int, computed: int, rejected: Mapping[str, int], seconds: float, **more: Any) -> None:
        """Report a finished step in one line and one event: rows in, computed now, refused by reason, pairs per second."""
        fields = {"step": name, "rows": rows, "computed": computed, "rejected": dict(rejected), "seconds": round(seconds, 2), **more}
        self.steps.append(fields)
        self.event("step", **fields)
        rate = f"{computed / seconds:.1f} pairs/s" if computed and seconds > 0 else "nothing to compute"
        refused = f"; refused: {', '.join(f'{count} {reason}' for reason, count in rejected.items())}" if rejected else ""
        extra = "".join(f", {key} {value}" for key, value in more.items())
        logger.info("%s: %d pairs, %d computed in %.1f s (%s)%s%s", name, rows, computed, seconds, rate, refused, extra)

    def stop(self, error: BaseException) -> None:
        """Record in one event why the run ended before its time: the status shows it. The first reason stays."""
        if self._stopped:
            return
        self._stopped = True
        asked = isinstance(error, KeyboardInterrupt | SystemExit)  # Ctrl-C, or SIGTERM, which Ray turns into an exit
        message = "the process was asked to stop" if asked else redact(" ".join(str(error).split()))[:MAX_MESSAGE_CHARACTERS]
        self.event("stop", error=type(error).__name__, message=message)

    def finish(self) -> None:
        """Write metrics.json, the run's last word."""
        self.metrics.setdefault("seconds", round(self.seconds, 2))
        self.storage.write_json(f"{self.folder}/metrics.json", self.metrics)
        self.event("finish", seconds=round(self.seconds, 2))
