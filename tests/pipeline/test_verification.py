"""Verdicts from a file as a step: what is added about other pairs computes nothing again."""

import json
from pathlib import Path

from synpref_ray.pipeline.ingest_sources import IngestConfig
from synpref_ray.pipeline.verification import AnnotatorConfig, verify_pool
from synpref_ray.reporting.run import Run
from synpref_ray.rules.gold import GoldConfig
from synpref_ray.schema import ATTRIBUTES_SCHEMA
from synpref_ray.tables.pools import commit_pool, write_pool_shard
from synpref_ray.tables.sidecars import Sidecar
from synpref_ray.tables.storage import Storage
from tests.builders import make_pairs


def test_verdicts_about_other_pairs_change_nothing_and_changed_ones_do(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "ws"))
    pairs = make_pairs(4)
    pool = commit_pool(storage, "seed", "seed", [write_pool_shard(storage, "seed", 0, pairs)], {})
    attributes = Sidecar(pool, "attributes", "a" * 32)
    ids = pairs["pair_id"].to_pylist()
    values = {"task_category": "other", "objectivity": "objective", "controversiality": "low"}
    attributes.write(0, ATTRIBUTES_SCHEMA.empty_table().from_pylist([{"pair_id": name, **values} for name in ids], schema=ATTRIBUTES_SCHEMA))
    file, lines = tmp_path / "verdicts.jsonl", [{"pair_id": name, "verdict": "chosen", "annotator": "ann"} for name in ids[:2]]

    def verify() -> tuple[int, str]:
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        config = AnnotatorConfig(path=str(file))
        result = verify_pool(Run(storage, "stage1", IngestConfig()), "verify", pool, attributes, 0, config, GoldConfig())
        return result.rows_computed, result.sidecars[0][0].fingerprint

    computed, first = verify()
    assert computed == 4
    lines.append({"pair_id": "f" * 32, "verdict": "rejected", "annotator": "ann"})  # of another pool
    assert verify() == (0, first)
    lines[0]["verdict"] = "rejected"
    computed, changed = verify()
    assert computed == 4
    assert changed != first
