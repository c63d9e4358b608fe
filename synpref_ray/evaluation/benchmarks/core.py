"""What every benchmark is made of: items with their replies, outcomes of a scorer on them, and metrics that are means put together.

A benchmark reads its official files into items, and measures outcomes: rewards of a model, or verdicts of a judge. All its metrics are combinations
of means over observations of items (*cells*), so that one bootstrap over prompts serves them all (`estimates`).

Units: every metric is a fraction, or a mean of fractions; the officials' tables often print 100 times that.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from synpref_ray.schema import Message, prompt_group

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Means = Mapping[str, Floats]
"""By name of a cell, its mean in each resample, (R,)."""
Row = Mapping[str, object]


class Verified(StrEnum):
    """What stands behind a metric: printed beside its number."""

    OFFICIAL_OUTPUT = "official output"
    """Equal to what the benchmark's own code gives on its own data."""
    HAND_WORKED = "hand-worked"
    """Follows the benchmark's own code as read; checked on cases that were worked out by hand."""
    UNVERIFIED = "unverified"
    """Follows a description; the benchmark's own code was not to be had, or has none for it."""


class Part(NamedTuple):
    """One file of a benchmark, or one split of it on a hub: its name, which may say what it holds, and its rows."""

    name: str
    rows: Sequence[Row]


class HubPart(NamedTuple):
    """Where a part is published on the Hugging Face hub."""

    dataset: str
    split: str
    config: str = ""


@dataclass(frozen=True)
class Item:
    """One prompt with its replies, and the comparisons that the metric makes of them."""

    name: str
    prompt: tuple[Message, ...]
    replies: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]
    """(better, worse) as places in `replies`: what a judge is asked."""
    subset: str = ""
    quality: tuple[float, ...] = ()
    """The known worth of each reply, for best-of-N; empty: not known."""
    problem: str | None = None
    """Why this row of the file is no item: nothing is scored, and it counts as wrong."""
    attributes: tuple[tuple[str, str], ...] = ()
    """What else is known of the prompt, by name (task_category, objectivity …): audits tell accuracy by it."""

    @cached_property
    def prompt_key(self) -> str:
        """The same for prompts that differ in case, punctuation and white space only: what the bootstrap draws together."""
        return prompt_group(self.prompt) if self.prompt else f"item {self.name}"


@dataclass(frozen=True)
class Outcome:
    """What a scorer makes of one item.

    `wins` says of every pair whether its better reply wins, strictly: a tie, or a reply without reward or verdict, is no win. `scores` are the
    rewards of the replies, NaN for one without; None where the scorer compares pairs only.
    """

    wins: Flags
    scores: Floats | None = None
    answered: bool = True
    """Whether every reply has its reward, or every pair a verdict; counted, and wrong where not."""


@dataclass(frozen=True)
class Cell:
    """Observations whose mean is asked for, with the prompt of each."""

    values: Floats
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    """A benchmark's metrics on some items: `combine` makes them, each (R,), of the cells' means.

    `missing` names the metrics that these items or this scorer do not support, with the reason.
    """

    cells: Mapping[str, Cell]
    combine: Callable[[Means], dict[str, Floats]]
    missing: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ReadItems:
    """The items of a benchmark's parts, and what was left out of them by its own rules, counted."""

    items: list[Item]
    left_out: Mapping[str, int] = field(default_factory=dict)


