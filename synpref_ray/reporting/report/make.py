"""The report of a workspace, put together: its sections in the order of the pipeline, the figures at its top, and its warnings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from synpref_ray.reporting.report.audits import audits_section
from synpref_ray.reporting.report.content import Figure, Report, Section, interval, show, show_count
from synpref_ray.reporting.report.curation import SIMULATED, rounds_section, stage2_section, workspace_section, yields_section
from synpref_ray.reporting.report.models import benchmarks_section, best_of_n_section, training_section
from synpref_ray.reporting.report.opinions import judges_section, people_section
from synpref_ray.reporting.report.pairs import examples_section
from synpref_ray.reporting.report.records import Records, Values, read_records
from synpref_ray.reporting.report.spending import costs_section, runs_section
from synpref_ray.reporting.report.truth import labels_section, selection_section, truth_section
from synpref_ray.tables.storage import Storage
from synpref_ray.versions import package_versions


@dataclass(frozen=True)
class ReportOptions:
    """How much is read and shown; `made` is the time that the page states, in seconds since 1970."""

    made: float
    max_runs: int = 200
    num_examples: int = 3
    gpu_hour_price: float = 0.0


def make_report(storage: Storage, options: ReportOptions, *, current: Mapping[str, Values] | None = None, labels: Sequence[Values] = ()) -> Report:
    """Read a workspace and return its report.

    Args:
        current: metrics of runs that are still going on, by run folder: a run's own report holds its own numbers.
        labels: what a known truth says of the labels, as `jobs/report.py labels format=json` prints it.

    Raises:
        InputError: there is no workspace.
    """
    records = read_records(storage, max_runs=options.max_runs, current=current)
    sections = [
        workspace_section(records),
        yields_section(records),
        truth_section(records),
        labels_section(labels),
        selection_section(records),
        rounds_section(records),
        judges_section(records),
        people_section(records),
        stage2_section(records),
        training_section(records),
        benchmarks_section(records),
        best_of_n_section(records),
        audits_section(records),
        costs_section(records, gpu_hour_price=options.gpu_hour_price),
        examples_section(storage, records, count=options.num_examples),
        runs_section(records),
    ]
    return Report(
        workspace=storage.url,
        made=options.made,
        versions=package_versions(),
        warnings=(f"{SIMULATED} Numbers say how the pipeline works, not what people would say.",) if records.is_simulated else (),
        figures=_figures(records, gpu_hour_price=options.gpu_hour_price),
        sections=tuple(section for section in sections if section is not None),
    )


def _figures(records: Records, *, gpu_hour_price: float) -> tuple[Figure, ...]:
    sizes = {pool.name: pool.num_rows for pool in records.status.pools}
    ingested = sum(sizes.get(name, 0) for name in ("seed", "unverified", "wild"))
    found = [Figure("pairs ingested", show_count(ingested), ", ".join(f"{show_count(sizes[name])} {name}" for name in _POOLS if name in sizes))]
    if records.rounds:
        last = records.rounds[-1]["set_sizes"]
        gold = last.get("gold-working", 0) + last.get("gold-audit", 0)
        found.append(Figure("gold pairs", show_count(gold), f"{show_count(last.get('gold-audit', 0))} of them frozen for audit"))
        found.append(Figure("silver pairs", show_count(last.get("silver", 0)), f"after round {records.rounds[-1]['round']}"))
    if records.stage2:
        decisions, pairs = records.stage2["decisions"], records.stage2["pairs"] or 1
        curated = decisions.get("keep", 0) + decisions.get("flip", 0)
        found.append(
            Figure(
                "curated pairs",
                show_count(curated),
                f"{100 * curated / pairs:.0f} % of {records.stage2['pool']}, {show_count(decisions.get('flip', 0))} flipped",
            )
        )
    best = ((records.stage1 or {}).get("audit_gold_accuracy") or {}).get("best")
    if best:
        ends = interval(best["low"], best["high"])
        found.append(Figure("best RM on audit gold", show(best["accuracy"], "share"), f"{show(ends, 'interval')}, {best['num_pairs']} pairs"))
    labels = (records.latest("demo") or (None, {}))[1].get("labels")
    if labels:
        after = labels["kept_and_flipped"]
        found.append(
            Figure("labels right", show(after["accuracy"], "share"), f"in curated pairs; {show(labels['raw']['accuracy'], 'share')} as they came")
        )
    hours = records.status.gpu_seconds / 3600
    if hours or records.status.cost:
        money = hours * gpu_hour_price + records.status.cost
        found.append(Figure("GPU hours", f"{hours:,.1f}", f"{money:,.2f} with endpoints" if money else ""))
    return tuple(found)


_POOLS = ("seed", "unverified", "wild")


def tables_of(section: Section) -> dict[str, list[dict[str, Any]]]:
    """Return a section's tables as rows by column name, values as they are."""
    return {table.name: [dict(zip((column.name for column in table.columns), row, strict=True)) for row in table.rows] for table in section.tables}
