"""The next pairs of a Stage 1 round, by the rule that the settings name, all rules at one budget (`rules/query_selection.py`).

Paper: Sec. 3.2, Step 2. Our choice: candidates are alike for every rule (no pair of an earlier round, of a gold prompt, without an embedding, or that
gives a benchmark item away), and the unverified pool is scored only where the rule reads its rewards.
"""

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synpref_ray.pipeline.gold_tables import GoldTables
from synpref_ray.pipeline.retrieval import EMBEDDING, pieces_of, read_scored_gold, select_for_errors
from synpref_ray.retrieval.embedder import embedding_matrix
from synpref_ray.retrieval.index import IndexConfig
from synpref_ray.retrieval.select import RetrievalConfig
from synpref_ray.rules.query_selection import (
    SELECTION_SCHEMA,
    SelectionConfig,
    SelectionKind,
    num_called_for,
    select_random,
    shortlist,
    spread_picks,
    uncertainty,
)
from synpref_ray.rules.retrieval import confidence_in_human_label, num_neighbours
from synpref_ray.schema import Verdict
from synpref_ray.tables.pools import Pool
from synpref_ray.tables.selection import Piece
from synpref_ray.tables.sidecars import Sidecar, zip_shard


@dataclass(frozen=True)
class Candidates:
    """The unverified pool as a round sees it: its parts, the embeddings of each and (where the rule reads them) rewards of one or two RMs."""

    parts: Sequence[Pool]
    embeddings: Sequence[Sidecar]
    rewards: Sequence[Sequence[Sidecar]] = ()
    """For each part the sidecar of the best RM, then that of the gold RM if there is one."""


@dataclass(frozen=True)
class Selected:
    """What a rule selects: rows by shard of the unverified pool, the record (SELECTION_SCHEMA), and counts, which are plain values."""

    pieces: list[Piece]
    record: pa.Table
    counts: Mapping[str, Any]


def select_pairs(
    gold: GoldTables,
    gold_rewards: Sidecar,
    candidates: Candidates,
    already_selected: Set[str],
    *,
    config: SelectionConfig,
    retrieval: RetrievalConfig,
    index: IndexConfig,
    max_pairs: int,
) -> Selected:
    """Select a round's pairs.

    Args:
        gold_rewards: of the best RM, on all gold.
        max_pairs: ceiling whatever the settings say.
    """
    confidences = gold_confidences(gold, gold_rewards)
    called = num_called_for(confidences, retrieval.k_max)
    budget = min(config.num_pairs or called, max_pairs)
    if config.kind is SelectionKind.SIMILARITY:
        parts = list(zip(candidates.parts, candidates.embeddings, strict=True))
        found = select_for_errors(gold, gold_rewards, parts, already_selected, retrieval, index, budget)
        record = _record_of_calls(found.record, retrieval.k_max)
        pieces = found.pieces
    else:
        free = _free(gold, candidates)
        if config.kind is SelectionKind.RANDOM:
            record = _record(select_random(free["pair_id"].to_pylist(), already_selected, budget, seed=config.seed), config.kind)
        else:
            record = _uncertain(free, candidates, already_selected, budget, config)
        ids = set(record["pair_id"].to_pylist())
        pieces = [piece for pool in candidates.parts for piece in pieces_of(pool, ids)]
    by_k = Counter(num_neighbours(p, retrieval.k_max) for p in confidences)
    counts = {
        "kind": config.kind.value,
        "selected": record.num_rows,
        "budget": budget,
        "called_for": called,
        "gold_pairs": len(confidences),
        "gold_errors": sum(p <= 0.5 for p in confidences),
        "gold_pairs_by_k": {str(k): count for k, count in sorted(by_k.items(), reverse=True)},
    }
    return Selected(pieces, record, counts)


