"""Charts as inline SVG, drawn by matplotlib: no script, no request, and colours that the page's light or dark style gives.

Our choice: SVG rather than a scripted chart, so that a report opens from a mail or a bucket under the strictest content policy. Text stays text: it
can be searched. Every colour is drawn as a marker that becomes a CSS variable, so one file serves both styles.
"""

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, MaxNLocator

from synpref_ray.reporting.report.content import Chart, show_count

WIDTH, FULL_WIDTH = 7.6, 10.0  # inches: of a chart that stands alone, and of one as wide as the page's tables
PIXELS_AN_INCH = 95  # so that letters of all charts have one size
MAX_LABEL_CHARACTERS = 34
INK, SOFT, GRID, PAPER = "#010203", "#010204", "#010205", "#010206"
SERIES = ("#010211", "#010212", "#010213", "#010214", "#010215", "#010216")
"""Blue, orange, green, purple, red, grey: by place, so that what belongs together has one colour in all charts."""
BLUE, ORANGE, GREEN, PURPLE, RED, GREY = SERIES
_VARIABLES = {INK: "--ink", SOFT: "--soft", GRID: "--grid", PAPER: "--paper", **{color: f"--c{place + 1}" for place, color in enumerate(SERIES)}}
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "synpref_ray",
    "text.parse_math": False,  # names of sources and judges are text, whatever they hold
    "font.size": 10,
    "font.family": ["DejaVu Sans"],
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": GRID,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Point:
    """A value with its interval; None where none is known."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Flow:
    """So many pairs go from one node of a Sankey to the next."""

    start: str
    end: str
    count: int


def draw(name: str, title: str, paint: Callable[[Figure], None], *, height: float, caption: str = "", width: float = WIDTH) -> Chart:
    """Return what `paint` draws on a new figure as a chart for the page; sizes in inches."""
    with mpl.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*missing from font")  # a reader's browser has the glyph
        figure = Figure(figsize=(width, height))
        paint(figure)
        target = io.StringIO()
        figure.savefig(target, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return Chart(name, title, _for_page(target.getvalue(), name, round(PIXELS_AN_INCH * width)), caption)


def _for_page(text: str, name: str, max_pixels: int) -> str:
    """Return a stand-alone SVG as an element of the page: without prologue, sized by the page, its colours variables, its ids its own."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(
        r'^<svg[^>]*?viewBox="([^"]*)"[^>]*>',
        rf'<svg viewBox="\1" style="max-width: {max_pixels}px" aria-hidden="true" focusable="false">',
        text,
        count=1,
        flags=re.DOTALL,
    )
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    text = text.replace("'DejaVu Sans'", "system-ui, sans-serif").replace("xlink:href=", "href=")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    return re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text).strip()


def shorten(text: str) -> str:
    """Return a name that fits beside a chart."""
    plain = "".join(character if character.isprintable() else "\ufffd" for character in text)  # a control character is no part of an SVG
    return plain if len(plain) <= MAX_LABEL_CHARACTERS else plain[: MAX_LABEL_CHARACTERS - 1] + "…"


def percent_axis(axes: Axes, *, which: str = "y") -> None:
    """Label an axis of fractions in percent."""
    axis = axes.yaxis if which == "y" else axes.xaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))


def lines_chart(
    figure: Figure, title: str, names: Sequence[str], series: Mapping[str, Sequence[Point | None]], *, chance: float | None = None
) -> None:
    """Draw shares over ordered names (rounds), a line a series, with intervals as whiskers."""
    axes = figure.subplots()
    places = np.arange(len(names))
    for place, (label, points) in enumerate(series.items()):
        color, shift = SERIES[place % len(SERIES)], (place - (len(series) - 1) / 2) * 0.08
        found = [(x + shift, point) for x, point in zip(places, points, strict=True) if point is not None]
        xs = [x for x, _ in found]
        axes.plot(xs, [point.value for _, point in found], color=color, marker="o", label=label)
        for x, point in found:
            if point.low is not None and point.high is not None:
                axes.plot([x, x], [point.low, point.high], color=color, linewidth=1.1, alpha=0.65)
    if chance is not None:
        axes.axhline(chance, color=SOFT, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate(
            "chance", (1.0, chance), xycoords=("axes fraction", "data"), textcoords="offset points", xytext=(-2, 3), ha="right", size=8, color=SOFT
        )
    axes.set_xticks(places, [shorten(name) for name in names])
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.grid(visible=False, axis="x")
    axes.set_title(title)
    percent_axis(axes)
    figure.legend(loc="outside upper right", ncols=len(series))


def bars_chart(figure: Figure, title: str, names: Sequence[str], series: Mapping[str, Sequence[float]], *, stacked: bool = True) -> None:
    """Draw counts over ordered names, stacked by series."""
    axes = figure.subplots()
    places, below = np.arange(len(names)), np.zeros(len(names))
    for place, (label, values) in enumerate(series.items()):
        axes.bar(places, list(values), 0.62, bottom=below if stacked else None, color=SERIES[place % len(SERIES)], label=label)
        below = below + np.array(values, dtype=float)
    for x, total in zip(places, below, strict=True):
        axes.annotate(show_count(total), (x, total), textcoords="offset points", xytext=(0, 3), ha="center", size=8.5, color=SOFT)
    axes.set_xticks(places, [shorten(name) for name in names])
    axes.grid(visible=False, axis="x")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: show_count(value)))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_title(title)
    figure.legend(loc="outside upper right", ncols=len(series))


