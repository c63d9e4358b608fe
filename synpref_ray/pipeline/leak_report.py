"""What becomes of overlaps with benchmarks, for people: a line a proposal in one file, counts by pool and by benchmark, the closing table.

Our choice: proposals are read a few shards at a time, by columns; a row group of the report is what the driver holds, and the file, of any size,
grows in the driver's folder for temporary files (TMPDIR) before the workspace gets it whole.
"""

import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from synpref_ray.ingest.decontamination import MatchKind
from synpref_ray.pipeline.leak_proposals import PROPOSAL_NAMES, PROPOSALS_SCHEMA
from synpref_ray.pipeline.shard_io import count_values
from synpref_ray.reporting.table import format_table
from synpref_ray.rules.leaks import LEAK_SCHEMA, LeakReason
from synpref_ray.schema import GATHERED_FIELDS, DropReason
from synpref_ray.tables.pools import Pool, Shard
from synpref_ray.tables.reading import read_each
from synpref_ray.tables.sidecars import Sidecar, zip_shard

ROWS_PER_GROUP = 50_000  # ours: some 15 MB of proposals without their texts
_PROPOSED = ("source", *(field.name for field in GATHERED_FIELDS), *PROPOSAL_NAMES)
_DECIDED = tuple(name for name in LEAK_SCHEMA.names if name != "pair_id")
REPORT_SCHEMA = pa.schema(
    [
        *(PROPOSALS_SCHEMA.field(name) for name in ("pair_id", *_PROPOSED)),
        *(LEAK_SCHEMA.field(name) for name in _DECIDED),
        pa.field("verdicts", pa.list_(pa.string())),
    ]
)
"""The pair and where it stands, the item, the words, what the judges say together, and what each said (`judge/order/sample: verdict`)."""
Counts = dict[str, dict[str, dict[str, int]]]


def write_report(path: str, proposals: Pool, votes: Sequence[Sidecar], decisions: Sidecar) -> Counts:
    """Write the report (REPORT_SCHEMA) into the proposals' workspace, whole or not at all.

    Args:
        votes: of every judge, sidecars of the proposals, as `decisions` is.

    Returns:
        by benchmark and by kind (candidates: and by length) how many proposals each reason holds for.
    """
    beside: list[tuple[Sidecar, Mapping[str, str]]] = [(decisions, {name: name for name in _DECIDED})]
    beside += [(sidecar, {"votes": f"votes.{number}"}) for number, sidecar in enumerate(votes)]

    def read(shard: Shard) -> pa.Table:
        table = zip_shard(proposals, shard.number, _PROPOSED, beside)
        verdicts = _verdicts([table[f"votes.{number}"] for number in range(len(votes))])
        return table.select(["pair_id", *_PROPOSED, *_DECIDED]).append_column("verdicts", verdicts).cast(REPORT_SCHEMA)

    counts: Counter[tuple[str, str, int, str]] = Counter()
    with tempfile.TemporaryDirectory(prefix="synpref_ray-leaks-") as spool:
        file = f"{spool}/report.parquet"
        with pq.ParquetWriter(file, REPORT_SCHEMA, compression="zstd") as writer:
            for table in _grouped(read_each(read, proposals.shards)):
                writer.write_table(table)
                counts.update(_count_proposals(table))
        proposals.storage.upload(file, path)
    return _by_benchmark(counts)


def _grouped(tables: Iterable[pa.Table]) -> Iterable[pa.Table]:
    """Yield the same rows in tables of ROWS_PER_GROUP or, by less than one of the given tables, more; the last has what is left."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(part.num_rows for part in waiting) >= ROWS_PER_GROUP:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _verdicts(votes: Sequence[pa.ChunkedArray]) -> pa.Array:
    """Return by row what each judge said, judges in their order; of nobody, where there are no votes."""
    num_rows = len(votes[0])
    texts, owners = [pa.array([], pa.string())], [np.zeros(0, np.int64)]
    for column in votes:
        lists = column.combine_chunks()
        said = lists.flatten()
        asked = (said.field("judge"), *(said.field(name).cast(pa.string()) for name in ("order", "sample")))
        texts.append(pc.binary_join_element_wise(pc.binary_join_element_wise(*asked, "/"), said.field("verdict"), ": "))
        owners.append(np.repeat(np.arange(num_rows), pc.fill_null(lists.value_lengths(), 0).to_numpy()))
    owner = np.concatenate(owners)
    ends = np.cumsum(np.bincount(owner, minlength=num_rows))
    offsets = pa.array(np.concatenate([[0], ends]), pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.concat_arrays(texts).take(pa.array(np.argsort(owner, kind="stable"))))


def _count_proposals(report: pa.Table) -> dict[tuple[str, str, int, str], int]:
    names = ["benchmark", "kind", "n", "leak_reason"]
    found = report.select(names).group_by(names).aggregate([([], "count_all")]).to_pylist()
    return {(row["benchmark"], row["kind"], row["n"], row["leak_reason"]): row["count_all"] for row in found}


def _by_benchmark(counts: Mapping[tuple[str, str, int, str], int]) -> Counts:
    found: dict[str, dict[str, Counter[str]]] = {}
    for (benchmark, kind, n, reason), count in counts.items():
        name = f"{kind}_{n:02d}" if kind == MatchKind.CANDIDATE else kind
        found.setdefault(benchmark, {}).setdefault(name, Counter())[reason] += count
    return {benchmark: {kind: dict(sorted(reasons.items())) for kind, reasons in sorted(kinds.items())} for benchmark, kinds in sorted(found.items())}


def count_pairs(leaks: Sidecar) -> dict[str, int]:
    """Return how many pairs of a pool each reason holds for; pairs that nothing proposes are not among them."""
    counts: Counter[str] = Counter()
    for table in read_each(lambda shard: leaks.read(shard.number, ["leak_reason"]), leaks.pool.shards):
        counts.update(count_values(table["leak_reason"]))
    return dict(sorted(counts.items()))


def closing_table(metrics: Mapping[str, Any], report: str) -> str:
    """Return what the job prints at its end.

    Args:
        metrics: the run's `decontamination`.
        report: where the report is.
    """
    rows = []
    for pool, counts in metrics["pairs"].items():
        rows += [(f"pairs of {pool}", _REASON_WORDS[LeakReason(reason)], str(count)) for reason, count in counts.items()]
        rows += [] if counts else [(f"pairs of {pool}", "nothing to judge", "0")]
    for benchmark, kinds in metrics["benchmarks"].items():
        rows += [(benchmark, f"{kind}: {reason}", str(count)) for kind, counts in kinds.items() for reason, count in counts.items()]
    lines = [format_table(("overlaps with benchmarks", "", "count"), rows), f"item, pair, words and votes of every overlap: {report}"]
    unread = sum(sum(count for reason, count in counts.items() if reason != DropReason.NOT_SELECTED) for counts in metrics["judges"].values())
    if unread:
        lines.append(f"{unread} times a judge gave no vote that could be read (too long, unreadable, refused): such pairs are kept")
    return "\n".join(lines)


_REASON_WORDS = {
    LeakReason.CONFIRMED: "a leak: dropped",
    LeakReason.CLEARED: "a coincidence: kept",
    LeakReason.UNDECIDED: "the judges do not agree: kept",
    LeakReason.NOT_JUDGED: "no judge could say: kept",
}
