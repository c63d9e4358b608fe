"""Biases of a reward model for length, Markdown and verbosity; and whether mending one moves the pressure to another.

Over pairs of known order, the margin should follow from which reply is better. Where it also follows from how much longer (more formatted, more
wordy) the better reply is, that is pressure. Three views: the plain correlation of margins with a difference (*pressure*), the slope beside the
other differences in one regression (*slope*), and accuracy where the better reply has more or less of it.

The check of a mitigation: take out of the margins what one difference explains by itself (the usual length correction), with a slope learned on the
other half of the prompts, and measure the pressure of every difference again. A correction whose neighbour's pressure grew by more than chance has
moved the problem. Our choice throughout; RM-Bench's styles (Sec. 4) show the same at equal content (`style_shifts`).

Shape legend: P comparisons, F features, G prompts, R resamples.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from synpref_ray.evaluation.accuracy import Accuracy, Flags, accuracy_over_groups
from synpref_ray.evaluation.reliability.comparisons import (
    NUM_RESAMPLES,
    Comparisons,
    Floats,
    Interval,
    interval_of,
    prompt_sums,
    resampled_sums,
)
from synpref_ray.schema import stable_hash

FEATURES = ("length", "markdown", "verbosity")
ALL = "all"
_WORD = re.compile(r"\w+")
_MARKS = re.compile(r"^\s*(?:#{1,6}\s|[-*+]\s|\d+[.)]\s|>\s|```)|\*\*|__|`|\|", re.MULTILINE)
MIN_PAIRS = 20  # ours: four parameters and two halves; fewer pairs say nothing
STYLES = ("concise", "detailed", "markdown")


def features_of(text: str) -> tuple[float, float, float]:
    """Return what a reply has of each feature.

    length: log(1 + words). markdown: log(1 + marks): headings, list items, quotes, code fences and ticks, bold, table bars.
    verbosity: the share of words that repeat an earlier one of the reply.
    """
    words = [word.lower() for word in _WORD.findall(text)]
    repeated = 1 - len(set(words)) / len(words) if words else 0.0
    return math.log1p(len(words)), math.log1p(len(_MARKS.findall(text))), repeated


@dataclass(frozen=True)
class FeatureBias:
    """One feature's part in the margins; intervals over prompts. `more` and `less`: accuracy where the better reply has more, or less, of it."""

    pressure: Interval
    slope: Interval
    """Standard deviations of the margin for one standard deviation of the difference, the other differences held fixed."""
    partial: float
    """Correlation of margin and difference after both are cleared of the other differences."""
    more: Accuracy
    less: Accuracy


@dataclass(frozen=True)
class Mitigation:
    """What taking out one feature (or all of them) does: accuracy before and after, and every feature's pressure before and after."""

    mitigated: str
    accuracy_before: float
    accuracy_after: float
    before: dict[str, float]
    after: dict[str, float]
    change: dict[str, Interval]
    """Of |pressure|: above 0 it grew."""

    @property
    def moved_to(self) -> tuple[str, ...]:
        """The features that were not mitigated and whose pressure grew beyond chance."""
        return tuple(name for name, change in self.change.items() if self.mitigated not in (name, ALL) and change.low > 0)


@dataclass(frozen=True)
class BiasReport:
    """The audit of one set of pairs. A feature in which no pair differs has no part."""

    num_pairs: int
    features: dict[str, FeatureBias]
    correlations: dict[str, float]
    """Between the differences themselves, `<a>~<b>`: how far two biases can be told apart."""
    mitigations: tuple[Mitigation, ...]


