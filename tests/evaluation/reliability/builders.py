"""Comparisons made of numbers."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from synpref_ray.evaluation.reliability.comparisons import Comparisons


def comparisons(margins: npt.ArrayLike, better: Sequence[str] = (), worse: Sequence[str] = (), prompts: Sequence[str] = ()) -> Comparisons:
    """Return comparisons with these margins; each has a prompt of its own unless said."""
    values = np.asarray(margins, dtype=np.float64)
    names = tuple(prompts) or tuple(f"p{place}" for place in range(values.size))
    return Comparisons(values, tuple(better) or ("",) * values.size, tuple(worse) or ("",) * values.size, names, ("",) * values.size)


def reply(words: int, marks: int = 0, name: int = 0) -> str:
    """Return a reply of so many different words, with so many words in bold pairs of marks."""
    return " ".join([*(f"w{name}x{place}" for place in range(words)), *("**" for _ in range(marks))])
