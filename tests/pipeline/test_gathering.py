"""Gathered pools: named by their rows, found again by who needs fewer, and scattered back by the shards that they took from alone."""

import threading
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from synpref_ray.pipeline.gathering import find_gathered, gather_pool, gather_sidecars, gathered_from, scatter_sidecars
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
    expected = [scatter_shard(pool, shard.number, [(gathered, result)], LENGTHS) for shard in pool.shards]  # reads every gathered shard
    read: list[int] = []
    read_one = Sidecar.read

    def counted(sidecar: Sidecar, number: int, columns: list[str] | None = None) -> pa.Table:
        if sidecar.pool.name == gathered.name:
            read.append(number)
        return read_one(sidecar, number, columns)

    monkeypatch.setattr(Sidecar, "read", counted)
    scattered = scatter_sidecars(pool, [(gathered, result)], "lengths", LENGTHS)
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

    def find(rows: dict[int, tuple[int, ...]], usable: tuple[Pool, ...] = (all_rows, some)) -> list[str]:
        names = {one.name for one in usable}
        found, missing = find_gathered(storage, "few", pieces(pool, rows), lambda other: 0 if other.name in names else other.num_rows)
        assert not missing
        return [one.name for one in found]

    assert find({0: (3,)}) == [some.name]  # the smallest that will do
    assert find({0: (3,)}, usable=(all_rows,)) == [all_rows.name]
    assert find({0: (3,), 3: (4,)}) == [all_rows.name]
    assert find(ROWS) == [all_rows.name]
    assert find({}) == []
    assert open_pool(storage, some.name).num_rows == 3


def test_what_no_pool_holds_is_left_to_gather(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "wild", [4, 2, 3, 5])
    storage = pool.storage
    wide = {0: (0, 1, 3), 1: (0, 1), 3: (0, 1, 4)}

    def find(source: Pool = pool, name: str = "few") -> tuple[list[str], list[Piece]]:
        found, missing = find_gathered(storage, name, pieces(source, wide), lambda _: 0)
        return [one.name for one in found], missing

    assert find() == ([], pieces(pool, wide))
    first = gather_pool(storage, "few", pieces(pool, {0: (1, 3), 1: (0,)}), inputs={}, max_pairs=2)
    within = gather_pool(storage, "few", pieces(pool, {0: (3,)}), inputs={}, max_pairs=2)  # adds nothing
    across = gather_pool(
        storage, "few", pieces(pool, {0: (1, 2), 3: (1, 2, 3)}), inputs={}, max_pairs=2
    )  # two pairs of these, one of which `first` has
    taken, rest = sorted([first.name, across.name]), pieces(pool, {0: (0,), 1: (1,), 3: (0, 4)})
    assert find() == (taken, rest)
    earlier = replace(pool, shards=pool.shards[:2])  # the version before has no shard 3: what a pool holds of that is passed over
    assert find_gathered(storage, "few", pieces(earlier, {0: (2,)}), lambda _: 0) == ([across], [])
    new = gather_pool(storage, "few", rest, inputs={}, max_pairs=2)
    assert find() == (sorted([*taken, new.name]), [])  # the same again, and the new one
    other_groups = replace(pool, clusters="c" * 32)  # prompts are grouped otherwise there
    assert find(other_groups) == ([], pieces(other_groups, wide))
    assert find(name="others") == ([], pieces(pool, wide))
    assert within.num_rows == 1


def test_a_pool_is_finished_where_that_asks_less_than_asking_anew(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "wild", [4, 2, 3, 5])
    storage = pool.storage
    many = gather_pool(storage, "few", pieces(pool, {0: (0, 1, 2, 3), 1: (0, 1)}), inputs={}, max_pairs=2)  # 6 pairs
    more = gather_pool(storage, "few", pieces(pool, {2: (0, 1, 2)}), inputs={}, max_pairs=2)  # 3 others
    over = gather_pool(storage, "few", pieces(pool, {1: (0, 1), 2: (0, 1)}), inputs={}, max_pairs=2)  # 4, of both

    def find(rows: dict[int, tuple[int, ...]], lacks: dict[str, int]) -> tuple[list[str], list[Piece]]:
        found, missing = find_gathered(storage, "few", pieces(pool, rows), lambda other: lacks[other.name], 3)
        return [one.name for one in found], missing

    wanted = {0: (0, 1, 2, 3), 1: (0, 1), 2: (0, 1, 2), 3: (0,)}
    rest = pieces(pool, {3: (0,)})
    one_new = {many.name: 6, more.name: 3, over.name: 12}  # of three models one is new; nobody answered about the third pool
    assert find(wanted, one_new) == (sorted([many.name, more.name]), rest)
    assert find(wanted, {**one_new, over.name: 0}) == (sorted([many.name, over.name]), pieces(pool, {2: (2,), 3: (0,)}))  # the finished one first
    assert find({0: (0, 1)}, one_new) == ([], pieces(pool, {0: (0, 1)}))  # asking anew costs 6 answers, finishing 6
    assert find({0: (0, 1, 2)}, one_new) == ([many.name], [])  # 9 and 6
    assert find({0: (0, 1, 2)}, {**one_new, many.name: 18}) == ([], pieces(pool, {0: (0, 1, 2)}))
    assert find({1: (0, 1)}, {**one_new, over.name: 4}) == ([over.name], [])  # saves 2 answers, the other none


def test_results_of_several_pools_go_back_together(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "wild", [4, 2, 3, 5])
    rows = ({0: (1, 3), 1: (0,)}, {0: (0, 1), 3: (0, 4)}, {2: (2,)})
    gathered = [gather_pool(pool.storage, "few", pieces(pool, one), inputs={}, max_pairs=2) for one in rows]
    numbers = label(pool)
    results = [gather_sidecars("lengths", LENGTHS, [(one, {pool.name: numbers})])[0] for one in gathered]
    table = results[0].read(0).replace_schema_metadata()
    results[0].write(0, table.set_column(1, "chosen_characters", pa.array([100, 300], pa.int64())))  # what it says of row 1 differs from the second
    several = scatter_sidecars(pool, list(zip(gathered, results, strict=True)), "lengths", LENGTHS)
    assert several.read_all()["chosen_characters"].to_pylist() == [0, 100, None, 300, 4, None, None, None, 8, 9, None, None, None, 13]
    one = scatter_sidecars(pool, [(gathered[0], results[0])], "lengths", LENGTHS)
    assert one.manifest["digests"] == {"gathered": gathered[0].digest, "result": results[0].fingerprint}  # the name that it has always had
    assert one.fingerprint != several.fingerprint


def test_a_pool_is_looked_through_many_shards_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(tmp_path, "wild", [4, 2, 3, 5])
    gathered = gather_pool(pool.storage, "few", pieces(pool, ROWS), inputs={}, max_pairs=2)
    together, read_one = threading.Barrier(3, timeout=60), Pool.read

    def read(self: Pool, number: int, columns: list[str] | None = None) -> pa.Table:
        together.wait()  # its three shards, or nobody goes on
        return read_one(self, number, columns)

    monkeypatch.setattr(Pool, "read", read)
    assert find_gathered(pool.storage, "few", pieces(pool, {3: (4,)}), lambda _: 0) == ([gathered], [])