def audit_biases(pairs: Comparisons, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES, confidence: float = 0.95) -> BiasReport:
    """Audit the margins of pairs.

    Raises:
        ValueError: there are too few pairs.
    """
    if len(pairs.margins) < MIN_PAIRS:
        raise ValueError(f"a bias audit needs {MIN_PAIRS} scored pairs or more, found {len(pairs.margins)}")
    both = (np.array([features_of(text) for text in texts]) for texts in (pairs.better, pairs.worse))
    better, worse = both
    differences = better - worse
    used = [place for place in range(len(FEATURES)) if differences[:, place].std() > 0]
    names = [FEATURES[place] for place in used]
    differences = differences[:, used]
    if not names or pairs.margins.std() == 0:
        return BiasReport(len(pairs.margins), {}, {}, ())
    drawn = _Resampler(pairs.prompts, seed, num_resamples, confidence)
    features = {
        name: FeatureBias(
            pressure=drawn.pressure(pairs.margins, differences[:, place]),
            slope=slope,
            partial=_partial(pairs.margins, differences, place),
            more=drawn.accuracy(pairs.margins > 0, differences[:, place] > 0),
            less=drawn.accuracy(pairs.margins > 0, differences[:, place] < 0),
        )
        for place, (name, slope) in enumerate(zip(names, drawn.slopes(pairs.margins, differences), strict=True))
    }
    correlations = {
        f"{names[a]}~{names[b]}": _correlation(differences[:, a], differences[:, b]) for a in range(len(names)) for b in range(a + 1, len(names))
    }
    choices = [(name, [place]) for place, name in enumerate(names)] + ([(ALL, list(range(len(names))))] if len(names) > 1 else [])
    mitigations = tuple(_mitigate(pairs, differences, names, label, columns, drawn) for label, columns in choices)
    return BiasReport(len(pairs.margins), features, correlations, mitigations)


def corrected_margins(margins: Floats, differences: Floats, prompts: Sequence[str]) -> Floats:
    """Return the margins (P,) without what the differences (P, C) explain, by slopes learned on the prompts of the other half."""
    half = np.array([stable_hash(0, prompt, "bias-half") % 2 == 1 for prompt in prompts])
    corrected = margins.copy()
    for fold in (half, ~half):
        other = ~fold
        if other.any():
            corrected[fold] -= differences[fold] @ _regress(margins[other], differences[other])[1:]
    return corrected


def _mitigate(pairs: Comparisons, differences: Floats, names: Sequence[str], label: str, columns: list[int], drawn: "_Resampler") -> Mitigation:
    after = corrected_margins(pairs.margins, differences[:, columns], pairs.prompts)
    return Mitigation(
        mitigated=label,
        accuracy_before=float(np.mean(pairs.margins > 0)),
        accuracy_after=float(np.mean(after > 0)),
        before={name: _correlation(pairs.margins, differences[:, place]) for place, name in enumerate(names)},
        after={name: _correlation(after, differences[:, place]) for place, name in enumerate(names)},
        change={name: drawn.change(pairs.margins, after, differences[:, place]) for place, name in enumerate(names)},
    )


def _regress(margins: Floats, differences: Floats) -> Floats:
    """Return the least-squares intercept and slopes, (1 + C,)."""
    design = np.concatenate([np.ones((len(margins), 1)), differences], axis=1)
    return np.asarray(np.linalg.lstsq(design, margins, rcond=None)[0])


def _correlation(a: Floats, b: Floats) -> float:
    spread = a.std() * b.std()
    return float(((a - a.mean()) * (b - b.mean())).mean() / spread) if spread > 0 else 0.0


def _partial(margins: Floats, differences: Floats, place: int) -> float:
    others = np.delete(differences, place, axis=1)
    own = differences[:, place]
    design = np.concatenate([np.ones((len(own), 1)), others], axis=1)
    rests = [values - design @ np.linalg.lstsq(design, values, rcond=None)[0] for values in (margins, own)]
    return 0.0 if rests[1].std() < 1e-9 * max(1.0, own.std()) else _correlation(*rests)


