"""Sections about the runs: where time, tokens and money went, and which runs there were."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from synpref_ray.reporting.report.charts import BLUE, SOFT, draw, shorten
from synpref_ray.reporting.report.content import Block, Note, Section, Table, columns, show_seconds
from synpref_ray.reporting.report.records import Records, RunRecord, steps_of

MAX_STEPS_DRAWN = 12
MAX_RUNS = 25


def costs_section(records: Records, *, gpu_hour_price: float) -> Section | None:
    """Say what the steps of all runs took, and what was paid."""
    totals: dict[str, dict[str, float]] = {}
    for event in steps_of(records.runs):
        if not event.get("computed"):
            continue
        name = _family(str(event["step"]))
        total = totals.setdefault(name, {"times": 0, "computed": 0, "seconds": 0.0, "prompt": 0, "written": 0, "cost": 0.0})
        total["times"] += 1
        for key, source in (
            ("computed", "computed"),
            ("seconds", "seconds"),
            ("prompt", "prompt_tokens"),
            ("written", "output_tokens"),
            ("cost", "cost"),
        ):
            total[key] += float(event.get(source) or 0)
    ordered = sorted(totals.items(), key=lambda entry: -entry[1]["seconds"])
    hours = records.status.gpu_seconds / 3600
    money = f", {hours * gpu_hour_price:,.2f} at {gpu_hour_price:g} an hour" if gpu_hour_price else ""
    paid = (
        f"Paid endpoints have cost {records.status.cost:,.4f} in the unit of their prices."
        if records.status.cost
        else "No paid endpoint has cost anything."
    )
    used = f"Workers at shards and finished trainings took {hours:.2f} GPU hours{money}." if hours else "No GPU was used."
    blocks: list[Block] = [Note(f"{paid} {used}")]
    if ordered:
        drawn = ordered[:MAX_STEPS_DRAWN]
        blocks.append(
            draw(
                "costs-steps",
                "Seconds that each kind of step took",
                lambda figure: _bars(figure, [(name, total["seconds"]) for name, total in drawn]),
                height=0.75 + 0.27 * len(drawn),
            )
        )
        rows = []
        for name, total in ordered:
            rate = total["computed"] / total["seconds"] if total["seconds"] > 0 else None
            tokens = (total["prompt"] or None, total["written"] or None)
            rows.append((name, total["times"], total["computed"], total["seconds"], rate, *tokens, total["cost"] or None))
        heads = columns(
            *("step", ("times", "count"), ("pairs computed", "count"), ("time", "seconds"), ("pairs/s", "rate")),
            *(("prompt tokens", "count"), ("written tokens", "count"), ("paid", "number")),
        )
        blocks.append(
            Table("steps", heads, tuple(rows), note="Wall time from a step's start to its seal, starting engines included; rounds are summed up.")
        )
    lead = "What was computed in the runs that this report read. A step that found its table finished took no time and is left out."
    return Section("costs", "Time and costs", lead, tuple(blocks))


def _family(step: str) -> str:
    """Return a step's name without its round, so that rounds are summed up."""
    return step.split(", round ")[0].split(", final")[0]


def _bars(figure: Figure, rows: list[tuple[str, float]]) -> None:
    axes = figure.subplots()
    for place, (_, seconds) in enumerate(rows):
        axes.barh(place, seconds, 0.62, color=BLUE)
        axes.annotate(show_seconds(seconds), (seconds, place), textcoords="offset points", xytext=(5, 0), va="center", size=8.5, color=SOFT)
    axes.set_yticks(range(len(rows)), [shorten(name) for name, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.14)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: show_seconds(value)))
    axes.set_title("Where the time went")


def runs_section(records: Records) -> Section:
    """List the latest runs and how they ended."""
    rows = tuple((run.name, run.job, *_end_of(run)) for run in records.runs[:MAX_RUNS])
    versions = _versions_note(records)
    table = Table("runs", columns("run", "job", "ended", ("time", "seconds"), "why"), rows)
    return Section("runs", "Runs", "Each has a folder with its config, its versions, its events and its metrics.", (table, *versions))


def _end_of(run: RunRecord) -> tuple[str, float | None, str | None]:
    last: Mapping[str, Any] = run.events[-1] if run.events else {}
    seconds = float(last["time"]) - run.time if last else None
    kind = last.get("event")
    if kind == "stop":
        return "early", seconds, f"{last.get('error')}: {last.get('message')}"
    return ("finished" if kind == "finish" else "not yet"), seconds, None


def _versions_note(records: Records) -> list[Note]:
    left = len(records.runs) - MAX_RUNS
    return [Note(f"{left} earlier runs were read and are not listed.")] if left > 0 else []
