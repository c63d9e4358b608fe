"""The training sets of the ablations: selections of a finished workspace's pairs, each with its exact rule, as sets and never as copies.

Paper: Fig. 5 (original, filtered, corrected), Fig. 6 (seed, + uncurated, + LLM only, + human, + full). Our choice: which of several possible readings
of these names is meant stands in each arm's rule, all sets of a comparison have one size, no set but the human one holds a prompt of gold, and audit
gold is in none.
"""

import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synpref_ray.errors import InputError
from synpref_ray.evaluation.matching import MAX_CANDIDATES, PairFacts, match
from synpref_ray.pipeline.ablation_pairs import Flips, Places, Wild, chances, least
from synpref_ray.pipeline.stage1 import STAGE1_RECORD
from synpref_ray.pipeline.stage2 import Stage1Result
from synpref_ray.pipeline.steps import Output, ShardKey, Step, StepInput, plan_sidecars, run_step
from synpref_ray.rules.labels import LabelReason
from synpref_ray.schema import Verdict
from synpref_ray.tables.pools import Pool, Shard, shard_path
from synpref_ray.tables.reading import read_each
from synpref_ray.tables.sets import Member, PairSet, load_set, read_member, save_set
from synpref_ray.tables.sidecars import Sidecar, open_sidecar, zip_shard
from synpref_ray.tables.storage import Storage

