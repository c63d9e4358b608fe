"""How good curated labels are, where the truth is known. Used by reports over what is decided, and nothing that decides labels may call it.

Paper: Table 19 gives the agreement of kept and of flipped pairs with humans; here the truth takes the humans' place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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
    decisions: Sequence[str],
    truth: Sequence[str | None],
    *,
    groups: Sequence[str] | None = None,
    counts: Sequence[int] | None = None,
    confidence: float = 0.95,
) -> LabelQuality:
    """Compare decisions with the truth.

    Args:
        decisions: keep, flip or drop, one per pair.
        truth: which reply of the pair as ingested is really better; None or abstain is not known, and such a pair is only counted.
        groups: pairs of one group (a prompt) are drawn together in the intervals, which are bootstrapped then; without, Wilson's.
        counts: for how many pairs of its group each entry stands, at least 1; without, for one.

    Raises:
        ValueError: the lengths differ, or a value is neither of these.
    """
    pairs = _Pairs.of(decisions, truth, groups, counts)
    label_right = pairs.better == Verdict.CHOSEN.value
    kept, flipped, dropped = (pairs.decided == decision.value for decision in (Decision.KEEP, Decision.FLIP, Decision.DROP))
    curated_right = np.where(flipped, ~label_right, label_right).astype(bool)
    everything = np.ones(len(label_right), dtype=bool)
    return LabelQuality(
        raw=pairs.accuracy(everything, label_right, confidence),
        kept=pairs.accuracy(kept, curated_right, confidence),
        flipped=pairs.accuracy(flipped, curated_right, confidence),
        kept_and_flipped=pairs.accuracy(kept | flipped, curated_right, confidence),
        dropped=pairs.accuracy(dropped, label_right, confidence),
        kept_share=pairs.share(kept),
        flipped_share=pairs.share(flipped),
        num_without_truth=pairs.num_without_truth,
        confusion={
            decision.value: {
                verdict.value: int(pairs.counts[(pairs.decided == decision.value) & (pairs.better == verdict.value)].sum())
                for verdict in (Verdict.CHOSEN, Verdict.REJECTED)
            }
            for decision in Decision
        },
    )


@dataclass(frozen=True)
class _Pairs:
    """What was decided of the pairs whose truth is known, (P,) each, and how many there are without; an entry stands for `counts` pairs."""

    decided: npt.NDArray[np.object_]
    better: npt.NDArray[np.object_]
    groups: npt.NDArray[np.object_] | None
    counts: npt.NDArray[np.int64]
    num_without_truth: int

    @classmethod
    def of(cls, decisions: Sequence[str], truth: Sequence[str | None], groups: Sequence[str] | None, counts: Sequence[int] | None) -> "_Pairs":
        decided = np.array([Decision(decision).value for decision in decisions], dtype=object)
        better = np.array([Verdict(value).value if value is not None else Verdict.ABSTAIN.value for value in truth], dtype=object)
        if decided.shape != better.shape:
            raise ValueError(f"expected a truth for each of {len(decided)} decisions, found {len(better)}")
        names = None if groups is None else np.array(list(groups), dtype=object)
        if names is not None and names.shape != decided.shape:
            raise ValueError(f"expected a group for each of {len(decided)} decisions, found {len(names)}")
        weights = np.ones(len(decided), dtype=np.int64) if counts is None else np.array(counts, dtype=np.int64)
        if weights.shape != decided.shape:
            raise ValueError(f"expected a count for each of {len(decided)} decisions, found {len(weights)}")
        known = better != Verdict.ABSTAIN.value
        names = None if names is None else names[known]
        return cls(decided[known], better[known], names, weights[known], int(weights[~known].sum()))

    def accuracy(self, rows: np.ndarray, right: np.ndarray, confidence: float) -> Accuracy:
        """Return the share of the right ones among some entries."""
        flags, counts = right[rows].astype(bool), self.counts[rows]
        if self.groups is None:
            return pair_accuracy(np.repeat(flags, counts), confidence=confidence)
        return accuracy_over_groups(flags, self.groups[rows].tolist(), counts=counts, confidence=confidence)

    def share(self, flags: np.ndarray) -> float:
        """Return the share of some entries among all."""
        return float(self.counts[flags].sum() / self.counts.sum()) if len(flags) else float("nan")


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
    decisions: Sequence[str],
    truth: Sequence[str | None],
    *,
    groups: Sequence[str] | None = None,
    counts: Sequence[int] | None = None,
    confidence: float = 0.95,
) -> FlipDetection:
    """Compare flips with the truth; arguments and errors as for `label_quality`."""
    pairs = _Pairs.of(decisions, truth, groups, counts)
    wrong, right = (pairs.better == verdict.value for verdict in (Verdict.REJECTED, Verdict.CHOSEN))
    flipped, gone = pairs.decided == Decision.FLIP.value, pairs.decided != Decision.KEEP.value
    return FlipDetection(
        precision=pairs.accuracy(flipped, wrong, confidence),
        recall=pairs.accuracy(wrong, flipped, confidence),
        removed=pairs.accuracy(wrong, gone, confidence),
        lost=pairs.accuracy(right, gone, confidence),
    )


@dataclass(frozen=True)
class LabelEvidence:
    """What the truth says of one stage's labels, for one source; `is_total`: for all of them."""

    stage: str
    source: str
    quality: LabelQuality
    flips: FlipDetection
    is_total: bool
