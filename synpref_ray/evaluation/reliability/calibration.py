"""Whether p_chosen = sigmoid(margin) is the share of pairs that it says, and how accuracy goes with the margin.

The model's preferred reply is right with the probability max(p, 1 - p): which reply a file calls chosen says nothing, so everything is measured on
this confidence, from a half up. Our choice throughout; the paper calls p_chosen a confidence and does not test it.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar

from synpref_ray.evaluation.accuracy import Accuracy, accuracy_over_groups
from synpref_ray.evaluation.reliability.comparisons import (
    NUM_RESAMPLES,
    Comparisons,
    Floats,
    Interval,
    interval_of,
    prompt_sums,
    resampled_sums,
)

NUM_BINS = 10  # ours: the usual number; of width 0.05, from a half to one
NUM_MARGIN_BINS = 5  # ours: fifths of the pairs
MAX_LOG_TEMPERATURE = 6.0


@dataclass(frozen=True)
class Bin:
    """Pairs whose confidence lies in [low, high): their mean confidence, and the share of them that is right."""

    low: float
    high: float
    num_pairs: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """`ece` is the mean gap between confidence and accuracy over pairs; its bootstrap interval leans upwards, as small samples do."""

    num_pairs: int
    ece: Interval
    overconfidence: Interval
    """Mean confidence minus accuracy: above 0 the model is too sure of itself."""
    brier: float
    log_loss: float
    temperature: float
    """Margins divided by it have the least log loss; above 1: too sure."""
    log_loss_at_temperature: float
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class MarginBin:
    """Pairs whose |margin| lies in [low, high], and their accuracy."""

    low: float
    high: float
    accuracy: Accuracy


def calibrate(
    pairs: Comparisons, *, num_bins: int = NUM_BINS, seed: int = 0, num_resamples: int = NUM_RESAMPLES, confidence: float = 0.95
) -> Calibration:
    """Measure the calibration of p_chosen; a tie is half right, at a confidence of a half.

    Raises:
        ValueError: there are no pairs.
    """
    margins = pairs.margins
    if not margins.size:
        raise ValueError("there are no scored pairs to calibrate on")
    sure = 1 / (1 + np.exp(-np.abs(margins)))
    right = np.where(margins == 0, 0.5, (margins > 0).astype(np.float64))
    place = np.minimum(((sure - 0.5) * 2 * num_bins).astype(np.int64), num_bins - 1)
    one_hot = np.eye(num_bins)[place]
    sums = np.concatenate([one_hot, one_hot * sure[:, np.newaxis], one_hot * right[:, np.newaxis]], axis=1)
    by_prompt = prompt_sums(sums, pairs.prompts)
    total = by_prompt.sum(axis=0)
    drawn = resampled_sums(by_prompt, seed=seed, num_resamples=num_resamples)
    counts, confidences, hits = np.split(total, 3)
    filled = np.maximum(counts, 1)
    edges = 0.5 + 0.5 * np.arange(num_bins + 1) / num_bins
    bins = tuple(
        Bin(float(edges[b]), float(edges[b + 1]), int(counts[b]), float(confidences[b] / filled[b]), float(hits[b] / filled[b]))
        for b in range(num_bins)
        if counts[b]
    )
    temperature = best_temperature(margins)
    return Calibration(
        num_pairs=margins.size,
        ece=interval_of(float(_ece(total[np.newaxis])[0]), _ece(drawn), confidence),
        overconfidence=interval_of(float(_overconfidence(total[np.newaxis])[0]), _overconfidence(drawn), confidence),
        brier=float(np.mean((sure - right) ** 2)),
        log_loss=log_loss(margins),
        temperature=temperature,
        log_loss_at_temperature=log_loss(margins / temperature),
        bins=bins,
    )


def _ece(sums: Floats) -> Floats:
    counts, confidences, hits = np.split(sums, 3, axis=1)
    return np.asarray(np.abs(hits - confidences).sum(axis=1) / counts.sum(axis=1))


def _overconfidence(sums: Floats) -> Floats:
    counts, confidences, hits = np.split(sums, 3, axis=1)
    return np.asarray((confidences - hits).sum(axis=1) / counts.sum(axis=1))


def log_loss(margins: Floats) -> float:
    """Return the mean of -log sigmoid(margin): the Bradley-Terry loss."""
    return float(np.mean(np.logaddexp(0.0, -margins)))


def best_temperature(margins: Floats) -> float:
    """Return the T in [e^-6, e^6] for which margins / T have the least log loss; an end of it where every pair is right, or wrong."""
    found = minimize_scalar(lambda log_t: log_loss(margins / np.exp(log_t)), bounds=(-MAX_LOG_TEMPERATURE, MAX_LOG_TEMPERATURE), method="bounded")
    return float(np.exp(found.x))


def accuracy_by_margin(
    pairs: Comparisons, *, num_bins: int = NUM_MARGIN_BINS, seed: int = 0, num_resamples: int = NUM_RESAMPLES, confidence: float = 0.95
) -> list[MarginBin]:
    """Return the accuracy of equal parts of the pairs, from the smallest |margin| to the largest; intervals over prompts."""
    size = np.abs(pairs.margins)
    order = np.argsort(size, kind="stable")
    parts = [part for part in np.array_split(order, num_bins) if part.size]
    found = []
    for part in parts:
        prompts = [pairs.prompts[place] for place in part]
        accuracy = accuracy_over_groups(pairs.margins[part] > 0, prompts, seed=seed, num_resamples=num_resamples, confidence=confidence)
        found.append(MarginBin(float(size[part].min()), float(size[part].max()), accuracy))
    return found
