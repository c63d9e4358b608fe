"""Pairwise accuracy of reward models, and how sure one can be of it. Serves checkpoint selection on gold and every reported comparison of
models.

Paper: accuracy is the share of pairs whose preferred reply gets the higher reward (Sec. 3.2); it reports no intervals. Our choice: every
figure that is reported has one.

Shapes: P pairs, S seeds (training runs), R resamples, G groups.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from synpref_ray.rules.intervals import wilson_interval

Flags = npt.NDArray[np.bool_]
NUM_RESAMPLES = 10_000  # ours: the ends of a 95 % interval then move by about 1 % of its width from one seed of the bootstrap to another
_MAX_DRAWS = 1 << 23  # per block: 64 MiB of counts


@dataclass(frozen=True)
class Accuracy:
    """A share of pairs ranked right, with an interval (Wilson unless said otherwise)."""

    num_pairs: int
    num_correct: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """How much more accurate model A is than model B, in shares of pairs, with a bootstrap interval."""

    num_pairs: int
    num_seeds: int
    accuracy_a: float
    accuracy_b: float
    difference: float
    low: float
    high: float

    @property
    def is_above_zero(self) -> bool:
        """Whether the whole interval lies above zero: A beats B by more than the choice of pairs explains."""
        return self.low > 0.0


@dataclass(frozen=True)
class SeedAccuracy:
    """The mean accuracy of several training runs, with a bootstrap interval over pairs for these runs, and each run's own."""

    num_pairs: int
    accuracy: float
    low: float
    high: float
    by_seed: tuple[float, ...]


def is_correct(margins: npt.ArrayLike) -> Flags:
    """Return, for every margin (reward of the preferred reply minus reward of the other), whether it is above 0; a tie is wrong.

    Raises:
        ValueError: a margin is NaN: a pair that was not scored is neither right nor wrong, so leave it out and count it.
    """
    values = np.asarray(margins, dtype=np.float64)
    if np.isnan(values).any():
        raise ValueError(f"{int(np.isnan(values).sum())} of {values.size} margins are missing; leave unscored pairs out and report their number")
    return np.asarray(values > 0)


def pair_accuracy(correct: npt.ArrayLike, *, confidence: float = 0.95) -> Accuracy:
    """Return the accuracy over (P,) flags with its Wilson interval; without pairs it is NaN, and the interval (0, 1)."""
    flags = _flags(correct, num_axes=1)
    num_correct = int(flags.sum())
    low, high = wilson_interval(num_correct, flags.size, confidence=confidence)
    return Accuracy(flags.size, num_correct, num_correct / flags.size if flags.size else math.nan, low, high)


def accuracy_by(
    correct: npt.ArrayLike,
    groups: Sequence[str | None],
    *,
    prompts: Sequence[str] = (),
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = 0.95,
) -> dict[str, Accuracy]:
    """Return the accuracy of every group (a task category, a source …), by name; pairs without a group come under `unknown`.

    Args:
        prompts: of every pair, where several pairs of one prompt are told apart: intervals are those of `accuracy_over_groups` over them then.
    """
    flags = _flags(correct, num_axes=1)
    names = np.array([group if group is not None else "unknown" for group in groups], dtype=object)
    if len(names) != flags.size:
        raise ValueError(f"expected a group for each of {flags.size} pairs, found {len(names)}")
    if not prompts:
        return {name: pair_accuracy(flags[names == name], confidence=confidence) for name in sorted(set(names))}
    if len(prompts) != flags.size:
        raise ValueError(f"expected a prompt for each of {flags.size} pairs, found {len(prompts)}")
    keys, found = np.asarray(prompts, dtype=object), {}
    for name in sorted(set(names)):
        own = names == name
        found[name] = accuracy_over_groups(flags[own], keys[own].tolist(), seed=seed, num_resamples=num_resamples, confidence=confidence)
    return found


def bootstrap_accuracy(
    correct: npt.ArrayLike,
    *,
    groups: Sequence[str] | None = None,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = 0.95,
) -> Accuracy:
    """Return the accuracy over (P,) flags with a percentile bootstrap interval.

    Args:
        groups: pairs of one group (a prompt) are drawn together, since their outcomes go together; without groups every pair stands for
        itself.
    """
    flags = _flags(correct, num_axes=1)
    low, high = _bootstrap_mean(flags.astype(np.float64), groups, seed, num_resamples, confidence)
    return Accuracy(flags.size, int(flags.sum()), float(flags.mean()), low, high)


