"""What `jobs/report.py` does: status, the report as a page with its numbers as JSON and CSV, a pair's story, labels against a known truth."""

import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import Field

from synpref_ray.ingest.source import Route
from synpref_ray.pipeline.explain import explain_pair
from synpref_ray.pipeline.job import JobConfig
from synpref_ray.pipeline.label_report import report_labels
from synpref_ray.reporting.status import PoolStatus, RunStatus, TableStatus, WorkspaceStatus, count_rejects, read_status
from synpref_ray.reporting.table import format_table
from synpref_ray.tables.storage import Storage

MAX_TABLES_SHOWN = 40  # ours: two screens; the rest is counted


class ReportConfig(JobConfig):
    """What to show of the workspace. A GPU hour's price turns GPU hours into money, in the unit of the endpoints' prices."""

    max_runs: int = Field(default=10, ge=1)  # ours
    gpu_hour_price: float = Field(default=0.0, ge=0.0)
    """What an hour of one GPU costs, for the cost in the status; 0: unknown."""
    out: str = "report.html"
    """Where `html` writes its page, on disk or on s3://; the numbers go beside it as .json and .csv."""
    num_examples: int = Field(default=3, ge=0)
    """Pairs of each decision on the page; 0 for a page without any text of the pairs."""
    max_report_runs: int = Field(default=200, ge=1)  # ours: a request or three each
    pair: str = ""
    """explain: a pair_id, or the first 8 digits of one or more."""
    format: Literal["text", "json"] = "text"
    """explain, labels: json holds all of it; of a pair every table and the whole texts."""
    truth: str = ""
    """labels, html: a Parquet file with pair_id and verdict of pairs as ingested, where the truth is known; html then has labels by source."""


def show_status(config: ReportConfig) -> str:
    """Return the workspace's status as text."""
    storage = Storage(config.workspace)
    return describe_status(read_status(storage, max_runs=config.max_runs), storage.url, now=time.time(), gpu_hour_price=config.gpu_hour_price)


def write_html(config: ReportConfig) -> str:
    """Write the workspace's report; return where it is."""
    from synpref_ray.pipeline.report_page import write_report  # not above: a status should not wait for the plotting library

    options: dict[str, Any] = {"max_runs": config.max_report_runs, "num_examples": config.num_examples, "gpu_hour_price": config.gpu_hour_price}
    files = write_report(config.storage, config.out, truth=config.truth, **options)
    return "\n".join(f"report: {file}" for file in files)


def show_pair(config: ReportConfig) -> str:
    """Return one pair's story."""
    return explain_pair(Storage(config.workspace), config.pair, as_json=config.format == "json")


def show_labels(config: ReportConfig) -> str:
    """Return how many labels are right, before and after, where the truth is known."""
    return report_labels(Storage(config.workspace), config.truth, as_json=config.format == "json")


VERBS: Mapping[str, Callable[[ReportConfig], str]] = {"status": show_status, "html": write_html, "explain": show_pair, "labels": show_labels}


def describe_status(status: WorkspaceStatus, url: str, *, now: float, gpu_hour_price: float) -> str:
    """Return the tables and lines of a status; `now` is in seconds since 1970."""
    parts = [f"workspace {url}\n{_stages(status)}", _pools(status.pools)]
    if status.unfinished:
        parts.append(_unfinished(status.unfinished, now))
    if status.trainings:
        parts.append(f"training now: {', '.join(status.trainings)}")
    if status.runs:
        parts.append(_runs(status.runs, now))
    if status.errors:
        parts.append("\n".join(["last errors:", *(f"  {_name(run)}: {_why(run)}" for run in status.errors)]))
    parts.append(_cost(status, gpu_hour_price))
    return "\n\n".join(parts)


def _stages(status: WorkspaceStatus) -> str:
    pools = {pool.name for pool in status.pools}
    started = {_name(run).split("-")[0] for run in status.runs}
    begun = {"stage1": bool(status.num_rounds), "stage2": any(name.startswith("wild-mismatches") for name in pools)}
    lines = [f"ingest: {'done' if pools & {route.value for route in Route} else 'not begun'}"]
    for stage, found in begun.items():
        rounds = f", {status.num_rounds} rounds recorded with the seed's" if stage == "stage1" and found else ""
        state = "done" if stage in status.finished_stages else f"begun{rounds}" if found or stage in started else "not begun"
        lines.append(f"{stage}: {state}")
    return ", ".join([*lines, f"models: {len(status.models)}"])


def _pools(pools: tuple[PoolStatus, ...]) -> str:
    rows = []
    for pool in pools:
        sealed = sum(table.is_sealed for table in pool.tables)
        rejects = ", ".join(f"{reason} {count}" for reason, count in sorted(count_rejects(pool).items())) or "-"
        rows.append((pool.name, str(pool.num_rows), str(pool.num_shards), str(sealed), str(len(pool.tables) - sealed), rejects))
    return format_table(("pool", "pairs", "shards", "tables done", "unfinished", "rows rejected"), rows)


def _unfinished(tables: list[TableStatus], now: float) -> str:
    rows = []
    for table in sorted(tables, key=lambda table: not table.is_held)[:MAX_TABLES_SHOWN]:
        quiet = table.is_quiet(now)
        rate = f"{table.rows_per_second:.1f}" if table.rows_per_second and not quiet else "-"
        left = _duration(table.seconds_left) if table.seconds_left is not None and table.is_held and not quiet else "-"
        last = f"{_duration(now - table.last_written)} ago" if table.last_written else "-"
        held = "its job lives, but no shard comes" if quiet else "being written"
        state = held if table.is_held else "stopped: run its job again"
        done, pending = str(table.num_done), str(table.num_shards - table.num_done)
        rows.append((f"{table.pool}/{table.name}/{table.version}", done, pending, last, rate, left, state))
    text = format_table(("unfinished table", "shards done", "pending", "last shard", "pairs/s", "time left", "state"), rows)
    return text if len(tables) <= MAX_TABLES_SHOWN else f"{text}\n… and {len(tables) - MAX_TABLES_SHOWN} more"


def _runs(runs: tuple[RunStatus, ...], now: float) -> str:
    rows = []
    for run in runs:
        event = run.last_event
        kind = event.get("event", "")
        what = {"finish": "finished", "stop": "ended early", "step": f"after {event.get('step')}", "": "just begun"}.get(kind, kind)
        what = f"died, {what}" if run.has_died else what
        rows.append((_name(run), what, f"{_duration(now - event['time'])} ago" if "time" in event else "-"))
    return format_table(("run", "last word", "when"), rows)


def _why(run: RunStatus) -> str:
    if run.has_died:
        return "died without a last word: it was killed, or its machine was lost"
    return f"{run.last_event['error']}: {run.last_event['message']}"


def _cost(status: WorkspaceStatus, gpu_hour_price: float) -> str:
    hours = status.gpu_seconds / 3600
    text = f"cost so far: paid endpoints {status.cost:.4f}; {hours:.2f} GPU hours of workers at shards and of finished trainings"
    return f"{text}, {hours * gpu_hour_price:.2f} at {gpu_hour_price:g} an hour" if gpu_hour_price else text


def _name(run: RunStatus) -> str:
    return run.folder.rsplit("/", 1)[-1]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)  # clocks of storage and of this machine differ
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
