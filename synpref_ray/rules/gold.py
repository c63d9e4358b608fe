"""Gold is clean, or nothing is: the split into working and audit gold, and the checks that keep gold out of where it must never be.

Paper: Sec. 3.2: gold picks the checkpoints of a reward model that trains on silver only, drives retrieval and serves as exemplars; Sec.
3.3: it trains the gold RM. Our choice: gold is split by prompt group into *working* gold, which does all of that, and *audit* gold, on
which nothing is tuned and every reported figure is measured. A check counts all violations and names at most three
pairs.
"""

from collections.abc import Mapping
from enum import StrEnum

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from synpref_ray.config import Settings
from synpref_ray.errors import CleanGoldError
from synpref_ray.rules.columns import require_columns
from synpref_ray.rules.intervals import wilson_interval
from synpref_ray.schema import stable_uniform


class GoldSplit(StrEnum):
    """Which part of gold a pair belongs to, for good."""

    WORKING = "working"
    AUDIT = "audit"


MAX_HALF_WIDTH = 0.1
"""Ours: where a 95 % interval around one half reaches farther than ten points to either side, rounds, judges and models cannot be told apart."""


class GoldConfig(Settings):
    """How gold is split."""

    seed: int = 0
    """Seed of the split."""
    audit_fraction: float = Field(default=0.3, gt=0.0, lt=1.0)  # ours: enough to report on, most is left to work with


def gold_split(prompt_group: str, config: GoldConfig) -> GoldSplit:
    """Return the part that every gold pair of this prompt group belongs to.

    It depends on the group and the seed alone, so gold added in a later round joins the part its group is in, and audit gold stays audit
    gold.
    """
    return GoldSplit.AUDIT if stable_uniform(config.seed, prompt_group, "gold_split") < config.audit_fraction else GoldSplit.WORKING


def split_gold(prompt_groups: pa.Array | pa.ChunkedArray, config: GoldConfig) -> pa.Array:
    """Return `working` or `audit` for every row, by its prompt group."""
    groups = prompt_groups.combine_chunks() if isinstance(prompt_groups, pa.ChunkedArray) else prompt_groups
    encoded = groups.dictionary_encode()
    splits = pa.array([gold_split(group, config).value for group in encoded.dictionary.to_pylist()], pa.string())
    return splits.take(encoded.indices)


def describe_small_gold(num_pairs: Mapping[GoldSplit, int]) -> str:
    """Return one line that warns where gold is too small to judge anything by, else ""; `num_pairs` counts each part of gold."""
    reach = {split: (high - low) / 2 for split, count in num_pairs.items() for low, high in [wilson_interval(count / 2, count)]}
    if not any(half > MAX_HALF_WIDTH for half in reach.values()):
        return ""
    parts = " and ".join(f"{num_pairs[split]} {split.value} (±{100 * half:.0f} points)" for split, half in reach.items())
    return f"gold is too small to judge by: {parts} pairs; what differs by less is not told apart, so have people judge more"


def check_split(gold: pa.Table, config: GoldConfig) -> None:
    """Raise unless every gold pair's `gold_split` is the one its prompt group has; so no group lies on both sides."""
    require_columns(gold, ("pair_id", "prompt_group", "gold_split"), rule="check_split")
    wrong = pc.fill_null(pc.not_equal(gold.column("gold_split"), split_gold(gold.column("prompt_group"), config)), True)
    ids = gold.column("pair_id").filter(wrong)
    _refuse(ids, "gold pairs lie in another part of gold than their prompt group", "split gold with split_gold")


