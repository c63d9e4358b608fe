"""Sections about reward models: how they trained, what they reach on benchmarks beside the paper, and best-of-N."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from synpref_ray.reporting.report import paper
from synpref_ray.reporting.report.charts import Range, curves_grid, draw, grid_size, range_chart, range_height
from synpref_ray.reporting.report.content import Block, Cell, Kind, Note, Section, Table, columns, left_out
from synpref_ray.reporting.report.records import Records, Values
from synpref_ray.reporting.report.scores import Evaluation, Score, level_name, read_evaluations, read_scores, scores_of

MAX_MODELS = 9  # ours: three rows of small charts
MAX_CURVE_POINTS = 200  # ours: a step a pixel; the record beside the weights has all
_BEST_OF = re.compile(r"^(?:(?P<part>.*)/)?best_of/(?P<size>\d+)/(?P<picker>model|oracle|random)$")


def training_section(records: Records) -> Section | None:
    """Draw loss and gold accuracy of the models that matter most: those of the rounds and of Stage 1's end, then the others."""
    names = _models_in_order(records)
    if not names:
        return None
    shown = names[:MAX_MODELS]
    loss: list[tuple[str, Mapping[str, Any]]] = []
    gold: list[tuple[str, Mapping[str, Any]]] = []
    points: list[tuple[Cell, ...]] = []
    for name in shown:
        record = records.trainings[name]
        curve = thinned(record["steps"], ("step", "loss", "accuracy"))
        loss.append((without_digest(name), {"loss of the optimizer step": (curve["step"], curve["loss"], "line")}))
        points += [(name, "step", int(step), value, accuracy) for step, value, accuracy in zip(*curve.values(), strict=True)]
        found = record["evaluations"]
        if found:
            steps = [entry["step"] for entry in found]
            gold.append((without_digest(name), {"accuracy on gold": (steps, [entry["accuracy"] for entry in found], "points")}))
            points += [(name, "gold", entry["step"], entry["loss"], entry["accuracy"]) for entry in found]
    blocks: list[Block] = [_grid("training-loss", "Training loss by optimizer step", loss, percent=False)]
    if gold:
        blocks.append(_grid("training-gold", "Accuracy on the gold pairs that pick the checkpoint", gold, percent=True))
    if len(names) > len(shown):
        blocks.append(Note(f"{len(names) - len(shown)} more models are in the table, without curves."))
    blocks.append(_model_table(records, names))
    heads = columns("model", "of", ("optimizer step", "count"), ("loss", "number"), ("accuracy", "share"))
    blocks.append(Table("training_curves", heads, tuple(points), shown=False))
    lead = (
        "Bradley-Terry loss, and accuracy on the gold pairs that pick the checkpoint (working gold). Curves of more than "
        f"{MAX_CURVE_POINTS} steps are averaged in bins."
    )
    return Section("training", "Training", lead, tuple(blocks))


def _models_in_order(records: Records) -> list[str]:
    of_rounds = [(entry["training"] or {}).get("model") for entry in records.rounds]
    final = [records.stage1[name]["name"] for name in ("best_rm", "gold_rm")] if records.stage1 else []
    first = [name for name in dict.fromkeys([*of_rounds, *final]) if name in records.trainings]
    return [*first, *(name for name in sorted(records.trainings) if name not in first)]


def without_digest(name: str) -> str:
    """Return a model's name without the digest at its end."""
    return re.sub(r"-[0-9a-f]{8}$", "", name)


def thinned(steps: Sequence[Values], names: Sequence[str]) -> dict[str, list[float]]:
    """Return columns of a training's steps, averaged over equal bins where there are too many for a curve."""
    table = np.array([[float(step[name]) for name in names] for step in steps]).reshape(-1, len(names))
    bins = np.array_split(table, MAX_CURVE_POINTS) if len(table) > MAX_CURVE_POINTS else [table[place : place + 1] for place in range(len(table))]
    means = [part.mean(axis=0) for part in bins]
    return {name: [float(row[place]) for row in means] for place, name in enumerate(names)}


def _grid(name: str, title: str, panels: Sequence[tuple[str, Mapping[str, Any]]], *, percent: bool) -> Block:
    height, width = grid_size(len(panels))
    return draw(name, title, lambda figure: curves_grid(figure, panels, percent=percent, x_label="optimizer step"), height=height, width=width)


def _model_table(records: Records, names: Sequence[str]) -> Table:
    rows = []
    for name in names:
        record = records.trainings[name]
        config, steps = record["config"], record["steps"]
        figures = (
            record["num_pairs"],
            len(steps),
            config.get("global_batch_pairs"),
            config.get("learning_rate"),
            steps[-1]["loss"] if steps else None,
        )
        measured = (record["gold_accuracy"], record["num_gold_pairs"] or None)
        speed = (record["num_unique_tokens"] / record["seconds"]["train"] if record["seconds"].get("train") else None, record["shared_fraction"])
        rows.append((name, paper.name_of_backbone(str(config.get("backbone", ""))), *figures, *measured, record["seconds"].get("total"), *speed))
    heads = columns(
        *(
            "model",
            "backbone",
            ("pairs", "count"),
            ("steps", "count"),
            ("pairs a step", "count"),
            ("learning rate", "number"),
            ("last loss", "number"),
        ),
        *(("right on gold", "share"), ("gold pairs", "count"), ("time", "seconds"), ("unique tokens/s", "rate"), ("tokens shared", "share")),
    )
    return Table("models", heads, tuple(rows))