class _Resampler:
    """The bootstrap of correlations and slopes from sums by prompt."""

    def __init__(self, prompts: Sequence[str], seed: int, num_resamples: int, confidence: float):
        self._prompts = prompts
        self._seed = seed
        self._num_resamples = num_resamples
        self._confidence = confidence

    def _drawn(self, values: Floats) -> Floats:
        return resampled_sums(prompt_sums(values, self._prompts), seed=self._seed, num_resamples=self._num_resamples)

    def _correlations(self, a: Floats, b: Floats) -> Floats:
        count, sum_a, sum_b, sum_aa, sum_bb, sum_ab = self._drawn(np.stack([np.ones_like(a), a, b, a * a, b * b, a * b], axis=1)).T
        with np.errstate(invalid="ignore", divide="ignore"):
            covariance = sum_ab / count - sum_a * sum_b / count**2
            spread = np.sqrt(np.maximum(0, sum_aa / count - (sum_a / count) ** 2) * np.maximum(0, sum_bb / count - (sum_b / count) ** 2))
            return np.asarray(covariance / spread)

    def pressure(self, margins: Floats, difference: Floats) -> Interval:
        return interval_of(_correlation(margins, difference), self._correlations(margins, difference), self._confidence)

    def accuracy(self, right: Flags, part: Flags) -> Accuracy:
        """Return the accuracy over a part of the pairs."""
        prompts = [prompt for prompt, is_in in zip(self._prompts, part, strict=True) if is_in]
        return accuracy_over_groups(right[part], prompts, seed=self._seed, num_resamples=self._num_resamples, confidence=self._confidence)

    def change(self, before: Floats, after: Floats, difference: Floats) -> Interval:
        value = abs(_correlation(after, difference)) - abs(_correlation(before, difference))
        drawn = np.abs(self._correlations(after, difference)) - np.abs(self._correlations(before, difference))
        return interval_of(value, drawn, self._confidence)

    def slopes(self, margins: Floats, differences: Floats) -> list[Interval]:
        scaled = (differences - differences.mean(axis=0)) / differences.std(axis=0)
        target = (margins - margins.mean()) / margins.std()
        design = np.concatenate([np.ones((len(target), 1)), scaled], axis=1)
        width = design.shape[1]
        products = (design[:, :, np.newaxis] * design[:, np.newaxis, :]).reshape(len(target), -1)
        drawn = self._drawn(np.concatenate([products, design * target[:, np.newaxis]], axis=1))
        squares = drawn[:, : width * width].reshape(-1, width, width)
        solved = np.einsum("rij,rj->ri", np.linalg.pinv(squares), drawn[:, width * width :])
        point = _regress(target, scaled)
        return [interval_of(float(point[place]), solved[:, place], self._confidence) for place in range(1, width)]


def style_shifts(
    rewards: Floats, prompts: Sequence[str], *, seed: int = 0, num_resamples: int = NUM_RESAMPLES, confidence: float = 0.95
) -> dict[str, Interval]:
    """Return how far style alone moves the reward in RM-Bench, in units of what being right moves it at equal style.

    Args:
        rewards: (N, 6), three right replies and three wrong ones, each concise, detailed, with Markdown.

    Returns:
        `<style>_over_<style>`: mean shift between two styles at equal correctness, over the mean of right minus wrong; and `right_over_wrong`, that
        mean itself, in rewards. Where that mean is not above zero (the model is below chance) there is no such unit: shifts are NaN, and resamples
        in which it is not are left out of the intervals.
    """
    right, wrong = rewards[:, :3], rewards[:, 3:]
    quality = (right - wrong).mean(axis=1)
    columns = {f"{STYLES[a]}_over_{STYLES[b]}": ((right[:, a] - right[:, b]) + (wrong[:, a] - wrong[:, b])) / 2 for a in range(3) for b in range(a)}
    values = np.stack([np.ones_like(quality), quality, *columns.values()], axis=1)
    sums = prompt_sums(values, prompts)
    drawn = resampled_sums(sums, seed=seed, num_resamples=num_resamples)
    total = sums.sum(axis=0)
    found = {"right_over_wrong": interval_of(float(total[1] / total[0]), drawn[:, 1] / drawn[:, 0], confidence)}
    for place, name in enumerate(columns, start=2):
        with np.errstate(invalid="ignore", divide="ignore"):
            shifts = np.where(drawn[:, 1] > 0, drawn[:, place] / drawn[:, 1], np.nan)
        has_unit = total[1] > 0
        found[name] = interval_of(float(total[place] / total[1]), shifts, confidence) if has_unit else Interval(math.nan, math.nan, math.nan)
    return found
