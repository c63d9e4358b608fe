"""Comparisons: pairs of replies of which one is better, with the margin that a reward model gives. What all audits but the attacks read.

Shape legend: P comparisons, G prompts, R resamples, S sums.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from synpref_ray.evaluation.benchmarks.core import Item, Outcome

Floats = npt.NDArray[np.float64]
NUM_RESAMPLES = 1000  # ours: the ends of a 95 % interval then move by about 4 % of its width between seeds
_MAX_DRAWS = 1 << 23  # per block: 64 MiB of counts


@dataclass(frozen=True)
class Interval:
    """A value with a percentile bootstrap interval over prompts."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparisons:
    """P comparisons: `margins` is the reward of the better reply minus that of the worse, (P,); texts, prompts and groups go with them."""

    margins: Floats
    better: tuple[str, ...]
    worse: tuple[str, ...]
    prompts: tuple[str, ...]
    groups: tuple[str, ...]
    num_unscored: int = 0
    """Comparisons with a reply that has no reward: they are left out."""
    attributes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By an attribute's name, every comparison's value (`unknown` where its item has none)."""


class _Row(NamedTuple):
    margin: float
    better: str
    worse: str
    prompt: str
    group: str
    attributes: Mapping[str, str]


def comparisons_of(items: Sequence[Item], outcomes: Sequence[Outcome]) -> Comparisons:
    """Return the scored comparisons of a benchmark's items; those without both rewards are counted.

    Raises:
        ValueError: a scorer has no rewards (a judge): its verdicts have no margins.
    """
    rows: list[_Row] = []
    unscored = 0
    for item, outcome in zip(items, outcomes, strict=True):
        if outcome.scores is None:
            raise ValueError("margins need rewards, and this scorer gives verdicts only")
        for better, worse in item.pairs:
            margin = float(outcome.scores[better] - outcome.scores[worse])
            if np.isnan(margin):
                unscored += 1
            else:
                rows.append(_Row(margin, item.replies[better], item.replies[worse], item.prompt_key, item.subset, dict(item.attributes)))
    names = sorted({name for row in rows for name in row.attributes})
    attributes = {name: tuple(row.attributes.get(name, "unknown") for row in rows) for name in names}
    return Comparisons(
        margins=np.array([row.margin for row in rows], dtype=np.float64),
        better=tuple(row.better for row in rows),
        worse=tuple(row.worse for row in rows),
        prompts=tuple(row.prompt for row in rows),
        groups=tuple(row.group for row in rows),
        num_unscored=unscored,
        attributes=attributes,
    )


def prompt_sums(values: Floats, prompts: Sequence[str]) -> Floats:
    """Return the sums of (P, S) values by prompt, (G, S)."""
    _, member = np.unique(np.asarray(prompts, dtype=str), return_inverse=True)
    sums = np.zeros((int(member.max()) + 1 if len(member) else 0, values.shape[1]))
    np.add.at(sums, member, values)
    return sums


def resampled_sums(sums: Floats, *, seed: int, num_resamples: int) -> Floats:
    """Return the (R, S) sums over prompts drawn with replacement."""
    generator = np.random.default_rng(seed)
    block = max(1, _MAX_DRAWS // len(sums))
    parts = []
    for start in range(0, num_resamples, block):
        size = min(block, num_resamples - start)
        parts.append(generator.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=size).astype(np.float64) @ sums)
    return np.concatenate(parts)


def interval_of(value: float, drawn: Floats, confidence: float) -> Interval:
    """Return a value with the percentile interval of its resamples; resamples without a value are left out."""
    defined = drawn[np.isfinite(drawn)]
    if not defined.size:
        return Interval(value, float("nan"), float("nan"))
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return Interval(value, float(low), float(high))