def benchmarks_section(records: Records) -> Section | None:
    """Put our numbers beside the paper's Table 1, each with what stands behind it and how much of the benchmark was there."""
    evaluations = read_evaluations(records.runs)
    scores = [score for evaluation in evaluations for score in scores_of(evaluation)]
    if not scores:
        return None
    by_key = {(score.benchmark, score.scorer, score.metric): score for score in scores}
    scorers = list(dict.fromkeys(score.scorer for score in scores))
    level = level_name(score.level for score in scores)
    looked = any(score.shared is not None for score in scores)
    ranges: list[Range] = []
    rows: list[tuple[Cell, ...]] = []
    for place, column in enumerate(paper.BENCHMARKS):
        ours = [by_key[key] for scorer in scorers if (key := (column.benchmark, scorer, column.metric)) in by_key]
        theirs = paper.paper_values(place)
        if ours:
            ranges.append((column.title, list(theirs.values()), [(without_digest(score.scorer), score.point) for score in ours]))
        for score in ours:
            same = _same_backbone(records, score)
            printed = ((min(theirs.values()), max(theirs.values())), theirs[same] if same else None, "Table 1")
            cells = _cells(score, looked)
            rows.append((column.title, *cells[:4], *printed, *cells[4:]))
    blocks: list[Block] = []
    if ranges:
        blocks.append(
            draw(
                "benchmarks-paper",
                "Our benchmark scores over the range of the paper's eight models",
                lambda figure: range_chart(figure, "", ranges, "the paper's eight models"),
                height=range_height(ranges),
                caption=f"Ticks: {paper.SOURCE}, Table 1, Qwen3-0.6B to Llama-3.1-8B-40M. Whiskers: {level}s over prompts.",
            )
        )
    blocks += _notes(evaluations, scores)
    printed_heads: tuple[str | tuple[str, Kind], ...] = (("paper, eight models", "interval"), ("paper, same backbone", "share"), "paper's source")
    ours_heads = _heads(level, looked)
    heads = columns(*ours_heads[:5], *printed_heads, *ours_heads[5:])
    remarks = "; ".join(
        f"{column.title}: {column.remark}" for column in paper.BENCHMARKS if column.remark and any(row[0] == column.title for row in rows)
    )
    note = f"Table 1 of {paper.SOURCE}. {remarks}" + "." * bool(remarks)
    missing = tuple((one.benchmark, one.scorer, name, reason) for one in evaluations for name, reason in one.missing.items())
    blocks += [
        Table("benchmarks", heads, tuple(rows), title="Metrics that the paper prints", note=note),
        _every_metric(scores, level, looked),
        Table("missing_metrics", columns("benchmark", "scorer", "metric", "why there is none"), missing, title="Metrics that are missing"),
        _paper_table(by_key, scorers),
    ]
    lead = "Each number is the benchmark's own metric. Verified says what stands behind it: equal to official output, worked by hand, or neither."
    return Section("benchmarks", "Benchmarks beside the paper", lead, tuple(block for block in blocks if not isinstance(block, Table) or block.rows))


def _heads(level: str, looked: bool) -> tuple[str | tuple[str, Kind], ...]:
    """Return the columns of a score's table; `looked`: whether any run compared its benchmarks with pools."""
    measured: tuple[str | tuple[str, Kind], ...] = ("benchmark", "scorer", "metric", ("value", "share"), (level, "interval"))
    counts: tuple[tuple[str, Kind], ...] = (("items", "count"), ("of official", "count"), ("unscored", "count"))
    shared: tuple[tuple[str, Kind], ...] = (("shared with pools", "count"), ("without them", "share")) if looked else ()
    return *measured, *counts, *shared, "verified"


def _cells(score: Score, looked: bool) -> tuple[Cell, ...]:
    """Return a score's cells behind its benchmark."""
    counts = (score.items, score.official_items, score.unscored)
    shared = (score.shared, score.clean) if looked else ()
    return score.scorer, score.metric, score.value, score.ends, *counts, *shared, score.verified


