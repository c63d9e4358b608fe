"""Pairs that ablations select: which of a pool, under which label; and the wild pool with all that a selection goes by.

Our choice: Arrow columns and numpy, no object a pair (some 100 bytes of the driver's memory each); texts are looked at by a step of shards alone.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from synpref_ray.errors import InputError
from synpref_ray.evaluation.matching import PairFacts, label_noise
from synpref_ray.pipeline.stage2 import STAGE2_RECORD
from synpref_ray.pipeline.steps import Output, ShardKey, Step, StepInput, run_step
from synpref_ray.reporting.run import Run
from synpref_ray.rules.gate import GateReason
from synpref_ray.schema import Decision, canonical_json, stable_hash
from synpref_ray.tables.pools import Pool, Shard, open_pool
from synpref_ray.tables.reading import read_each
from synpref_ray.tables.sidecars import Sidecar, list_sidecars, open_sidecar, zip_shard
from synpref_ray.tables.storage import Storage

WORDS_VERSION = 1
WORDS_SCHEMA = pa.schema([pa.field("pair_id", pa.string(), nullable=False), pa.field("words", pa.int32(), nullable=False)])
NEVER = {GateReason.GOLD_PROMPT, GateReason.CONTAMINATED, GateReason.UNSCORED}
"""Wild pairs that no arm takes: they share a prompt with gold, give a benchmark item away, or have no rewards to match on."""
_BLOCK = 65_536  # names that are Python texts at once
Bools = npt.NDArray[np.bool_]
Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Flips:
    """Selected pairs of one pool, (N,) each: their ids, whether their source label is turned, and the number of the shard that holds them."""

    names: pa.Array
    turned: Bools
    shards: npt.NDArray[np.int32]

    @classmethod
    def of(cls, rows: Sequence[tuple[str, bool, int]]) -> "Flips":
        """Return flips of (pair_id, turned, shard)."""
        names, turned, shards = zip(*rows, strict=True) if rows else ((), (), ())
        return cls(pa.array(names, pa.string()), np.array(turned, dtype=bool), np.array(shards, dtype=np.int32))

    def __len__(self) -> int:
        return len(self.names)

    def take(self, places: Places) -> "Flips":
        """Return some of them."""
        return Flips(self.names.take(pa.array(places)), self.turned[places], self.shards[places])

    def updated(self, other: "Flips") -> "Flips":
        """Return these and others of the same pool; what both hold has the other's label."""
        own = self.take(np.flatnonzero(~np.asarray(pc.is_in(self.names, value_set=other.names))))
        names = pa.concat_arrays([own.names, other.names])
        return Flips(names, np.concatenate([own.turned, other.turned]), np.concatenate([own.shards, other.shards]))

    @property
    def digest(self) -> str:
        """32 hex digits over ids and labels: `content_digest` of them as a mapping, without making one."""
        order = np.asarray(pc.sort_indices(self.names))
        digest = hashlib.blake2b(b"{", digest_size=16)
        for first in range(0, len(order), _BLOCK):
            block = order[first : first + _BLOCK]
            entries = zip(self.names.take(pa.array(block)).to_pylist(), self.turned[block].tolist(), strict=True)
            digest.update(("," * bool(first) + ",".join(f"{canonical_json(name)}:{canonical_json(turned)}" for name, turned in entries)).encode())
        digest.update(b"}")
        return digest.hexdigest()

    def by_shard(self) -> Iterator[tuple[int, pa.Table]]:
        """Yield shard by shard its number and its selected pairs: pair_id, flipped."""
        order = np.argsort(self.shards, kind="stable")
        numbers, starts = np.unique(self.shards[order], return_index=True)
        for number, places in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True):
            some = self.take(places)
            yield number, pa.table({"pair_id": some.names, "flipped": pa.array(some.turned)})


