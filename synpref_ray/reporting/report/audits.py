"""Sections about what goes wrong: calibration, biases and attacks of a reward model, instructions planted against judges, and other audits."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from synpref_ray.reporting.report.charts import (
    BLUE,
    FULL_WIDTH,
    GREY,
    ORANGE,
    RED,
    Point,
    calibration_grid,
    draw,
    forest_chart,
    grid_size,
    heat_chart,
)
from synpref_ray.reporting.report.content import Block, Cell, Section, Table, columns, interval, left_out, share_cells
from synpref_ray.reporting.report.curation import point
from synpref_ray.reporting.report.models import MAX_MODELS, without_digest
from synpref_ray.reporting.report.records import Records, Values, numbers_in
from synpref_ray.reporting.report.scores import Score, by_completeness, level_name, level_of, model_labels, read_scores

MAX_OTHER_ROWS = 60
LEVEL = "level of intervals"
KNOWN_JOBS = {"ingest", "stage1", "stage2", "train", "score", "annotate", "hygiene", "export", "decontaminate", "preverify", "demo", "report"}
KNOWN_JOBS |= {"selection"}  # a run of benchmarks/selection.py
MAX_ROWS = 24  # ours: of a forest chart, about a screen
STYLES = ("concise", "detailed", "markdown")
"""RM-Bench's, from plain to fancy, as its metrics name them."""
Found = list[tuple[str, str, Values]]
"""Scorer, benchmark (or set), and its metrics with the names that they have below `audit/<kind>/<benchmark>/`."""


def audits_section(records: Records) -> Section | None:
    """Show what audits found: RM-Bench's style matrix, planted injections, and whatever else a run measured."""
    blocks: list[Block] = [*_calibration_blocks(records), *_bias_blocks(records), *_style_blocks(records), *_hack_blocks(records)]
    blocks += [*_comparison_tables(records), *_attack_blocks(records), *_other_tables(records)]
    if not blocks:
        return None
    lead = "Calibration, what style does to rewards, what hacked replies gain, and whether planted instructions sway judges."
    return Section("audits", "Reliability, bias and attacks", lead, tuple(blocks))


def read_audit(records: Records, kind: str) -> Found:
    """Return the metrics under `audit/<kind>/`, by scorer and benchmark: those of one run, on the largest sample and of those the latest."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    owner: dict[tuple[str, str], str] = {}
    labels = model_labels(records.runs)
    for run in by_completeness(records.runs):
        for key, value in run.metrics.items():
            if not key.startswith(f"audit/{kind}/") or "/" not in key.removeprefix(f"audit/{kind}/"):
                continue
            benchmark, _, name = key.removeprefix(f"audit/{kind}/").partition("/")
            place = (labels.get(run.name, ""), benchmark)
            if owner.setdefault(place, run.name) == run.name:
                found.setdefault(place, {LEVEL: level_of(run)})[name] = value
    return [(*place, values) for place, values in found.items()]


def _level(found: Found) -> str:
    """Return what a column of these metrics' intervals is called."""
    return level_name(values[LEVEL] for *_, values in found)


def _of(scorer: str, found: Found) -> str:
    """Return what tells a scorer's rows of a chart from another's; nothing where there is one."""
    return f", {without_digest(scorer)}" if len({name for name, *_ in found}) > 1 else ""


def _measured(values: Values, name: str) -> tuple[Cell, Cell]:
    """Return a metric with its interval."""
    return values.get(name), interval(values.get(f"{name}/low"), values.get(f"{name}/high"))


def _as_point(values: Values, name: str) -> Point | None:
    value = values.get(name)
    return None if value is None or math.isnan(value) else Point(value, values.get(f"{name}/low"), values.get(f"{name}/high"))


