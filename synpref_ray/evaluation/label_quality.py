"""How good curated labels are, where the truth is known. Used by reports over what is decided, and nothing that decides labels may call it.

Paper: Table 19 gives the agreement of kept and of flipped pairs with humans; here the truth takes the humans' place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from synpref_ray.evaluation.accuracy import Accuracy, accuracy_over_groups, pair_accuracy
from synpref_ray.schema import Decision, Verdict


@dataclass(frozen=True)
class LabelQuality:
    """Accuracy of labels by decision, over the pairs whose truth is known; an accuracy of no pairs is NaN.

    `raw` is the source labels of all these pairs, `dropped` those of the dropped ones; `kept_share` and `flipped_share` are shares of all
    these pairs. `confusion[decision][truth]` counts pairs.
    """

    raw: Accuracy
    kept: Accuracy
    flipped: Accuracy
    kept_and_flipped: Accuracy
    dropped: Accuracy
    kept_share: float
    flipped_share: float
    num_without_truth: int
    confusion: Mapping[str, Mapping[str, int]]


def label_quality(
    decisions: Sequence[str], truth: Sequence[str | None], *, groups: Sequence[str] | None = None, confidence: float = 0.95
) -> LabelQuality:
    """Compare decisions with the truth.

    Args:
        decisions: keep, flip or drop, one per pair.
        truth: which reply of the pair as ingested is really better; None or abstain is not known, and such a pair is only counted.
        groups: pairs of one group (a prompt) are drawn together in the intervals, which are bootstrapped then; without, Wilson's.

    Raises:
        ValueError: the lengths differ, or a value is neither of these.
    """
    decided = np.array([Decision(decision).value for decision in decisions], dtype=object)
    better = np.array([Verdict(value).value if value is not None else Verdict.ABSTAIN.value for value in truth], dtype=object)
    if decided.shape != better.shape:
        raise ValueError(f"expected a truth for each of {len(decided)} decisions, found {len(better)}")
    names = None if groups is None else np.array(list(groups), dtype=object)
    if names is not None and names.shape != decided.shape:
        raise ValueError(f"expected a group for each of {len(decided)} decisions, found {len(names)}")
    known = better != Verdict.ABSTAIN.value
    names = None if names is None else names[known]
    decided, better = decided[known], better[known]
    label_right = better == Verdict.CHOSEN.value
    kept, flipped, dropped = (decided == decision.value for decision in (Decision.KEEP, Decision.FLIP, Decision.DROP))
    curated_right = np.where(flipped, ~label_right, label_right).astype(bool)

    def accuracy(rows: np.ndarray, right: np.ndarray) -> Accuracy:
        flags = right[rows].astype(bool)
        if names is None:
            return pair_accuracy(flags, confidence=confidence)
        return accuracy_over_groups(flags, names[rows].tolist(), confidence=confidence)

    return LabelQuality(
        raw=accuracy(np.ones(len(decided), dtype=bool), label_right),
        kept=accuracy(kept, curated_right),
        flipped=accuracy(flipped, curated_right),
        kept_and_flipped=accuracy(kept | flipped, curated_right),
        dropped=accuracy(dropped, label_right),
        kept_share=_share(kept),
        flipped_share=_share(flipped),
        num_without_truth=int((~known).sum()),
        confusion={
            decision.value: {
                verdict.value: int(((decided == decision.value) & (better == verdict.value)).sum()) for verdict in (Verdict.CHOSEN, Verdict.REJECTED)
            }
            for decision in Decision
        },
    )


def _share(flags: np.ndarray) -> float:
    return float(flags.mean()) if len(flags) else float("nan")


@dataclass(frozen=True)
class FlipDetection:
    """How well wrong labels were found, over the pairs whose truth is known; a share of no pairs is NaN.

    `precision`: of the flipped pairs, those whose label was wrong. `recall`: of the wrong labels, those that were flipped. `removed`: of the wrong
    labels, those that were flipped or dropped, so that they mislead nobody. `lost`: of the right labels, those that were flipped or dropped.
    """

    precision: Accuracy
    recall: Accuracy
    removed: Accuracy
    lost: Accuracy


def flip_detection(
    decisions: Sequence[str], truth: Sequence[str | None], *, groups: Sequence[str] | None = None, confidence: float = 0.95
) -> FlipDetection:
    """Compare flips with the truth; arguments and errors as for `label_quality`."""
    names = [None] * len(decisions) if groups is None else list(groups)
    rows = [
        (Decision(decision), Verdict(better), group)
        for decision, better, group in zip(decisions, truth, names, strict=True)
        if better is not None and Verdict(better) is not Verdict.ABSTAIN
    ]

    def share(of: Sequence[tuple[bool, str | None]]) -> Accuracy:
        flags = np.array([flag for flag, _ in of], dtype=bool)
        if groups is None:
            return pair_accuracy(flags, confidence=confidence)
        return accuracy_over_groups(flags, [str(group) for _, group in of], confidence=confidence)

    return FlipDetection(
        precision=share([(better is Verdict.REJECTED, group) for decision, better, group in rows if decision is Decision.FLIP]),
        recall=share([(decision is Decision.FLIP, group) for decision, better, group in rows if better is Verdict.REJECTED]),
        removed=share([(decision is not Decision.KEEP, group) for decision, better, group in rows if better is Verdict.REJECTED]),
        lost=share([(decision is not Decision.KEEP, group) for decision, better, group in rows if better is Verdict.CHOSEN]),
    )
