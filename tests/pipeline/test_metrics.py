"""A small step on a real Ray: each metric stands in Prometheus' text format at the node's own endpoint, with what was computed."""

import re
import time
import urllib.request
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pytest

from synpref_ray.pipeline import progress
from synpref_ray.pipeline.metrics import TrainingWatch, export
from synpref_ray.pipeline.progress import seconds_left
from synpref_ray.pipeline.steps import Output, Resources, ShardKey, Step, StepInput, run_step
from synpref_ray.reporting.metrics import METRICS, judge_samples
from synpref_ray.reward.packing import PackingStats
from synpref_ray.reward.training_record import EvaluationRecord, StepRecord
from synpref_ray.schema import DropReason
from synpref_ray.tables.sidecars import Sidecar
from tests.cluster.test_dashboards import QUERIES, parse, selectors
from tests.pipeline.test_steps import LENGTHS, make_pool

UP_SECONDS = 600.0  # workers report every ten seconds; a busy machine takes longer
GAUGE_SECONDS = 20.0  # how long Ray serves a gauge that nobody sets again
COUNTERS = {"prompt_tokens": 30.0, "cached_prompt_tokens": 20.0, "output_tokens": 5.0, "requests_sent": 4.0, "from_journal": 1.0, "cost": 0.25}


class Engine:
    """Refuses the first pair of every shard, and counts as an LLM step does."""

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        reasons = [DropReason.UNPARSABLE_REPLY.value] + [None] * (shard.num_rows - 1)
        columns = [shard["pair_id"], pa.nulls(shard.num_rows, pa.int64()), pa.array(reasons, pa.string())]
        return pa.table(columns, schema=LENGTHS), COUNTERS


def scrape(ray: ModuleType) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Return our series as this node's endpoint serves them: by name, with their tags and values."""
    node = ray.nodes()[0]
    with urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    series = defaultdict(list)
    for name, tags, value in re.findall(r"^(ray_synpref_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        series[name].append((dict(re.findall(r'(\w+)="([^"]*)"', tags)), float(value)))
    return series


def total(series: list[tuple[dict[str, str], float]], **tags: str) -> float:
    """Return the sum over the series with these tags, whichever worker they come from."""
    return sum(value for found, value in series if tags.items() <= found.items())


def unanswered(found: Mapping[str, list[tuple[dict[str, str], float]]]) -> list[str]:
    """Return what the dashboard asks for and no served series answers, by panel; of GPUs there is nothing to serve here."""
    missing = []
    for title, query in QUERIES:
        for selector in selectors(parse(query)):
            wanted = [(matcher.name, matcher.value) for matcher in selector.matchers.matchers]
            if ("resource", "gpu") in wanted:
                continue
            series = found.get(selector.name, [])
            if not any(all(re.fullmatch(value, tags.get(name, "")) for name, value in wanted) for tags, _ in series):
                missing.append(f"{title}: {selector.name} {wanted}")
    return missing


def step_record() -> StepRecord:
    values = {name: 0.5 for name, field in StepRecord.model_fields.items() if field.annotation is float}
    return StepRecord(step=1, num_pairs=16, num_tokens=900, mfu=None, **values)  # type: ignore[arg-type]


@pytest.mark.ray
def test_each_metric_is_served_with_what_was_computed(ray: ModuleType, tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "seed", [3, 2, 4])
    step = Step(
        "tag",
        1,
        Engine,
        (Output("lengths", LENGTHS),),
        {},
        title="tag metrics",
        model="small",
        resources=Resources(2, num_cpus=0.5, concurrent_shards=2),
    )
    run_step(step, [StepInput(pool, ("chosen",))])
    export(judge_samples("big", "audit", 0.75, 0.6))
    watch = TrainingWatch("best-r01-metrics")
    watch.step(step_record(), PackingStats(sequence_tokens=100, unique_tokens=60, computed_tokens=70, padded_tokens=80))
    watch.evaluation(EvaluationRecord(step=1, accuracy=0.8, loss=0.5, margin=0.1, num_pairs=9, seconds=1.0))

    wanted = {name for metric in METRICS for name in metric.series}
    deadline, found = time.monotonic() + UP_SECONDS, scrape(ray)
    while not (wanted <= found.keys() and total(found["ray_synpref_shards_total"], step="tag metrics") == 3 and not unanswered(found)):
        if time.monotonic() > deadline:
            break
        time.sleep(1)
        found = scrape(ray)
    assert wanted <= found.keys(), wanted - found.keys()
    assert unanswered(found) == []
    ours = {"step": "tag metrics"}
    assert total(found["ray_synpref_pairs_total"], **ours, model="small") == 9
    assert total(found["ray_synpref_shards_total"], **ours) == total(found["ray_synpref_shard_seconds_count"], **ours) == 3
    assert total(found["ray_synpref_rejects_total"], **ours, reason="unparsable_reply") == 3
    kinds = {kind: total(found["ray_synpref_tokens_total"], **ours, kind=kind) for kind in ("prompt", "cached_prompt", "output")}
    assert kinds == {"prompt": 90, "cached_prompt": 60, "output": 15}
    assert total(found["ray_synpref_requests_total"], **ours, source="journal") == 3
    assert total(found["ray_synpref_cost_total"], **ours) == pytest.approx(0.75)
    assert total(found["ray_synpref_pending_shards"], **ours) == total(found["ray_synpref_eta_seconds"], **ours) == 0
    assert total(found["ray_synpref_judge_agreement_low"], judge="big", split="audit") == pytest.approx(0.6)
    assert total(found["ray_synpref_tokens_total"], model="best-r01-metrics", kind="shared") == 30
    assert total(found["ray_synpref_gold_accuracy"], model="best-r01-metrics") == pytest.approx(0.8)


@pytest.mark.slow
@pytest.mark.ray
def test_a_gauge_that_was_set_once_stays(ray: ModuleType) -> None:
    export(judge_samples("lasting", "working", 0.75, 0.6))
    end = time.monotonic() + 3 * GAUGE_SECONDS
    while time.monotonic() < end:
        time.sleep(1)
    assert total(scrape(ray)["ray_synpref_judge_agreement"], judge="lasting") == pytest.approx(0.75)


def test_the_time_left_follows_the_pace() -> None:
    assert seconds_left(0, 10, 5.0) is None
    assert seconds_left(20, 10, 5.0) == 2.5
    assert seconds_left(20, 0, 5.0) == 0.0


def test_waiting_for_nodes_does_not_count_for_the_time_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pool, now, told = make_pool(tmp_path, "seed", [2, 2, 4]), [0.0], []
    monkeypatch.setattr(progress, "export", lambda samples: told.append({sample.metric.name: sample.value for sample in samples}))
    sidecar = Sidecar(pool, "lengths", "a" * 32)
    watch = progress.Progress("score", [(sidecar, {0: 2, 1: 2, 2: 4})], clock=lambda: now[0])
    shard = LENGTHS.empty_table()
    for when, number in ((3600.0, None), (3700.0, 0), (3750.0, None), (3800.0, 1)):
        now[0] = when
        if number is not None:
            sidecar.write(number, shard)
        watch._export_once()
    assert [sample.get("synpref_eta_seconds") for sample in told] == [None, None, None, 4 * 100 / 2]
    now[0] = 4000.0  # nothing comes any more
    watch._export_once()
    assert told[-1] == {"synpref_pending_shards": 1, "synpref_eta_seconds": 4 * 300 / 2}