ABLATION_VERSION = 1
SELECTION_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("flipped", pa.bool_(), nullable=False),
        pa.field("selected", pa.string(), nullable=False),
    ]
)
SELECTED = "yes"
SCRATCH = "scratch/ablation"
"""Folder of selections on their way to the workers, shard by shard; removed when their table is sealed."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arm:
    """One training set of a comparison: its pairs by pool, and the rule that selected them."""

    part: str
    name: str
    rule: str
    choices: tuple[tuple[Pool, Flips], ...]
    facts: PairFacts | None = None
    """What controls are matched on; None where the pairs are of several pools."""

    @property
    def num_pairs(self) -> int:
        """Pairs of the set."""
        return sum(len(flips) for _, flips in self.choices)


@dataclass(frozen=True)
class Selection:
    """How many pairs are drawn, and by which chance."""

    pairs: int
    seed_pairs: int
    fractions: tuple[float, ...]
    seed: int


def matched_size(wild: Wild, selection: Selection) -> tuple[int, str]:
    """Return how many pairs every matched set gets, and, where these are fewer than asked for, why: the scarcest kind sets the size of all.

    Raises:
        InputError: curation kept no pair.
    """
    kept, turned = len(wild.where("keep")), len(wild.where("flip"))
    if not kept:
        raise InputError("Stage 2 kept no pair: there is nothing to compare")
    supply = {"kept pairs": kept, "flipped pairs": turned or selection.pairs, "wild pairs, in halves": wild.num_rows // 2}
    scarce = min(supply, key=lambda name: supply[name])
    if supply[scarce] >= selection.pairs:
        return selection.pairs, ""
    return supply[scarce], f"every matched set has {supply[scarce]} pairs, not the {selection.pairs} asked for: there are no more {scarce}"


def matched_arms(wild: Wild, selection: Selection) -> list[Arm]:
    """Return the sets of Fig. 5's kind, all of one size, and controls for the curated one.

    Raises:
        InputError: curation kept no pair.
    """
    size, why = matched_size(wild, selection)
    if why:
        logger.warning("ablation: %s", why)
    kept, turned = wild.where("keep"), wild.where("flip")
    every = np.arange(wild.num_rows)

    def drawn(places: Places, use: str) -> Places:
        return wild.draw(places, size, seed=selection.seed, use=use)

    def arm(name: str, rule: str, places: Places, *, decided: bool) -> Arm:
        return Arm("matched", name, rule, ((wild.pool, wild.flips(places, decided=decided)),), wild.facts(places, decided=decided))

    curated = drawn(np.concatenate([kept, turned]), "ablation")
    reference = wild.facts(curated, decided=True)

    def controls(places: Places, *, decided: bool) -> Places:
        # `match` looks at candidates in this order, and at no more of them: so facts of a few, not of the whole pool.
        few = wild.draw(places, size + MAX_CANDIDATES, seed=selection.seed, use="match-candidates")
        return few[match(reference, wild.facts(few, decided=decided), seed=selection.seed)]

    arms = [
        arm("curated", "kept and flipped pairs as they come, drawn by chance; labels as decided", curated, decided=True),
        arm("raw", "the curated arm's pairs; source labels", curated, decided=False),
        arm(
            "filtered",
            "kept pairs, matched to the curated arm; their labels, which are the source labels",
            controls(kept, decided=True),
            decided=True,
        ),
        arm("random", "all wild pairs, drawn by chance, decisions not looked at; source labels", drawn(every, "ablation-random"), decided=False),
        arm(
            "random, matched",
            "wild pairs outside the curated arm, matched to it; source labels",
            controls(np.setdiff1d(every, curated), decided=False),
            decided=False,
        ),
    ]
    if len(turned):
        arms.insert(3, arm("corrected", "flipped pairs, drawn by chance; labels turned", drawn(turned, "ablation"), decided=True))
    return arms


def scaling_arms(wild: Wild, selection: Selection) -> list[Arm]:
    """Return parts of the curated pairs, each inside the next larger one."""
    curated = wild.where("keep", "flip")
    arms = []
    for fraction in sorted(selection.fractions):
        places = wild.draw(curated, max(1, round(fraction * len(curated))), seed=selection.seed, use="ablation")
        rule = f"{fraction:.0%} of the kept and flipped pairs, by chance, each part inside the next; labels as decided"
        arms.append(Arm("scaling", f"{fraction:g}", rule, ((wild.pool, wild.flips(places, decided=True)),)))
    return arms


def ladder_arms(storage: Storage, wild: Wild, before: Stage1Result, selection: Selection) -> list[Arm]:
    """Return the rungs of Fig. 6: the seed, and the seed with equally many further pairs of each kind.

    Raises:
        InputError: a kind has no pairs.
    """
    gold_groups = before.gold.prompt_groups()
    base = _drawn_members(_round_set(storage, 0, "silver"), selection.seed_pairs, selection.seed, "ablation-seed")
    every, curated = np.arange(wild.num_rows), wild.where("keep", "flip")
    record = storage.read_json(STAGE1_RECORD)["sets"]
    silver, working = (load_set(storage, **record[name]) for name in ("silver", "gold-working"))
    seed_pools = {pool.name for pool, _ in base}
    judged = [choice for member in silver.members if member.sidecar.pool.name not in seed_pools for choice in _judged(member, gold_groups)]
    human = _flips_of(working)
    supply = {"uncurated": len(every), "LLM only": sum(len(f) for _, f in judged), "human": sum(len(f) for _, f in human), "full": len(curated)}
    if missing := [name for name, count in supply.items() if not count]:
        raise InputError(f"the ladder has no pairs for: {', '.join(missing)} (found {supply}); leave it out of parts")
    size = min(selection.pairs, *supply.values())

    def some(choices: Sequence[tuple[Pool, Flips]], use: str) -> tuple[tuple[Pool, Flips], ...]:
        return _draw_choices(choices, size, selection.seed, use)

    def of_wild(places: Places, use: str, *, decided: bool) -> tuple[tuple[Pool, Flips], ...]:
        return ((wild.pool, wild.flips(wild.draw(places, size, seed=selection.seed, use=use), decided=decided)),)

    more = (
        ("+ uncurated", "wild pairs drawn by chance, source labels", of_wild(every, "ablation-random", decided=False)),
        (
            "+ LLM only",
            "pairs that Stage 1 retrieved, labelled by the votes of all judges, whether they may decide or not",
            some(judged, "ablation-llm"),
        ),
        ("+ human", "working gold (no audit gold), labels of people", some(human, "ablation-human")),
        ("+ full", "kept and flipped wild pairs, labels as decided", of_wild(curated, "ablation", decided=True)),
    )
    seed_rule = "seed pairs outside gold's prompts, labels as Stage 1 began with (judges that may decide, else source labels)"
    rungs = [Arm("ladder", "seed", seed_rule, base)]
    return rungs + [
        Arm("ladder", name, f"the seed rung, and as many as every other rung adds: {rule}", _merge(base, added)) for name, rule, added in more
    ]


def _round_set(storage: Storage, number: int, name: str) -> PairSet:
    record = storage.read_json(f"rounds/{number:02d}/round.json")
    return load_set(storage, f"{name}-r{number:02d}", record["wrote"][name])


def _flips_of(pairs: PairSet) -> list[tuple[Pool, Flips]]:
    """Return a set's pairs by pool, each comparison once."""
    seen: set[str] = set()
    found: list[tuple[Pool, Flips]] = []
    for member in pairs.members:
        rows: list[tuple[str, bool, int]] = []
        for shard in member.sidecar.pool.shards:
            for row in read_member(member, shard.number).select(["pair_id", "comparison_id", "flipped"]).to_pylist():
                if row["comparison_id"] not in seen:
                    seen.add(row["comparison_id"])
                    rows.append((row["pair_id"], bool(row["flipped"]), shard.number))
        if rows:
            found.append((member.sidecar.pool, Flips.of(rows)))
    return found


def _drawn_members(pairs: PairSet, count: int, seed: int, use: str) -> tuple[tuple[Pool, Flips], ...]:
    return _draw_choices(_flips_of(pairs), count, seed, use)


def _draw_choices(choices: Sequence[tuple[Pool, Flips]], count: int, seed: int, use: str) -> tuple[tuple[Pool, Flips], ...]:
    """Return `count` of these pairs, drawn by stable chance over all pools."""
    drawn = least(np.concatenate([np.zeros(0, np.uint64), *(chances(flips.names, seed=seed, use=use) for _, flips in choices)]), count)
    ends = np.cumsum([0, *(len(flips) for _, flips in choices)])
    kept = [(pool, flips.take(drawn[(drawn >= first) & (drawn < last)] - first))
            for (pool, flips), first, last in zip(choices, ends, ends[1:], strict=False)]  # fmt: skip
    return tuple((pool, flips) for pool, flips in kept if len(flips))


