"""The report of a workspace as files: `jobs/report.py html`, and the end of the demo."""

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from synpref_ray.errors import ConfigError, InputError
from synpref_ray.pipeline.label_report import labels_beside_truth
from synpref_ray.reporting.report.make import ReportOptions, make_report
from synpref_ray.reporting.report.page import render_html, report_csv, report_json
from synpref_ray.tables.storage import Storage

ENDING = ".html"


def write_report(
    storage: Storage, out: str, *, current: Mapping[str, Mapping[str, Any]] | None = None, truth: str = "", **options: Any
) -> tuple[str, ...]:
    """Write the report of a workspace to `out`, and its numbers beside it as JSON and CSV; return the three names.

    Args:
        out: a file on disk or on s3://, ending in .html; what is there is replaced.
        current: metrics of runs that are still going on, by run folder.
        truth: a file for `labels_beside_truth`; without, the page has no such section.
        options: of `ReportOptions`.

    Raises:
        ConfigError: the name does not end in .html.
        InputError: there is no workspace, the truth knows no labelled pair, or the file cannot be written.
    """
    folder, _, name = out.rpartition("/")
    if not name.endswith(ENDING) or name == ENDING:
        raise ConfigError(f"out must name a file that ends in {ENDING}, found {out!r}")
    labels = [asdict(entry) for entry in labels_beside_truth(storage, truth)] if truth else []
    report = make_report(storage, ReportOptions(made=time.time(), **options), current=current, labels=labels)
    target, stem = Storage(folder or "."), name.removesuffix(ENDING)
    texts = {name: render_html(report), f"{stem}.json": report_json(report), f"{stem}.csv": report_csv(report)}
    try:
        for file, text in texts.items():
            target.write_bytes(file, text.encode("utf-8", "replace"))  # half of a surrogate pair in a source's name is no text
    except (PermissionError, NotADirectoryError, IsADirectoryError) as error:
        raise InputError(f"cannot write {out}: {error}") from None
    return tuple(target.join(file) for file in texts)
