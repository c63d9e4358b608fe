"""Pools grow by versions, sidecars zip by pair_id, gather and scatter are inverse on what was selected, sets apply flips."""

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synpref_ray.errors import InputError, RunConflictError, SchemaError
from synpref_ray.schema import GATHERED_SCHEMA
from synpref_ray.tables.pools import Pool, commit_pool, list_pools, open_pool, write_pool_shard
from synpref_ray.tables.selection import Piece, gather_pairs, gather_sidecar, plan_gather, scatter_shard
from synpref_ray.tables.sets import Member, load_set, save_set
from synpref_ray.tables.sidecars import Sidecar, open_sidecar, zip_shard
from synpref_ray.tables.storage import Storage
from tests.builders import make_pairs

LABELS = pa.schema([pa.field("pair_id", pa.string(), nullable=False), ("flipped", pa.bool_()), ("label", pa.string()), ("drop_reason", pa.string())])


def make_pool(root: Path, name: str, sizes: list[int]) -> Pool:
    storage, pairs, shards, start = Storage(str(root)), make_pairs(sum(sizes), topic=name), [], 0
    for number, size in enumerate(sizes):
        shards.append(write_pool_shard(storage, name, number, pairs.slice(start, size)))
        start += size
    return commit_pool(storage, name, "f" * 32, shards, {})


def label_pool(pool: Pool, fingerprint: str = "a" * 32) -> Sidecar:
    """Write a sealed sidecar: every second pair flipped, labels silver and gold in turns of three."""
    sidecar, count = Sidecar(pool, "verdict", fingerprint), 0
    for shard in pool.shards:
        ids = pool.read(shard.number, ["pair_id"])["pair_id"].to_pylist()
        rows = [(i, (count + k) % 2 == 1, "gold" if (count + k) % 3 == 0 else "silver", None) for k, i in enumerate(ids)]
        table = pa.Table.from_pylist([dict(zip(LABELS.names, row, strict=True)) for row in rows], schema=LABELS)
        sidecar.write(shard.number, table)
        count += len(ids)
    pool.storage.write_json(f"{sidecar.folder}/manifest.json", {"pool_digest": pool.digest, "fingerprint": fingerprint})
    return sidecar


def test_growing_a_pool_keeps_every_shard(tmp_path: Path) -> None:
    first = make_pool(tmp_path, "seed", [2, 3])
    more = write_pool_shard(first.storage, "seed", 2, make_pairs(1, topic="more"))
    second = commit_pool(first.storage, "seed", "e" * 32, [*first.shards, more], {})
    assert (second.version, second.num_rows) == (1, 6)
    assert open_pool(first.storage, "seed") == second
    assert open_pool(first.storage, "seed", 0) == first
    assert first.digest != second.digest
    with pytest.raises(RunConflictError, match="must keep every shard of version 1"):
        commit_pool(first.storage, "seed", "d" * 32, [more], {})
    with pytest.raises(InputError, match="pool 'wild' does not exist"):
        open_pool(first.storage, "wild")
    assert list_pools(first.storage) == ["seed"]


def test_a_committed_shard_is_never_rewritten(tmp_path: Path) -> None:
    storage, pairs = Storage(str(tmp_path)), make_pairs(3, topic="seed")
    left = write_pool_shard(storage, "seed", 0, pairs.slice(0, 1))  # of a driver that was killed: no version lists it
    shard = write_pool_shard(storage, "seed", 0, pairs)
    assert left.digest != shard.digest
    pool = commit_pool(storage, "seed", "f" * 32, [shard], {})
    file = tmp_path / "pools" / "seed" / "shard-00000.parquet"
    written = file.stat().st_ino
    assert write_pool_shard(storage, "seed", 0, pairs) == shard  # the same bytes: nothing to do
    with pytest.raises(RunConflictError, match="shards are never rewritten"):
        write_pool_shard(storage, "seed", 0, pairs.slice(1, 2))
    assert file.stat().st_ino == written
    assert pool.read(0).num_rows == 3


def test_a_shard_without_rows_knows_its_number(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "seed", [2, 0])
    assert pool.read(1).num_rows == 0
    assert pool.read(1).schema.metadata[b"synpref_ray.shard"] == b"1"


def test_a_zip_of_other_pairs_is_an_error(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "seed", [2, 2])
    sidecar = label_pool(pool)
    joined = zip_shard(pool, 1, ["chosen"], [(sidecar, {"label": "who"})])
    assert joined.column_names == ["pair_id", "chosen", "who"]
    sidecar.write(1, sidecar.read(0))
    with pytest.raises(SchemaError, match="does not hold the pairs of pool 'seed'"):
        zip_shard(pool, 1, ["chosen"], [(sidecar, {"label": "who"})])


