"""What a search over embedded pairs takes and gives, apart from the engine that does it (retrieval/index.py)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Neighbours:
    """For each query, pair_ids with their float32 scores, best first; equal scores are ordered by pair_id."""

    ids: list[list[str]]
    scores: list[Matrix]


class NeighbourSearch(Protocol):
    """An index over embedded pairs."""

    def search(self, queries: Matrix, k: int, *, exclude_groups: Sequence[str] | None = None) -> Neighbours:
        """Return the `k` best pairs for each query, fewer if there are no more, none of the query's excluded prompt group."""
        ...
