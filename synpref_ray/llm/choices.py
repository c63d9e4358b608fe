"""How log-probabilities tell the choices of a request apart (Sec. 3.2, Step 3: a verdict is one of two). Serves the engines."""

import math
from collections.abc import Sequence

Watched = tuple[int, tuple[int, ...]]
"""A position in a reply, and the token of each choice there."""


def watched_tokens(choices: Sequence[Sequence[int]]) -> Watched | None:
    """Return the first position at which all choices differ, with their tokens there; None when some differ earlier than others."""
    for position, column in enumerate(zip(*choices, strict=False)):
        if len(set(column)) == len(column):
            return position, column
        if len(set(column)) > 1:
            break
    return None


def normalise_logprobs(raw: Sequence[float]) -> tuple[float, ...]:
    """Return the log-probabilities normalised among themselves: their exponentials sum to 1."""
    total = log_sum(raw)
    return tuple(value - total for value in raw)


def log_sum(values: Sequence[float]) -> float:
    """Return the logarithm of the sum of the exponentials of `values`, at least one."""
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))