def gold_confidences(gold: GoldTables, rewards: Sidecar) -> list[float]:
    """Return the best RM's confidence in the human label of every working gold pair that has an embedding and a reward."""
    table = read_scored_gold(gold, rewards)
    usable = table.filter(pc.and_(pc.is_valid(table["embedding"]), pc.is_valid(table["p_chosen"])))
    columns = (usable[name].to_pylist() for name in ("p_chosen", "human_verdict"))
    return [confidence_in_human_label(p, Verdict(verdict)) for p, verdict in zip(*columns, strict=True)]


def _free(gold: GoldTables, candidates: Candidates) -> pa.Table:
    """Return pair_id and (if there are rewards) p_0, p_1 of every embedded pair of no gold prompt; no vectors."""
    tables = []
    for place, (pool, embeddings) in enumerate(zip(candidates.parts, candidates.embeddings, strict=True)):
        beside: list[tuple[Sidecar, Mapping[str, str]]] = [(embeddings, {"drop_reason": "drop_reason"})]
        beside += [(sidecar, {"p_chosen": f"p_{number}"}) for number, sidecar in enumerate(candidates.rewards[place] if candidates.rewards else ())]
        tables += [zip_shard(pool, shard.number, ["prompt_group"], beside) for shard in pool.shards]
    table = pa.concat_tables(tables)
    in_gold = pc.is_in(table["prompt_group"], value_set=pa.array(sorted(gold.prompt_groups()), pa.string()))
    return table.filter(pc.and_(pc.is_null(table["drop_reason"]), pc.invert(in_gold)))


def _uncertain(free: pa.Table, candidates: Candidates, already_selected: Set[str], budget: int, config: SelectionConfig) -> pa.Table:
    """Pick the most uncertain pairs, spread over the embedding space: the vectors of the shortlist alone are read."""
    ids = free["pair_id"].to_pylist()
    confidences = [np.array(free[name].to_pylist(), dtype=np.float64) for name in free.column_names if name.startswith("p_")]
    scores = uncertainty(*confidences)
    best = shortlist(ids, scores, already_selected, budget * config.shortlist_factor)
    names = [ids[row] for row in best]
    picks = [best[place] for place in spread_picks(_vectors(candidates, names), budget, config.max_clusters)]
    return _record([ids[row] for row in picks], config.kind, [float(scores[row]) for row in picks])


def _vectors(candidates: Candidates, pair_ids: Sequence[str]) -> Any:
    """Return the embeddings of some pairs, in their order, shape (P, E) float32."""
    wanted = pa.array(pair_ids, pa.string())
    tables = []
    for embeddings in candidates.embeddings:
        for shard in embeddings.pool.shards:
            table = embeddings.read(shard.number, ["pair_id", *EMBEDDING])
            tables.append(table.filter(pc.is_in(table["pair_id"], value_set=wanted)))
    found = pa.concat_tables(tables).combine_chunks()
    rows = pc.index_in(wanted, value_set=found["pair_id"].combine_chunks())
    return embedding_matrix(found["embedding"].take(rows))


def _record(pair_ids: Sequence[str], kind: SelectionKind, scores: Sequence[float] | None = None) -> pa.Table:
    rows = [
        {"pair_id": pair_id, "selected_by": kind.value, "rank": rank, "uncertainty": scores[rank] if scores is not None else None}
        for rank, pair_id in enumerate(pair_ids)
    ]
    return pa.Table.from_pylist(rows, schema=SELECTION_SCHEMA)


def _record_of_calls(retrieved: pa.Table, k_max: int) -> pa.Table:
    """Return what the errors on gold retrieved as a record: `place` is the rank among the picks of one gold pair, `rank` that among all."""
    rows = [
        {
            **{name: row[name] for name in ("pair_id", "gold_pair_id", "gold_confidence", "similarity")},
            "selected_by": SelectionKind.SIMILARITY.value,
            "rank": rank,
            "k": num_neighbours(row["gold_confidence"], k_max),
            "place": row["rank"],
        }
        for rank, row in enumerate(retrieved.to_pylist())
    ]
    return pa.Table.from_pylist(rows, schema=SELECTION_SCHEMA)
