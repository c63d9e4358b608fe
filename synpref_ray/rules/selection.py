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
    max_pairs: int = Field(ge=0)
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

    Our choice: `random_fraction` of the budget is drawn from all candidates alike. Gold picks checkpoints and measures everything; gold of
    easy pairs alone would measure easy pairs alone. Ties are broken by stable chance, so the queue depends on neither the order of the rows
    nor the run.

    Args:
        candidates: with `pair_id`, `objectivity`, `controversiality`; pairs already verified are not among them.

    Returns:
        `QUEUE_SCHEMA`, in queue order.
    """
    require_columns(candidates, ("pair_id", "objectivity", "controversiality"), rule="select_for_verification")
    ids = candidates.column("pair_id").to_pylist()
    attributes = zip(candidates.column("objectivity").to_pylist(), candidates.column("controversiality").to_pylist(), strict=True)
    keys = {pair_id: priority(*pair) for pair_id, pair in zip(ids, attributes, strict=True)}
    num_selected = min(config.max_pairs, len(keys))
    num_random = round(num_selected * config.random_fraction)
    drawn = sorted(keys, key=lambda pair_id: (stable_hash(config.seed, pair_id, "verify_chance"), pair_id))[:num_random]
    rest = sorted(
        keys.keys() - set(drawn), key=lambda pair_id: (keys[pair_id], stable_hash(config.seed, pair_id, "verify_priority"), pair_id)
    )[: num_selected - num_random]
    queue = [*((pair_id, BY_CHANCE) for pair_id in drawn), *((pair_id, BY_PRIORITY) for pair_id in rest)]
    rows = [{"pair_id": pair_id, "rank": rank, "selected_by": how} for rank, (pair_id, how) in enumerate(queue)]
    return pa.Table.from_pylist(rows, schema=QUEUE_SCHEMA)
