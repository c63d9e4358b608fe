"""Writes the demo's files: pair files that carry no truth, and the truth in a file of its own."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from synpref_ray.schema import PROMPT

from .assembly import HELD_OUT_POOL, DemoPair

PAIR_FILE_SCHEMA = pa.schema(
    [
        pa.field("prompt", PROMPT),
        pa.field("chosen", pa.string()),
        pa.field("rejected", pa.string()),
        pa.field("source", pa.string()),
        pa.field("source_id", pa.string()),
    ]
)
TRUTH_SCHEMA = pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("pair_id", "verdict", "kind", "pool")])


def pair_row(pair: DemoPair, row: int) -> dict[str, object]:
    """Return what is shipped of a pair; `source_id` counts the rows of its file."""
    return {
        "prompt": pair.messages,
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "source": f"demo_{pair.pool}",
        "source_id": f"{pair.pool}-{row:04d}",
    }


def write_demo(output: Path, pools: Mapping[str, Sequence[DemoPair]]) -> list[Path]:
    """Write the training pools as JSON lines under `pools/`, held_out and truth (all pools, sorted by pair_id) as Parquet; return the paths."""
    (output / "pools").mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for name, pairs in pools.items():
        rows = [pair_row(pair, row) for row, pair in enumerate(pairs)]
        if name == HELD_OUT_POOL:
            paths.append(output / f"{name}.parquet")
            pq.write_table(pa.Table.from_pylist(rows, PAIR_FILE_SCHEMA), paths[-1], compression="zstd")
        else:
            paths.append(output / "pools" / f"{name}.jsonl")
            paths[-1].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    truth = [
        {"pair_id": pair.pair_id, "verdict": pair.verdict.value, "kind": pair.kind, "pool": pair.pool} for pairs in pools.values() for pair in pairs
    ]
    paths.append(output / "truth.parquet")
    pq.write_table(pa.Table.from_pylist(sorted(truth, key=lambda row: row["pair_id"]), TRUTH_SCHEMA), paths[-1], compression="zstd")
    return paths
