"""The one shape in which reports of judges, taggers and attacks give a share: value, number, interval.

Our choice: Wilson's interval at the share over pairs, with Kish's effective number of prompts, (sum of n)^2 / (sum of n^2) for prompts of n pairs, as
trials. Pairs of one prompt go right or wrong together, so they are no evidence of their own, and a prompt with most of the pairs decides the share
nearly alone; Wilson, because a category is often a handful of pairs that all agree. It always holds the share itself, and it equals the bound of
`rules/judges.py` where every prompt has the same number of pairs.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from sklearn.metrics import cohen_kappa_score

from synpref_ray.rules.intervals import wilson_interval

INTERVAL = "Wilson, at the share over pairs, trials = effective number of prompts (Kish)"
UNKNOWN = "unknown"
"""The name under which reports put pairs without a category."""


def share(flags: Iterable[bool], prompts: Iterable[str | None], *, confidence: float = 0.95) -> dict[str, Any]:
    """Return `{"num_pairs", "num_prompts", "value", "low", "high"}` of flags; the value is None without pairs, and the interval (0, 1).

    Args:
        prompts: the prompt group of each flag's pair; None is a group of its own.
    """
    pairs = list(zip(flags, prompts, strict=True))
    sizes = Counter(number if prompt is None else prompt for number, (_, prompt) in enumerate(pairs)).values()
    value = sum(flag for flag, _ in pairs) / len(pairs) if pairs else None
    effective = len(pairs) ** 2 / sum(size * size for size in sizes) if pairs else 0.0
    low, high = wilson_interval((value or 0.0) * effective, effective, confidence=confidence)
    return {"num_pairs": len(pairs), "num_prompts": len(sizes), "value": value, "low": low, "high": high}


def kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Return Cohen's kappa of two raters of the same pairs; None where it is not defined: no pairs, or one label all over."""
    if len({*first, *second}) < 2:
        return None
    return float(cohen_kappa_score(list(first), list(second)))
