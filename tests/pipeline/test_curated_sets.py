"""What the curated sets hold of the wild pool and of Stage 1's silver."""

from pathlib import Path

import pyarrow as pa

from synpref_ray.pipeline.curated_sets import save_curated_sets
from synpref_ray.rules.gold import check_best_rm_training
from synpref_ray.rules.labels import LABEL_SCHEMA
from synpref_ray.tables.pools import Pool, commit_pool, write_pool_shard
from synpref_ray.tables.sets import Member, load_set, save_set
from synpref_ray.tables.sidecars import Sidecar
from synpref_ray.tables.storage import Storage
from tests.builders import make_pairs
from tests.pipeline.test_gold import seal

DECISIONS = pa.schema([("pair_id", pa.string()), ("decision", pa.string()), ("flipped", pa.bool_())])


def make_pool(storage: Storage, name: str, count: int) -> Pool:
    return commit_pool(storage, name, name, [write_pool_shard(storage, name, 0, make_pairs(count, name))], {})


def test_curated_sets_hold_what_stage_2_and_judges_of_stage_1_decided(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    wild, seed = make_pool(storage, "wild", 3), make_pool(storage, "seed", 6)
    ids = {pool.name: pool.read_all(["pair_id"])["pair_id"].to_pylist() for pool in (wild, seed)}
    decided = [{"pair_id": i, "decision": d, "flipped": d == "flip"} for i, d in zip(ids["wild"], ("keep", "flip", "drop"), strict=True)]
    decision = seal(Sidecar(wild, "decision", "d" * 32), pa.Table.from_pylist(decided, schema=DECISIONS))
    says = (
        ("silver", "judge", False),
        ("silver", "judge", True),
        ("silver", "source_label", False),
        ("gold", "human", False),
        ("unverified", "gold_prompt", False),
        ("unverified", "judge_abstained", False),
    )
    columns = ("label_source", "label_reason", "flipped")
    rows = [{"pair_id": i, **dict(zip(columns, said, strict=True))} for i, said in zip(ids["seed"], says, strict=True)]
    label = seal(Sidecar(seed, "label", "a" * 32), pa.Table.from_pylist(rows, schema=LABEL_SCHEMA))
    silver = save_set(storage, "silver-r00", [Member(label, (("label_source", ("silver",)),))])
    sets = save_curated_sets(decision, silver)
    assert sets == {
        "kept": "curated-wild-kept",
        "kept_and_flipped": "curated-wild-kept-and-flipped",
        "kept_and_silver": "curated-wild-silver-kept",
        "kept_and_flipped_and_silver": "curated-wild-silver-kept-and-flipped",
    }
    found = {kind: load_set(storage, name).read() for kind, name in sets.items()}
    flips = {kind: dict(zip(table["pair_id"].to_pylist(), table["flipped"].to_pylist(), strict=True)) for kind, table in found.items()}
    kept, turned = {ids["wild"][0]: False}, {ids["wild"][1]: True}
    assert flips == {
        "kept": kept,
        "kept_and_flipped": kept | turned,
        "kept_and_silver": kept | {ids["seed"][0]: False},
        "kept_and_flipped_and_silver": kept | turned | {ids["seed"][0]: False, ids["seed"][1]: True},
    }
    for table in found.values():
        check_best_rm_training(table, seed.read_all().slice(3, 1))
    assert save_curated_sets(decision, None) == {kind: sets[kind] for kind in ("kept", "kept_and_flipped")}
