"""How many unverified pairs an error on gold may call for. Serves Stage 1, Step 2 (error-driven adaptive retrieval)."""

import math

from synpref_ray.schema import Verdict

K_MAX = 8  # Paper: Sec. 3.2, Step 2
_GUARD = 1e-7  # per neighbour; above half a unit in the last place of a float32 p, far below any difference that means something


def num_neighbours(p: float, k_max: int = K_MAX) -> int:
    """Return k for a gold pair on which the best RM's confidence in the human label is `p`.

    Paper: Sec. 3.2, Step 2: `k_max` where the reward model is wrong (p <= 0.5), else ceil(k_max * (1 - p)); exactly 0 only at p = 1.

    Our choice: the product is lowered by a guard before rounding up, because `10 * (1 - 0.7)` is 3.0000000000000004 and a float32 p is off
    by up to 3e-8; so a p within 1e-7 above a step counts as on the step. The formula falls from k_max to half of it at 0.5; the paper has
    that jump, we keep it.

    Raises:
        ValueError: `p` is not a number in [0, 1], or `k_max` is negative.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"expected a confidence in [0, 1], found {p}")
    if k_max < 0:
        raise ValueError(f"expected k_max >= 0, found {k_max}")
    if p <= 0.5:
        return k_max
    return max(0, math.ceil(k_max * (1.0 - p) - k_max * _GUARD))


def confidence_in_human_label(p_chosen: float, verdict: Verdict) -> float:
    """Return the p that `num_neighbours` wants; `p_chosen` is about the pair as ingested, which the human may have turned round.

    Raises:
        ValueError: the verdict is an abstention.
    """
    if verdict is Verdict.ABSTAIN:
        raise ValueError("a pair that a person could not decide is no gold and has no label to be confident in")
    return p_chosen if verdict is Verdict.CHOSEN else 1.0 - p_chosen
