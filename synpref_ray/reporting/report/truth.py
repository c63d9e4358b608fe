"""Sections that compare with a known truth: labels by source, the demo's models, and the rules that select pairs."""

from collections.abc import Sequence

from synpref_ray.reporting.report.charts import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, Point, draw, forest_chart
from synpref_ray.reporting.report.content import Block, Cell, Note, Section, Table, columns, interval, left_out, share_cells
from synpref_ray.reporting.report.curation import point
from synpref_ray.reporting.report.records import Records, Values

MAX_SOURCES = 12  # ours: rows that a chart can label; the tables have all
RULE_COLORS = {"similarity": BLUE, "random": GREY, "uncertainty": PURPLE}


def truth_section(records: Records) -> Section | None:
    """Compare labels and models with known truth, where a run had it (the demo)."""
    found = records.latest("demo")
    if found is None:
        return None
    demo = found[1]
    labels, held_out = demo["labels"], demo["held_out"]
    named = {"as they came": "raw", "kept": "kept", "flipped": "flipped", "kept and flipped": "kept_and_flipped", "dropped (source label)": "dropped"}
    label_rows = tuple((name, labels[key]["num_pairs"], *share_cells(labels[key])) for name, key in named.items())
    models = [
        (name if len(values) == 1 else f"{name}, run {place + 1}", value) for name, values in held_out.items() for place, value in enumerate(values)
    ]
    model_rows = tuple((_MODEL_NAMES.get(name, name), value["num_pairs"], *share_cells(value)) for name, value in models)
    difference = demo["curated_minus_raw"]
    gap = ("curated minus raw", difference["num_pairs"], difference["difference"], interval(difference["low"], difference["high"]))
    colors = {"as they came": GREY, "kept": BLUE, "flipped": ORANGE, "kept and flipped": GREEN, "dropped (source label)": RED}
    points = [(name, found_point, colors[name]) for name, key in named.items() if (found_point := point(labels[key]))]
    others = [
        (_MODEL_NAMES.get(name, name), found_point, BLUE if name.startswith("curated") else GREY)
        for name, value in models
        if (found_point := point(value))
    ]
    blocks: list[Block] = [
        draw(
            "truth-labels",
            "Share of labels that are right before and after curation",
            lambda figure: forest_chart(figure, "Labels that are right", points),
            height=2.2,
        ),
        Table(
            "label_quality",
            columns("pairs of the wild pool", ("pairs", "count"), ("labels right", "share"), ("95 % interval", "interval")),
            label_rows,
        ),
        draw(
            "truth-models",
            "Accuracy on held-out pairs by training data",
            lambda figure: forest_chart(figure, "Held-out pairs ranked right", others, mark=0.5, mark_label="chance"),
            height=0.9 + 0.33 * len(others),
        ),
        Table("held_out", columns("reward model", ("pairs", "count"), ("right", "share"), ("95 % interval", "interval")), model_rows),
        Table(
            "curated_minus_raw",
            columns("difference, in points", ("pairs", "count"), ("difference", "points"), ("95 % interval", "points_interval")),
            (gap,),
            note="Curated and raw models: as many pairs, the same steps and seeds. The interval is over held-out prompts, not over training runs.",
        ),
    ]
    lead = "Here the truth of every pair is known. Only the simulated annotator (for its budget) and this comparison read it."
    return Section("truth", "Against known truth", lead, tuple(blocks))


_MODEL_NAMES = {
    "curated": "trained on curated pairs",
    "raw": "trained on as many raw pairs",
    "best": "best RM of Stage 1",
    "gold": "gold RM of Stage 1",
}


