"""Gold takes over the attributes that people edited, and is the same gold, byte for byte, where nobody edited any."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from synpref_ray.human.results import EDITED_SCHEMA
from synpref_ray.pipeline import edited_tags
from synpref_ray.pipeline.edited_tags import human_tags_file, use_edited_tags
from synpref_ray.pipeline.gold import gather_gold, gold_record, measure_judges, open_gold, report_judges
from synpref_ray.pipeline.gold_tables import GoldTables
from synpref_ray.pipeline.ingest_sources import IngestConfig
from synpref_ray.pipeline.retrieval import EmbedStepConfig
from synpref_ray.pipeline.steps import Output, ShardKey, Step, StepInput, run_step
from synpref_ray.reporting.run import Run
from synpref_ray.retrieval.embedder import embeddings_schema
from synpref_ray.rules.judges import TrustConfig
from synpref_ray.tables.pools import Pool
from synpref_ray.tables.sidecars import Sidecar
from synpref_ray.tables.storage import Storage
from tests.pipeline.test_gold import EMBEDDINGS, GOLD, labelled_pool, vote_table

CONFIG = EmbedStepConfig(dimension=2)


class CategoryWorker:
    """Embeds by category alone: an embedder that tells edited pairs from others."""

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        rows = [
            {"pair_id": row["pair_id"], "embedding": [0.0, 1.0] if row["task_category"] == "planning" else [1.0, 0.0]} for row in shard.to_pylist()
        ]
        return pa.Table.from_pylist(rows, schema=embeddings_schema(2)), {}


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Embed without a model; return a list that gets the number of pairs of every call."""
    counts: list[int] = []

    def embed(run: Run, name: str, pools: Sequence[tuple[Pool, Sidecar]], config: EmbedStepConfig) -> list[Sidecar]:
        step = Step("embed", 1, CategoryWorker, (Output("embeddings", embeddings_schema(2)),), {})
        inputs = [StepInput(pool, (), ((attributes, {"task_category": "task_category"}),)) for pool, attributes in pools]
        counts.extend(pool.num_rows for pool, _ in pools)
        return [sidecars[0] for sidecars in run_step(step, inputs).sidecars]

    monkeypatch.setattr(edited_tags, "embed_pools", embed)
    return counts


@pytest.fixture
def gold(tmp_path: Path) -> GoldTables:
    labelled = labelled_pool(tmp_path, ["chosen", None, "rejected", "chosen"])
    return gather_gold(labelled.pool.storage, "gold-r00", [labelled], GOLD, EMBEDDINGS)


def use(gold: GoldTables, path: str) -> GoldTables:
    return use_edited_tags(Run(gold.pool.storage, "stage1", IngestConfig()), "round 0", gold, path, CONFIG)


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_gold_takes_over_what_people_changed(tmp_path: Path, gold: GoldTables, embedded: list[int]) -> None:
    ids = gold.pool.read_all(["pair_id"])["pair_id"].to_pylist()
    path = write(tmp_path / "t.jsonl", [{"pair_id": ids[1], "task_category": "planning", "desired_attributes": "few steps"}])
    edited = use(gold, path)
    assert edited.read()["task_category"].to_pylist() == ["math", "planning", "math"]
    assert edited.read()["desired_attributes"].to_pylist() == [None, "few steps", None]
    assert edited.embeddings.read_all()["embedding"].to_pylist() == [[1, 0], [0, 1], [1, 0]]
    assert embedded == [1]  # no pair that nobody edited is embedded anew
    assert (edited.as_targets, gold.as_targets) == (gold, gold)  # a judge is measured on the taggers' attributes
    assert {edited.attributes.fingerprint, edited.embeddings.fingerprint}.isdisjoint({gold.attributes.fingerprint, gold.embeddings.fingerprint})
    assert open_gold(gold.pool.storage, json.loads(json.dumps(gold_record(edited)))) == edited
    assert open_gold(gold.pool.storage, gold_record(gold)) == gold
    assert use(gold, path) == edited


def test_trust_goes_by_the_taggers_categories_and_reports_by_the_edited_ones(tmp_path: Path, gold: GoldTables, embedded: list[int]) -> None:
    ids = gold.pool.read_all(["pair_id"])["pair_id"].to_pylist()
    edited = use(gold, write(tmp_path / "t.jsonl", [{"pair_id": pair_id, "task_category": "planning"} for pair_id in ids]))
    votes = [vote_table(gold.pool, "chosen")]
    for tables, category in ((gold, "math"), (edited, "planning")):
        working, audit = measure_judges(tables, votes, TrustConfig())
        assert {*working["j"].by_category, *audit["j"].by_category} == {"math"}
        reports = report_judges(tables, votes).values()
        assert {name for report in reports for name in report["judges"]["j"]["agreement"]["task_category"]} == {category}


def test_nothing_is_computed_or_named_anew_where_nobody_edited_gold(tmp_path: Path, gold: GoldTables, embedded: list[int]) -> None:
    ids = gold.pool.read_all(["pair_id"])["pair_id"].to_pylist()
    files = sorted(path for path in tmp_path.rglob("pools/**/*") if path.is_file())
    same = [{"pair_id": ids[0], "task_category": "math", "objectivity": " objective "}, {"pair_id": ids[2], "task_category": None}]
    for rows in ([], same, [{"pair_id": "f" * 32, "task_category": "planning"}]):
        assert use(gold, write(tmp_path / "t.jsonl", rows)) is gold
    assert use(gold, "") is gold
    assert embedded == []
    assert sorted(path for path in tmp_path.rglob("pools/**/*") if path.is_file()) == files


def test_the_workspace_s_own_annotations_count_when_they_hold_edits(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    assert human_tags_file(storage, "") == ""
    for changed, found in (([], ""), (["task_category"], storage.join("annotation/attributes.parquet"))):
        rows = [{"pair_id": "a", "task_category": "math", "changed": []}, {"pair_id": "b", "task_category": "math", "changed": changed}]
        storage.write_table("annotation/attributes.parquet", pa.Table.from_pylist(rows, schema=EDITED_SCHEMA))
        assert human_tags_file(storage, "") == found
        assert human_tags_file(storage, "mine.csv") == "mine.csv"
    storage.write_table("annotation/attributes.parquet", EDITED_SCHEMA.empty_table())
    assert human_tags_file(storage, "") == ""
