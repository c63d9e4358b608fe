"""How many labels are right before and after curation, and how well flips were found, by source, where the truth is known (`jobs/report.py labels`).

Paper: Table 19 (agreement of kept and flipped pairs with people); the truth takes the people's place. Our choice: a report of its own over decisions
that are made, because no step may reach the truth (DESIGN 4): this module and the demo's final report call `read_truth`, and nothing that decides
does.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import pyarrow as pa

from synpref_ray.errors import ConfigError, InputError
from synpref_ray.evaluation.accuracy import Accuracy
from synpref_ray.evaluation.label_quality import FlipDetection, LabelQuality, flip_detection, label_quality
from synpref_ray.human.simulated import read_truth
from synpref_ray.reporting.table import format_share, format_table
from synpref_ray.schema import Decision, LabelSource
from synpref_ray.tables.pools import Shard, open_pool
from synpref_ray.tables.reading import read_each
from synpref_ray.tables.sets import load_set
from synpref_ray.tables.sidecars import Sidecar, open_sidecar, zip_shard
from synpref_ray.tables.storage import Storage

ALL = "all sources"
STAGE2 = "Stage 2"
SILVER = "Stage 1, silver"


@dataclass(frozen=True)
class Evidence:
    """What the truth says of one stage's labels, for one source."""

    stage: str
    source: str
    quality: LabelQuality
    flips: FlipDetection


def report_labels(storage: Storage, truth: str, *, as_json: bool) -> str:
    """Return the report.

    Args:
        truth: a Parquet file with pair_id and verdict (chosen or rejected) of pairs as ingested, for as many pairs as are known.

    Raises:
        ConfigError: no file is named.
        InputError: nothing has been decided yet, or the file knows no decided pair.
    """
    if not truth:
        raise ConfigError("name the file that knows which reply is better: truth=FILE (Parquet with pair_id and verdict)")
    found = list(measure_labels(storage, truth))
    if not found:
        raise InputError(f"{storage.url} holds no labels yet: run jobs/stage1.py, and jobs/stage2.py for decisions about the wild pool")
    if not any(entry.quality.raw.num_pairs for entry in found):
        raise InputError(f"{truth} knows none of the labelled pairs: are its pair_ids those of this workspace?")
    return json.dumps([asdict(entry) for entry in found], indent=2) if as_json else describe_labels(found, truth)


def measure_labels(storage: Storage, truth: str) -> Iterator[Evidence]:
    """Yield the evidence for Stage 1's last silver and for Stage 2's decisions, as far as they are there: all sources together, then each.

    The truth is read once, whatever the number of shards, after all decisions are.
    """
    decided: dict[str, list[_Decided]] = {}
    if storage.exists("rounds/stage1.json"):
        silver = load_set(storage, **storage.read_json("rounds/stage1.json")["sets"]["silver"])
        labels = {(member.sidecar.pool.name, member.sidecar.fingerprint): member.sidecar for member in silver.members}
        decided[SILVER] = [row for sidecar in labels.values() for row in _read_decided(sidecar, _silver_decisions)]
    if storage.exists("rounds/stage2.json"):
        record = storage.read_json("rounds/stage2.json")
        decision = open_sidecar(open_pool(storage, record["pool"]), "decision", record["decision"])
        decided[STAGE2] = _read_decided(decision, _decisions)
    known = read_truth(truth, {row.pair_id for rows in decided.values() for row in rows}) if decided else {}
    for stage, rows in decided.items():
        yield from _measure(stage, rows, known)


class _Decided(NamedTuple):
    """A pair about which a stage decided."""

    pair_id: str
    source: str
    group: str
    decision: str


def _decisions(table: pa.Table) -> list[str | None]:
    return list(table["decision"].to_pylist())


def _silver_decisions(table: pa.Table) -> list[str | None]:
    """Return what became of each label: kept or flipped where it made silver, dropped where it made none, None where people decided."""
    made = {LabelSource.SILVER.value: Decision.KEEP.value, LabelSource.GOLD.value: None}
    rows = zip(table["label_source"].to_pylist(), table["flipped"].to_pylist(), strict=True)
    return [Decision.FLIP.value if flipped and source == LabelSource.SILVER else made.get(source, Decision.DROP.value) for source, flipped in rows]


def _read_decided(sidecar: Sidecar, decide: Callable[[pa.Table], list[str | None]]) -> list[_Decided]:
    columns: Mapping[str, str] = {"decision": "decision"} if sidecar.name == "decision" else {"label_source": "label_source", "flipped": "flipped"}

    def read(shard: Shard) -> list[_Decided]:
        table = zip_shard(sidecar.pool, shard.number, ["prompt_group", "source"], [(sidecar, columns)])
        rows = zip(*(table[name].to_pylist() for name in ("pair_id", "source", "prompt_group")), decide(table), strict=True)
        return [_Decided(*row) for row in rows if row[-1] is not None]

    return [row for rows in read_each(read, sidecar.pool.shards) for row in rows]


def _measure(stage: str, decided: Sequence[_Decided], known: Mapping[str, str]) -> Iterator[Evidence]:
    by_source: dict[str, list[_Decided]] = {ALL: list(decided)}
    for row in decided:
        by_source.setdefault(row.source, []).append(row)
    for source, rows in by_source.items():
        decisions, better, groups = [row.decision for row in rows], [known.get(row.pair_id) for row in rows], [row.group for row in rows]
        yield Evidence(stage, source, label_quality(decisions, better, groups=groups), flip_detection(decisions, better, groups=groups))


def describe_labels(found: Sequence[Evidence], truth: str) -> str:
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
    unknown = sum(entry.quality.num_without_truth for entry in found if entry.source == ALL)
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
