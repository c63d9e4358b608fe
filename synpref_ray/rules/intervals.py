"""The interval of a share of successes: it decides which judges are trusted, and stands beside every accuracy that is reported."""

import math
from statistics import NormalDist


def wilson_interval(num_successes: float, num_trials: float, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return the two-sided Wilson score interval of a share; (0, 1) without trials.

    Neither need be whole: `num_successes` may be a sum of shares, and `num_trials` an effective number.

    Our choice: Wilson, not the normal approximation, because gold of one category is a handful of pairs and often all of them agree.

    Raises:
        ValueError: a count is negative, there are more successes than trials, or `confidence` is not strictly between 0 and 1.
    """
    if not 0 <= num_successes <= num_trials:
        raise ValueError(f"expected 0 <= successes <= trials, found {num_successes} of {num_trials}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"expected a confidence strictly between 0 and 1, found {confidence}")
    if num_trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = num_successes / num_trials
    centre = share + z * z / (2 * num_trials)
    spread = z * math.sqrt(share * (1 - share) / num_trials + z * z / (4 * num_trials * num_trials))
    scale = 1 + z * z / num_trials
    low = 0.0 if num_successes == 0 else (centre - spread) / scale
    high = 1.0 if num_successes == num_trials else (centre + spread) / scale
    return low, high