def test_opening_a_sidecar_needs_exactly_one_sealed_version(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "seed", [2])
    with pytest.raises(InputError, match="no finished sidecar 'verdict'"):
        open_sidecar(pool, "verdict")
    label_pool(pool, "a" * 32)
    label_pool(pool, "b" * 32)
    with pytest.raises(InputError, match="2 versions of sidecar"):
        open_sidecar(pool, "verdict")
    assert open_sidecar(pool, "verdict", "b" * 32).fingerprint == "b" * 32


@given(st.lists(st.lists(st.integers(0, 30), unique=True).map(sorted), max_size=5), st.integers(1, 7))
def test_a_gather_plan_holds_each_row_once_in_order(rows: list[list[int]], max_pairs: int) -> None:
    pool = Pool(Storage("memory://plan"), "p", 0, "", ())
    plan = plan_gather([Piece(pool, number, tuple(selected)) for number, selected in enumerate(rows)], max_pairs)
    flat = [(piece.shard, row) for shard in plan for piece in shard for row in piece.rows]
    assert flat == [(number, row) for number, selected in enumerate(rows) for row in selected]
    sizes = [sum(len(piece.rows) for piece in shard) for shard in plan]
    assert all(size == max_pairs for size in sizes[:-1])
    assert all(0 < size <= max_pairs for size in sizes)


@settings(max_examples=15, deadline=None)
@given(st.sets(st.integers(0, 8)))
def test_scattering_a_gathered_result_gives_it_back_in_place(tmp_path_factory: pytest.TempPathFactory, selected: set[int]) -> None:
    pool = make_pool(tmp_path_factory.mktemp("scatter"), "wild", [4, 0, 5])
    labels = label_pool(pool)
    pieces = [Piece(pool, 0, tuple(sorted(n for n in selected if n < 4))), Piece(pool, 2, tuple(sorted(n - 4 for n in selected if n >= 4)))]
    plan = plan_gather([piece for piece in pieces if piece.rows], 2)
    shards = [write_pool_shard(pool.storage, "few", number, gather_pairs(part)) for number, part in enumerate(plan)]
    few = commit_pool(pool.storage, "few", "c" * 32, shards, {})
    result = Sidecar(few, "verdict", "d" * 32)
    for shard in few.shards:
        gathered = few.read(shard.number)
        assert gathered.schema.equals(GATHERED_SCHEMA)
        result.write(shard.number, gather_sidecar(gathered, {"wild": labels}, LABELS))
    scattered = pa.concat_tables([scatter_shard(pool, number, [(few, result)], LABELS) for number in range(3)])
    original = labels.read_all()
    for row, (mine, theirs) in enumerate(zip(scattered.to_pylist(), original.to_pylist(), strict=True)):
        unselected = {"pair_id": theirs["pair_id"], "flipped": None, "label": None, "drop_reason": "not_selected"}
        assert mine == (theirs if row in selected else unselected)


def test_a_set_reads_its_rows_with_flips_applied(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "seed", [3, 2])
    labels = label_pool(pool)
    save_set(pool.storage, "silver", [Member(labels, (("label", ("silver",)),))])
    pairs = load_set(pool.storage, "silver")
    rows = pairs.read().to_pylist()
    source = pool.read_all().to_pylist()
    assert [row["pair_id"] for row in rows] == [source[index]["pair_id"] for index in (1, 2, 4)]
    assert [row["flipped"] for row in rows] == [True, False, False]
    assert (rows[0]["chosen"], rows[0]["rejected"]) == (source[1]["rejected"], source[1]["chosen"])
    assert (rows[1]["chosen"], rows[1]["rejected"]) == (source[2]["chosen"], source[2]["rejected"])
    assert load_set(pool.storage, "silver").digest == pairs.digest


def test_a_contradiction_settled_one_way_is_one_pair(tmp_path: Path) -> None:
    storage, pairs = Storage(str(tmp_path)), make_pairs(2)
    turned = pairs.slice(1, 1).to_pylist()[0]
    turned |= {"pair_id": "f" * 32, "chosen": turned["rejected"], "rejected": turned["chosen"]}
    table = pa.concat_tables([pairs, pa.Table.from_pylist([turned], schema=pairs.schema)])
    pool = commit_pool(storage, "wild", "f" * 32, [write_pool_shard(storage, "wild", 0, table)], {})
    sidecar = Sidecar(pool, "verdict", "a" * 32)
    flips = [{"pair_id": i, "flipped": flip, "label": "silver"} for i, flip in zip(table["pair_id"].to_pylist(), (False, False, True), strict=True)]
    sidecar.write(0, pa.Table.from_pylist(flips, schema=LABELS))
    storage.write_json(f"{sidecar.folder}/manifest.json", {"pool_digest": pool.digest, "fingerprint": "a" * 32})
    assert save_set(storage, "all", [Member(sidecar, ())]).read()["pair_id"].to_pylist() == pairs["pair_id"].to_pylist()