def check_exemplars(targets: pa.Table, gold: pa.Table) -> None:
    """Raise unless all exemplars are working gold of other prompts than their target's.

    For gold targets this is leave-one-out: a gold pair is judged without itself and without every other pair of its prompt.

    Args:
        targets: with `pair_id`, `prompt_group` and `exemplar_ids` (null: none).
        gold: all gold, with `pair_id`, `prompt_group` and `gold_split`.
    """
    require_columns(targets, ("pair_id", "prompt_group", "exemplar_ids"), rule="check_exemplars")
    require_columns(gold, ("pair_id", "prompt_group", "gold_split"), rule="check_exemplars")
    ids = _one(targets.column("exemplar_ids"))
    parents, exemplars = pc.list_parent_indices(ids), pc.list_flatten(ids)
    rows = pc.index_in(exemplars, value_set=_one(gold.column("pair_id")))
    target_ids = targets.column("pair_id").take(parents)
    _refuse(target_ids.filter(pc.is_null(rows)), "pairs have exemplars that are not gold", "retrieve exemplars from working gold")
    splits = gold.column("gold_split").take(rows)
    not_working = pc.fill_null(pc.not_equal(splits, GoldSplit.WORKING.value), True)
    _refuse(target_ids.filter(not_working), "pairs have exemplars from audit gold", "retrieve exemplars from working gold")
    same = pc.equal(gold.column("prompt_group").take(rows), targets.column("prompt_group").take(parents))
    _refuse(target_ids.filter(same), "pairs have an exemplar of their own prompt", "exclude the target's prompt_group when retrieving")


def check_silver(silver: pa.Table, gold: pa.Table) -> None:
    """Raise if silver holds a gold pair or any pair of a gold prompt, working or audit. Both tables have `pair_id` and `prompt_group`."""
    _check_apart(silver, gold, "silver pairs share a prompt with gold", "label pairs of gold prompts as discarded")


def check_best_rm_training(training: pa.Table, gold: pa.Table) -> None:
    """Raise if the best RM would train on gold: on a gold pair, or on any pair of a gold prompt, working or audit.

    Paper: Sec. 3.2, Step 1: it trains on silver only, and gold picks its checkpoint.
    """
    _check_apart(training, gold, "training pairs of the best RM share a prompt with gold", "train it on silver only")


def check_gold_rm_training(training: pa.Table, gold: pa.Table) -> None:
    """Raise unless the gold RM trains on working gold alone. `gold` is all gold, with `gold_split`.

    Paper: Sec. 3.3: it trains on all human-verified pairs. Our choice: without audit gold, so that its accuracy can be told.
    """
    require_columns(gold, ("gold_split",), rule="check_gold_rm_training")
    audit = gold.filter(pc.fill_null(pc.not_equal(gold.column("gold_split"), GoldSplit.WORKING.value), True))
    _check_apart(training, audit, "training pairs of the gold RM share a prompt with audit gold", "train it on working gold only")
    known = pc.is_in(training.column("pair_id"), value_set=_one(gold.column("pair_id")))
    strangers = training.column("pair_id").filter(pc.invert(known))
    _refuse(strangers, "training pairs of the gold RM are not gold", "train it on working gold only")


def _check_apart(pairs: pa.Table, gold: pa.Table, problem: str, remedy: str) -> None:
    for table in (pairs, gold):
        require_columns(table, ("pair_id", "prompt_group"), rule="clean gold")
    by_id = pc.is_in(pairs.column("pair_id"), value_set=_one(gold.column("pair_id")))
    by_group = pc.is_in(pairs.column("prompt_group"), value_set=_one(gold.column("prompt_group")))
    _refuse(pairs.column("pair_id").filter(pc.or_(by_id, by_group)), problem, remedy)


def _refuse(ids: pa.Array | pa.ChunkedArray, problem: str, remedy: str) -> None:
    """Raise about these pairs, if there are any."""
    if len(ids):
        unique = list(dict.fromkeys(ids.to_pylist()))
        raise CleanGoldError(f"{len(unique)} {problem} ({', '.join(unique[:3])}{' …' if len(unique) > 3 else ''}): {remedy}")


def _one(column: pa.ChunkedArray) -> pa.Array:
    """Return a column as a single array."""
    combined = column.combine_chunks()
    return combined if isinstance(combined, pa.Array) else pa.concat_arrays(combined.chunks)
