"""What a search over embedded pairs takes and gives, apart from the engine that does it (retrieval/index.py)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from synpref_ray.errors import SchemaError

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


@dataclass(frozen=True)
class JoinedSearch:
    """Several indexes searched as one: the best of what each finds. No pair may be in two of them."""

    searches: Sequence[NeighbourSearch]

    def search(self, queries: Matrix, k: int, *, exclude_groups: Sequence[str] | None = None) -> Neighbours:
        """Return the `k` best pairs of all indexes for each query, none of the query's excluded prompt group."""
        found = [search.search(queries, k, exclude_groups=exclude_groups) for search in self.searches]
        ids: list[list[str]] = []
        scores: list[Matrix] = []
        for row in range(len(queries)):
            names = [name for one in found for name in one.ids[row]]
            values = np.concatenate([one.scores[row] for one in found]) if found else np.zeros(0, dtype=np.float32)
            best = sorted(range(len(names)), key=lambda place, names=names, values=values: (-values[place], names[place]))[:k]  # type: ignore[misc]
            ids.append([names[place] for place in best])
            scores.append(values[best].astype(np.float32))
        return Neighbours(ids, scores)


def check_queries(queries: Matrix, dimension: int, exclude_groups: Sequence[str] | None) -> list[str | None]:
    """Return one excluded prompt group (or None) for each query.

    Raises:
        SchemaError: queries are not finite, not of shape (Q, `dimension`), or there is not one group for each.
    """
    if queries.ndim != 2 or queries.shape[1] != dimension or not np.isfinite(queries).all():
        raise SchemaError(f"expected finite queries of shape (Q, {dimension}), found {queries.shape}")
    excluded: list[str | None] = list(exclude_groups) if exclude_groups is not None else [None] * len(queries)
    if len(excluded) != len(queries):
        raise SchemaError(f"expected one prompt group for each of {len(queries)} queries, found {len(excluded)}")
    return excluded
