"""The Grafana dashboard and Prometheus' settings: every query is PromQL, and asks only for what the code exports, by tags that it has."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from synpref_ray.reporting.metrics import METRICS, REQUEST_SOURCES, TOKEN_KINDS

MONITORING = Path(__file__).parents[2] / "cluster" / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana" / "dashboards" / "synpref.json").read_text(encoding="utf-8"))
SERIES = {series: metric for metric in METRICS for series in metric.series}
VARIABLES = {"$__rate_interval": "1m", "$__range": "3h", "$gpu_hour_price": "2.5", "$cpu_hour_price": "0.05", "$step": ".*"}
QUERIES = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]


def parse(query: str) -> Any:
    """Return the query's syntax tree, the dashboard's variables filled in."""
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    assert "$" not in query, f"an unknown variable: {query}"
    return promql_parser.parse(query)


def selectors(node: Any) -> Iterator[Any]:
    """Yield every vector selector of a syntax tree."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for name in ("expr", "lhs", "rhs", "param", "vector_selector", "vs", "args"):
        child = getattr(node, name, None)
        for inner in child if isinstance(child, list) else [child]:
            if inner is not None:
                yield from selectors(inner)


def grouped_by(query: str) -> set[str]:
    """Return the labels that the query keeps, `le` of histograms aside."""
    return {label.strip() for labels in re.findall(r"by \(([^)]*)\)", query) for label in labels.split(",")} - {"le"}


@pytest.mark.parametrize(("title", "query"), QUERIES)
def test_a_query_asks_for_what_the_code_exports(title: str, query: str) -> None:
    found = list(selectors(parse(query)))
    assert found, query
    for selector in found:
        metric = SERIES[selector.name]
        tags = {*metric.tags, *(["le"] if selector.name.endswith("_bucket") else [])}
        assert {matcher.name for matcher in selector.matchers.matchers} <= tags, query
        assert grouped_by(query) <= tags


@pytest.mark.parametrize(("title", "query"), QUERIES)
def test_values_of_tags_are_those_that_the_code_gives(title: str, query: str) -> None:
    values = {"kind": {*TOKEN_KINDS.values()}, "source": {*REQUEST_SOURCES.values()}, "resource": {"cpu", "gpu"}}
    for selector in selectors(parse(query)):
        for matcher in selector.matchers.matchers:
            if matcher.name in values:
                assert set(matcher.value.split("|")) <= values[matcher.name]


def test_counters_are_asked_for_rates_or_totals_and_gauges_are_not() -> None:
    for _, query in QUERIES:
        assert "increase(" not in query  # it leaves out what a series is born with, and every worker has series of its own
        for series, metric in SERIES.items():
            if re.search(rf"\b{series}\b", query):
                of_counter = re.search(rf"(rate|max_over_time)\({series}\b", query) is not None
                assert of_counter == (metric.kind != "gauge"), query


def labels(tags: dict[str, str]) -> str:
    """Return tags as Prometheus writes them."""
    return "{" + ", ".join(f'{name}="{value}"' for name, value in tags.items()) + "}"


@pytest.mark.parametrize("title", ["Rejected pairs, by reason", "Cost of paid endpoints", "Cost of workers at work"])
def test_totals_over_the_time_shown_count_what_a_worker_counted_first(title: str, tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed")
    for query in (query for found, query in QUERIES if found == title):
        for name, value in {**VARIABLES, "$__range": "10m", "$gpu_hour_price": "3600", "$cpu_hour_price": "3600"}.items():
            query = query.replace(name, value)
        selector = next(selectors(promql_parser.parse(query)))
        tags = {tag: {"resource": "gpu" if '"gpu"' in query else "cpu"}.get(tag, "x") for tag in SERIES[selector.name].tags}

        def series(worker: str, values: str, name: str = selector.name, tags: dict[str, str] = tags) -> dict[str, str]:
            return {"series": name + labels({**tags, "WorkerId": worker}), "values": values}

        # Minutes 0 to 20, every 15 seconds; the last ten are shown. 15 from one that was there before, 3 + 1 from two that came and went.
        seen = [series("old", "100x50 115x30"), series("new", "_x60 3x9 stale"), series("once", "_x70 1x2 stale"), series("dead", "7x10 stale")]
        wanted = [{"labels": labels({tag: tags[tag] for tag in grouped_by(query)}), "value": 19.0}]
        check = {"expr": query, "eval_time": "20m", "exp_samples": wanted}
        file = tmp_path / "totals.yml"
        file.write_text(yaml.safe_dump({"rule_files": [], "tests": [{"interval": "15s", "input_series": seen, "promql_expr_test": [check]}]}))
        done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_metric_is_on_the_dashboard() -> None:
    shown = {selector.name for _, query in QUERIES for selector in selectors(parse(query))}
    assert not [metric.name for metric in METRICS if not shown & {*metric.series}]


def test_panels_are_apart_and_of_one_data_source() -> None:
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len({*places}) == len(places) == len({panel["id"] for panel in DASHBOARD["panels"]})
    sources = {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} | {
        target["datasource"]["uid"] for panel in DASHBOARD["panels"] for target in panel["targets"]
    }
    assert sources == {"${datasource}"}


def test_grafana_finds_the_dashboard_and_prometheus() -> None:
    provisioning = MONITORING / "grafana" / "provisioning"
    [source] = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["current"]["value"] == source["uid"]
    providers = yaml.safe_load((provisioning / "dashboards" / "synpref.yml").read_text())["providers"]
    assert providers[0]["options"]["path"] == "$SYNPREF_DASHBOARDS"
    script = (MONITORING / "dashboards.sh").read_text()
    assert f"{source['url'].removeprefix('http://')}" in script
    assert 'SYNPREF_DASHBOARDS="$here/grafana/dashboards"' in script


def test_prometheus_accepts_its_settings() -> None:
    file = MONITORING / "prometheus.yml"
    [job] = yaml.safe_load(file.read_text())["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed: only the file's shape was checked")
    subprocess.run(["promtool", "check", "config", str(file)], check=True, capture_output=True)


def test_without_prometheus_the_command_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for tool in ("sh", "dirname", "mkdir"):
        (tmp_path / "bin" / tool).symlink_to(str(shutil.which(tool)))
    command = ["sh", str(MONITORING / "dashboards.sh"), str(tmp_path / "data")]
    done = subprocess.run(command, env={**os.environ, "PATH": str(tmp_path / "bin")}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "prometheus is not installed" in done.stderr
