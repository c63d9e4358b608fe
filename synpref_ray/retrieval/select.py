"""Error-driven retrieval: which unverified pairs the next labels are spent on. Serves Stage 1, Step 2 (paper: Sec. 3.2)."""

import logging
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from synpref_ray.config import Settings
from synpref_ray.errors import SchemaError
from synpref_ray.retrieval.embedder import embedding_matrix
from synpref_ray.retrieval.neighbours import Neighbours, NeighbourSearch
from synpref_ray.rules.retrieval import K_MAX, confidence_in_human_label, num_neighbours
from synpref_ray.schema import Verdict
from synpref_ray.tables.pools import require_columns

logger = logging.getLogger(__name__)

RETRIEVED_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("gold_pair_id", pa.string(), nullable=False),
        pa.field("gold_confidence", pa.float32(), nullable=False),
        pa.field("similarity", pa.float32(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
    ]
)
RETRIEVAL_REQUIRES = ("pair_id", "prompt_group", "embedding", "p_chosen", "human_verdict")
_FIRST_DEPTH = 4  # times k_max: neighbouring errors share neighbours, and each list should still suffice


class RetrievalConfig(Settings):
    """How much an error may call for."""

    k_max: int = Field(default=K_MAX, ge=1)  # Paper: Sec. 3.2, Step 2


class GoldError(NamedTuple):
    """A gold pair and the best RM's confidence in its human label."""

    pair_id: str
    p: float


class Retrieved(NamedTuple):
    """A selected pair and the gold pair that called for it; `rank` counts that gold pair's picks from 0."""

    pair_id: str
    gold_pair_id: str
    p: float
    similarity: float
    rank: int


@dataclass(frozen=True)
class Selection:
    """The selected pairs, in order, and the positions of gold pairs whose neighbour list ran out before they had their k."""

    retrieved: list[Retrieved]
    short: list[int]


def select_neighbours(gold: Sequence[GoldError], neighbours: Neighbours, already_selected: Set[str], k_max: int) -> Selection:
    """Give every gold pair its k(p) nearest pairs that nobody else has, the most wrong gold pair first.

    Paper: Sec. 3.2, Step 2 retrieves k(p) pairs per gold pair and does not say what a repeated hit counts. Our choice: a pair is given
    once, to the gold pair with the lowest p (ties: smaller pair_id), and the others go on to their next neighbour. Errors come in clusters
    that share neighbours; were hits not refilled, the clusters that need most new pairs would get fewest, and a second round would find
    what the first already took.

    Args:
        gold: each pair once.
        neighbours: for each gold pair, in the same order, candidates from nearest to farthest.
        already_selected: pair_ids of earlier rounds, never given again.
    """
    if len({error.pair_id for error in gold}) != len(gold) or len(neighbours.ids) != len(gold):
        raise ValueError(f"expected each gold pair once with one neighbour list, found {len(gold)} pairs and {len(neighbours.ids)} lists")
    taken = set(already_selected)
    retrieved: list[Retrieved] = []
    short = []
    for position in sorted(range(len(gold)), key=lambda position: (gold[position].p, gold[position].pair_id)):
        error = gold[position]
        k = num_neighbours(error.p, k_max)
        free = ((pair, float(score)) for pair, score in zip(neighbours.ids[position], neighbours.scores[position], strict=True) if pair not in taken)
        picks = [Retrieved(pair, error.pair_id, error.p, score, rank) for rank, (pair, score) in zip(range(k), free, strict=False)]
        taken.update(pick.pair_id for pick in picks)
        retrieved.extend(picks)
        if len(picks) < k:
            short.append(position)
    return Selection(retrieved, short)


def retrieve_pairs(gold: pa.Table, index: NeighbourSearch, already_selected: Set[str], config: RetrievalConfig) -> pa.Table:
    """Retrieve the pairs that the best RM's errors on working gold call for.

    Lists that run out are searched deeper, until every gold pair has its k(p) or the index is exhausted; the other gold pairs are not asked
    about again. A gold pair never retrieves its own prompt.

    Args:
        gold: working gold with `RETRIEVAL_REQUIRES`; rows without a reward or an embedding call for nothing, and are counted in the log.
        index: over unverified pairs. Leave out pairs of gold prompts: they can become neither silver nor gold of the other part. Leave out those
            already selected too: they are never given again, but where they are found, lists run out and have to be searched deeper.

    Returns:
        `RETRIEVED_SCHEMA`, in order of selection, no pair twice.
    """
    require_columns(gold, RETRIEVAL_REQUIRES, step="retrieve")
    usable = gold.filter(pc.and_(pc.is_valid(gold.column("embedding")), pc.is_valid(gold.column("p_chosen"))))
    if usable.num_rows < gold.num_rows:
        logger.warning("%d of %d gold pairs have no reward or no embedding and retrieve nothing", gold.num_rows - usable.num_rows, gold.num_rows)
    errors = _errors(usable)
    queries, groups = embedding_matrix(usable.column("embedding")), usable.column("prompt_group").to_pylist()
    depths = [_FIRST_DEPTH * config.k_max] * len(errors)
    neighbours = index.search(queries, _FIRST_DEPTH * config.k_max, exclude_groups=groups)
    while True:
        selection = select_neighbours(errors, neighbours, already_selected, config.k_max)
        deeper = [position for position in selection.short if len(neighbours.ids[position]) == depths[position]]
        if not deeper:
            break
        by_depth = {depth: [position for position in deeper if depths[position] == depth] for depth in sorted({depths[p] for p in deeper})}
        for depth, asked in by_depth.items():
            found = index.search(queries[asked], 2 * depth, exclude_groups=[groups[position] for position in asked])
            for position, ids, scores in zip(asked, found.ids, found.scores, strict=True):
                neighbours.ids[position], neighbours.scores[position], depths[position] = ids, scores, 2 * depth
    if selection.short:
        logger.warning("%d of %d gold pairs got fewer pairs than they called for: the index is exhausted", len(selection.short), len(errors))
    return _to_table(selection.retrieved)


def _errors(gold: pa.Table) -> list[GoldError]:
    columns = (gold.column(name).to_pylist() for name in ("pair_id", "p_chosen", "human_verdict"))
    errors = []
    for pair_id, p_chosen, verdict in zip(*columns, strict=True):
        if verdict not in (Verdict.CHOSEN, Verdict.REJECTED):
            raise SchemaError(f"gold needs a human verdict of chosen or rejected; {pair_id} has none")
        errors.append(GoldError(pair_id, confidence_in_human_label(p_chosen, Verdict(verdict))))
    return errors


def _to_table(retrieved: Sequence[Retrieved]) -> pa.Table:
    columns = [
        pa.array([pick.pair_id for pick in retrieved], pa.string()),
        pa.array([pick.gold_pair_id for pick in retrieved], pa.string()),
        pa.array(np.array([pick.p for pick in retrieved], dtype=np.float32)),
        pa.array(np.array([pick.similarity for pick in retrieved], dtype=np.float32)),
        pa.array([pick.rank for pick in retrieved], pa.int32()),
    ]
    return pa.table(columns, schema=RETRIEVED_SCHEMA)
