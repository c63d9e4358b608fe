"""The sets that Stage 2 leaves: its own kept and flipped pairs, and these with Stage 1's silver, which the family trains on.

Paper: Sec. 3.3 (26M pairs kept; with the flipped ones the 40M kind; none of the 26M is flipped). Our choice, since the paper does not say what of
Stage 1 is among them: the silver of the last round that a judge has decided. Silver under its source label where no judge may decide stays out, as
nobody has agreed with it; so does gold, which picks the checkpoints, and with it every pair that shares a prompt with gold. Pairs of the unverified
pool that no round retrieved are in no set.
"""

from dataclasses import replace

from synpref_ray.rules.labels import LabelReason
from synpref_ray.schema import Decision
from synpref_ray.tables.sets import Member, PairSet, save_set
from synpref_ray.tables.sidecars import Sidecar

_KEPT = (("decision", (Decision.KEEP.value,)),)
_KEPT_AND_FLIPPED = (("decision", (Decision.KEEP.value, Decision.FLIP.value)),)
_JUDGED = (("label_reason", (LabelReason.JUDGE.value,)),)
_STANDS = (("flipped", ("false",)),)


def save_curated_sets(decision: Sidecar, silver: PairSet | None) -> dict[str, str]:
    """Write the curated sets of a pool and return their names by kind: kept, kept_and_flipped, and with `_and_silver` those with silver beside.

    Args:
        decision: Stage 2's decisions about the pool.
        silver: that of Stage 1's last round; None where its record names none.
    """
    pool = decision.pool
    kept, both = Member(decision, _KEPT), Member(decision, _KEPT_AND_FLIPPED)
    sets = {"kept": (f"curated-{pool.name}-kept", [kept]), "kept_and_flipped": (f"curated-{pool.name}-kept-and-flipped", [both])}
    if silver is not None:
        stands, judged = ([replace(member, where=(*member.where, *_JUDGED, *more)) for member in silver.members] for more in (_STANDS, ()))
        sets["kept_and_silver"] = f"curated-{pool.name}-silver-kept", [kept, *stands]
        sets["kept_and_flipped_and_silver"] = f"curated-{pool.name}-silver-kept-and-flipped", [both, *judged]
    for name, members in sets.values():
        save_set(pool.storage, name, members)
    return {kind: name for kind, (name, _) in sets.items()}
