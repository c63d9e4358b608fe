"""A report as files: the HTML page (escaped by Jinja2, nothing to load, no script), and its numbers as JSON and CSV."""

import csv
import io
import json
import math
import time
from collections.abc import Iterator
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from synpref_ray.reporting.report.content import Chart, Examples, Note, Report, Table, show
from synpref_ray.reporting.report.make import tables_of

PACKAGE = "synpref_ray.reporting.report"
NUMERIC = {"count", "share", "points", "number", "interval", "points_interval", "number_interval", "seconds", "rate"}
CSV_HEADER = ("section", "table", "row", "column", "value")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet may take for the beginning of a formula."""


def render_html(report: Report) -> str:
    """Return the page: one file that asks for nothing and runs nothing."""
    environment = Environment(
        loader=PackageLoader(PACKAGE), autoescape=select_autoescape(default=True), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style = resources.files(PACKAGE).joinpath("templates/report.css").read_text(encoding="utf-8")
    page: str = environment.get_template("report.html").render(
        report=report,
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(report.made)),
        style=Markup(style),  # ours, from the package
        show=show,
        numeric=NUMERIC,
        kind_of=lambda block: _KINDS[type(block)],
        drawn=lambda chart: Markup(chart.svg),  # made by matplotlib, which escapes every label
    )
    return page


_KINDS = {Table: "table", Chart: "chart", Note: "note", Examples: "examples"}


def report_json(report: Report) -> str:
    """Return every table's values by section, with the example pairs; what is not a number is null."""
    sections = {}
    for section in report.sections:
        examples = [
            {**vars(pair), "prompt": list(pair.prompt), "facts": dict(pair.facts)}
            for block in section.blocks
            if isinstance(block, Examples)
            for pair in block.pairs
        ]
        sections[section.name] = {"title": section.title, "tables": tables_of(section), **({"examples": examples} if examples else {})}
    value = {
        "workspace": report.workspace,
        "made": report.made,
        "versions": dict(report.versions),
        "warnings": list(report.warnings),
        "sections": sections,
    }
    return json.dumps(_plain(value), ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def report_csv(report: Report) -> str:
    """Return the same tables in long form, a line a value; an interval is two. Names that a spreadsheet would run as a formula get an apostrophe."""
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for section in report.sections:
        for table in section.tables:
            for number, row in enumerate(table.rows, start=1):
                for column, cell in zip(table.columns, row, strict=True):
                    for name, value in _csv_cells(column.name, cell):
                        writer.writerow((section.name, table.name, number, name, value))
    return target.getvalue()


def _csv_cells(name: str, cell: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(cell, tuple):
        yield from zip((f"{name}, low", f"{name}, high"), cell, strict=True)
    elif cell is not None and not (isinstance(cell, float) and math.isnan(cell)):
        yield name, f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell
