"""In which order people verify the pairs of a pool, and how many of them look at each. Serves the annotation queue (Stage 1, human verification).

Paper: Sec. 3.2: objective and low-controversiality pairs first. Our choice: pairs that errors on gold retrieved come before all others; a share
drawn by chance is spread evenly over the order, so that gold is not only what was easy, wherever the work stops; and a share is judged by
several people.
"""

import pyarrow as pa
from pydantic import Field

from synpref_ray.config import Settings
from synpref_ray.rules.selection import BY_CHANCE, VerificationConfig, select_for_verification
from synpref_ray.schema import stable_uniform

QUEUE_ORDER_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("selected_by", pa.string(), nullable=False),
        pa.field("num_verdicts", pa.int32(), nullable=False),
    ]
)
AFTER_RETRIEVED = 1_000_000_000
"""Ranks of pairs that no error retrieved begin here."""


class QueueConfig(Settings):
    """Which part of a pool people verify."""

    seed: int = 0
    """Seed of the draws."""
    max_pairs: int = Field(default=2_000, ge=1)  # ours: about a week of the paper's team (2,000 to 3,000 annotations)
    max_fraction: float = Field(default=0.5, gt=0.0, lt=1.0)  # ours: the rest of a pool becomes silver
    audit_share: float = Field(default=0.1, ge=0.0, le=1.0)  # ours: drawn by chance
    repeat_share: float = Field(default=0.2, ge=0.0, le=1.0)  # ours: agreement needs pairs that several people judged
    repeat_verdicts: int = Field(default=2, ge=2)  # ours


def order_queue(candidates: pa.Table, config: QueueConfig, *, retrieved: bool) -> pa.Table:
    """Return the queue of a pool, smallest rank first.

    Args:
        candidates: with `pair_id`, `prompt_group`, `objectivity`, `controversiality`.
        retrieved: whether the pool holds what errors on gold retrieved.

    Returns:
        QUEUE_ORDER_SCHEMA: as many pairs as the config allows; `num_verdicts` is how many people judge a pair.
    """
    limit = min(config.max_pairs, int(candidates.num_rows * config.max_fraction))
    selection = VerificationConfig(seed=config.seed, max_pairs=limit, random_fraction=config.audit_share)
    rows = select_for_verification(candidates, selection).to_pylist()
    by_chance = [row for row in rows if row["selected_by"] == BY_CHANCE]
    by_priority = [row for row in rows if row["selected_by"] != BY_CHANCE]
    places = [((place + 0.5) / len(part), row) for part in (by_chance, by_priority) for place, row in enumerate(part)]
    first = 0 if retrieved else AFTER_RETRIEVED
    ordered = []
    for rank, (_, row) in enumerate(sorted(places, key=lambda entry: (entry[0], entry[1]["pair_id"]))):
        is_repeated = stable_uniform(config.seed, row["pair_id"], "verify_repeat") < config.repeat_share
        ordered.append({**row, "rank": first + rank, "num_verdicts": config.repeat_verdicts if is_repeated else 1})
    return pa.Table.from_pylist(ordered, schema=QUEUE_ORDER_SCHEMA)
