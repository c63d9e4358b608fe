"""The scaling curve: how a score grows with the number of curated pairs, with a fitted law and its interval; the size that a target needs; when to
stop.

Paper: App. F: read the fraction for a target off Fig. 5, and stop where a further million curated pairs gain less than a threshold (for instance 0.3
points). Our choice: the law is score(n) = limit - drop · n^(-power), the usual one for learning curves, fitted by least squares; an interval is a
percentile bootstrap over the residuals, which says how far the points determine the curve, and nothing about sizes far beyond them. Three points
leave the law's three parameters no residual, so they say nothing of how sure they are: intervals are without ends then.

Shape legend: K points, R resamples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, PositiveFloat

from synpref_ray.config import Settings
from synpref_ray.errors import InputError

Floats = npt.NDArray[np.float64]
POWERS = np.geomspace(0.05, 2.0, 120)  # ours: exponents of published learning curves lie well inside; 120 are 3 % apart
NUM_RESAMPLES = 1000  # ours
MIN_SIZES = 3  # as many as the law has parameters
MAX_PAIRS = 1e12
Verdict = Literal["stop", "go on", "undecided"]


class CurvePoint(Settings):
    """One training run: so many pairs, such a score (any scale, bigger is better)."""

    pairs: PositiveFloat
    """Pairs of the training."""
    score: float
    """Its score."""


class StopRule(Settings):
    """When more pairs are not worth it."""

    min_gain: float = Field(default=0.3, ge=0.0)  # App. F: 0.3 points of the average
    per_pairs: PositiveFloat = 1_000_000  # App. F: per further million


@dataclass(frozen=True)
class Law:
    """score(n) = limit - drop * n^(-power), with drop >= 0."""

    limit: float
    drop: float
    power: float

    def score(self, pairs: float) -> float:
        """Return the score at a size."""
        return float(self.limit - self.drop * pairs**-self.power)

    def size_for(self, target: float) -> float:
        """Return the pairs that a target needs; infinity where the limit is below it, and 0 where every size reaches it."""
        if target >= self.limit:
            return math.inf
        return 0.0 if self.drop == 0 else float((self.drop / (self.limit - target)) ** (1 / self.power))

    def gain(self, pairs: float, further: float) -> float:
        """Return what `further` pairs on top of `pairs` add to the score."""
        return self.score(pairs + further) - self.score(pairs)


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its interval; without ends (infinite) where nothing is known of them."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """A fitted law and the laws of the resamples."""

    law: Law
    resampled: tuple[Law, ...]
    num_points: int
    num_sizes: int
    largest: float
    """The largest size among the points: beyond it the law extrapolates."""
    residual: float
    """Root mean square of the residuals, in points of the score."""
    confidence: float

    def score(self, pairs: float) -> Interval:
        """Return the score at a size."""
        return self._interval(self.law.score(pairs), [law.score(pairs) for law in self.resampled])

    def size_for(self, target: float) -> Interval:
        """Return the pairs that a target needs; an end may be infinite."""
        return self._interval(self.law.size_for(target), [law.size_for(target) for law in self.resampled])

    def gain(self, pairs: float, further: float) -> Interval:
        """Return what `further` pairs add."""
        return self._interval(self.law.gain(pairs, further), [law.gain(pairs, further) for law in self.resampled])

    def power(self) -> Interval:
        """Return the exponent."""
        return self._interval(self.law.power, [law.power for law in self.resampled])

    def limit(self) -> Interval:
        """Return the score that no size passes."""
        return self._interval(self.law.limit, [law.limit for law in self.resampled])

    def _interval(self, value: float, values: Sequence[float]) -> Interval:
        if not values:
            return Interval(value, -math.inf, math.inf)
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(np.asarray(values), [tail, 1 - tail], method="inverted_cdf")  # infinities stay what they are
        return Interval(value, float(low), float(high))


def fit_curve(
    points: Sequence[CurvePoint], *, ceiling: float = math.inf, seed: int = 0, num_resamples: int = NUM_RESAMPLES, confidence: float = 0.95
) -> Curve:
    """Fit the law to points; several runs of one size are several points.

    Args:
        ceiling: the highest score there is (100 for accuracies in percent): no limit is fitted above it.

    Raises:
        InputError: there are fewer than three sizes.
    """
    sizes = np.array([point.pairs for point in points], dtype=np.float64)
    scores = np.array([point.score for point in points], dtype=np.float64)
    num_sizes = len(np.unique(sizes))
    if num_sizes < MIN_SIZES:
        raise InputError(f"a scaling curve needs runs at {MIN_SIZES} sizes or more, found {num_sizes}")
    law = _fit(sizes, scores[np.newaxis], ceiling)[0]
    fitted = np.array([law.score(size) for size in sizes])
    residuals = scores - fitted
    freedom = max(1, len(points) - MIN_SIZES)
    spread = residuals * math.sqrt(len(points) / freedom)  # a fit with three parameters leaves residuals that are too small
    generator = np.random.default_rng(seed)
    num_resamples = num_resamples if len(points) > MIN_SIZES else 0
    drawn = fitted + spread[generator.integers(0, len(points), size=(num_resamples, len(points)))]
    return Curve(
        law=law,
        resampled=tuple(_fit(sizes, drawn, ceiling)) if num_resamples else (),
        num_points=len(points),
        num_sizes=num_sizes,
        largest=float(sizes.max()),
        residual=float(np.sqrt(np.mean(residuals**2))),
        confidence=confidence,
    )


def _fit(sizes: Floats, scores: Floats, ceiling: float) -> list[Law]:
    """Return the least-squares law of every row of scores, (R, K): for each power of a grid a straight line, drop never below 0, limit never above
    the ceiling."""
    best_error = np.full(len(scores), math.inf)
    best = np.zeros((len(scores), 3))
    means = scores.mean(axis=1)
    for power in POWERS:
        x = (sizes / sizes.max()) ** -power  # 1 at the largest size: so that no power overflows
        centred = x - x.mean()
        slopes = np.minimum(0.0, (scores - means[:, np.newaxis]) @ centred / (centred @ centred))
        limits = means - slopes * x.mean()
        if math.isfinite(ceiling):
            over = limits > ceiling
            slopes = np.where(over, np.minimum(0.0, (scores - ceiling) @ x / (x @ x)), slopes)
            limits = np.where(over, ceiling, limits)
        errors = ((scores - limits[:, np.newaxis] - slopes[:, np.newaxis] * x) ** 2).sum(axis=1)
        better = errors < best_error
        best_error[better] = errors[better]
        best[better] = np.stack([limits, -slopes * sizes.max() ** power, np.full_like(limits, power)], axis=1)[better]
    return [Law(float(limit), float(drop), float(power)) for limit, drop, power in best]


def stop_size(law: Law, rule: StopRule) -> float:
    """Return the smallest size from which `per_pairs` further pairs gain less than `min_gain`; infinity where they always gain more.

    Gains of this law fall with the size, so that halving finds it.
    """
    low, high = 0.0, 1.0
    if law.drop == 0:
        return 0.0
    while law.gain(high, rule.per_pairs) >= rule.min_gain:
        low, high = high, 2 * high
        if high > MAX_PAIRS:
            return math.inf
    while high - low > max(1.0, 1e-6 * high):
        middle = (low + high) / 2
        low, high = (middle, high) if law.gain(middle, rule.per_pairs) >= rule.min_gain else (low, middle)
    return high


def stop_verdict(gain: Interval, rule: StopRule) -> Verdict:
    """Return what a gain says: `stop` where its whole interval is below the threshold, `go on` where none of it is, else `undecided`."""
    return "stop" if gain.high < rule.min_gain else "go on" if gain.low >= rule.min_gain else "undecided"


def pairs_for_target(curve: Curve, target: float) -> Interval:
    """Return the size that a target needs.

    Raises:
        InputError: the fitted limit is below the target; with the numbers.
    """
    found = curve.size_for(target)
    if math.isinf(found.value) or found.value > MAX_PAIRS:
        limit = curve.limit()
        ends = f" ({limit.low:.2f} to {limit.high:.2f})" if curve.resampled else ""
        raise InputError(
            f"no number of pairs reaches {target:g} on this curve: it levels off at {limit.value:.2f}{ends}, "
            f"fitted to {curve.num_points} runs of up to {curve.largest:,.0f} pairs"
        )
    return found
