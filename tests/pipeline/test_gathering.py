"""Gathered pools: named by their rows, found again by who needs fewer, and scattered back by the shards that they took from alone."""

import threading
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from synpref_ray.pipeline.gathering import find_covering_pool, gather_pool, gather_sidecars, gathered_from, scatter_sidecar
from synpref_ray.tables.pools import Pool, open_pool
from synpref_ray.tables.selection import Piece, scatter_shard
from synpref_ray.tables.sidecars import Sidecar
from tests.pipeline.test_steps import LENGTHS, make_pool

ROWS = {0: (1, 3), 1: (0,), 3: (0, 1, 4)}


def pieces(pool: Pool, rows: dict[int, tuple[int, ...]]) -> list[Piece]:
    return [Piece(pool, number, selected) for number, selected in rows.items()]


def label(pool: Pool) -> Sidecar:
    """Write a sealed sidecar with the row's number in the pool."""
    sidecar, first = Sidecar(pool, "lengths", "a" * 32), 0
    for shard in pool.shards:
        ids = pool.read(shard.number, ["pair_id"])["pair_id"]
        numbers = pa.array(range(first, first + shard.rows), pa.int64())
        sidecar.write(shard.number, pa.table([ids, numbers, pa.nulls(shard.rows, pa.string())], schema=LENGTHS))
        first += shard.rows
    pool.storage.write_json(f"{sidecar.folder}/manifest.json", {"pool_digest": pool.digest, "fingerprint": sidecar.fingerprint, "rejected": {}})
    return sidecar


def test_a_gathered_pool_knows_where_its_rows_are_from(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "wild", [4, 2, 3, 5])
    gathered = gather_pool(pool.storage, "few", pieces(pool, ROWS), inputs={"why": "test"}, max_pairs=2)
    assert gather_pool(pool.storage, "few", pieces(pool, ROWS), inputs={"why": "test"}, max_pairs=2) == gathered
    assert gather_pool(pool.storage, "few", pieces(pool, {0: (1, 3)}), inputs={"why": "test"}, max_pairs=2).name != gathered.name
    assert [shard.rows for shard in gathered.shards] == [2, 2, 2]
    places = gathered.read_all(["source_shard", "source_row"]).to_pylist()
    assert [(row["source_shard"], row["source_row"]) for row in places] == [(number, row) for number, rows in ROWS.items() for row in rows]
    found = {number: [shard.number for shard in shards] for number, shards in gathered_from(gathered, pool).items()}
    assert found == {0: [0], 1: [1], 3: [1, 2]}
    assert gathered_from(gathered, replace(pool, name="other")) == {}


def test_results_go_back_to_where_the_rows_are_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(tmp_path, "wild", [4, 2, 3, 5])
    gathered = gather_pool(pool.storage, "few", pieces(pool, ROWS), inputs={}, max_pairs=2)
    result = gather_sidecars("lengths", LENGTHS, [(gathered, {pool.name: label(pool)})])[0]
    expected = [scatter_shard(pool, shard.number, gathered, result, LENGTHS) for shard in pool.shards]  # reads every gathered shard
    read: list[int] = []
    read_one = Sidecar.read

    def counted(sidecar: Sidecar, number: int, columns: list[str] | None = None) -> pa.Table:
        if sidecar.pool.name == gathered.name:
            read.append(number)
        return read_one(sidecar, number, columns)

    monkeypatch.setattr(Sidecar, "read", counted)
    scattered = scatter_sidecar(pool, gathered, result, "lengths", LENGTHS)
    assert sorted(read) == [0, 1, 1, 2]  # shard 1 of the gathered pool has rows of two source shards
    monkeypatch.undo()
    assert [scattered.read(shard.number).replace_schema_metadata() for shard in pool.shards] == expected
    rows = scattered.read_all().to_pylist()
    assert [row["chosen_characters"] for row in rows] == [None, 1, None, 3, 4, None, None, None, None, 9, 10, None, None, 13]
    assert [row["drop_reason"] for row in rows] == [None if row["chosen_characters"] is not None else "not_selected" for row in rows]


def test_a_pool_that_holds_more_serves_who_needs_less(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "wild", [4, 2, 3, 5])
    storage = pool.storage
    all_rows = gather_pool(storage, "few", pieces(pool, ROWS), inputs={}, max_pairs=2)
    some = gather_pool(storage, "few", pieces(pool, {0: (1, 3), 3: (0,)}), inputs={}, max_pairs=2)

    def find(rows: dict[int, tuple[int, ...]], usable: tuple[Pool, ...] = (all_rows, some)) -> str | None:
        found = find_covering_pool(storage, "few", pieces(pool, rows), lambda other: other.name in {one.name for one in usable})
        return found.name if found else None

    assert find({0: (3,)}) == some.name  # the smallest that will do
    assert find({0: (3,)}, usable=(all_rows,)) == all_rows.name
    assert find({0: (3,), 3: (4,)}) == all_rows.name
    assert find(ROWS) == all_rows.name
    assert find({0: (2,)}) is None
    assert find({2: (0,)}) is None
    assert find({}) is None
    assert find_covering_pool(storage, "others", pieces(pool, {0: (3,)}), lambda _: True) is None
    other_groups = replace(pool, clusters="c" * 32)  # prompts are grouped otherwise there
    assert find_covering_pool(storage, "few", pieces(other_groups, {0: (3,)}), lambda _: True) is None
    assert open_pool(storage, some.name).num_rows == 3


def test_a_pool_is_looked_through_many_shards_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(tmp_path, "wild", [4, 2, 3, 5])
    gathered = gather_pool(pool.storage, "few", pieces(pool, ROWS), inputs={}, max_pairs=2)
    together, read_one = threading.Barrier(3, timeout=60), Pool.read

    def read(self: Pool, number: int, columns: list[str] | None = None) -> pa.Table:
        together.wait()  # its three shards, or nobody goes on
        return read_one(self, number, columns)

    monkeypatch.setattr(Pool, "read", read)
    assert find_covering_pool(pool.storage, "few", pieces(pool, {3: (4,)}), lambda _: True) == gathered