def chances(names: pa.Array, *, seed: int, use: str) -> npt.NDArray[np.uint64]:
    """Return the stable chance of every pair, (N,): those drawn are those with the least."""
    texts = (name for first in range(0, len(names), _BLOCK) for name in names.slice(first, _BLOCK).to_pylist())
    return np.fromiter((stable_hash(seed, name, use) for name in texts), dtype=np.uint64, count=len(names))


def least(values: npt.NDArray[np.uint64], count: int) -> Places:
    """Return the places of the `count` least values, in their order; of equal ones the first. The same as `matching.draw` on their names."""
    return np.sort(np.argsort(values, kind="stable")[:count])


@dataclass(frozen=True)
class Wild:
    """The wild pool's pairs that an arm may take, one of each comparison.

    `table` has the columns pair_id, shard, keep, flip (the decision), flipped, margin_best, margin_gold (of both RMs, towards the source label),
    category and words (of both replies).
    """

    pool: Pool
    table: pa.Table
    category_from: str

    @property
    def num_rows(self) -> int:
        """Pairs."""
        return int(self.table.num_rows)

    def where(self, *decisions: str) -> Places:
        """Return the places of the pairs with one of these decisions (`keep`, `flip`)."""
        masks = [np.asarray(self.table[name]) for name in decisions]
        return np.flatnonzero(np.logical_or.reduce(masks))

    def draw(self, places: Places, count: int, *, seed: int, use: str) -> Places:
        """Return `count` of these places, drawn by stable chance, in their order; sets drawn for one use are nested in one another."""
        return places[least(chances(self._column("pair_id", places), seed=seed, use=use), count)]

    def flips(self, places: Places, *, decided: bool) -> Flips:
        """Return these pairs under the labels decided, or under their source labels."""
        turned = np.asarray(self._column("flipped", places)) if decided else np.zeros(len(places), dtype=bool)
        return Flips(self._column("pair_id", places), turned, np.asarray(self._column("shard", places)))

    def facts(self, places: Places, *, decided: bool) -> PairFacts:
        """Return what these pairs are matched on, the noise being that of the labels decided, or of the source labels."""
        margins = np.stack([np.asarray(self._column(name, places)) for name in ("margin_best", "margin_gold")], axis=1)
        words = np.asarray(self._column("words", places), dtype=np.float64)
        signs = np.where(np.asarray(self._column("flipped", places)), -1.0, 1.0) if decided else np.ones(len(places))
        noise = label_noise(margins * signs[:, np.newaxis])
        numbers = np.stack([np.log1p(words), np.abs(margins[:, 0]), noise], axis=1)
        names, categories = (tuple(self._column(name, places).to_pylist()) for name in ("pair_id", "category"))
        return PairFacts(names, categories, numbers)

    def _column(self, name: str, places: Places) -> pa.Array:
        taken = self.table[name].take(pa.array(places, pa.int64()))
        return taken.combine_chunks() if isinstance(taken, pa.ChunkedArray) else taken


@dataclass(frozen=True)
class WildTables:
    """The pool that Stage 2 decided about, and its decisions."""

    pool: Pool
    decision: Sidecar


def open_wild(storage: Storage) -> WildTables:
    """Open what Stage 2 recorded, without reading pairs.

    Raises:
        InputError: Stage 2 has not finished here.
    """
    if not storage.exists(STAGE2_RECORD):
        raise InputError(f"Stage 2 has not finished in {storage.url}: run jobs/stage2.py with this workspace first")
    record = storage.read_json(STAGE2_RECORD)
    pool = open_pool(storage, record["pool"])
    return WildTables(pool, open_sidecar(pool, "decision", record["decision"]))


class WordsWorker:
    """Counts the words of both replies."""

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        texts = zip(shard["chosen"].to_pylist(), shard["rejected"].to_pylist(), strict=True)
        words = pa.array([len(chosen.split()) + len(rejected.split()) for chosen, rejected in texts], pa.int32())
        return pa.table([shard["pair_id"].combine_chunks(), words], schema=WORDS_SCHEMA), {}


