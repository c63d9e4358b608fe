"""Sections about the pairs: what the workspace holds, where pairs went, Stage 1's rounds, Stage 2's decisions."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from synpref_ray.reporting.report import paper
from synpref_ray.reporting.report.charts import (
    BLUE,
    FULL_WIDTH,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    Flow,
    Point,
    bars_chart,
    draw,
    lines_chart,
    sankey_chart,
    shares_chart,
)
from synpref_ray.reporting.report.content import Block, Chart, Note, Section, Table, columns, share_cells, show_count
from synpref_ray.reporting.report.records import Records, Values
from synpref_ray.reporting.status import PoolStatus, count_rejects

MAX_SOURCES = 10  # ours: what a Sankey can label; the table has all
MAX_POOLS = 30
POOLS = ("seed", "unverified", "wild")
DECISION_COLORS = {"keep": BLUE, "flip": ORANGE, "drop": GREY}
SIMULATED = "Gold is simulated: an annotator that reads known truth for a stated budget of pairs stands in for people."


def point(figure: Mapping[str, Any]) -> Point | None:
    """Return a recorded share as a point of a chart; None where nothing was measured."""
    value, ends = share_cells(figure)
    if not isinstance(value, float):
        return None
    return Point(value, *ends) if isinstance(ends, tuple) else Point(value)


def workspace_section(records: Records) -> Section:
    """Say which pools, sources and stages there are."""
    status = records.status
    main = [pool for pool in status.pools if pool.name in POOLS]
    rest = [pool for pool in status.pools if pool.name not in POOLS]
    stages = ", ".join(status.finished_stages) or "none"
    lead = (
        f"{len(main)} pools of ingested pairs and {len(rest)} gathered from them, {len(status.models)} models, {status.num_rounds} recorded rounds "
        f"(the seed's included). Stages that have finished: {stages}."
    )
    blocks: list[Block] = [_pool_table(sorted(main, key=lambda pool: POOLS.index(pool.name)) + rest[: MAX_POOLS - len(main)])]
    if len(status.pools) > MAX_POOLS:
        blocks.append(Note(f"{len(status.pools) - MAX_POOLS} more pools are not listed."))
    sources = _source_table(records)
    return Section("workspace", "What the workspace holds", lead, (*blocks, *([sources] if sources else [])))


def _pool_table(pools: Sequence[PoolStatus]) -> Table:
    rows = []
    for pool in pools:
        sealed = sum(table.is_sealed for table in pool.tables)
        rejects = ", ".join(f"{reason} {count}" for reason, count in sorted(count_rejects(pool).items()))
        rows.append((pool.name, pool.num_rows, pool.num_shards, sealed, len(pool.tables) - sealed, rejects or None))
    heads = columns("pool", ("pairs", "count"), ("shards", "count"), ("tables finished", "count"), ("unfinished", "count"), "rows refused by a step")
    return Table("pools", heads, tuple(rows), title="Pools")


def _source_table(records: Records) -> Table | None:
    found = records.latest("sources")
    if found is None:
        return None
    names = ("records", "kept", "duplicates", "contaminated")
    rows = []
    for name, counts in found[1].items():
        figures = [int(counts.get(key, 0)) for key in names]
        rejected = sum(counts.get("rejected", {}).values())
        rows.append((name, str(counts.get("route", "")), *figures[:2], rejected, *figures[2:], str(counts.get("licence", ""))))
    heads = columns(
        "source",
        "pool",
        ("records", "count"),
        ("kept", "count"),
        ("rejected", "count"),
        ("duplicates", "count"),
        ("contaminated", "count"),
        "licence",
    )
    return Table("sources", heads, tuple(rows), title="Sources of the latest ingest")


def yields_section(records: Records) -> Section | None:
    """Say where the pairs of every pool went."""
    flows = _flows(records)
    if not flows:
        return None
    stages = [*_stages(flows)]
    colors = {
        **{"seed": GREEN, "unverified": BLUE, "wild": PURPLE, "set aside by ingest": RED},
        **{"Stage 1": BLUE, "Stage 2": PURPLE, "gold, working": ORANGE, "gold, audit": RED, "silver": GREEN, "not labelled": GREY},
        **{_decided(name): color for name, color in DECISION_COLORS.items()},
    }
    tallest = max(len(stage) for stage in stages)
    chart = draw(
        "yields-flow",
        "Flow of pairs from sources to pools, stages and outcomes",
        lambda figure: sankey_chart(figure, stages, flows, colors),
        height=max(2.6, 0.55 * tallest),
        width=FULL_WIDTH,
        caption="Heights are pairs. Nothing is deleted: every outcome is a column, so each is a filter over one table.",
    )
    rows = tuple((flow.start, flow.end, flow.count) for flow in flows if flow.count)
    table = Table("flows", columns("from", "to", ("pairs", "count")), rows, shown=False)
    return Section("yields", "Where the pairs went", "From the sources' records to what a reward model trains on.", (chart, table))


def reason_words(reason: str) -> str:
    """Return a gate's reason as words."""
    return reason.replace("_", " ").replace("rms", "RMs").replace("rm ", "RM ")


