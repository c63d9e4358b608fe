"""Sections about who labels: judges, taggers and people, and how far they agree."""

from collections.abc import Mapping, Sequence
from typing import Any

from synpref_ray.reporting.report import paper
from synpref_ray.reporting.report.charts import BLUE, GREY, ORANGE, Point, draw, forest_chart, lines_chart
from synpref_ray.reporting.report.content import Block, Cell, Note, Section, Table, columns, share_cells
from synpref_ray.reporting.report.curation import SIMULATED, point
from synpref_ray.reporting.report.records import Records, Values

KINDS = ("objectivity", "controversiality", "task_category")


def judges_section(records: Records) -> Section | None:
    """Say what judges are worth on gold: agreement, position bias, self-consistency, and where they may decide."""
    entries: list[tuple[str, Values]] = [(f"Stage 1, round {entry['round']}", entry) for entry in records.rounds]
    if records.stage2 and records.stage2.get("judge_report"):
        entries.append(("Stage 2", records.stage2))
    entries = [(name, entry) for name, entry in entries if entry.get("judge_report", {}).get("working", {}).get("judges")]
    if not entries:
        return None
    where, last = entries[-1]
    reports = last["judge_report"]
    blocks: list[Block] = [_trust_note(last)]
    rows = [(f"{judge}, {split}", found) for split, report in reports.items() for judge, found in _overall(report)]
    colors = {"working": BLUE, "audit": ORANGE}
    points = [(name, measured, colors.get(name.rsplit(", ", 1)[1], GREY)) for name, found in rows if (measured := point(found))]
    if points:
        blocks.append(
            draw(
                "judges-agreement",
                "Agreement of judges with gold, with 95 % intervals",
                lambda figure: forest_chart(figure, "Verdicts that agree with gold", points, mark=0.5, mark_label="chance"),
                height=0.95 + 0.34 * len(points),
            )
        )
    history = _history(entries)
    if history is not None:
        blocks.append(history)
    blocks += [_judge_table(reports), _kind_table(reports), *_between_tables(reports)]
    objective, subjective = (", ".join(f"{who} {values[place]} %" for who, values in paper.JUDGE_AGREEMENT.items()) for place in (0, 1))
    blocks.append(Note(f"The paper's agreement with gold (Table 14): on objective pairs {objective}; on subjective pairs {subjective}."))
    lead = (
        f"Measured on gold with exemplars of other prompts only, latest in {where}. A judge decides only where the lower bound of its agreement with "
        "working gold is above chance, overall and in the pair's category; elsewhere its votes are stored and a fallback applies."
    )
    return Section("judges", "Judges against gold", lead, tuple(blocks))


def _overall(report: Values) -> list[tuple[str, Values]]:
    found = [(judge, figures["agreement"]["overall"]) for judge, figures in report["judges"].items()]
    return [*found, ("all judges", report["all_judges"]["overall"])] if len(found) > 1 else found


def _trust_note(entry: Values) -> Note:
    lines, silent = [], False
    for judge, trust in sorted(entry["judges_on_working_gold"].items()):
        decides = ", ".join(name.replace("_", " ") for name in trust["decides"])
        silent = silent or not decides
        bar = "chance and the source labels" if trust.get("must_beat_source_label") else "chance"
        lines.append(f"{judge} decides {decides or f'nothing: it has not proved, overall and in a category, that it beats {bar}'}")
    return Note("; ".join(lines) + ".", warns=silent)


def _history(entries: Sequence[tuple[str, Values]]) -> Block | None:
    """Draw the agreement with audit gold over the rounds, if there are several."""
    names = sorted({judge for _, entry in entries for judge in entry["judge_report"].get("audit", {}).get("judges", {})})
    series: dict[str, list[Point | None]] = {}
    for judge in names:
        found = [entry["judge_report"].get("audit", {}).get("judges", {}).get(judge) for _, entry in entries]
        series[judge] = [point(figures["agreement"]["overall"]) if figures else None for figures in found]
    if len(entries) < 2 or not any(value for points in series.values() for value in points):
        return None
    labels = ["seed" if name.endswith(", round 0") else name.removeprefix("Stage 1, ") for name, _ in entries]
    return draw(
        "judges-history",
        "Agreement of judges with audit gold by round",
        lambda figure: lines_chart(figure, "Agreement with audit gold", labels, series, chance=0.5),
        height=2.7,
    )


def _judge_table(reports: Values) -> Table:
    rows = []
    for split, report in reports.items():
        for judge, figures in report["judges"].items():
            agreement = figures["agreement"]["overall"]
            consistency, first = figures["self_consistency"] or {}, figures["first_choices"] or {}
            rows.append(
                (
                    *(judge, split, figures["num_pairs"], agreement["num_verdicts"], *share_cells(agreement), agreement["abstention_share"]),
                    *(*share_cells(figures["position_bias"]), first.get("value"), consistency.get("value"), figures["unreadable_share"]),
                )
            )
    heads = columns(
        *(
            "judge",
            "gold",
            ("pairs", "count"),
            ("verdicts", "count"),
            ("agrees", "share"),
            ("95 % interval, agreement", "interval"),
            ("abstained", "share"),
        ),
        *(
            ("position bias", "share"),
            ("95 % interval, bias", "interval"),
            ("first named", "share"),
            ("self-consistent", "share"),
            ("unreadable", "share"),
        ),
    )
    note = "Position bias: of pairs answered in both orders, those whose two answers name the same position. First named: 50 % favours no position."
    return Table("judges", heads, tuple(rows), note=note)