def _merge(*sides: Sequence[tuple[Pool, Flips]]) -> tuple[tuple[Pool, Flips], ...]:
    pools: dict[str, Pool] = {}
    merged: dict[str, Flips] = {}
    for pool, flips in (choice for side in sides for choice in side):
        pools[pool.name] = pool
        merged[pool.name] = merged[pool.name].updated(flips) if pool.name in merged else flips
    return tuple((pools[name], flips) for name, flips in merged.items())


def _judged(member: Member, gold_groups: frozenset[str]) -> list[tuple[Pool, Flips]]:
    """Return the pairs of a labelled pool on which the judges' votes decide, without those of gold's prompts."""
    pool, label = member.sidecar.pool, member.sidecar
    verdict = open_sidecar(pool, "verdict", label.manifest["sidecars"]["verdict"])
    beside: list[tuple[Sidecar, Mapping[str, str]]] = [(verdict, {"all_judges_verdict": "verdict"}), (label, {"label_reason": "label_reason"})]
    flips: list[tuple[str, bool, int]] = []
    seen: set[str] = set()
    for shard in pool.shards:
        for row in zip_shard(pool, shard.number, ["comparison_id", "prompt_group"], beside).to_pylist():
            usable = row["prompt_group"] not in gold_groups and row["label_reason"] != LabelReason.CONTAMINATED and row["comparison_id"] not in seen
            if usable and row["verdict"] in (Verdict.CHOSEN, Verdict.REJECTED):
                seen.add(row["comparison_id"])
                flips.append((row["pair_id"], row["verdict"] == Verdict.REJECTED, shard.number))
    return [(pool, Flips.of(flips))] if flips else []


def shared_groups(arms: Sequence[Arm], groups: Set[str]) -> set[str]:
    """Return those of some prompts' groups that a pair of any arm has; every pool is read once, by its ids."""
    wanted, found = pa.array(sorted(groups), pa.string()), set[str]()
    pools = {pool.name: replace(pool, clusters="") for arm in arms for pool, _ in arm.choices}

    for pool in pools.values():

        def read(shard: Shard, pool: Pool = pool) -> pa.Table:
            table = pool.read(shard.number, ["pair_id", "prompt_group"]).replace_schema_metadata()
            return table.filter(pc.is_in(table["prompt_group"], value_set=wanted))

        tables = list(read_each(read, pool.shards))
        if not tables:
            continue
        same = pa.concat_tables(tables)
        for flips in (flips for arm in arms for other, flips in arm.choices if other.name == pool.name):
            found.update(same.filter(pc.is_in(same["pair_id"], value_set=flips.names))["prompt_group"].to_pylist())
    return found


class SelectionWorker:
    """Says which pairs a set takes, and under which label; it reads those of its shard alone."""

    def __init__(self, storage: Storage, folder: str):
        self._storage = storage
        self._folder = folder

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        path, flips = shard_path(self._folder, key.number), dict[str, bool]()
        if self._storage.exists(path):
            table = self._storage.read_table(path)
            flips = dict(zip(table["pair_id"].to_pylist(), table["flipped"].to_pylist(), strict=True))
        names = shard["pair_id"].to_pylist()
        rows = [{"pair_id": n, "flipped": flips.get(n, False), "selected": SELECTED if n in flips else "no"} for n in names]
        return pa.Table.from_pylist(rows, schema=SELECTION_SCHEMA), {}


def _save_selection(pool: Pool, flips: Flips) -> Sidecar:
    """Write a selection beside its pool. It is named by its pairs: equal selections are one table, and one model."""
    storage, digest = pool.storage, flips.digest
    folder = f"{SCRATCH}/{pool.name}-{digest}"
    step = Step(
        name="ablation selection",
        version=ABLATION_VERSION,
        worker=SelectionWorker,
        outputs=(Output("ablation", SELECTION_SCHEMA),),
        settings={"flips": digest},
        worker_arguments=lambda _: {"storage": storage, "folder": folder},
    )
    source = StepInput(pool, ())
    if not plan_sidecars(step, [source])[0][0].is_sealed:
        for number, table in flips.by_shard():
            storage.write_table(shard_path(folder, number), table)
    sidecar = run_step(step, [source]).sidecars[0][0]
    storage.delete_folder(folder)
    return sidecar


def save_arm(storage: Storage, arm: Arm) -> PairSet:
    """Write the arm's selections beside its pools, and `sets/ablation-….json`."""
    members = [Member(_save_selection(pool, flips), (("selected", (SELECTED,)),)) for pool, flips in arm.choices]
    name = "".join(letter if letter.isalnum() or letter == "." else "-" for letter in f"{arm.part}-{arm.name}").replace("--", "-").strip("-")
    return save_set(storage, f"ablation-{name}", members)