def _decided(decision: str) -> str:
    return {"keep": "kept", "flip": "flipped", "drop": "dropped"}[decision]


def _flows(records: Records) -> list[Flow]:
    sizes = {pool.name: pool.num_rows for pool in records.status.pools}
    found = records.latest("sources")
    flows = _source_flows(found[1]) if found and _is_of_these_pools(found[1], sizes) else []
    if records.stage1 and records.rounds:
        last = records.rounds[-1]["set_sizes"]
        parts = {"gold, working": last.get("gold-working", 0), "gold, audit": last.get("gold-audit", 0), "silver": last.get("silver", 0)}
        pairs = {name: sizes.get(name, 0) for name in ("seed", "unverified")}
        flows += [Flow(name, "Stage 1", count) for name, count in pairs.items()]
        flows += [Flow("Stage 1", name, count) for name, count in parts.items()]
        flows.append(Flow("Stage 1", "not labelled", max(0, sum(pairs.values()) - sum(parts.values()))))
    if records.stage2:
        flows.append(Flow(records.stage2["pool"], "Stage 2", records.stage2["pairs"]))
        flows += [Flow("Stage 2", _decided(name), count) for name, count in records.stage2["decisions"].items()]
    return [flow for flow in flows if flow.count]


def _is_of_these_pools(sources: Mapping[str, Values], sizes: Mapping[str, int]) -> bool:
    """Whether the latest ingest made all of the pools: one that only added to them says nothing of the rest."""
    kept: Counter[str] = Counter()
    for counts in sources.values():
        kept[counts["route"]] += counts["kept"]
    return all(sizes.get(name, 0) == count for name, count in kept.items())


def _source_flows(sources: Mapping[str, Values]) -> list[Flow]:
    largest = sorted(sources, key=lambda name: -sources[name]["records"])
    routes = [*POOLS, *sorted({str(counts["route"]) for counts in sources.values()} - {*POOLS})]
    shown = largest if len(largest) <= MAX_SOURCES else largest[: MAX_SOURCES - 1]
    flows: Counter[tuple[str, str]] = Counter()
    for name in sorted(largest, key=lambda name: (name not in shown, routes.index(sources[name]["route"]))):  # few ribbons cross
        counts, label = sources[name], f"{name} " if name in POOLS else name  # a source may have the name of a pool
        start = label if name in shown else f"{len(largest) - len(shown)} more sources"
        flows[start, counts["route"]] += counts["kept"]
        flows[start, "set aside by ingest"] += sum(counts["rejected"].values()) + counts["duplicates"] + counts.get("contaminated", 0)
    return [Flow(start, end, count) for (start, end), count in flows.items()]


def _stages(flows: Sequence[Flow]) -> list[list[str]]:
    """Return the Sankey's columns, the first one only where sources are known."""
    pools = [*POOLS, *(flow.start for flow in flows if flow.end in ("Stage 1", "Stage 2") and flow.start not in POOLS), "set aside by ingest"]
    middle = ["Stage 1", "Stage 2"]
    ends = ["gold, working", "gold, audit", "silver", "not labelled", *(_decided(name) for name in DECISION_COLORS)]
    sources = [flow.start for flow in flows if flow.start not in {*pools, *middle}]
    columns_ = [list(dict.fromkeys(sources)), pools, middle, ends]
    used = {flow.start for flow in flows} | {flow.end for flow in flows}
    kept = [[name for name in column if name in used] for column in columns_]
    return [column for column in kept if column]


