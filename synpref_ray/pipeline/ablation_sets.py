"""The training sets of the ablations: selections of a finished workspace's pairs, each with its exact rule, as sets and never as copies.

Paper: Fig. 5 (original, filtered, corrected), Fig. 6 (seed, + uncurated, + LLM only, + human, + full). Our choice: which of several possible readings
of these names is meant stands in each arm's rule, all sets of a comparison have one size, no set but the human one holds a prompt of gold, and audit
gold is in none.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from synpref_ray.errors import InputError
from synpref_ray.evaluation.matching import PairFacts, draw, label_noise, match
from synpref_ray.pipeline.stage1 import STAGE1_RECORD
from synpref_ray.pipeline.stage2 import STAGE2_RECORD, Stage1Result
from synpref_ray.pipeline.steps import Output, ShardKey, Step, StepInput, run_step
from synpref_ray.rules.gate import GateReason
from synpref_ray.rules.labels import LabelReason
from synpref_ray.schema import Decision, Verdict
from synpref_ray.tables.pools import Pool, content_digest, open_pool
from synpref_ray.tables.sets import Member, PairSet, load_set, read_member, save_set
from synpref_ray.tables.sidecars import Sidecar, list_sidecars, open_sidecar, zip_shard
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
NEVER = {GateReason.GOLD_PROMPT, GateReason.CONTAMINATED, GateReason.UNSCORED}
"""Wild pairs that no arm takes: they share a prompt with gold, give a benchmark item away, or have no rewards to match on."""
Flips = Mapping[str, bool]
"""Selected pairs, and whether their source label is turned."""


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


@dataclass(frozen=True)
class Wild:
    """The wild pool with all that arms select by."""

    pool: Pool
    rows: Sequence[Mapping[str, Any]]
    """Pairs that an arm may take, one of each comparison."""
    category_from: str
    numbers: np.ndarray[Any, np.dtype[np.float64]] = field(repr=False)
    """(rows, 2): log words, |margin| of the best RM."""

    @cached_property
    def margins(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """(rows, 2): margins of the best and the gold RM, towards the source label."""
        return np.array([[row["margin_best"], row["margin_gold"]] for row in self.rows], dtype=np.float64).reshape(-1, 2)

    def where(self, keep: Callable[[Mapping[str, Any]], bool]) -> list[int]:
        """Return the places of the rows for which `keep` holds."""
        return [place for place, row in enumerate(self.rows) if keep(row)]

    def flips(self, places: Iterable[int], *, decided: bool) -> dict[str, bool]:
        """Return these pairs under the labels decided, or under their source labels."""
        return {self.rows[place]["pair_id"]: decided and bool(self.rows[place]["flipped"]) for place in places}

    def facts(self, places: Sequence[int], *, decided: bool) -> PairFacts:
        """Return what these pairs are matched on, the noise being that of the labels decided, or of the source labels."""
        rows = [self.rows[place] for place in places]
        signs = np.array([-1.0 if decided and row["flipped"] else 1.0 for row in rows])
        noise = label_noise(self.margins[list(places)] * signs[:, np.newaxis]) if rows else np.zeros(0)
        numbers = np.concatenate([self.numbers[list(places)], noise[:, np.newaxis]], axis=1) if rows else np.zeros((0, 3))
        return PairFacts(tuple(row["pair_id"] for row in rows), tuple(str(row["category"]) for row in rows), numbers)


def read_wild(storage: Storage, attributes: Sidecar | None) -> Wild:
    """Read the pool that Stage 2 decided about; categories are the tags given, or the only ones of the whole pool, else the sources.

    Raises:
        InputError: Stage 2 has not finished here.
    """
    if not storage.exists(STAGE2_RECORD):
        raise InputError(f"Stage 2 has not finished in {storage.url}: run jobs/stage2.py with this workspace first")
    record = storage.read_json(STAGE2_RECORD)
    pool = open_pool(storage, record["pool"])
    decision = open_sidecar(pool, "decision", record["decision"])
    there = list_sidecars(pool, "attributes")
    tags = attributes or (there[0] if len(there) == 1 else None)  # of several nobody says which is meant
    wanted = ("decision", "flipped", "decision_reason", "margin_best", "margin_gold")
    beside: list[tuple[Sidecar, Mapping[str, str]]] = [(decision, {name: name for name in wanted})]
    beside += [(tags, {"task_category": "task_category"})] if tags else []
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for shard in pool.shards:
        for row in zip_shard(pool, shard.number, ["comparison_id", "prompt_group", "source", "chosen", "rejected"], beside).to_pylist():
            if row["decision_reason"] not in NEVER and row["comparison_id"] not in seen and None not in (row["margin_best"], row["margin_gold"]):
                seen.add(row["comparison_id"])
                words = len(row.pop("chosen").split()) + len(row.pop("rejected").split())
                rows.append({**row, "category": row.get("task_category") or "untagged" if tags else row["source"], "words": words})
    numbers = np.array([[np.log1p(row["words"]), abs(row["margin_best"])] for row in rows], dtype=np.float64).reshape(-1, 2)
    return Wild(pool, rows, "task_category" if tags else "source", numbers)


def matched_arms(wild: Wild, selection: Selection) -> list[Arm]:
    """Return the sets of Fig. 5's kind, all of one size, and controls for the curated one.

    Raises:
        InputError: curation kept or flipped no pair.
    """
    kept = wild.where(lambda row: row["decision"] == Decision.KEEP)
    turned = wild.where(lambda row: row["decision"] == Decision.FLIP)
    if not kept:
        raise InputError("Stage 2 kept no pair: there is nothing to compare")
    every = list(range(len(wild.rows)))
    size = min(selection.pairs, len(kept), len(turned) or selection.pairs, len(every) // 2)

    def drawn(places: Sequence[int], use: str) -> list[int]:
        names = [wild.rows[place]["pair_id"] for place in places]
        return [places[place] for place in draw(names, size, seed=selection.seed, use=use)]

    def arm(name: str, rule: str, places: Sequence[int], *, decided: bool) -> Arm:
        return Arm("matched", name, rule, ((wild.pool, wild.flips(places, decided=decided)),), wild.facts(places, decided=decided))

    curated = drawn([*kept, *turned], "ablation")
    reference = wild.facts(curated, decided=True)
    taken = set(curated)
    others = [place for place in every if place not in taken]
    controls = [others[place] for place in match(reference, wild.facts(others, decided=False), seed=selection.seed)]
    filtered = [kept[place] for place in match(reference, wild.facts(kept, decided=True), seed=selection.seed)]
    arms = [
        arm("curated", "kept and flipped pairs as they come, drawn by chance; labels as decided", curated, decided=True),
        arm("raw", "the curated arm's pairs; source labels", curated, decided=False),
        arm("filtered", "kept pairs, matched to the curated arm; their labels, which are the source labels", filtered, decided=True),
        arm("random", "all wild pairs, drawn by chance, decisions not looked at; source labels", drawn(every, "ablation-random"), decided=False),
        arm("random, matched", "wild pairs outside the curated arm, matched to it; source labels", controls, decided=False),
    ]
    if turned:
        arms.insert(3, arm("corrected", "flipped pairs, drawn by chance; labels turned", drawn(turned, "ablation"), decided=True))
    return arms


def scaling_arms(wild: Wild, selection: Selection) -> list[Arm]:
    """Return parts of the curated pairs, each inside the next larger one."""
    curated = wild.where(lambda row: row["decision"] in (Decision.KEEP, Decision.FLIP))
    names = [wild.rows[place]["pair_id"] for place in curated]
    arms = []
    for fraction in sorted(selection.fractions):
        places = [curated[place] for place in draw(names, max(1, round(fraction * len(curated))), seed=selection.seed, use="ablation")]
        rule = f"{fraction:.0%} of the kept and flipped pairs, by chance, each part inside the next; labels as decided"
        arms.append(Arm("scaling", f"{fraction:g}", rule, ((wild.pool, wild.flips(places, decided=True)),), wild.facts(places, decided=True)))
    return arms


def ladder_arms(storage: Storage, wild: Wild, before: Stage1Result, selection: Selection) -> list[Arm]:
    """Return the rungs of Fig. 6: the seed, and the seed with equally many further pairs of each kind.

    Raises:
        InputError: a kind has no pairs.
    """
    gold_groups = before.gold.prompt_groups()
    base = _drawn_members(_round_set(storage, 0, "silver"), selection.seed_pairs, selection.seed, "ablation-seed")
    every = list(range(len(wild.rows)))
    curated = wild.where(lambda row: row["decision"] in (Decision.KEEP, Decision.FLIP))
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

    def of_wild(places: Sequence[int], use: str, *, decided: bool) -> tuple[tuple[Pool, Flips], ...]:
        return some([(wild.pool, wild.flips(places, decided=decided))], use)

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
        flips: dict[str, bool] = {}
        for shard in member.sidecar.pool.shards:
            for row in read_member(member, shard.number).select(["pair_id", "comparison_id", "flipped"]).to_pylist():
                if row["comparison_id"] not in seen:
                    seen.add(row["comparison_id"])
                    flips[row["pair_id"]] = bool(row["flipped"])
        if flips:
            found.append((member.sidecar.pool, flips))
    return found


def _drawn_members(pairs: PairSet, count: int, seed: int, use: str) -> tuple[tuple[Pool, Flips], ...]:
    return _draw_choices(_flips_of(pairs), count, seed, use)


def _draw_choices(choices: Sequence[tuple[Pool, Flips]], count: int, seed: int, use: str) -> tuple[tuple[Pool, Flips], ...]:
    """Return `count` of these pairs, drawn by stable chance over all pools."""
    names = [name for _, flips in choices for name in flips]
    drawn = {names[place] for place in draw(names, count, seed=seed, use=use)}
    kept = ((pool, {name: flip for name, flip in flips.items() if name in drawn}) for pool, flips in choices)
    return tuple((pool, flips) for pool, flips in kept if flips)


def _merge(*sides: Sequence[tuple[Pool, Flips]]) -> tuple[tuple[Pool, Flips], ...]:
    pools: dict[str, Pool] = {}
    merged: dict[str, dict[str, bool]] = {}
    for pool, flips in (choice for side in sides for choice in side):
        pools[pool.name] = pool
        merged.setdefault(pool.name, {}).update(flips)
    return tuple((pools[name], flips) for name, flips in merged.items())


def _judged(member: Member, gold_groups: frozenset[str]) -> list[tuple[Pool, Flips]]:
    """Return the pairs of a labelled pool on which the judges' votes decide, without those of gold's prompts."""
    pool, label = member.sidecar.pool, member.sidecar
    verdict = open_sidecar(pool, "verdict", label.manifest["sidecars"]["verdict"])
    beside: list[tuple[Sidecar, Mapping[str, str]]] = [(verdict, {"all_judges_verdict": "verdict"}), (label, {"label_reason": "label_reason"})]
    flips: dict[str, bool] = {}
    seen: set[str] = set()
    for shard in pool.shards:
        for row in zip_shard(pool, shard.number, ["comparison_id", "prompt_group"], beside).to_pylist():
            usable = row["prompt_group"] not in gold_groups and row["label_reason"] != LabelReason.CONTAMINATED and row["comparison_id"] not in seen
            if usable and row["verdict"] in (Verdict.CHOSEN, Verdict.REJECTED):
                seen.add(row["comparison_id"])
                flips[row["pair_id"]] = row["verdict"] == Verdict.REJECTED
    return [(pool, flips)] if flips else []


class SelectionWorker:
    """Says which pairs a set takes, and under which label."""

    def __init__(self, flips: Flips):
        self._flips = flips

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        names = shard["pair_id"].to_pylist()
        rows = [{"pair_id": n, "flipped": self._flips.get(n, False), "selected": SELECTED if n in self._flips else "no"} for n in names]
        return pa.Table.from_pylist(rows, schema=SELECTION_SCHEMA), {}


def save_arm(storage: Storage, arm: Arm) -> PairSet:
    """Write the arm's selections beside its pools, and `sets/ablation-….json`."""
    members = []
    for pool, flips in arm.choices:
        step = Step(
            name="ablation selection",
            version=ABLATION_VERSION,
            worker=SelectionWorker,
            outputs=(Output("ablation", SELECTION_SCHEMA),),
            settings={"flips": content_digest(dict(sorted(flips.items())))},  # named by its pairs: equal selections are one table, and one model
            worker_arguments=lambda _, flips=flips: {"flips": flips},  # type: ignore[misc]
        )
        members.append(Member(run_step(step, [StepInput(pool, ())]).sidecars[0][0], (("selected", (SELECTED,)),)))
    name = "".join(letter if letter.isalnum() or letter == "." else "-" for letter in f"{arm.part}-{arm.name}").replace("--", "-").strip("-")
    return save_set(storage, f"ablation-{name}", members)