def count_words(run: Run, pool: Pool) -> Sidecar:
    """Make the sidecar `words` of a pool."""
    step = Step("words", WORDS_VERSION, WordsWorker, (Output("words", WORDS_SCHEMA),), {})
    result = run_step(step, [StepInput(pool, ("chosen", "rejected"))])
    run.step(step.name, rows=result.rows, computed=result.rows_computed, rejected={}, seconds=result.seconds)
    return result.sidecars[0][0]


def read_wild(tables: WildTables, words: Sidecar, attributes: Sidecar | None) -> Wild:
    """Read the columns that arms select by; categories are the tags given, or the only ones of the whole pool, else the sources."""
    pool = tables.pool
    there = list_sidecars(pool, "attributes")
    tags = attributes or (there[0] if len(there) == 1 else None)  # of several nobody says which is meant
    wanted = ("decision", "flipped", "decision_reason", "margin_best", "margin_gold")
    beside: list[tuple[Sidecar, Mapping[str, str]]] = [(tables.decision, {name: name for name in wanted}), (words, {"words": "words"})]
    beside += [(tags, {"task_category": "category"})] if tags else []
    columns = ["comparison_id", *([] if tags else ["source"])]

    def read(shard: Shard) -> pa.Table:
        return _usable(zip_shard(pool, shard.number, columns, beside), shard.number)

    found = list(read_each(read, pool.shards))
    table = pa.concat_tables(found) if found else _usable(_nothing(), 0)
    return Wild(pool, _first_of_each_comparison(table.unify_dictionaries()).combine_chunks(), "task_category" if tags else "source")


def _usable(rows: pa.Table, number: int) -> pa.Table:
    """Return the rows of a shard that an arm may take, in `Wild`'s columns and with their comparison."""
    never = pc.is_in(rows["decision_reason"], value_set=pa.array(sorted(NEVER), pa.string()))
    scored = pc.and_(pc.is_valid(rows["margin_best"]), pc.is_valid(rows["margin_gold"]))
    rows = rows.filter(pc.and_(pc.invert(never), scored))
    category = rows["source"] if "source" in rows.column_names else pc.fill_null(rows["category"], "untagged")
    category = pc.if_else(pc.equal(category, ""), "untagged", category) if "category" in rows.column_names else category
    columns: dict[str, Any] = {
        "pair_id": rows["pair_id"],
        "comparison_id": rows["comparison_id"],
        "shard": pa.repeat(pa.scalar(number, pa.int32()), rows.num_rows),
        "keep": pc.equal(rows["decision"], Decision.KEEP.value),
        "flip": pc.equal(rows["decision"], Decision.FLIP.value),
        "flipped": pc.fill_null(rows["flipped"], False),
        "margin_best": rows["margin_best"].cast(pa.float64()),
        "margin_gold": rows["margin_gold"].cast(pa.float64()),
        "category": category.cast(pa.string()).dictionary_encode(),
        "words": rows["words"],
    }
    return pa.table(columns)


def _nothing() -> pa.Table:
    texts = {name: pa.array([], pa.string()) for name in ("pair_id", "comparison_id", "source", "decision", "decision_reason")}
    margins = {name: pa.array([], pa.float64()) for name in ("margin_best", "margin_gold")}
    return pa.table({**texts, **margins, "flipped": pa.array([], pa.bool_()), "words": pa.array([], pa.int32())})


def _first_of_each_comparison(table: pa.Table) -> pa.Table:
    rows = pa.table({"comparison": table["comparison_id"], "row": pa.array(np.arange(table.num_rows))})
    first = np.sort(np.asarray(rows.group_by("comparison").aggregate([("row", "min")])["row_min"]))
    table = table.drop_columns(["comparison_id"])
    return table if len(first) == table.num_rows else table.take(pa.array(first))
