"""Which unverified pairs a round of Stage 1 spends its labels on: three rules at one budget.

Paper: Sec. 3.2, Step 2 retrieves what is similar to the best RM's errors on gold; App. F.4 names a choice by uncertainty as future work. Our choice:
that rule stays the default; beside it pairs drawn by chance, which newer work finds hard to beat, and pairs by uncertainty and diversity. The budget
is what the errors call for, sum of k(p), whichever rule spends it, so that rules can be compared. The functions here are those of chance and of
uncertainty; similarity is `retrieval/select.py`.

Shapes: P pairs, E embedding size.
"""

from collections.abc import Iterable, Sequence, Set
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from synpref_ray.config import Settings
from synpref_ray.rules.retrieval import num_neighbours
from synpref_ray.schema import stable_hash

Floats = npt.NDArray[np.float64]
_ROUNDED = 6  # digits of a similarity that count: what a machine's float32 sums differ by must not choose pairs

SELECTION_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("selected_by", pa.string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("gold_pair_id", pa.string()),
        pa.field("gold_confidence", pa.float32()),
        pa.field("k", pa.int32()),
        pa.field("place", pa.int32()),
        pa.field("similarity", pa.float32()),
        pa.field("uncertainty", pa.float32()),
    ]
)
"""What a round selected, in the order of selection; similarity says which gold error called (`place` counts its picks from 0), uncertainty its score.
"""


class SelectionKind(StrEnum):
    """The rules."""

    SIMILARITY = "similarity"
    RANDOM = "random"
    UNCERTAINTY = "uncertainty"


class SelectionConfig(Settings):
    """How the next pairs are selected. `num_pairs` 0: as many as the errors on gold call for; else that many, and similarity at most that many."""

    kind: SelectionKind = SelectionKind.SIMILARITY  # Paper: Sec. 3.2, Step 2
    num_pairs: int = Field(default=0, ge=0)  # ours: the paper's own budget, sum of k(p)
    seed: int = 0
    """random: another seed draws other pairs."""
    gold_rm: bool = False
    """uncertainty: train a gold RM every round too, and count where the two RMs disagree. Ours: off, since it is a training more a round."""
    shortlist_factor: int = Field(default=4, ge=1)  # ours: diversity chooses among four times as many of the most uncertain pairs
    max_clusters: int = Field(default=256, ge=1)  # ours: one pass over the shortlist's vectors each; 1: by uncertainty alone


def num_called_for(confidences: Iterable[float], k_max: int) -> int:
    """Return how many pairs the gold pairs call for together: the sum of k(p) over the confidences in their human labels."""
    return sum(num_neighbours(p, k_max) for p in confidences)


def select_random(pair_ids: Sequence[str], already_selected: Set[str], num_pairs: int, *, seed: int) -> list[str]:
    """Draw pairs by stable chance; the order of `pair_ids` does not matter.

    A pair's chance depends on its name and the seed alone, so a later round draws from where an earlier one stopped, and a pool that has grown mixes
    its new pairs in.
    """
    free = set(pair_ids) - already_selected
    return sorted(free, key=lambda pair_id: (stable_hash(seed, pair_id, "select_random"), pair_id))[:num_pairs]


def uncertainty(p_best: npt.ArrayLike, p_gold: npt.ArrayLike | None = None) -> Floats:
    """Return how uncertain the reward models are about each pair: the entropy, in bits, of their mean confidence; shape (P,), from 0 to 1.

    With one RM it falls with the size of its margin. With two it is the mean of their entropies plus their mutual information (how much they
    disagree), so a pair on which one is sure of the label and the other of its opposite counts as much as one that neither can tell.

    Args:
        p_best, p_gold: each RM's confidence that `chosen` is better, shape (P,); NaN gives NaN.
    """
    p = np.asarray(p_best, dtype=np.float64)
    if p_gold is not None:
        p = (p + np.asarray(p_gold, dtype=np.float64)) / 2
    if ((p < 0) | (p > 1)).any():
        raise ValueError("expected confidences from 0 to 1")
    sides = np.stack([p, 1 - p])
    bits = np.log2(sides, out=np.zeros_like(sides), where=sides > 0)
    return np.asarray(np.where(np.isnan(p), np.nan, 0.0 - (sides * bits).sum(axis=0)))


def shortlist(pair_ids: Sequence[str], scores: Floats, already_selected: Set[str], num_pairs: int) -> list[int]:
    """Return the rows of the `num_pairs` most uncertain free pairs, the most uncertain first; ties by pair_id, rows without a score never."""
    scored = np.flatnonzero(~np.isnan(scores))
    free = [int(row) for row in scored if pair_ids[row] not in already_selected]
    return sorted(free, key=lambda row: (-scores[row], pair_ids[row]))[:num_pairs]


def spread_picks(vectors: npt.NDArray[np.float32], num_pairs: int, max_clusters: int) -> list[int]:
    """Return the rows of `num_pairs` pairs that are spread over the embedding space, in the order of selection.

    Greedy k-center: centres are taken one by one, each the row farthest from all before it, beginning with row 0; every row then belongs to its
    nearest centre, and clusters are served in turn, each its first rows first. Our choice: at most `max_clusters` centres, because a centre costs a
    pass over all vectors; with a budget below that every pick is a centre's best row.

    Args:
        vectors: (P, E), the most wanted row first; only their directions count.
    """
    num_rows = len(vectors)
    if not num_rows or num_pairs < 1:
        return []
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(norms > 0, norms, 1)
    nearest, cluster = np.full(num_rows, -np.inf, dtype=np.float32), np.zeros(num_rows, dtype=np.int64)
    centre = 0
    for number in range(min(num_pairs, max_clusters, num_rows)):
        similarity = np.round(unit @ unit[centre], _ROUNDED)
        closer = similarity > nearest
        closer[centre] = True
        nearest, cluster = np.where(closer, similarity, nearest), np.where(closer, number, cluster)
        nearest[centre] = np.inf  # no row is a centre twice
        centre = int(np.argmin(nearest))
    within = np.zeros(num_rows, dtype=np.int64)
    for number in range(int(cluster.max()) + 1):
        mine = np.flatnonzero(cluster == number)
        within[mine] = np.arange(len(mine))
    return [int(row) for row in np.lexsort((np.arange(num_rows), cluster, within))[:num_pairs]]
