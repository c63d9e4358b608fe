"""Which unverified pairs people verify first. Serves Stage 1: human verification of a budget of pairs per round (paper: Sec. 3.2 and its "
"protocol)."""

import pyarrow as pa
from pydantic import Field

from synpref_ray.config import Settings
from synpref_ray.rules.columns import require_columns
from synpref_ray.schema import Controversiality, Objectivity, stable_hash

QUEUE_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("selected_by", pa.string(), nullable=False),
    ]
)
BY_CHANCE, BY_PRIORITY = "chance", "priority"


class VerificationConfig(Settings):
    """How many pairs to verify, and how many of them regardless of priority."""

    seed: int = 0
    """Seed of the draws."""
    max_pairs: int = Field(ge=0)
    """How many pairs in all."""
    random_fraction: float = Field(default=0.25, ge=0.0, le=1.0)  # ours: see select_for_verification


_CONTROVERSIALITY = {name.value: rank for rank, name in enumerate((Controversiality.LOW, Controversiality.MEDIUM, Controversiality.HIGH))}
_OBJECTIVITY = {name.value: rank for rank, name in enumerate((Objectivity.OBJECTIVE, Objectivity.SUBJECTIVE))}


def priority(objectivity: str | None, controversiality: str | None) -> tuple[int, int]:
    """Return a key that sorts pairs by verification priority, smallest first.

    Paper: objective and low-controversiality pairs first. Our choice: objectivity before controversiality, since a fact can be checked even
    where people disagree; an attribute that is missing or unknown comes last.
    """
    return (
        _OBJECTIVITY.get(objectivity or "", len(_OBJECTIVITY)),
        _CONTROVERSIALITY.get(controversiality or "", len(_CONTROVERSIALITY)),
    )


def select_for_verification(candidates: pa.Table, config: VerificationConfig) -> pa.Table:
    """Return the queue for the annotators: at most `max_pairs` pairs, first those drawn by chance, then the others by priority.

    Our choice: `random_fraction` of the budget is drawn from all candidates alike. Gold picks checkpoints and measures everything; gold of easy pairs
    alone would measure easy pairs alone. A pair brings the other pairs of its prompt with it, because gold keeps its prompts out of silver: verified
    together they cost silver nothing. Ties are broken by stable chance, so the queue depends on neither the order of the rows nor the run.

    Args:
        candidates: with `pair_id`, `prompt_group`, `objectivity`, `controversiality`; pairs already verified are not among them.

    Returns:
        `QUEUE_SCHEMA`, in queue order.
    """
    require_columns(candidates, ("pair_id", "prompt_group", "objectivity", "controversiality"), rule="select_for_verification")
    rows = candidates.select(["pair_id", "prompt_group", "objectivity", "controversiality"]).to_pylist()
    groups: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: str(row["pair_id"])):
        groups.setdefault(row["prompt_group"], []).append(row["pair_id"])
    keys = {row["pair_id"]: priority(row["objectivity"], row["controversiality"]) for row in rows}
    group_of = {row["pair_id"]: row["prompt_group"] for row in rows}
    num_selected = min(config.max_pairs, len(keys))
    by_chance = sorted(keys, key=lambda pair_id: (stable_hash(config.seed, pair_id, "verify_chance"), pair_id))
    by_priority = sorted(keys, key=lambda pair_id: (keys[pair_id], stable_hash(config.seed, pair_id, "verify_priority"), pair_id))
    queue: dict[str, str] = {}
    for order, how, limit in ((by_chance, BY_CHANCE, round(num_selected * config.random_fraction)), (by_priority, BY_PRIORITY, num_selected)):
        for pair_id in order:
            for member in [pair_id, *groups[group_of[pair_id]]]:
                if len(queue) < limit:
                    queue.setdefault(member, how)
    ranked = [{"pair_id": pair_id, "rank": rank, "selected_by": how} for rank, (pair_id, how) in enumerate(queue.items())]
    return pa.Table.from_pylist(ranked, schema=QUEUE_SCHEMA)