def forest_chart(
    figure: Figure, title: str, rows: Sequence[tuple[str, Point, str]], *, mark: float | None = None, mark_label: str = "", whole: bool = True
) -> None:
    """Draw a share a row with its interval; a row is (label, share, colour). `whole`: the axis goes from 0 to 100 %."""
    axes = figure.subplots()
    for place, (_, point, color) in enumerate(rows):
        if point.low is not None and point.high is not None:
            axes.plot([point.low, point.high], [place, place], color=color, linewidth=2.2, alpha=0.55, solid_capstyle="round")
        axes.plot([point.value], [place], marker="o", color=color, markersize=6)
        end = point.high if point.high is not None else point.value
        axes.annotate(f"{100 * point.value:.1f}", (end, place), textcoords="offset points", xytext=(6, 0), va="center", size=8.5, color=SOFT)
    if mark is not None:
        axes.axvline(mark, color=SOFT, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate(
            mark_label, (mark, 1.0), xycoords=("data", "axes fraction"), textcoords="offset points", xytext=(0, 3), ha="center", size=8, color=SOFT
        )
    axes.set_yticks(range(len(rows)), [shorten(label) for label, *_ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    if whole:
        axes.set_xlim(0.0, 1.0)
    axes.margins(x=0.12)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    percent_axis(axes, which="x")
    axes.set_title(title, pad=14)


def shares_chart(figure: Figure, title: str, rows: Sequence[tuple[str, Sequence[tuple[str, int, str]]]]) -> None:
    """Draw each row as one bar of 100 %, cut into (label, count, colour); small parts carry no text."""
    axes = figure.subplots()
    for place, (_, parts) in enumerate(rows):
        total, left = sum(count for _, count, _ in parts) or 1, 0.0
        for label, count, color in parts:
            width = count / total
            axes.barh(place, width, 0.62, left=left, color=color, edgecolor=PAPER, linewidth=1.0)
            if width > 0.09:
                axes.annotate(f"{label} {100 * width:.0f} %", (left + width / 2, place), ha="center", va="center", size=8.5, color=PAPER)
            left += width
    axes.set_yticks(range(len(rows)), [shorten(label) for label, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.grid(visible=False)
    axes.tick_params(axis="y", length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    percent_axis(axes, which="x")
    axes.set_title(title)


HALF_ROW = 0.38
"""How far a value of a row may be drawn from the row's middle; rows are 1 apart."""
Range = tuple[str, Sequence[float], Sequence[tuple[str, Point]]]
"""A row of a range chart: its label, what others reached, and our values by name."""


def _names_in(rows: Sequence[Range]) -> list[str]:
    return list(dict.fromkeys(name for *_, ours in rows for name, _ in ours))


def _marker(place: int) -> str:
    """Return the marker of the name at a place: five colours have one each, then the next one."""
    return "osD^v"[place // 5 % 5]


def range_height(rows: Sequence[Range]) -> float:
    """Return the height of a range chart, in inches: rows as high as their names need, and the legend."""
    names = len(_names_in(rows))
    return 0.8 + 0.2 * -(-(names + 1) // 4) + max(0.42, 0.11 * names) * len(rows)


def range_chart(figure: Figure, title: str, rows: Sequence[Range], theirs: str) -> None:
    """Draw for each row what others reached (ticks in grey), and our values over them with intervals (a colour a name); all within the row."""
    axes = figure.subplots()
    names = _names_in(rows)
    step = min(0.2, 2 * HALF_ROW / max(1, len(names) - 1))
    for place, (_, others, ours) in enumerate(rows):
        if others:
            axes.plot([min(others), max(others)], [place, place], color=GREY, linewidth=7, alpha=0.22, solid_capstyle="round")
            axes.plot(
                list(others), [place] * len(others), linestyle="none", marker="|", markersize=9, color=GREY, label=theirs if not place else None
            )
        for name, point in ours:
            number = names.index(name)
            color, shift = SERIES[number % 5], (number - (len(names) - 1) / 2) * step
            if point.low is not None and point.high is not None:
                axes.plot([point.low, point.high], [place + shift] * 2, color=color, linewidth=2.0, alpha=0.6)
            axes.plot([point.value], [place + shift], marker=_marker(number), linestyle="none", color=color)
    handles = [axes.plot([], [], marker=_marker(place), linestyle="none", color=SERIES[place % 5])[0] for place in range(len(names))]
    handles.append(axes.plot([], [], marker="|", linestyle="none", markersize=9, color=GREY)[0])
    figure.legend(handles, [*(shorten(name) for name in names), theirs], loc="outside upper right", ncols=min(len(names) + 1, 4))
    axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    percent_axis(axes, which="x")
    axes.set_title(title)


def curves_grid(
    figure: Figure,
    panels: Sequence[tuple[str, Mapping[str, tuple[Sequence[float], Sequence[float], str]]]],
    *,
    percent: bool,
    x_label: str,
    log_x: bool = False,
    columns: int = 3,
) -> None:
    """Draw small panels side by side; a panel is its title and lines by name: (xs, ys, "line" or "points"). A name has one colour in all panels."""
    rows = -(-len(panels) // columns)
    grid = figure.subplots(rows, min(columns, len(panels)), squeeze=False)
    names = list(dict.fromkeys(name for _, lines in panels for name in lines))
    for place, axes in enumerate(grid.flat):
        if place >= len(panels):
            axes.set_visible(False)
            continue
        title, lines = panels[place]
        for name, (xs, ys, style) in lines.items():
            color = SERIES[names.index(name) % len(SERIES)]
            if style == "points" or len(xs) == 1:
                axes.plot(list(xs), list(ys), color=color, marker="o", markersize=4, linestyle="-" if len(xs) > 1 else "none", linewidth=1.3)
            else:
                axes.plot(list(xs), list(ys), color=color, linewidth=1.5)
        if log_x:
            axes.set_xscale("log", base=2)
            ticks = sorted({x for xs, *_ in lines.values() for x in xs})
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
        else:
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        if percent:
            percent_axis(axes)
        axes.set_title(shorten(title), size=9.5)
        if place >= len(panels) - columns:
            axes.set_xlabel(x_label, size=9)
    handles = [figure.axes[0].plot([], [], color=SERIES[place % len(SERIES)])[0] for place in range(len(names))]
    figure.legend(handles, [shorten(name) for name in names], loc="outside upper right", ncols=min(len(names), 5))


def grid_size(num_panels: int) -> tuple[float, float]:
    """Return height and width of so many small panels, three in a row."""
    return 0.6 + 1.8 * -(-num_panels // 3), min(FULL_WIDTH, 1.0 + 3.4 * num_panels)


def calibration_grid(figure: Figure, panels: Sequence[tuple[str, Sequence[tuple[float, float, int]]]]) -> None:
    """Draw accuracy over confidence beside the line of a calibrated model; a panel is its title and (confidence, accuracy, pairs) by bin."""
    rows = -(-len(panels) // 3)
    grid = figure.subplots(rows, min(3, len(panels)), squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place >= len(panels):
            axes.set_visible(False)
            continue
        title, bins = panels[place]
        total = sum(count for *_, count in bins) or 1
        axes.plot([0.5, 1.0], [0.5, 1.0], color=SOFT, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.plot([confidence for confidence, *_ in bins], [accuracy for _, accuracy, _ in bins], color=BLUE, linewidth=1.3)
        for confidence, accuracy, count in bins:
            axes.plot([confidence], [accuracy], marker="o", linestyle="none", color=BLUE, markersize=3 + 9 * (count / total) ** 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        percent_axis(axes)
        percent_axis(axes, which="x")
        axes.set_title(shorten(title), size=9.5)
        axes.set_xlabel("confidence", size=9)


def heat_chart(figure: Figure, panels: Sequence[tuple[str, Sequence[str], Sequence[str], Sequence[Sequence[float | None]]]]) -> None:
    """Draw matrices of shares: (title, row names, column names, values); the share is written into its cell, and its depth is its colour."""
    grid = figure.subplots(1, len(panels), squeeze=False)
    for axes, (title, down, across, values) in zip(grid.flat, panels, strict=True):
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if value is None:
                    continue
                axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=BLUE, alpha=0.08 + 0.6 * value, linewidth=0))
                axes.annotate(f"{100 * value:.0f}", (x, y), ha="center", va="center", size=9, color=INK)
        axes.set_xlim(-0.5, len(across) - 0.5)
        axes.set_ylim(len(down) - 0.5, -0.5)
        axes.set_xticks(range(len(across)), [shorten(name) for name in across])
        axes.set_yticks(range(len(down)), [shorten(name) for name in down] if axes is grid.flat[0] else [""] * len(down))
        axes.tick_params(length=0, labelsize=8)
        axes.grid(visible=False)
        for side in axes.spines.values():
            side.set_visible(False)
        axes.set_title(title, size=9.5)


def sankey_chart(figure: Figure, stages: Sequence[Sequence[str]], flows: Sequence[Flow], colors: Mapping[str, str]) -> None:
    """Draw flows between columns of nodes: heights are counts; a node without a flow is left out.

    A column's nodes stand in the order given, apart by a fixed gap. A ribbon has the colour of its end.
    """
    axes = figure.subplots()
    axes.set_axis_off()
    into, out = _sums(flows, "end"), _sums(flows, "start")
    sizes = {node: max(into.get(node, 0), out.get(node, 0)) for stage in stages for node in stage}
    kept = [[node for node in stage if sizes[node]] for stage in stages]
    total = max((sum(sizes[node] for node in stage) for stage in kept), default=1) or 1
    gap = 0.055 * total
    height = max(sum(sizes[node] for node in stage) + gap * (len(stage) - 1) for stage in kept if stage)
    tops: dict[str, float] = {}
    places = {node: place for place, stage in enumerate(kept) for node in stage}
    for stage in kept:
        top = (height - sum(sizes[node] for node in stage) - gap * max(len(stage) - 1, 0)) / 2
        for node in stage:
            tops[node] = top
            top += sizes[node] + gap
    filled_out, filled_in = dict(tops), dict(tops)
    order = [node for stage in kept for node in stage]
    for flow in sorted((flow for flow in flows if flow.count), key=lambda flow: (order.index(flow.start), order.index(flow.end))):
        _ribbon(
            axes,
            (places[flow.start] + _NODE, filled_out[flow.start]),
            (places[flow.end], filled_in[flow.end]),
            flow.count,
            colors.get(flow.end, GREY),
        )
        filled_out[flow.start] += flow.count
        filled_in[flow.end] += flow.count
    last = len(kept) - 1
    for node in order:
        x, size = places[node], sizes[node]
        axes.add_patch(Rectangle((x, tops[node]), _NODE, size, facecolor=colors.get(node, GREY), linewidth=0))
        axes.annotate(f"{shorten(node)} · {show_count(size)}", (x + _NODE + 0.03, tops[node] + size / 2), va="center", ha="left", size=9, color=INK)
    axes.set_xlim(-0.02, last + 0.72)
    axes.set_ylim(height * 1.02, -height * 0.02)


_NODE = 0.035


def _sums(flows: Sequence[Flow], side: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for flow in flows:
        node = flow.end if side == "end" else flow.start
        found[node] = found.get(node, 0) + flow.count
    return found


def _ribbon(axes: Axes, start: tuple[float, float], end: tuple[float, float], size: float, color: str) -> None:
    (x0, y0), (x1, y1) = start, end
    middle = (x0 + x1) / 2
    points = [(x0, y0), (middle, y0), (middle, y1), (x1, y1), (x1, y1 + size), (middle, y1 + size), (middle, y0 + size), (x0, y0 + size), (x0, y0)]
    curve = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3, Path.CLOSEPOLY]
    axes.add_patch(PathPatch(Path(points, curve), facecolor=color, alpha=0.32, linewidth=0))
