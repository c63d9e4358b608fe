"""The plain way to do what the index does: every score, one full sort. The oracle for FAISS, and an index for tests without it."""

import numpy as np

from synpref_ray.retrieval.embedder import embedding_matrix
from synpref_ray.retrieval.neighbours import Neighbours


class BruteForceSearch:
    def __init__(self, pairs):
        pairs = pairs.sort_by("pair_id")
        self.ids = pairs["pair_id"].to_pylist()
        self.groups = pairs["prompt_group"].to_pylist()
        self.vectors = embedding_matrix(pairs["embedding"]).astype(np.float64)
        self.depths = []
        self.num_queries = []

    def search(self, queries, k, *, exclude_groups=None):
        self.depths.append(k)
        self.num_queries.append(len(queries))
        ids, scores = [], []
        for number, query in enumerate(queries):
            values = [np.float32((vector * query.astype(np.float64)).sum()) for vector in self.vectors]
            allowed = [row for row in range(len(self.ids)) if exclude_groups is None or self.groups[row] != exclude_groups[number]]
            best = sorted(allowed, key=lambda row: (-values[row], self.ids[row]))[:k]
            ids.append([self.ids[row] for row in best])
            scores.append(np.array([values[row] for row in best], dtype=np.float32))
        return Neighbours(ids, scores)
