"""Hands samples to Ray, whose agent on every node serves them to Prometheus; what is measured stands in `reporting/metrics.py`."""

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import ray
from ray.util.metrics import Counter, Gauge, Histogram

from synpref_ray.reporting.metrics import Metric, Sample, gold_sample, training_samples

if TYPE_CHECKING:  # the annotation server and every other job that counts shards need no torch for it
    from synpref_ray.reward.packing import PackingStats
    from synpref_ray.reward.training_record import EvaluationRecord, StepRecord

KEEP_SECONDS = 8.0  # within Ray's own report of every 10 s


def export(samples: Iterable[Sample]) -> None:
    """Add samples to the metrics of this process; without Ray nothing is done, and nothing is computed."""
    if not ray.is_initialized():
        return
    session = ray.get_runtime_context().get_node_id()
    for sample in samples:
        _add(_instrument(sample.metric, session), sample)
        if sample.metric.kind == "gauge":
            _GAUGES.keep(sample, session)


class _Gauges:
    """Sets the gauges of this process again and again: Ray 2.60 serves one for two reports (20 s) after it was set, and then no more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._session = ""
        self._last: dict[tuple[str, tuple[tuple[str, str], ...]], Sample] = {}
        self._thread: threading.Thread | None = None

    def keep(self, sample: Sample, session: str) -> None:
        """Set this sample again until another of its metric and tags comes, or this process leaves the cluster."""
        with self._lock:
            if session != self._session:
                self._session = session
                self._last.clear()
            self._last[sample.metric.name, tuple(sorted(sample.tags.items()))] = sample
            if self._thread is None:
                self._thread = threading.Thread(target=self._set_again, name="gauges", daemon=True)
                self._thread.start()

    def _set_again(self) -> None:
        while True:
            time.sleep(KEEP_SECONDS)
            with self._lock:
                if not ray.is_initialized() or ray.get_runtime_context().get_node_id() != self._session:
                    self._last.clear()
                for sample in self._last.values():
                    _add(_instrument(sample.metric, self._session), sample)


_GAUGES = _Gauges()


def _add(instrument: Any, sample: Sample) -> None:
    tags = dict(sample.tags)
    match sample.metric.kind:
        case "counter":
            if sample.value > 0:  # Ray refuses to add nothing
                instrument.inc(float(sample.value), tags)
        case "gauge":
            instrument.set(float(sample.value), tags)
        case "histogram":
            instrument.observe(float(sample.value), tags)


@cache
def _instrument(metric: Metric, session: str) -> Counter | Gauge | Histogram:
    """Return Ray's object for a metric, one per process and cluster (a process may leave one Ray and start another)."""
    if metric.kind == "histogram":
        return Histogram(metric.name, metric.description, boundaries=list(metric.buckets), tag_keys=metric.tags)
    return (Counter if metric.kind == "counter" else Gauge)(metric.name, metric.description, metric.tags)


@dataclass(frozen=True)
class TrainingWatch:
    """Exports what the first worker of a training sees; goes to that worker. `model` is the name of the model in the making."""

    model: str

    def step(self, record: "StepRecord", tokens: "PackingStats") -> None:
        """Called after every optimizer step, with the tokens of its global batch."""
        export(training_samples(self.model, pairs=record.num_pairs, counters=tokens.counters(), loss=record.loss))

    def evaluation(self, record: "EvaluationRecord") -> None:
        """Called after every evaluation on gold."""
        export([gold_sample(self.model, record.accuracy)])