def _notes(evaluations: Sequence[Evaluation], scores: Sequence[Score]) -> list[Block]:
    """Return what a reader must know before comparing: parts of official sets, sets of unknown size, prompts that pools hold too, unscored items."""
    notes: list[Block] = []
    partial = _benchmarks_of(scores, lambda score: score.is_partial)
    if partial:
        notes.append(Note(f"Not the whole official set: {partial}. Such numbers are not comparable with the paper's.", warns=True))
    unknown = _benchmarks_of(scores, lambda score: score.is_official and not score.is_partial and score.official_items is None)
    if unknown:
        notes.append(Note(f"Of these metrics it is not known here how many items the official set has: {unknown}. A part may be missing unnoticed."))
    shared = [f"{one.benchmark} ({one.shared} of {one.facts['items']} items)" for one in evaluations if one.shared]
    if shared:
        told = "; ".join(dict.fromkeys(shared))
        notes.append(Note(f"Items share their prompt with pools of this workspace: {told}. Numbers without them are beside the others.", warns=True))
    unscored = {(score.benchmark, score.scorer): score.unscored for score in scores if score.unscored}
    if unscored:
        told = "; ".join(f"{benchmark} ({number}, {scorer})" for (benchmark, scorer), number in unscored.items())
        notes.append(Note(f"Items without a score count as wrong: {told}."))
    return notes


def _benchmarks_of(scores: Sequence[Score], is_so: Callable[[Score], bool]) -> str:
    """Return the benchmarks with such scores, as a list; with the metrics' names where not all are such."""
    told = []
    for name in sorted({score.benchmark for score in scores if is_so(score)}):
        of_it = [score for score in scores if score.benchmark == name and not _is_detail(score)]
        metrics = list(dict.fromkeys(score.metric for score in of_it if is_so(score)))
        others = {score.metric for score in of_it} - set(metrics)
        told.append(f"{name} ({', '.join(metrics[:6])}{' …' if len(metrics) > 6 else ''})" if others and metrics else name)
    return ", ".join(told)


def _is_detail(score: Score) -> bool:
    return "best_of/" in score.metric or "/matrix/" in score.metric


def _same_backbone(records: Records, score: Score) -> str | None:
    backbone = records.trainings[score.folder]["config"]["backbone"] if score.folder in records.trainings else score.folder
    return paper.paper_model_of(str(backbone))


def _every_metric(scores: Sequence[Score], level: str, looked: bool) -> Table:
    rows = tuple((score.benchmark, *_cells(score, looked), score.run) for score in scores if not _is_detail(score))
    return Table("metrics", columns(*_heads(level, looked), "run"), rows, title="Every metric")


def _paper_table(by_key: Mapping[tuple[str, str, str], Score], scorers: Sequence[str]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for scorer in scorers:
        found = [by_key.get((column.benchmark, scorer, column.metric)) for column in paper.BENCHMARKS]
        if any(found):
            rows.append((f"ours: {scorer}", *(score.value if score else None for score in found)))
    rows += [(f"Skywork-Reward-V2-{name}", *(value / 100 for value in values)) for name, values in paper.MODELS.items()]
    heads = columns("", *((column.title, "share") for column in paper.BENCHMARKS))
    return Table(
        "paper_table", heads, tuple(rows), title="The paper's Table 1", note=f"Source: Table 1 of {paper.SOURCE}. JudgeBench is its macro mean."
    )


def best_of_n_section(records: Records) -> Section | None:
    """Draw how good the reply is that a scorer picks out of n."""
    curves: dict[str, dict[str, list[tuple[int, Score]]]] = {}
    scores = [score for score in read_scores(records.runs) if _BEST_OF.match(score.metric)]
    for score in scores:
        found = _BEST_OF.match(score.metric)
        if found:
            part = f", {found['part']}" if found["part"] else ""
            panel = curves.setdefault(f"{score.benchmark}{part}", {})
            name = without_digest(score.scorer) if found["picker"] == "model" else {"oracle": "oracle", "random": "blind pick"}[found["picker"]]
            panel.setdefault(name, []).append((int(found["size"]), score))
    if not curves:
        return None
    panels, rows = [], []
    for title, lines in curves.items():
        drawn = {}
        for name, values in lines.items():
            ordered = sorted(dict(values).items())
            drawn[name] = ([float(size) for size, _ in ordered], [score.value for _, score in ordered], "points")
            rows += [(title, name, size, score.value, score.ends) for size, score in ordered]
        panels.append((title, drawn))
    height, width = grid_size(min(len(panels), MAX_MODELS))
    chart = draw(
        "best-of-n",
        "Expected quality of the picked reply against the number of replies",
        lambda figure: curves_grid(figure, panels[:MAX_MODELS], percent=True, x_label="replies to pick from", log_x=True),
        height=height + 0.4,
        width=width,
    )
    heads = columns("benchmark", "picked by", ("of", "count"), ("quality", "share"), (level_name(score.level for score in scores), "interval"))
    table = Table("best_of_n", heads, tuple(rows), title="Values of the curves")
    lead = (
        "The expected quality of the highest-scored of n replies, over all subsets of n (Fig. 4 of the paper gives such curves for PPE Correctness)."
    )
    return Section("best_of_n", "Best of N", lead, (chart, *left_out("curves", len(panels), MAX_MODELS), table))