def _calibration_blocks(records: Records) -> Iterator[Block]:
    found = [entry for entry in read_audit(records, "calibration") if entry[2].get("bins")]
    if not found:
        return
    level = _level(found)
    panels = []
    points: list[tuple[Cell, ...]] = []
    for scorer, benchmark, values in found:
        bins = [(part["confidence"], part["accuracy"], part["num_pairs"]) for part in values["bins"] if part["num_pairs"]]
        panels.append((f"{benchmark}, {without_digest(scorer)}", bins))
        points += [(scorer, benchmark, *part) for part in bins]
    height, width = grid_size(min(len(panels), MAX_MODELS))
    yield draw(
        "calibration",
        "Share of pairs ranked right against the model's confidence",
        lambda figure: calibration_grid(figure, panels[:MAX_MODELS]),
        height=height + 0.3,
        width=width,
        caption="A calibrated model lies on the dashed line; below it the model is surer than it is right. A point's size is its share of the pairs.",
    )
    yield from left_out("models and benchmarks", len(panels), MAX_MODELS)
    rows = tuple(
        (
            scorer,
            benchmark,
            values.get("pairs"),
            *_measured(values, "ece"),
            *_measured(values, "overconfidence"),
            values.get("brier"),
            values.get("temperature"),
        )
        for scorer, benchmark, values in found
    )
    heads = columns(
        *("scorer", "benchmark", ("pairs", "count"), ("ECE", "share"), (f"{level}, ECE", "interval"), ("overconfidence", "share")),
        *((f"{level}, overconfidence", "interval"), ("Brier", "number"), ("best temperature", "number")),
    )
    yield Table("calibration", heads, rows, title="Calibration")
    heads = columns("scorer", "benchmark", ("confidence", "share"), ("right", "share"), ("pairs", "count"))
    yield Table("calibration_bins", heads, tuple(points), shown=False)


def _bias_blocks(records: Records) -> Iterator[Block]:
    rows: list[tuple[Cell, ...]] = []
    mended: list[tuple[Cell, ...]] = []
    shifts: list[tuple[Cell, ...]] = []
    points = []
    found = read_audit(records, "bias")
    level = _level(found)
    for scorer, benchmark, values in found:
        for feature in [name.removesuffix("/pressure") for name in values if name.endswith("/pressure")]:
            shares = []
            for side, words, color in (("more", "more", BLUE), ("less", "less", ORANGE)):
                name = f"{feature}/accuracy_{side}"
                share = _as_point(
                    {f"{name}{end}": values.get(f"{name}/{key}") for end, key in (("", "accuracy"), ("/low", "low"), ("/high", "high"))}, name
                )
                shares += [share.value if share else None, interval(share.low, share.high) if share else None]
                if share:
                    points.append((f"{benchmark}: {words} {feature}{_of(scorer, found)}", share, color))
            rows.append((scorer, benchmark, feature, *_measured(values, f"{feature}/pressure"), values.get(f"{feature}/partial"), *shares))
        for one in values.get("mitigations", ()):
            moved = ", ".join(one["moved_to"]) or "nowhere"
            mended.append((scorer, benchmark, one["mitigated"], one["accuracy_before"], one["accuracy_after"], moved))
        for name in [name for name in values if name.startswith("styles/") and not name.endswith(("/low", "/high"))]:
            shifts.append((scorer, benchmark, name.removeprefix("styles/").replace("_", " "), *_measured(values, name)))
    if points:
        yield draw(
            "bias-sides",
            "Accuracy where the better reply has more, and where it has less, of a feature",
            lambda figure: forest_chart(figure, "Right where the better reply has …", points[:MAX_ROWS], mark=0.5, mark_label="chance"),
            height=0.95 + 0.27 * len(points[:MAX_ROWS]),
        )
        yield from left_out("shares", len(points), MAX_ROWS)
    if rows:
        heads = columns(
            *("scorer", "benchmark", "feature", ("pressure", "number"), (level, "number_interval"), ("partial", "number")),
            *(("right where more", "share"), ("interval, more", "interval"), ("right where less", "share"), ("interval, less", "interval")),
        )
        note = "Pressure: how the margin goes with the feature's difference; partial: with the other features held. Definitions: docs/evaluation.md."
        yield Table("biases", heads, tuple(rows), title="Biases", note=note)
    if mended:
        heads = columns("scorer", "benchmark", "taken out", ("right before", "share"), ("right after", "share"), "pressure moved to")
        yield Table("mitigations", heads, tuple(mended), title="What taking a bias out does")
    if shifts:
        heads = columns("scorer", "benchmark", "style", ("shift", "number"), (level, "number_interval"))
        note = "Of a model that does not prefer right replies at equal style there is no such unit, and no shift."
        yield Table("style_shifts", heads, tuple(shifts), title="Reward by style alone, in units of right over wrong", note=note)


