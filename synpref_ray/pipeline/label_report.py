"""How many labels are right before and after curation, and how well flips were found, by source, where the truth is known (`jobs/report.py labels`,
and a section of its page).

Paper: Table 19 (agreement of kept and flipped pairs with people); the truth takes the people's place. Our choice: a report of its own over decisions
that are made, because no step may reach the truth (DESIGN 4): this module and the demo's final report read the truth, and nothing that decides
does.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from synpref_ray.errors import ConfigError, InputError
from synpref_ray.evaluation.accuracy import Accuracy
from synpref_ray.evaluation.label_quality import LabelEvidence, flip_detection, label_quality
from synpref_ray.human.simulated import TruthLookup
from synpref_ray.reporting.table import format_share, format_table
from synpref_ray.schema import Decision, LabelSource
from synpref_ray.tables.pools import Shard, open_pool
from synpref_ray.tables.reading import read_each
from synpref_ray.tables.sets import load_set
from synpref_ray.tables.sidecars import Sidecar, open_sidecar, zip_shard
from synpref_ray.tables.storage import Storage

KEYS = ["source", "prompt_group", "decision", "better"]
_COUNTED = pa.schema([*(pa.field(name, pa.string()) for name in KEYS), pa.field("count", pa.int64())])
SHARDS_TOGETHER = 64  # ours: of 8,192 pairs each, half a million rows at most wait to be put together
ALL = "all sources"
STAGE2 = "Stage 2"
SILVER = "Stage 1, silver"


def report_labels(storage: Storage, truth: str, *, as_json: bool) -> str:
    """Return the report; arguments and errors as for `labels_beside_truth`.

    Raises:
        ConfigError: no file is named.
    """
    if not truth:
        raise ConfigError("name the file that knows which reply is better: truth=FILE (Parquet with pair_id and verdict)")
    found = labels_beside_truth(storage, truth)
    return json.dumps([asdict(entry) for entry in found], indent=2) if as_json else describe_labels(found, truth)


def labels_beside_truth(storage: Storage, truth: str) -> list[LabelEvidence]:
    """Return the evidence for every stage that has labels: all sources together, then each.

    Args:
        truth: a Parquet file with pair_id and verdict (chosen or rejected) of pairs as ingested, for as many pairs as are known.

    Raises:
        InputError: nothing has been decided yet, or the file knows no decided pair.
    """
    found = list(measure_labels(storage, truth))
    if not found:
        raise InputError(f"{storage.url} holds no labels yet: run jobs/stage1.py, and jobs/stage2.py for decisions about the wild pool")
    if not any(entry.quality.raw.num_pairs for entry in found):
        raise InputError(f"{truth} knows none of the labelled pairs: are its pair_ids those of this workspace?")
    return found


def measure_labels(storage: Storage, truth: str) -> Iterator[LabelEvidence]:
    """Yield the evidence for Stage 1's last silver and for Stage 2's decisions, as far as they are there: all sources together, then each.

    The truth is read once, whatever the number of shards. Decisions are read shard by shard, and of them only counts are kept: by prompt for the
    pairs whose truth is known, by source for the others. So what this takes grows with the truth, and not with the pools.
    """
    decided: dict[str, list[Sidecar]] = {}
    if storage.exists("rounds/stage1.json"):
        silver = load_set(storage, **storage.read_json("rounds/stage1.json")["sets"]["silver"])
        labels = {(member.sidecar.pool.name, member.sidecar.fingerprint): member.sidecar for member in silver.members}
        decided[SILVER] = list(labels.values())
    if storage.exists("rounds/stage2.json"):
        record = storage.read_json("rounds/stage2.json")
        decided[STAGE2] = [open_sidecar(open_pool(storage, record["pool"]), "decision", record["decision"])]
    known = TruthLookup(truth) if decided else None
    for stage, sidecars in decided.items():
        assert known is not None
        yield from _measure(stage, _count_all(sidecars, known))


@dataclass
class _Counts:
    """How many pairs a stage decided about: of known truth by KEYS, and the others by source, in the order in which sources came."""

    known: pa.Table
    without_truth: dict[str, int]


def _decisions(table: pa.Table) -> pa.Array:
    return table["decision"].combine_chunks()


def _silver_decisions(table: pa.Table) -> pa.Array:
    """Return what became of each label: kept or flipped where it made silver, dropped where it made none, null where people decided."""
    source, word = table["label_source"], pa.scalar
    made = pc.if_else(pc.fill_null(table["flipped"], False), word(Decision.FLIP.value), word(Decision.KEEP.value))
    is_silver, is_gold = (pc.fill_null(pc.equal(source, name.value), False) for name in (LabelSource.SILVER, LabelSource.GOLD))
    other = pc.if_else(is_gold, word(None, pa.string()), word(Decision.DROP.value))
    return pc.if_else(is_silver, made, other).combine_chunks()


def _count_all(sidecars: Sequence[Sidecar], truth: TruthLookup) -> _Counts:
    """Count the decisions of some tables, many shards at once; counts of shards are put together before they become many."""
    found = _Counts(_COUNTED.empty_table(), {})
    waiting: list[pa.Table] = []
    for sidecar in sidecars:
        for of_shard in read_each(partial(_count_shard, sidecar, truth), sidecar.pool.shards):
            for source, count in of_shard.without_truth.items():
                found.without_truth[source] = found.without_truth.get(source, 0) + count
            waiting.append(of_shard.known)
            if len(waiting) == SHARDS_TOGETHER:
                found.known, waiting = _add_up([found.known, *waiting]), []
    found.known = _add_up([found.known, *waiting])
    return found


def _count_shard(sidecar: Sidecar, truth: TruthLookup, shard: Shard) -> _Counts:
    is_decision = sidecar.name == "decision"
    columns: Mapping[str, str] = {"decision": "decision"} if is_decision else {"label_source": "label_source", "flipped": "flipped"}
    table = zip_shard(sidecar.pool, shard.number, ["prompt_group", "source"], [(sidecar, columns)])
    decisions = _decisions(table) if is_decision else _silver_decisions(table)
    table = pa.table([table["pair_id"], table["source"], table["prompt_group"], decisions], names=["pair_id", *KEYS[:3]]).filter(
        pc.is_valid(decisions)
    )
    table = table.append_column("better", truth.verdicts(table["pair_id"]))
    is_known = pc.is_valid(table["better"])
    without = dict.fromkeys(pc.unique(table["source"]).to_pylist(), 0)
    for row in table.filter(pc.invert(is_known)).group_by("source").aggregate([([], "count_all")]).to_pylist():
        without[row["source"]] = row["count_all"]
    return _Counts(_add_up([_with_ones(table.filter(is_known))]), without)


def _with_ones(table: pa.Table) -> pa.Table:
    return table.select(KEYS).append_column("count", pa.repeat(1, table.num_rows).cast(pa.int64())).cast(_COUNTED)


def _add_up(parts: Sequence[pa.Table]) -> pa.Table:
    added = pa.concat_tables(parts).group_by(KEYS, use_threads=False).aggregate([("count", "sum")])
    return added.rename_columns([*KEYS, "count"]).cast(_COUNTED)


def _measure(stage: str, counts: _Counts) -> Iterator[LabelEvidence]:
    for place, source in enumerate((ALL, *counts.without_truth)):  # a source may be called what ALL is
        is_total = place == 0
        table = counts.known if is_total else counts.known.filter(pc.equal(counts.known["source"], source))
        without = sum(counts.without_truth.values()) if is_total else counts.without_truth[source]
        decisions, better, groups, numbers = (table[name].to_pylist() for name in ("decision", "better", "prompt_group", "count"))
        entries = [*decisions, Decision.DROP.value], [*better, None]  # the last one stands for all whose truth is not known, whatever was decided
        more: dict[str, Any] = {"groups": [*groups, ""], "counts": [*numbers, without]}
        yield LabelEvidence(stage, source, label_quality(*entries, **more), flip_detection(*entries, **more), is_total)


def describe_labels(found: Sequence[LabelEvidence], truth: str) -> str:
    """Return the tables: label accuracy before and after, then flips."""
    header = ("labels", "source", "pairs", "right before", "right after", "pairs after", "kept", "flipped")
    before = [
        (
            entry.stage,
            entry.source,
            str(entry.quality.raw.num_pairs),
            _share(entry.quality.raw),
            _share(entry.quality.kept_and_flipped),
            str(entry.quality.kept_and_flipped.num_pairs),
            _share(entry.quality.kept),
            _share(entry.quality.flipped),
        )
        for entry in found
    ]
    flips = [
        (
            entry.stage,
            entry.source,
            str(entry.flips.recall.num_pairs),
            str(entry.flips.precision.num_pairs),
            *(_share(value) for value in (entry.flips.precision, entry.flips.recall, entry.flips.removed, entry.flips.lost)),
        )
        for entry in found
    ]
    unknown = sum(entry.quality.num_without_truth for entry in found if entry.is_total)
    lines = [
        format_table(header, before),
        format_table(("flip detection", "source", "wrong labels", "flips", "precision", "recall", "wrong ones gone", "right ones lost"), flips),
        f"truth: {truth}, read after all was decided; {unknown} labelled pairs that it lacks are left out; intervals are 95 %, over prompts.\n"
        "Wrong ones gone: flipped or dropped; right ones lost: the same. Gold is in neither table: people decided it.",
    ]
    return "\n\n".join(lines)


def _share(value: Accuracy) -> str:
    if not value.num_pairs:
        return "-"
    return f"{format_share(value.accuracy, 1)} ({100 * value.low:.0f} to {100 * value.high:.0f})"
