"""The sets that Stage 2 leaves: its own kept and flipped pairs, and these with Stage 1's silver, which the family trains on.

Paper: Sec. 3.3 (26M pairs kept; with the flipped ones the 40M kind; none of the 26M is flipped). Our choice, since the paper does not say what of
Stage 1 is among them: the silver of the last round that a judge has decided. Silver under its source label where no judge may decide stays out, as
nobody has agreed with it; so does gold, which picks the checkpoints, and with it every pair that shares a prompt with gold. Pairs of the unverified
pool that no round retrieved are in no set, nor is silver that was found to leak after the round.
"""

import logging
from collections.abc import Mapping, Set
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from synpref_ray.pipeline.growth import pinned_leaks
from synpref_ray.pipeline.leak_marks import leaked_pairs, leaks_of_set
from synpref_ray.pipeline.steps import Output, ShardKey, Step, StepInput, run_step
from synpref_ray.rules.labels import LABEL_SCHEMA, LabelReason
from synpref_ray.schema import Decision, LabelSource
from synpref_ray.tables.pools import content_digest
from synpref_ray.tables.sets import Member, PairSet, save_set
from synpref_ray.tables.sidecars import Sidecar

logger = logging.getLogger(__name__)

_WITHOUT_LEAKS_VERSION = 1
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


def without_leaks(silver: PairSet, wanted: str) -> PairSet:
    """Return silver without the pairs that decisions about leaks drop now: those made after Stage 1's last round began count here too.

    Args:
        wanted: the setting `decontamination` (errors: `silver_leaks`).
    """
    members = []
    for member, leaks in zip(silver.members, silver_leaks(silver, wanted), strict=True):
        leaked = frozenset().union(*map(leaked_pairs, leaks))
        members.append(replace(member, sidecar=_label_without(member.sidecar, leaked)) if leaked else member)
    return replace(silver, members=tuple(members))


def silver_leaks(silver: PairSet, wanted: str) -> list[list[Sidecar]]:
    """Return the decisions about leaks that silver goes by, by member (errors: `leaks_of_set`)."""
    pools = [member.sidecar.pool for member in silver.members]
    return leaks_of_set(pools, wanted, pinned_leaks(pools[0].storage)) if pools else []


def _label_without(label: Sidecar, leaked: Set[str]) -> Sidecar:
    """Return a pool's labels with none for leaked pairs; the same table where it has none of them as silver."""
    ids, sources = label.read_all(["pair_id", "label_source"]).columns
    late = pc.and_(pc.is_in(ids, value_set=pa.array(sorted(leaked), pa.string())), pc.equal(sources, LabelSource.SILVER.value))
    if not pc.any(late).as_py():
        return label
    dropped = sorted(ids.filter(late).to_pylist())
    logger.warning("%s: %d pairs of Stage 1's silver were found to leak after its last round began; they are left out", label.pool.name, len(dropped))
    step = Step(
        name="label, without leaks",
        version=_WITHOUT_LEAKS_VERSION,
        worker=_WithoutLeaksWorker,
        outputs=(Output("label", LABEL_SCHEMA),),
        settings={},
        digests={"label": label.fingerprint, "dropped": content_digest(dropped)},
        worker_arguments=lambda _: {"dropped": pa.array(dropped, pa.string())},
    )
    names = [name for name in LABEL_SCHEMA.names if name != "pair_id"]
    return run_step(step, [StepInput(label.pool, (), ((label, {name: name for name in names}),))]).sidecars[0][0]


class _WithoutLeaksWorker:
    """Takes the label from some pairs."""

    def __init__(self, dropped: pa.Array):
        self._dropped = dropped

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        late = pc.is_in(shard["pair_id"], value_set=self._dropped)
        none = {"label_source": LabelSource.UNVERIFIED.value, "label_reason": LabelReason.CONTAMINATED.value, "flipped": False}
        for name, value in none.items():
            shard = shard.set_column(shard.column_names.index(name), name, pc.if_else(late, pa.scalar(value), shard[name]))
        return shard.select(LABEL_SCHEMA.names).cast(LABEL_SCHEMA), {}
