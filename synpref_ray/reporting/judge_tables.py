"""The reports of judges and taggers (`evaluation/`) as tables for people. What each figure means is in docs/judges.md."""

from collections.abc import Mapping
from typing import Any

from synpref_ray.reporting.table import format_share, format_table


def format_judge_report(report: Mapping[str, Any]) -> str:
    """Return a `judge_report` as text: the judges side by side, their agreement with gold by kind of pair, and with each other."""
    level = f"{100 * report['confidence']:.0f} %"
    tables = [_judges(report, level), _agreements(report, level)]
    if report["between_judges"]:
        tables.append(_between(report))
    return "\n\n".join(tables)


def show_share(figure: Mapping[str, Any]) -> str:
    """Return a share in percent, or a dash."""
    return "-" if figure["value"] is None else format_share(figure["value"], 1)


def show_interval(figure: Mapping[str, Any]) -> str:
    """Return a share's interval in percent, or a dash where nothing was measured."""
    return "-" if figure["value"] is None else f"{100 * figure['low']:.1f} to {100 * figure['high']:.1f}"


def _judges(report: Mapping[str, Any], level: str) -> str:
    header = ("judge", "pairs", "position bias", level, "first named", "self-consistent", "unreadable votes", "refused rows")
    rows = []
    for name, judge in report["judges"].items():
        bias, consistency, refused = judge["position_bias"], judge["self_consistency"], judge["num_refused_rows"]
        shares = [show_share(figure or {"value": None}) for figure in (judge["first_choices"], consistency)]
        unreadable = format_share(judge["num_unreadable_votes"], judge["num_votes"])
        rows.append(
            (name, str(judge["num_pairs"]), show_share(bias), show_interval(bias), *shares, unreadable, "-" if refused is None else str(refused))
        )
    return format_table(header, rows)


def _agreements(report: Mapping[str, Any], level: str) -> str:
    who = {name: judge["agreement"] for name, judge in report["judges"].items()}
    if len(who) > 1:
        who["all judges"] = report["all_judges"]
    rows = []
    for name, agreement in who.items():
        cells = {"overall": agreement["overall"]}
        cells |= {value: cell for kind in ("objectivity", "controversiality", "task_category") for value, cell in _named(kind, agreement[kind])}
        for kind, cell in cells.items():
            abstained = "-" if cell["abstention_share"] is None else format_share(cell["abstention_share"], 1)
            rows.append((name, kind, str(cell["num_pairs"]), abstained, str(cell["num_verdicts"]), show_share(cell), show_interval(cell)))
    return format_table(("judge", "gold pairs", "pairs", "abstained", "verdicts", "agree with gold", level), rows)


def _named(kind: str, cells: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Say of what a bare value speaks: "low" is low controversiality."""
    suffix = {"controversiality": " controversiality"}.get(kind, "")
    return [(f"{kind} unknown" if value == "unknown" else f"{value}{suffix}", cell) for value, cell in cells.items()]


def _between(report: Mapping[str, Any]) -> str:
    rows = []
    for entry in report["between_judges"]:
        cells = []
        for figures in (entry["all_verdicts"], entry["both_decided"]):
            kappa = "-" if figures["kappa"] is None else f"{figures['kappa']:.2f}"
            cells += [str(figures["num_pairs"]), show_share(figures["equal"]), kappa]
        rows.append((" and ".join(entry["judges"]), *cells))
    return format_table(("judges", "pairs", "equal", "kappa", "both decided", "equal", "kappa"), rows)


def format_tag_quality(report: Mapping[str, Any]) -> str:
    """Return a `tag_quality` as text: a line a field, then the most common confusions."""
    level = f"{100 * report['confidence']:.0f} %"
    rows = []
    for name, field in report["enums"].items():
        rows.append((name, str(field["agreement"]["num_pairs"]), show_share(field["agreement"]), show_interval(field["agreement"]), "-"))
    for name, field in report["texts"].items():
        similarity = "-" if field["mean_similarity"] is None else f"{field['mean_similarity']:.2f}"
        rows.append((name, str(field["unchanged"]["num_pairs"]), show_share(field["unchanged"]), show_interval(field["unchanged"]), similarity))
    lines = [format_table(("field", "pairs", "as people have it", level, "mean similarity"), rows)]
    for name, field in report["enums"].items():
        lines += [f"{name}: {tag} where people say {human}: {count}" for tag, human, count in field["confusions"]]
    return "\n".join(lines)


def format_tagger_agreement(report: Mapping[str, Any]) -> str:
    """Return a `tagger_agreement` as text: a line a field for each two taggers, then what each failed to tag."""
    level = f"{100 * report['confidence']:.0f} %"
    rows = []
    for entry in report["between_taggers"]:
        for name, field in entry["enums"].items():
            kappa = "-" if field["kappa"] is None else f"{field['kappa']:.2f}"
            rows.append(
                (" and ".join(entry["taggers"]), name, str(field["num_pairs"]), show_share(field["equal"]), show_interval(field["equal"]), kappa)
            )
    lines = [format_table(("taggers", "field", "pairs", "equal", level, "kappa"), rows)] if rows else []
    for name, reasons in report["null_rows"].items():
        lines += [f"{name}: no attributes, {reason}: {count}" for reason, count in reasons.items()]
    return "\n".join(lines)