def labels_section(evidence: Sequence[Values]) -> Section | None:
    """Say by source how many labels are right before and after, and how well wrong ones were found."""
    if not evidence:
        return None
    charts: list[Block] = []
    for stage in dict.fromkeys(entry["stage"] for entry in evidence):
        of_stage = [entry for entry in evidence if entry["stage"] == stage]
        largest = sorted(of_stage, key=lambda entry: (not entry["is_total"], -entry["quality"]["raw"]["num_pairs"]))[: MAX_SOURCES + 1]
        drawn = [
            (f"{name}: {entry['source']}", found, color)
            for entry in largest
            for name, key, color in (("before", "raw", GREY), ("after", "kept_and_flipped", GREEN))
            if (found := point(entry["quality"][key]))
        ]
        charts += [_right_chart(stage, len(charts), drawn), *left_out("sources", len(of_stage) - 1, MAX_SOURCES)]
    quality_heads = columns(
        *("labels", "source", ("pairs before", "count"), ("right before", "share"), ("interval before", "interval")),
        *(("pairs after", "count"), ("right after", "share"), ("interval after", "interval"), ("truth not known", "count")),
    )
    quality = tuple(
        (
            entry["stage"],
            entry["source"],
            *_counted(entry["quality"]["raw"]),
            *_counted(entry["quality"]["kept_and_flipped"]),
            entry["quality"]["num_without_truth"],
        )
        for entry in evidence
    )
    flips = tuple(
        (
            *(entry["stage"], entry["source"]),
            *(entry["flips"]["recall"]["num_pairs"], entry["flips"]["precision"]["num_pairs"]),
            *share_cells(entry["flips"]["precision"]),
            *share_cells(entry["flips"]["recall"]),
            *(share_cells(figure)[0] for figure in (entry["flips"]["removed"], entry["flips"]["lost"])),
        )
        for entry in evidence
    )
    found_heads = columns(
        *("labels", "source", ("wrong labels", "count"), ("flips", "count"), ("precision", "share"), ("of precision", "interval")),
        *(("recall", "share"), ("of recall", "interval"), ("wrong ones gone", "share"), ("right ones lost", "share")),
    )
    unknown = sum(entry["quality"]["num_without_truth"] for entry in evidence if entry["is_total"])
    return Section(
        "labels",
        "Labels and flips by source",
        f"The truth was read after all was decided; {unknown} labelled pairs that it lacks are left out. Gold is not here: people decided it. Table "
        "19 of the paper has the agreement of kept and flipped pairs with people.",
        (
            *charts,
            Table(
                "label_quality_by_source",
                quality_heads,
                quality,
                note="After: the pairs that were kept or flipped. Intervals are 95 %, over prompts.",
            ),
            Table(
                "flip_detection",
                found_heads,
                flips,
                title="Flip detection",
                note="Precision: of the flips, those of a wrong label. Recall: of the wrong labels, those flipped. Gone, lost: flipped or dropped.",
            ),
        ),
    )


def _right_chart(stage: str, number: int, drawn: Sequence[tuple[str, Point, str]]) -> Block:
    return draw(
        f"labels-right-{number}",
        f"Share of labels that are right before and after curation, {stage}",
        lambda figure: forest_chart(figure, f"Labels that are right, {stage}", drawn),
        height=0.9 + 0.3 * len(drawn),
    )


def _counted(figure: Values) -> tuple[Cell, ...]:
    return (figure["num_pairs"], *share_cells(figure))


def selection_section(records: Records) -> Section | None:
    """Compare the rules that select pairs, where a run did (`benchmarks/selection.py`)."""
    found = records.latest("selection")
    if found is None:
        return None
    compared = found[1]
    runs: Sequence[Values] = compared["runs"]
    points = [
        (f"{run['kind']}, seed {run['seed']}", place, RULE_COLORS.get(str(run["kind"]), BLUE)) for run in runs if (place := point(run["held_out"]))
    ]
    chart = draw(
        "selection-held-out",
        "Accuracy of each rule's best reward model on held-out pairs, with 95 % intervals",
        lambda figure: forest_chart(figure, "Best RM: held-out pairs ranked right", points, mark=0.5, mark_label="chance"),
        height=0.9 + 0.33 * len(points),
    )
    rows = tuple(
        (
            *(run["kind"], run["seed"], sum(run["selected"]), run["silver"], run["gold"]),
            *(run["held_out"]["num_pairs"], *share_cells(run["held_out"]), *share_cells(run["audit_gold"])),
        )
        for run in runs
    )
    heads = columns(
        *("selected by", ("seed", "count"), ("pairs selected", "count"), ("silver", "count"), ("gold", "count"), ("held-out pairs", "count")),
        *(("best RM right", "share"), ("95 % interval", "interval"), ("right on its own audit gold", "share"), ("of audit gold", "interval")),
    )
    minus = tuple(
        (f"{kind} minus {compared['baseline']}", value["num_pairs"], value["num_seeds"], value["difference"], interval(value["low"], value["high"]))
        for kind, value in compared["minus_baseline"].items()
    )
    last = runs[-1]
    notes = [Note(f"The rules did not spend the same: {line}.", warns=True) for line in compared["unequal"]]
    notes.append(
        Note(f"The rounds, judges, labels and figures elsewhere on this page are of the Stage 1 that ran last: {last['kind']}, seed {last['seed']}.")
    )
    if compared["unscored"]:
        notes.append(Note(f"{compared['unscored']} held-out pairs that some model could not score are left out for all.", warns=True))
    return Section(
        "selection",
        "Which rule should select pairs",
        "Stage 1 under every rule, over the same pools with the same seeds and rounds, meant to spend as many selected and as many verified pairs; "
        "then the best RM of each on the same held-out pairs (Sec. 3.2, Step 2 has similarity; App. F.4 names uncertainty as future work).",
        (
            *notes,
            chart,
            Table("selection", heads, rows, note="Audit gold differs from rule to rule, since rules select other pairs: compare on held-out pairs."),
            Table(
                "selection_differences",
                columns(
                    *("difference, in points", ("pairs", "count"), ("seeds", "count"), ("difference", "points"), ("95 % interval", "points_interval"))
                ),
                minus,
                note="Paired, over other held-out prompts for the very models that were trained here. How models of other seeds would scatter is "
                "not in the interval: one seed tells no rule from another.",
            ),
        ),
    )
