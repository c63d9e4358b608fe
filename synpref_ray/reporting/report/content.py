"""What a report is made of: sections of tables, charts, notes and example pairs. A table is shown, and written as JSON and CSV, from the same values.

A cell holds the value itself (a share is a fraction, an interval two fractions); how it looks is its column's kind.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["text", "count", "share", "points", "number", "interval", "points_interval", "number_interval", "seconds", "rate"]
Cell = str | int | float | tuple[float, float] | None
NOTHING = "\u2013"
LONG_TEXT = 28


@dataclass(frozen=True)
class Column:
    """A column's name and how its values are shown: `share` and `interval` in percent, `points` as a signed difference of percentages."""

    name: str
    kind: Kind = "text"


@dataclass(frozen=True)
class Table:
    """Rows of raw values under columns. `shown=False`: the values behind a chart, for JSON and CSV alone."""

    name: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""
    note: str = ""
    shown: bool = True

    def is_long(self, place: int) -> bool:
        """Whether the column at `place` holds sentences rather than names."""
        return any(isinstance(cell, str) and len(cell) > LONG_TEXT for cell in (row[place] for row in self.rows))

    def __post_init__(self) -> None:
        widths = {len(row) for row in self.rows} - {len(self.columns)}
        if widths:
            raise ValueError(f"table {self.name}: rows of {sorted(widths)} cells under {len(self.columns)} columns")


@dataclass(frozen=True)
class Chart:
    """An inline SVG whose colours are the page's variables; `title` is what a screen reader says."""

    name: str
    title: str
    svg: str
    caption: str = ""


@dataclass(frozen=True)
class Note:
    """A sentence of ours; `warns` sets it apart."""

    text: str
    warns: bool = False


@dataclass(frozen=True)
class Example:
    """One pair with what was decided and why; `facts` are short name-value lines."""

    pair_id: str
    source: str
    decision: str
    reason: str
    prompt: tuple[Mapping[str, str], ...]
    chosen: str
    rejected: str
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Examples:
    """Pairs of one decision."""

    title: str
    pairs: tuple[Example, ...]


Block = Table | Chart | Note | Examples


@dataclass(frozen=True)
class Section:
    """One part of the report; `name` is its anchor, and its key in JSON and CSV."""

    name: str
    title: str
    lead: str
    blocks: tuple[Block, ...]

    @property
    def tables(self) -> list[Table]:
        """All tables, shown or not."""
        return [block for block in self.blocks if isinstance(block, Table)]


@dataclass(frozen=True)
class Figure:
    """A number at the top of the page."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Report:
    """The whole: where it comes from, when it was made (seconds since 1970), its warnings, figures and sections."""

    workspace: str
    made: float
    versions: Mapping[str, str]
    warnings: tuple[str, ...]
    figures: tuple[Figure, ...]
    sections: tuple[Section, ...]


def columns(*names: str | tuple[str, Kind]) -> tuple[Column, ...]:
    """Return columns by name, or by (name, kind)."""
    return tuple(Column(name) if isinstance(name, str) else Column(*name) for name in names)


def show(value: Cell, kind: Kind) -> str:
    """Return a cell as people read it; a dash where there is nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return NOTHING
    if isinstance(value, str):
        return value
    if isinstance(value, tuple) and kind == "number_interval":
        return " to ".join(f"{end:+.2f}" for end in value)
    if isinstance(value, tuple):
        low, high = (100 * end for end in value)
        return f"{low:+.1f} to {high:+.1f}" if kind == "points_interval" else f"{low:.1f} to {high:.1f}"
    return str(_NUMBERS[kind](value))


def show_count(value: float) -> str:
    """Return a whole number with thousands set apart by a thin space."""
    return f"{value:,.0f}".replace(",", "\u2009")


def show_seconds(value: float) -> str:
    """Return a duration in its two largest units."""
    seconds = round(value)
    if seconds < 60:
        return f"{value:.1f} s" if value < 10 else f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left:02d} min" if hours else f"{minutes} min {rest:02d} s"


_NUMBERS: Mapping[Kind, Any] = {
    "text": str,
    "count": show_count,
    "share": lambda value: f"{100 * value:.1f} %",
    "points": lambda value: f"{100 * value:+.1f}",
    "number": lambda value: f"{value:.3g}",
    "interval": str,
    "points_interval": str,
    "number_interval": str,
    "seconds": show_seconds,
    "rate": lambda value: f"{value:,.1f}".replace(",", "\u2009"),
}


def interval(low: float | None, high: float | None) -> tuple[float, float] | None:
    """Return an interval's cell; None where an end is not known."""
    return None if low is None or high is None or math.isnan(low) or math.isnan(high) else (float(low), float(high))


def share_cells(figure: Mapping[str, Any] | None) -> tuple[Cell, Cell]:
    """Return a share and its interval of a record with `value` (or `accuracy`), `low` and `high`; dashes where nothing was measured."""
    value = (figure or {}).get("value", (figure or {}).get("accuracy"))
    if figure is None or value is None or (isinstance(value, float) and math.isnan(value)):
        return None, None
    return float(value), interval(figure.get("low"), figure.get("high"))


def left_out(what: str, number: int, shown: int) -> tuple[Note, ...]:
    """Return a note where a chart shows fewer than there are."""
    return (Note(f"{number - shown} of {number} {what} are in the table, not in the chart."),) if number > shown else ()


def has_rows(tables: Sequence[Table]) -> bool:
    """Whether any of the tables has a row."""
    return any(table.rows for table in tables)