def _hack_blocks(records: Records) -> Iterator[Block]:
    rows: list[tuple[Cell, ...]] = []
    searched: list[tuple[Cell, ...]] = []
    points = []
    found = read_audit(records, "attacks")
    level = _level(found)
    for scorer, name, values in found:
        if name == "suffix":
            for start in [key.removesuffix("/starts") for key in values if key.endswith("/starts")]:
                shares = [values.get(f"{start}/beats_better/{what}") for what in ("start", "random", "best")]
                searched.append((scorer, start, values[f"{start}/starts"], *shares, values.get(f"{start}/rise"), values.get(f"{start}/gap")))
            continue
        for kind in [key.removesuffix("/beats_better") for key in values if key.endswith("/beats_better")]:
            label = kind.replace("_", " ")
            figures = (*_measured(values, f"{kind}/beats_better"), values.get(f"{kind}/beat_before"), *_measured(values, f"{kind}/shift"))
            rows.append((scorer, name, label, values.get(f"{kind}/replies"), *figures))
            measured = _as_point(values, f"{kind}/beats_better")
            if measured:
                points.append((f"{name}: {label}{_of(scorer, found)}", measured, RED if kind == "gibberish" else ORANGE))
    if points:
        yield draw(
            "attack-hacks",
            "Share of hacked worse replies that beat the better reply",
            lambda figure: forest_chart(figure, "Hacked replies that beat the better one", points[:MAX_ROWS]),
            height=0.9 + 0.27 * len(points[:MAX_ROWS]),
        )
        yield from left_out("shares", len(points), MAX_ROWS)
    if rows:
        heads = columns(
            *(
                "scorer",
                "set",
                "hack",
                ("replies", "count"),
                ("beats better", "share"),
                (f"{level}, beats", "interval"),
                ("did unhacked", "share"),
            ),
            *(("reward rises by", "number"), (f"{level}, rise", "number_interval")),
        )
        yield Table(
            "hacks", heads, tuple(rows), title="Attacks on the reward model", note="A rise of 1 is the gap between the better and the worse reply."
        )
    if searched:
        heads = columns(
            *(
                "scorer",
                "suffix behind",
                ("starts", "count"),
                ("beats better: start", "share"),
                ("random suffix", "share"),
                ("found suffix", "share"),
            ),
            *(("reward rises by", "number"), ("gap to better", "number")),
        )
        yield Table("suffix_search", heads, tuple(searched), title="Search for a suffix in token space")


def _comparison_tables(records: Records) -> Iterator[Block]:
    rows = []
    found = read_audit(records, "compare")
    for scorer, benchmark, values in found:
        if values.get("difference") is not None:
            ends = interval(values.get("low"), values.get("high"))
            rows.append(
                (scorer, benchmark, values["num_pairs"], values["accuracy_a"], values["accuracy_b"], values["difference"], ends, values["p_value"])
            )
    if rows:
        heads = columns(
            *("model", "benchmark", ("comparisons", "count"), ("right", "share"), ("right, other", "share"), ("difference", "points")),
            *((_level(found), "points_interval"), ("McNemar p", "number")),
        )
        note = (
            "The interval draws prompts. McNemar's exact p takes comparisons for independent: where several are of one prompt (nine in RM-Bench) it "
            "is too small, and the interval decides."
        )
        yield Table("model_tests", heads, tuple(rows), title="Against another model", note=note)


