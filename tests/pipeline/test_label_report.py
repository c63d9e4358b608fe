"""Labels against a known truth: read after all is decided, by source, and never by anything that decides."""

import json
import random
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import report
from synpref_ray.evaluation.label_quality import flip_detection, label_quality
from synpref_ray.human import simulated
from synpref_ray.pipeline import label_report
from synpref_ray.pipeline.label_report import measure_labels
from synpref_ray.rules.gate import DECISION_SCHEMA
from synpref_ray.rules.labels import LABEL_SCHEMA
from synpref_ray.tables.pools import Pool, commit_pool, write_pool_shard
from synpref_ray.tables.sets import Member, save_set
from synpref_ray.tables.sidecars import Sidecar
from synpref_ray.tables.storage import Storage
from tests.builders import make_pairs
from tests.pipeline.test_gold import seal


def two_sources(storage: Storage, name: str, count: int) -> Pool:
    """Return a one-shard pool of two sources with `count` pairs each."""
    table = pa.concat_tables([make_pairs(count, f"{name} hh"), make_pairs(count, f"{name} lm")]).combine_chunks()
    return commit_pool(storage, name, "f" * 32, [write_pool_shard(storage, name, 0, table)], {})


@pytest.fixture
def workspace(tmp_path: Path) -> tuple[Storage, Path]:
    """Return a workspace with decided wild pairs and silver, and its truth; the last pair's truth is not known."""
    storage = Storage(str(tmp_path / "ws"))
    wild, seed = two_sources(storage, "wild", 4), two_sources(storage, "seed", 2)
    ids, seed_ids = (pool.read(0, ["pair_id"])["pair_id"].to_pylist() for pool in (wild, seed))
    decisions = ["keep", "flip", "flip", "drop", "keep", "keep", "flip", "keep"]
    rows = [{"pair_id": i, "decision": d, "flipped": d == "flip", "decision_reason": "x"} for i, d in zip(ids, decisions, strict=True)]
    decision = seal(Sidecar(wild, "decision", "1" * 32), pa.Table.from_pylist(rows, schema=DECISION_SCHEMA))
    sources = [("silver", True), ("unverified", False), ("silver", False), ("gold", True)]
    labels = [{"pair_id": i, "label_source": s, "flipped": f, "label_reason": "x"} for i, (s, f) in zip(seed_ids, sources, strict=True)]
    label = seal(Sidecar(seed, "label", "2" * 32), pa.Table.from_pylist(labels, schema=LABEL_SCHEMA))
    silver = save_set(storage, "silver-r01", [Member(label, (("label_source", ("silver",)),))])
    storage.write_json("rounds/stage1.json", {"sets": {"silver": {"name": silver.name, "digest": silver.digest}}})
    storage.write_json("rounds/stage2.json", {"pool": "wild", "decision": decision.fingerprint})
    better = ["chosen", "rejected", "chosen", "rejected", "rejected", "chosen", "rejected"]
    truth = tmp_path / "truth.parquet"
    pq.write_table(pa.table({"pair_id": ids[:-1] + seed_ids, "verdict": [*better, "rejected", "chosen", "chosen", "chosen"]}), truth)
    return storage, truth


def test_flips_are_counted_by_stage_and_source(workspace: tuple[Storage, Path], capsys: pytest.CaptureFixture[str]) -> None:
    storage, truth = workspace
    arguments = ["labels", f"workspace={storage.url}", f"truth={truth}"]
    assert report.main([*arguments, "format=json"]) == 0
    found = {(entry["stage"], entry["source"]): entry for entry in json.loads(capsys.readouterr().out)}
    assert list(found) == [
        *(("Stage 1, silver", source) for source in ("all sources", "seed hh", "seed lm")),
        *(("Stage 2", source) for source in ("all sources", "wild hh", "wild lm")),
    ]
    counts = {
        key: [(entry["flips"][name]["num_correct"], entry["flips"][name]["num_pairs"]) for name in ("precision", "recall")]
        for key, entry in found.items()
    }
    assert counts[("Stage 2", "all sources")] == [(2, 3), (2, 4)]
    assert counts[("Stage 2", "wild hh")] == [(1, 2), (1, 2)]
    assert counts[("Stage 2", "wild lm")] == [(1, 1), (1, 2)]
    assert counts[("Stage 1, silver", "all sources")] == [(1, 1), (1, 1)]  # gold is left out
    quality = found[("Stage 2", "all sources")]["quality"]
    assert (quality["raw"]["num_correct"], quality["raw"]["num_pairs"]) == (3, 7)
    assert (quality["kept_and_flipped"]["num_correct"], quality["kept_and_flipped"]["num_pairs"]) == (4, 6)
    assert report.main(arguments) == 0
    text = capsys.readouterr().out
    assert "66.7 %" in text
    assert "1 labelled pairs that it lacks are left out" in text