def accuracy_over_groups(
    correct: npt.ArrayLike,
    groups: Sequence[str],
    *,
    counts: npt.ArrayLike | None = None,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = 0.95,
) -> Accuracy:
    """Return the accuracy over (P,) flags, of which those of one group (a prompt) go together.

    Our choice: bootstrapped over groups, except where all flags are alike: no resample differs then, so the interval would have no width however few
    pairs there are; there it is Wilson's, over as many trials as there are groups. Without pairs as `pair_accuracy`.

    Args:
        counts: (P,) for how many pairs each flag stands, at least 1; without, for one.
    """
    flags = _flags(correct, num_axes=1)
    weights = np.ones(flags.size, dtype=np.int64) if counts is None else np.asarray(counts, dtype=np.int64)
    num_pairs, num_correct = int(weights.sum()), int(weights[flags].sum())
    if 0 < num_correct < num_pairs:
        low, high = _bootstrap_totals(*_group_totals(flags.astype(np.float64), groups, weights), seed, num_resamples, confidence)
    else:
        num_groups = len(set(groups))
        low, high = wilson_interval(num_groups if num_correct else 0, num_groups, confidence=confidence)
    return Accuracy(num_pairs, num_correct, num_correct / num_pairs if num_pairs else math.nan, low, high)


def seed_accuracy(
    correct: npt.ArrayLike,
    *,
    groups: Sequence[str] | None = None,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = 0.95,
) -> SeedAccuracy:
    """Return the mean accuracy over (S, P) flags of S runs; the interval is over pairs (or groups of them), and does not hold the runs' scatter."""
    flags = _flags(correct, num_axes=2)
    means = flags.mean(axis=0)
    low, high = _bootstrap_mean(means, groups, seed, num_resamples, confidence)
    return SeedAccuracy(flags.shape[1], float(means.mean()), low, high, tuple(float(value) for value in flags.mean(axis=1)))


def paired_bootstrap(
    correct_a: npt.ArrayLike,
    correct_b: npt.ArrayLike,
    *,
    groups: Sequence[str] | None = None,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = 0.95,
) -> Difference:
    """Compare two models on the same pairs: mean difference of accuracy with a percentile bootstrap interval.

    Our choice: with several seeds (training runs) per model the runs are averaged pair by pair first, then pairs are resampled. The
    interval tells whether the difference would hold on other pairs, for these runs; it does not tell how runs with other seeds would
    scatter, so report each seed too.

    Args:
        correct_a, correct_b: (P,) or (S, P) flags over the same P pairs in the same order; the models may have different S.
        groups: as in `bootstrap_accuracy`.
    """
    a, b = (_flags(flags, num_axes=2) for flags in (correct_a, correct_b))
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"expected both models on the same pairs, found {a.shape[1]} and {b.shape[1]} pairs")
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    low, high = _bootstrap_mean(mean_a - mean_b, groups, seed, num_resamples, confidence)
    accuracy_a, accuracy_b = float(mean_a.mean()), float(mean_b.mean())
    return Difference(a.shape[1], min(len(a), len(b)), accuracy_a, accuracy_b, accuracy_a - accuracy_b, low, high)


def as_metrics(name: str, result: Accuracy | Difference) -> Mapping[str, float | int]:
    """Return a result as flat metrics, `<name>/<field>`."""
    return {f"{name}/{field}": value for field, value in asdict(result).items()}


def _flags(values: npt.ArrayLike, *, num_axes: int) -> Flags:
    flags = np.asarray(values)
    if flags.dtype != np.bool_ and flags.size:
        raise ValueError(f"expected flags (booleans), found {flags.dtype}: pass margins through is_correct first")
    flags = flags.astype(np.bool_)
    flags = flags[np.newaxis] if flags.ndim + 1 == num_axes else flags
    if flags.ndim != num_axes:
        raise ValueError(f"expected {num_axes} axes at most, found {flags.ndim}")
    return flags


def _bootstrap_mean(
    values: npt.NDArray[np.float64], groups: Sequence[str] | None, seed: int, num_resamples: int, confidence: float
) -> tuple[float, float]:
    """Return the percentile interval of the mean of (P,) values under resampling of pairs, or of whole groups."""
    if values.size == 0:
        raise ValueError("there are no pairs to resample")
    return _bootstrap_totals(*_group_totals(values, groups, np.ones(len(values), dtype=np.int64)), seed, num_resamples, confidence)


def _bootstrap_totals(
    sums: npt.NDArray[np.float64], sizes: npt.NDArray[np.float64], seed: int, num_resamples: int, confidence: float
) -> tuple[float, float]:
    """Return the percentile interval of the mean, given the sum and the number of the values of each of (G,) groups."""
    generator = np.random.default_rng(seed)
    means = []
    block = max(1, _MAX_DRAWS // len(sums))
    for start in range(0, num_resamples, block):
        counts = generator.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=min(block, num_resamples - start))
        means.append((counts @ sums) / (counts @ sizes))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def _group_totals(
    values: npt.NDArray[np.float64], groups: Sequence[str] | None, counts: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the sum and the number of the values of each group, each value standing for `counts` of its kind."""
    if groups is None:
        return values * counts, counts.astype(np.float64)
    if len(groups) != len(values):
        raise ValueError(f"expected a group for each of {len(values)} pairs, found {len(groups)}")
    _, member = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    return np.bincount(member, weights=values * counts).astype(np.float64), np.bincount(member, weights=counts).astype(np.float64)
