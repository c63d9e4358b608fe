"""How far annotators agree: Krippendorff's alpha, Cohen's kappa and plain agreement, overall and per task category.

Our choice: all three kinds of verdict count as labels, undecidable too, since one person's doubt of another's decision is disagreement. The kappa
of a team is pooled over its pairs of annotators. A figure that is not defined (nobody overlaps, or all say the same) is None, never a number.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import krippendorff
import numpy as np

from synpref_ray.config import Settings

LABELS = ("chosen", "rejected", "undecidable")


@dataclass(frozen=True)
class Vote:
    """What one person finally says of one pair as ingested."""

    pair_id: str
    annotator: str
    verdict: str
    category: str


class Agreement(Settings):
    """Agreement over the pairs that two or more people judged."""

    num_votes: int
    num_shared_pairs: int
    percent_agreement: float | None
    krippendorff_alpha: float | None
    cohen_kappa: float | None


def measure_agreement(votes: Sequence[Vote]) -> Agreement:
    """Return the agreement of these votes, one at most per person and pair."""
    by_pair = _by_pair(votes)
    shared = {pair_id: given for pair_id, given in by_pair.items() if len(given) > 1}
    same = [left == right for given in shared.values() for left, right in combinations(given.values(), 2)]
    return Agreement(
        num_votes=len(votes),
        num_shared_pairs=len(shared),
        percent_agreement=sum(same) / len(same) if same else None,
        krippendorff_alpha=_alpha(shared),
        cohen_kappa=_kappa(shared),
    )


def agreement_by_category(votes: Sequence[Vote]) -> dict[str, Agreement]:
    """Return the agreement within each task category, sorted by name. A pair whose votes name several counts with the first in order."""
    category: dict[str, str] = {}
    for vote in votes:
        category[vote.pair_id] = min(category.get(vote.pair_id, vote.category), vote.category)
    names = sorted(set(category.values()))
    return {name: measure_agreement([vote for vote in votes if category[vote.pair_id] == name]) for name in names}


def _by_pair(votes: Iterable[Vote]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for vote in votes:
        found.setdefault(vote.pair_id, {})[vote.annotator] = vote.verdict
    return found


def _alpha(shared: Mapping[str, Mapping[str, str]]) -> float | None:
    counts = np.array([[sum(verdict == label for verdict in given.values()) for label in LABELS] for given in shared.values()], dtype=np.int64)
    if not counts.size or (counts.sum(axis=0) > 0).sum() < 2:
        return None  # one label alone: there is nothing that chance could disagree on
    return float(krippendorff.alpha(value_counts=counts, level_of_measurement="nominal"))


def _kappa(shared: Mapping[str, Mapping[str, str]]) -> float | None:
    """Return Cohen's kappa pooled over all who shared pairs: observed and chance agreement are averaged over duos before they divide.

    Our choice (de Vries et al. 2008, "Using pooled kappa to summarize interrater agreement across many items"): a mean of the duos' own kappas would
    be far too low in a large team, where most duos share a pair or two: of those who agree it is not defined, of those who do not it is zero. What
    chance would do follows from all that a person said of shared pairs. With two annotators it is Cohen's kappa.
    """
    said: dict[str, Counter[str]] = {}
    for given in shared.values():
        for annotator, verdict in given.items():
            said.setdefault(annotator, Counter())[verdict] += 1
    observed = chance = 0.0
    weight = 0
    for given in shared.values():
        for left, right in combinations(sorted(given), 2):
            total = said[left].total() * said[right].total()
            observed += given[left] == given[right]
            chance += sum(said[left][label] * said[right][label] for label in LABELS) / total
            weight += 1
    if not weight or chance == weight:  # of one label alone kappa is not defined
        return None
    return (observed - chance) / (weight - chance)