def _style_blocks(records: Records) -> Iterator[Block]:
    matrices: dict[tuple[str, str], dict[tuple[str, str], Score]] = {}
    for score in read_scores(records.runs):
        domain, found, cell = score.metric.partition("/matrix/")
        if found and score.benchmark == "rm_bench":
            right, _, wrong = cell.partition("_over_")
            matrices.setdefault((score.scorer, domain), {})[right, wrong] = score
    by_scorer: dict[str, list[tuple[str, Sequence[str], Sequence[str], list[list[float | None]]]]] = {}
    rows = []
    for (scorer, domain), cells in matrices.items():
        named = dict.fromkeys(style for key in cells for style in key)
        styles = [*(style for style in STYLES if style in named), *(style for style in named if style not in STYLES)]
        values = [[cells[right, wrong].value if (right, wrong) in cells else None for wrong in styles] for right in styles]
        by_scorer.setdefault(scorer, []).append((domain, styles, styles, values))
        rows += [(scorer, domain, right.replace("_", " "), wrong.replace("_", " "), score.value) for (right, wrong), score in cells.items()]
    for place, (scorer, panels) in enumerate(by_scorer.items()):
        yield draw(
            f"style-{place}",
            f"RM-Bench style matrix of {scorer}",
            lambda figure, panels=panels: heat_chart(figure, panels),  # type: ignore[misc]
            height=2.3,
            width=FULL_WIDTH,
            caption=f"{without_digest(scorer)} on RM-Bench: of the comparisons of a right reply (rows: its style) with a wrong one (columns), the "
            "right reply wins so many in a hundred. Above the diagonal a plainer right reply meets a fancier wrong one.",
        )
    if rows:
        yield Table("style_matrix", columns("scorer", "domain", "right reply", "wrong reply", ("right wins", "share")), tuple(rows), shown=False)


def _attack_blocks(records: Records) -> Iterator[Block]:
    found = records.latest("attack")
    if found is None or "judges" not in found[1]:
        return
    rows, points = [], []
    for judge, figures in found[1]["judges"].items():
        for kind, counts in {**figures["by_kind"], "all but control": figures["overall"]}.items():
            moved = counts["moved_to_planted"]
            cells = (counts["clean_right"]["value"], *share_cells(moved), *share_cells(counts["changed"]))
            rows.append(
                (
                    judge,
                    kind.replace("_", " "),
                    counts["num_planted"],
                    sum(counts["not_judged"].values()),
                    counts["other_exemplars"]["num_planted"],
                    *cells,
                )
            )
            measured = point(moved)
            if measured is not None:
                color = GREY if kind == "control" else RED if kind == "all but control" else ORANGE
                points.append((f"{judge}, {kind.replace('_', ' ')}", measured, color))
    if points:
        yield draw(
            "attack-judges",
            "Share of verdicts that a planted instruction moved to the worse reply",
            lambda figure: forest_chart(figure, "Verdicts moved to the planted reply", points),
            height=0.9 + 0.3 * len(points),
        )
    heads = columns(
        *("judge", "planted", ("pairs", "count"), ("not judged", "count"), ("other exemplars", "count"), ("right before", "share")),
        *(("moved to planted", "share"), ("95 % interval, moved", "interval"), ("changed", "share"), ("95 % interval, changed", "interval")),
    )
    note = "What is planted: docs/judges.md. Pairs judged with other exemplars once planted (no room for all) are counted apart, and nowhere else."
    yield Table("judge_attacks", heads, tuple(rows), title="Instructions planted in the worse reply", note=note)


def _other_tables(records: Records) -> Iterator[Block]:
    """Yield a table for the latest run of every job that this report has no section for."""
    seen: set[str] = set()
    for run in records.runs:
        if run.job in KNOWN_JOBS or run.job in seen or "benchmarks" in run.metrics or "attack" in run.metrics or not run.metrics:
            continue
        seen.add(run.job)
        numbers = [(path, value) for path, value in numbers_in(run.metrics) if path != "seconds"]
        if not numbers:
            continue
        rest = f"{len(numbers) - MAX_OTHER_ROWS} more numbers are in runs/{run.name}/metrics.json." if len(numbers) > MAX_OTHER_ROWS else ""
        heads = columns("measured", ("value", "number"))
        yield Table(f"run_{run.job}", heads, tuple(numbers[:MAX_OTHER_ROWS]), title=f"{run.job}: the latest run", note=rest)