def rounds_section(records: Records) -> Section | None:
    """Say what every round trained on, and how right its reward model was on working and on audit gold."""
    if not records.rounds:
        return None
    names = ["seed" if entry["round"] == 0 else f"round {entry['round']}" for entry in records.rounds]
    final = (records.stage1 or {}).get("audit_gold_accuracy", {})
    rows = []
    for name, entry in zip(names, records.rounds, strict=True):
        measured = [cell for split in ("working", "audit") for cell in share_cells(entry.get(f"best_rm_on_{split}_gold") or None)]
        sizes = entry["set_sizes"]
        trained = (entry["training"] or {}).get("silver_pairs")
        rows.append(
            (name, trained, *measured, entry["selected_pairs"] or None, *(sizes.get(key) for key in ("silver", "gold-working", "gold-audit")))
        )
    heads = columns(
        "",
        ("RM trained on", "count"),
        ("right on working gold", "share"),
        ("95 % interval, working", "interval"),
        ("right on audit gold", "share"),
        ("95 % interval, audit", "interval"),
        ("then retrieved", "count"),
        ("silver", "count"),
        ("working gold", "count"),
        ("audit gold", "count"),
    )
    note = (
        "An RM's accuracy is on the gold that its round found; intervals are bootstrapped over prompts. Working gold picks checkpoints, so audit "
        "gold is the figure to quote."
    )
    blocks: list[Block] = [*_round_charts(names, records.rounds), Table("rounds", heads, tuple(rows), note=note)]
    if final:
        last = tuple((f"final {name} RM", figure.get("num_pairs"), *share_cells(figure or None)) for name, figure in final.items())
        head = columns("", ("audit pairs", "count"), ("right on audit gold", "share"), ("95 % interval", "interval"))
        blocks.append(Table("final_models", head, last, title="What goes on to Stage 2"))
    return Section(
        "rounds",
        "Stage 1, round by round",
        "A round trains a reward model on silver, picks its checkpoint on working gold, and retrieves unverified pairs for its errors (Sec. 3.2).",
        tuple(blocks),
    )


def _round_charts(names: Sequence[str], rounds: Sequence[Values]) -> list[Chart]:
    charts = []
    measured = {f"{split} gold": [point(entry.get(f"best_rm_on_{split}_gold") or {}) for entry in rounds] for split in ("working", "audit")}
    trained = [place for place in range(len(names)) if any(points[place] for points in measured.values())]
    if trained:
        series = {label: [points[place] for place in trained] for label, points in measured.items()}
        shown = [names[place] for place in trained]
        charts.append(
            draw(
                "rounds-accuracy",
                "Accuracy of each round's best reward model on working and audit gold, with 95 % intervals",
                lambda figure: lines_chart(figure, "Best RM: pairs ranked right", shown, series, chance=0.5),
                height=2.9,
            )
        )
    sizes = {label: [float(entry["set_sizes"].get(key, 0)) for entry in rounds] for label, key in _SETS.items()}
    charts.append(
        draw(
            "rounds-sizes",
            "Sizes of silver, working gold and audit gold after each round",
            lambda figure: bars_chart(figure, "Labelled pairs after the round", names, sizes),
            height=2.9,
        )
    )
    return charts


_SETS = {"silver": "silver", "working gold": "gold-working", "audit gold": "gold-audit"}


def stage2_section(records: Records) -> Section | None:
    """Say what the gate decided, and why."""
    record = records.stage2
    if record is None:
        return None
    decisions, total = record["decisions"], record["pairs"] or 1
    parts = [(_decided(name), decisions.get(name, 0), color) for name, color in DECISION_COLORS.items()]
    reasons = sorted(record["reasons"].items(), key=lambda entry: (list(DECISION_COLORS).index(entry[0].split("/")[0]), -entry[1]))
    rows = tuple((_decided(name.split("/")[0]), reason_words(name.split("/")[1]), count, count / total) for name, count in reasons)
    pairs, judged = show_count(record["pairs"]), show_count(record["judged_pairs"])
    lead = (
        f"Two reward models scored {pairs} pairs of {record['pool']}; judges were asked about {judged}. A pair "
        "is kept where gold RM and best RM (or a judge) agree with its label, flipped where both models reject it, dropped otherwise (Sec. 3.3)."
    )
    chart = draw(
        "stage2-decisions",
        "Shares of pairs kept, flipped and dropped",
        lambda figure: shares_chart(figure, "Decisions", [("all pairs", parts)]),
        height=1.35,
    )
    table = Table("decisions", columns("decision", "reason", ("pairs", "count"), ("share", "share")), rows)
    kept, flipped = paper.CURATION_AGREEMENT
    note = Note(
        f"In the paper people agreed with {kept} % of kept and {flipped} % of flipped pairs (Table 19, best and gold RM); "
        "14 of 40 million pairs were flipped."
    )
    return Section("stage2", "Stage 2: keep, flip or drop", lead, (chart, table, note))