def test_the_truth_is_read_once_for_all_stages_and_shards(workspace: tuple[Storage, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    storage, truth = workspace
    opened: list[str] = []
    open_once = simulated.open_file

    def noted(url: str) -> IO[bytes]:
        opened.append(url)
        return open_once(url)

    monkeypatch.setattr(simulated, "open_file", noted)
    assert len(list(measure_labels(storage, str(truth)))) == 6
    assert opened == [str(truth)]


def test_counts_of_shards_say_what_all_rows_together_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven shards over which prompts and sources are spread; every third pair's truth is known; the expected values are of rows, not counts."""
    monkeypatch.setattr(label_report, "SHARDS_TOGETHER", 2)
    storage, chance = Storage(str(tmp_path / "ws")), random.Random(5)
    shards, rows = [], []
    for number in range(7):
        pairs = make_pairs(20, f"s{number}")
        table = pairs.set_column(
            pairs.schema.get_field_index("prompt_group"), "prompt_group", pa.array([f"g{chance.randrange(25)}" for _ in range(20)])
        )
        table = table.set_column(table.schema.get_field_index("source"), "source", pa.array([chance.choice(["hh", "lm", "new"]) for _ in range(20)]))
        shards.append(write_pool_shard(storage, "wild", number, table.cast(pairs.schema)))
        rows += table.select(["pair_id", "source", "prompt_group"]).to_pylist()
    decision = Sidecar(commit_pool(storage, "wild", "f" * 32, shards, {}), "decision", "1" * 32)
    for row in rows:
        row |= {
            "decision": chance.choice(["keep", "flip", "drop"]),
            "better": chance.choice(["chosen", "rejected"]) if chance.random() < 0.4 else None,
        }
    for number in range(7):
        decided = [{"flipped": row["decision"] == "flip", "decision_reason": "x", **row} for row in rows[20 * number : 20 * number + 20]]
        decision.write(number, pa.Table.from_pylist(decided, schema=DECISION_SCHEMA))
    manifest = {"pool_digest": decision.pool.digest, "fingerprint": decision.fingerprint, "rejected": {}}
    storage.write_json(f"{decision.folder}/manifest.json", manifest)
    storage.write_json("rounds/stage2.json", {"pool": "wild", "decision": decision.fingerprint})
    known = [row for row in rows if row["better"]]
    pq.write_table(pa.table({"pair_id": [row["pair_id"] for row in known], "verdict": [row["better"] for row in known]}), tmp_path / "truth.parquet")
    found = list(measure_labels(storage, str(tmp_path / "truth.parquet")))
    assert [entry.source for entry in found] == ["all sources", *dict.fromkeys(row["source"] for row in rows)]
    for entry in found:
        mine = [row for row in rows if entry.source in ("all sources", row["source"])]
        decisions, better, groups = ([row[name] for row in mine] for name in ("decision", "better", "prompt_group"))
        assert entry.quality == label_quality(decisions, better, groups=groups)
        assert entry.flips == flip_detection(decisions, better, groups=groups)


@pytest.mark.parametrize(("argument", "said"), [("format=text", "name the file"), ("truth=absent.parquet", "there is no truth file absent.parquet")])
def test_what_is_missing_is_one_line(workspace: tuple[Storage, Path], capsys: pytest.CaptureFixture[str], argument: str, said: str) -> None:
    assert report.main(["labels", f"workspace={workspace[0].url}", argument]) == 2
    assert said in capsys.readouterr().err


def test_a_truth_of_other_pairs_and_an_undecided_workspace_are_said(
    workspace: tuple[Storage, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage, truth = workspace
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"pair_id": ["a"], "verdict": ["chosen"]}), other)
    assert report.main(["labels", f"workspace={storage.url}", f"truth={other}"]) == 2
    assert "knows none of the labelled pairs" in capsys.readouterr().err
    assert report.main(["labels", f"workspace={tmp_path / 'empty'}", f"truth={truth}"]) == 2
    assert "holds no labels yet" in capsys.readouterr().err
