"""Tests between two reward models on the same comparisons: a paired bootstrap over prompts, and McNemar's exact test.

Our choice throughout; the paper compares models by point values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

from synpref_ray.evaluation.accuracy import Difference, paired_bootstrap

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class PairedTest:
    """Two models on the same pairs. `only_a`, `only_b`: pairs that one alone has right (by the majority of its seeds)."""

    difference: Difference
    only_a: int
    only_b: int
    p_value: float
    """Two-sided, exact: that pairs which one model alone has right fall to either alike. It takes pairs for independent; the bootstrap does not."""


def paired_test(a: Flags, b: Flags, prompts: Sequence[str], *, seed: int = 0, num_resamples: int = 2000, confidence: float = 0.95) -> PairedTest:
    """Compare two models.

    Args:
        a, b: (S, P) flags, one row for every seed of a model.
    """
    difference = paired_bootstrap(a, b, groups=prompts, seed=seed, num_resamples=num_resamples, confidence=confidence)
    right_a, right_b = (2 * flags.sum(axis=0) > len(flags) for flags in (a, b))
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    p_value = float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return PairedTest(difference, only_a, only_b, p_value)