class Counted(NamedTuple):
    """Which items are behind a metric: those of some subsets (or of subsets whose names begin so, up to a `/`); none named means all."""

    official: int
    """How many of them the official set has; 0: not known."""
    subsets: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark: where its files are, how they are read, and what is measured on them."""

    name: str
    read: Callable[[Sequence[Part]], ReadItems]
    measure: Callable[[Sequence[Item], Sequence[Outcome]], Measured]
    verified: Verified
    verified_of: Mapping[str, Verified] = field(default_factory=dict)
    """Metrics (or the beginnings of their names up to a `/`) of which something else is true."""
    headline: tuple[str, ...]
    """The metrics that tables show."""
    num_items: int
    """Items of the official set; 0: not known."""
    counted: Mapping[str, Counted] = field(default_factory=dict)
    """Metrics (or the beginnings of their names up to a `/`) that are of a part of the items."""
    counts_left_out: tuple[str, ...] = ()
    """What reading leaves out although the official number counts it."""
    folders: tuple[str, ...]
    """Names that its folder may have."""
    is_part: Callable[[str], bool] = lambda _: True
    """Whether a file, by its path in the folder, holds items."""
    hub: tuple[HubPart, ...] = ()

    def verified_for(self, metric: str) -> Verified:
        """Return what stands behind a metric; the longest name that fits decides."""
        fitting = [name for name in self.verified_of if _begins(metric, name)]
        return self.verified_of[max(fitting, key=len)] if fitting else self.verified

    def items_behind(self, metric: str, read: ReadItems) -> tuple[int, int | None]:
        """Return how many of the items read a metric is of, and how many the official set has for it (without what reading leaves out); None: not
        known."""
        fitting = [name for name in self.counted if _begins(metric, name)]
        about = self.counted[max(fitting, key=len)] if fitting else Counted(self.num_items)
        number = sum(not about.subsets or any(_begins(item.subset, name) for name in about.subsets) for item in read.items)
        left_out = sum(read.left_out.get(what, 0) for what in self.counts_left_out)
        return number, about.official - left_out if about.official else None


def _begins(name: str, beginning: str) -> bool:
    return name == beginning or name.startswith(f"{beginning}/")


class CellBuilder:
    """Collects observations by cell."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}
        self._prompts: dict[str, list[str]] = {}

    def add(self, cell: str, value: float, prompt: str) -> None:
        """Note one observation."""
        self._values.setdefault(cell, []).append(value)
        self._prompts.setdefault(cell, []).append(prompt)

    def finish(self) -> dict[str, Cell]:
        """Return the cells, in the order of their first observations."""
        return {name: Cell(np.asarray(values, dtype=np.float64), tuple(self._prompts[name])) for name, values in self._values.items()}


def outcome_of_scores(item: Item, scores: npt.ArrayLike) -> Outcome:
    """Return what rewards of the replies, (N,), make of an item: strictly higher wins.

    Raises:
        ValueError: there is not one score per reply.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.shape != (len(item.replies),):
        raise ValueError(f"expected {len(item.replies)} scores for item {item.name!r}, found shape {values.shape}")
    wins = np.array([values[better] > values[worse] for better, worse in item.pairs], dtype=bool)
    return Outcome(wins, values, answered=item.problem is None and not bool(np.isnan(values).any()))


def outcome_of_verdicts(item: Item, sums: Sequence[int | None]) -> Outcome:
    """Return what a judge's verdicts make of an item.

    Paper: JudgeBench's rule for judges: a pair is asked about in both orders, a verdict for the better reply counts +1, for the worse -1, none 0, and
    the pair is won when the sum is above 0. So a judge that names the same position twice ties, and a tie is no win.

    Args:
        sums: for every pair of the item that sum, None where the judge was not asked or never answered.
    """
    if len(sums) != len(item.pairs):
        raise ValueError(f"expected {len(item.pairs)} verdicts for item {item.name!r}, found {len(sums)}")
    wins = np.array([value is not None and value > 0 for value in sums], dtype=bool)
    return Outcome(wins, None, answered=item.problem is None and None not in sums)


def mean_of(means: Means, names: Sequence[str]) -> Floats:
    """Return the plain mean of some cells, in the order given."""
    return np.asarray(np.mean([means[name] for name in names], axis=0))


def weighted_mean_of(means: Means, weights: Mapping[str, float]) -> Floats:
    """Return the mean of cells under weights."""
    total: Floats = np.sum([means[name] * weight for name, weight in weights.items()], axis=0)
    return np.asarray(total / sum(weights.values()))


def missing_cells(cells: Mapping[str, Cell], wanted: Sequence[str]) -> str:
    """Return which cells are not there, as a reason; empty: all are."""
    absent = [name for name in wanted if name not in cells]
    shown = ", ".join(absent[:4]) + (f" and {len(absent) - 4} more" if len(absent) > 4 else "")
    return f"no item of {shown}" if absent else ""