def _kind_table(reports: Values) -> Table:
    rows = []
    for split, report in reports.items():
        who = {judge: figures["agreement"] for judge, figures in report["judges"].items()}
        if len(who) > 1:
            who["all judges"] = report["all_judges"]
        for judge, agreement in who.items():
            for kind in KINDS:
                for value, figures in agreement.get(kind, {}).items():
                    label = value.replace("_", " ")
                    rows.append((judge, split, kind.replace("_", " "), label, figures["num_pairs"], figures["num_verdicts"], *share_cells(figures)))
    heads = columns("judge", "gold", "by", "value", ("pairs", "count"), ("verdicts", "count"), ("agrees", "share"), ("95 % interval", "interval"))
    return Table("judges_by_kind", heads, tuple(rows), title="By kind of pair")


def _between_tables(reports: Values) -> list[Table]:
    rows = []
    for split, report in reports.items():
        for entry in report["between_judges"]:
            both, decided = entry["all_verdicts"], entry["both_decided"]
            cells: list[Cell] = [cell for figures in (both, decided) for cell in (figures["num_pairs"], figures["equal"]["value"], figures["kappa"])]
            rows.append((" and ".join(entry["judges"]), split, *cells))
    heads = columns(
        *("judges", "gold", ("pairs", "count"), ("equal", "share"), ("kappa", "number")),
        *(("both decided", "count"), ("equal there", "share"), ("kappa there", "number")),
    )
    return [Table("between_judges", heads, tuple(rows), title="Between judges")] if rows else []


def people_section(records: Records) -> Section | None:
    """Say how far people agree with each other, and what they changed of the taggers' attributes."""
    blocks: list[Block] = []
    found = records.latest("annotation")
    if found is not None:
        blocks += _annotation_blocks(found[1])
    tags = records.latest("tag_report")
    if tags is not None:
        blocks += _tag_tables(tags[1])
    if records.is_simulated and found is None:
        blocks.insert(0, Note(SIMULATED, warns=True))
    if not blocks:
        return None
    return Section(
        "people", "People and taggers", "Who labelled gold, how far they agree, and what became of the taggers' attributes.", tuple(blocks)
    )


def _annotation_blocks(annotation: Values) -> list[Block]:
    rows = []
    for name, figures in annotation["agreement"].items():
        cells = (figures["percent_agreement"], figures["krippendorff_alpha"], figures["cohen_kappa"])
        rows.append(("all pairs" if name == "all" else name.replace("_", " "), figures["num_votes"], figures["num_shared_pairs"], *cells))
    heads = columns(
        "", ("verdicts", "count"), ("judged by several", "count"), ("agree", "share"), ("Krippendorff's alpha", "number"), ("Cohen's kappa", "number")
    )
    standing = tuple((name.replace("_", " "), count) for name, count in annotation["standings"].items())
    people = tuple((name, person["verdicts"], person["quality"]) for name, person in annotation["annotators"].items())
    return [
        Table("human_agreement", heads, tuple(rows), title="Agreement between people"),
        Table("annotation_standing", columns("pairs that are", ("pairs", "count")), standing, title="The annotation queue"),
        Table("annotators", columns("annotator", ("verdicts", "count"), ("estimated quality", "number")), people, title="Annotators"),
    ]


def _tag_tables(report: Values) -> list[Block]:
    rows: list[tuple[Cell, ...]] = []
    for who, quality in _tag_qualities(report):
        for name, field in {**quality.get("enums", {}), **quality.get("texts", {})}.items():
            figures = field.get("agreement") or field.get("unchanged") or {}
            rows.append((who, name.replace("_", " "), figures.get("num_pairs"), *share_cells(figures)))
    heads = columns("tagger", "field", ("pairs", "count"), ("as people have it", "share"), ("95 % interval", "interval"))
    tables: list[Block] = [Table("taggers", heads, tuple(rows), title="Attributes that people left as they were")] if rows else []
    pairs = tuple(
        (" and ".join(entry["taggers"]), name.replace("_", " "), field["num_pairs"], *share_cells(field["equal"]), field["kappa"])
        for entry in report.get("between_taggers", [])
        for name, field in entry["enums"].items()
    )
    heads = columns("taggers", "field", ("pairs", "count"), ("equal", "share"), ("95 % interval", "interval"), ("kappa", "number"))
    return [*tables, Table("between_taggers", heads, pairs, title="Between taggers")] if pairs else tables


def _tag_qualities(report: Mapping[str, Any]) -> list[tuple[str, Values]]:
    """Return every quality record in the taggers' report with the name it stands under, however deep."""
    found: list[tuple[str, Values]] = []
    for name, value in report.items():
        if isinstance(value, Mapping):
            found += [(name, value)] if "enums" in value and "texts" in value else _tag_qualities(value)
    return found
