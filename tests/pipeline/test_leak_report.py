"""What is made of many shards of proposals: the report, and the decisions beside each source shard, each from as little as it needs."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from synpref_ray.pipeline.ingest import run_ingest
from synpref_ray.pipeline.ingest_sources import IngestConfig
from synpref_ray.pipeline.leak_proposals import gather_proposals
from synpref_ray.pipeline.leak_report import REPORT_SCHEMA
from synpref_ray.pipeline.leaks import LeaksConfig, ScatterLeaksWorker
from synpref_ray.pipeline.steps import ShardKey
from synpref_ray.reporting.run import Run
from synpref_ray.rules.leaks import LEAKS_SCHEMA, merge_proposals
from synpref_ray.tables.pools import Pool, open_pool
from synpref_ray.tables.sidecars import open_sidecar
from tests.pipeline.test_leaks import ITEM, LEAKING, judge, leak_if


def many_shards(root: Path) -> dict[str, Any]:
    """Make a workspace whose proposals lie in shards of two that begin and end within the source shards of three, one pair too long for a judge."""
    (root / "data").mkdir()
    replies = [LEAKING, "Nothing of that kind.", "Somebody asked who has counted them so far."]
    seed = [{"prompt": f"Question {number} of some", "chosen": replies[number % 3], "rejected": "No."} for number in range(10)]
    seed[6]["chosen"] += " Well." * 2_000
    wild = [{"prompt": f"{number}: live in the old forest", "chosen": "a", "rejected": "who has counted them so far"} for number in range(4)]
    for name, rows in (("seed", seed), ("wild", wild)):
        (root / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "bench.json").write_text(json.dumps([{"prompt": ITEM, "id": "fox"}, {"prompt": "Who has counted them so far?", "id": "who"}]))
    decontaminate = {"benchmarks": [{"path": str(root / "bench.json"), "name": "bench"}]}
    paths = {"data": str(root / "data"), "workspace": str(root / "ws")}
    config = IngestConfig.model_validate({**paths, "decontaminate": decontaminate, "max_pairs_per_shard": 3})
    run_ingest(config, Run(config.storage, "ingest", config))
    return {"workspace": str(root / "ws"), "decontaminate": decontaminate, "gathered_shard_pairs": 2}


def judged_rows(run: Run, *judges: str) -> list[dict[str, Any]]:
    """Return what the report must hold, put together row by row from whole tables."""
    proposals = open_pool(run.storage, run.metrics["decontamination"]["proposals"])
    assert len(proposals.shards) > 5
    tables = [open_sidecar(proposals, name).read_all().to_pylist() for name in ("leak", *(f"leak_votes.{judge}" for judge in judges))]
    rows = []
    for row, decided, *votes in zip(proposals.read_all().to_pylist(), *tables, strict=True):
        said = [f"{vote['judge']}/{vote['order']}/{vote['sample']}: {vote['verdict']}" for found in votes for vote in found["votes"] or ()]
        rows.append({name: value for name, value in {**row, **decided, "verdicts": said}.items() if name in REPORT_SCHEMA.names})
    return rows


def test_the_report_is_written_a_few_shards_at_a_time_and_holds_every_proposal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = many_shards(tmp_path)
    monkeypatch.setattr("synpref_ray.pipeline.leak_report.ROWS_PER_GROUP", 3)
    run = judge(settings, leak_if(LEAKING), leak_if("forest"), max_input_tokens=6_000)
    found = run.metrics["decontamination"]
    assert {*found["judges"]["j0"]} == {"too_long"}
    file = pq.ParquetFile(Path(settings["workspace"]) / found["report"])
    assert file.schema_arrow == REPORT_SCHEMA
    rows = judged_rows(run, "j0", "j1")
    assert file.read().to_pylist() == rows
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups - 1)] == [4] * ((len(rows) - 1) // 4)
    assert {len(row["verdicts"]) for row in rows} == {0, 4}
    assert {row["source_pool"] for row in rows} == {"seed", "wild"}
    counts = Counter((f"candidate_{row['n']:02d}" if row["kind"] == "candidate" else row["kind"], row["leak_reason"]) for row in rows)
    assert {(kind, reason): count for kind, reasons in found["benchmarks"]["bench"].items() for reason, count in reasons.items()} == counts


def test_decisions_are_written_from_the_proposals_of_their_shard_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = many_shards(tmp_path)
    run = judge(settings, leak_if(LEAKING), max_input_tokens=99_000)
    config = LeaksConfig(judges=[{"engine": {"model": "none"}, "judge": {"judge": "j0"}}], **settings)
    pools = [open_pool(run.storage, name) for name in ("seed", "wild")]
    pool, about = gather_proposals(run.storage, pools, config.decontaminate, min_words=5, max_pairs=2)
    decisions, rows = open_sidecar(pool, "leak"), judged_rows(run, "j0")
    read: list[int] = []
    whole = Pool.read

    def spy(self: Pool, number: int, columns: list[str] | None = None) -> pa.Table:
        read.append(number)
        return whole(self, number, columns)

    for source in pools:
        marks = open_sidecar(source, "decontamination")
        for shard in source.shards:
            ids = source.read(shard.number, ["pair_id"])
            mine = [place for place, row in enumerate(rows) if (row["source_pool"], row["source_shard"]) == (source.name, shard.number)]
            with monkeypatch.context() as patched:
                patched.setattr(Pool, "read", spy)
                made, _ = ScatterLeaksWorker(source.name, about.get(source.name, {}), decisions)(ids, ShardKey(0, shard.number))
            assert read == sorted({place // 2 for place in mine})
            read.clear()
            expected = []
            for number, name in enumerate(ids["pair_id"].to_pylist()):
                of_pair = [rows[place] for place in mine if rows[place]["source_row"] == number]
                expected.append({**(merge_proposals(of_pair) if of_pair else {}), "pair_id": name, "num_proposals": len(of_pair)})
            assert made.equals(pa.Table.from_pylist(expected, schema=LEAKS_SCHEMA))
            assert marks.read(shard.number).equals(made)
    numbers = [number for shards in about.values() for found in shards.values() for number in found]
    assert len(set(numbers)) < len(numbers)  # some are about several source shards
    assert any(len(found) > 1 for found in about["seed"].values())
