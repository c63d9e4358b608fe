"""Matched controls: pairs that look like the reference's in everything that was named, and a table of how well that worked.

Paper: Sec. 4 compares sets of equal size (Figs. 5 and 6), and not what else differs between them. Our choice: a control is matched, pair by
pair and without replacement, on category (exactly, where the candidates allow), length, margin and estimated label noise; balance is told by
standardised mean differences, of which 0.1 is the usual bound.

Shape legend: N reference pairs, M candidates, C covariates.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from synpref_ray.schema import stable_hash

Floats = npt.NDArray[np.float64]
NUMBERS = ("length", "margin", "noise")
CATEGORY_COST = 4.0  # ours: another category costs as much as two standard deviations in two covariates
CHUNK = 500  # reference pairs assigned at once
MAX_CANDIDATES = 10_000  # looked at for one chunk
SMALL_DIFFERENCE = 0.1  # the usual bound of a standardised mean difference


@dataclass(frozen=True)
class PairFacts:
    """What pairs are matched on. `numbers` is (N, 3): log words of both replies, |margin| of the best RM, estimated probability of a wrong label."""

    names: tuple[str, ...]
    categories: tuple[str, ...]
    numbers: Floats

    def take(self, rows: Sequence[int]) -> "PairFacts":
        """Return the facts of some rows."""
        return PairFacts(tuple(self.names[row] for row in rows), tuple(self.categories[row] for row in rows), self.numbers[list(rows)])


def label_noise(margins: Floats) -> Floats:
    """Return the estimated probability that labels are wrong, (N,): the mean of sigmoid(-margin) over reward models.

    Args:
        margins: (N, models), towards the label in question; NaN where there is no reward.
    """
    with np.errstate(invalid="ignore"):
        doubts = 1 / (1 + np.exp(margins))
    known = ~np.isnan(doubts)
    return np.asarray(np.where(known.any(axis=1), np.where(known, doubts, 0).sum(axis=1) / np.maximum(1, known.sum(axis=1)), 0.5))


def draw(names: Sequence[str], count: int, *, seed: int, use: str) -> list[int]:
    """Return the rows of `count` of these, drawn by stable chance, in their order; sets drawn for one use are nested in one another."""
    ranked = sorted(range(len(names)), key=lambda row: stable_hash(seed, names[row], use))
    return sorted(ranked[:count])


def match(reference: PairFacts, candidates: PairFacts, *, seed: int = 0) -> list[int]:
    """Return for every reference pair one candidate of its own, in the reference's order, so that the sum of distances is least.

    A distance is the sum of squared differences in standard deviations of the reference, plus `CATEGORY_COST` where the category differs. Over 500
    reference pairs are assigned 500 at a time, in an order of stable chance.

    Raises:
        ValueError: there are fewer candidates than reference pairs.
    """
    if len(candidates.names) < len(reference.names):
        raise ValueError(f"{len(reference.names)} pairs cannot be matched with {len(candidates.names)}")
    spread = np.maximum(reference.numbers.std(axis=0), 1e-9) if len(reference.names) else np.ones(reference.numbers.shape[1])
    left = sorted(range(len(candidates.names)), key=lambda row: stable_hash(seed, candidates.names[row], "match-candidates"))
    order = sorted(range(len(reference.names)), key=lambda row: stable_hash(seed, reference.names[row], "match-reference"))
    found = [-1] * len(reference.names)
    for first in range(0, len(order), CHUNK):
        rows = order[first : first + CHUNK]
        columns = left[: max(MAX_CANDIDATES, len(rows))]
        gaps = (reference.numbers[rows][:, np.newaxis] - candidates.numbers[columns][np.newaxis]) / spread
        strangers = np.array([[reference.categories[r] != candidates.categories[c] for c in columns] for r in rows])
        for row, column in zip(*linear_sum_assignment((gaps**2).sum(axis=2) + CATEGORY_COST * strangers), strict=True):
            found[rows[row]] = columns[column]
        taken = {found[row] for row in rows}
        left = [row for row in columns if row not in taken] + left[len(columns) :]
    return found


def standardised_differences(reference: PairFacts, control: PairFacts) -> dict[str, float]:
    """Return by number the difference of means (control minus reference) over the pooled standard deviation; for the category the largest one
    of its levels' shares. Where neither side varies it is 0, or infinite if they differ."""
    found = {name: _difference(reference.numbers[:, place], control.numbers[:, place]) for place, name in enumerate(NUMBERS)}
    levels = sorted({*reference.categories, *control.categories})
    of_levels = [
        _difference(*(np.array([one == level for one in side.categories], dtype=np.float64) for side in (reference, control))) for level in levels
    ]
    return {"category": max(of_levels, key=abs, default=0.0), **found}


def _difference(a: Floats, b: Floats) -> float:
    if not a.size or not b.size:
        return math.nan
    gap = float(b.mean() - a.mean())
    spread = math.sqrt((a.var() + b.var()) / 2)
    if spread < 1e-12:
        return 0.0 if abs(gap) < 1e-12 else math.copysign(math.inf, gap)
    return gap / spread
