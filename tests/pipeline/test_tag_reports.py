"""The taggers' report over stored tables."""

import json
from pathlib import Path

import pyarrow as pa

from synpref_ray.pipeline.tag_reports import report_taggers
from synpref_ray.pipeline.tag_steps import TaggedPools
from synpref_ray.schema import ATTRIBUTES_SCHEMA, TAGS_SCHEMA
from synpref_ray.tables.pools import Pool, commit_pool, write_pool_shard
from synpref_ray.tables.sidecars import Sidecar
from synpref_ray.tables.storage import Storage
from tests.builders import make_pairs
from tests.pipeline.test_gold import seal


def tags(pool: Pool, name: str, categories: list[str | None], schema: pa.Schema = TAGS_SCHEMA) -> Sidecar:
    ids = pool.read_all(["pair_id"])["pair_id"].to_pylist()
    given = {"objectivity": "objective", "controversiality": "low", "desired_attributes": "short", "annotation_guideline": "Prefer short."}
    rows = [
        {"pair_id": i, "drop_reason": "unparsable_reply"} if category is None else {"pair_id": i, "task_category": category, **given}
        for i, category in zip(ids, categories, strict=True)
    ]
    return seal(Sidecar(pool, name, name[-1] * 32), pa.Table.from_pylist(rows, schema=schema))


def test_taggers_are_compared_with_each_other_and_with_people(tmp_path: Path) -> None:
    storage, pairs = Storage(str(tmp_path)), make_pairs(4)
    pool = commit_pool(storage, "seed", "f" * 32, [write_pool_shard(storage, "seed", 0, pairs)], {})
    one = tags(pool, "attributes.a", ["math", "math", "planning", None])
    two = tags(pool, "attributes.b", ["math", "planning", "planning", "planning"])
    merged = tags(pool, "attributes", ["math", "math", "planning", "planning"], ATTRIBUTES_SCHEMA)
    tagged = TaggedPools([merged], {"a": [one], "b": [two]})

    report = report_taggers([pool], tagged)
    assert report["num_pairs"] == 4
    assert report["null_rows"]["a"] == {"unparsable_reply": 1}
    [between] = report["between_taggers"]
    assert between["enums"]["task_category"]["equal"]["value"] == 2 / 3
    assert "quality" not in report

    edited = tmp_path / "edited.jsonl"
    ids = pairs["pair_id"].to_pylist()
    lines = [{"pair_id": ids[0], "task_category": "math"}, {"pair_id": ids[1], "task_category": "planning"}, {"pair_id": "elsewhere"}]
    edited.write_text("".join(json.dumps(line) + "\n" for line in lines))
    quality = report_taggers([pool], tagged, str(edited))["quality"]
    found = {**quality["by_tagger"], "merged": quality["merged"]}
    assert {name: one["enums"]["task_category"]["agreement"]["value"] for name, one in found.items()} == {"a": 0.5, "b": 1.0, "merged": 0.5}
