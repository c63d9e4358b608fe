"""A pair is found by its name, or by a head of it that no other pair has."""

from pathlib import Path

import pytest

from synpref_ray.errors import InputError
from synpref_ray.pipeline.gathering import gather_pool
from synpref_ray.tables.lookup import find_pair
from synpref_ray.tables.pools import commit_pool, write_pool_shard
from synpref_ray.tables.selection import Piece
from synpref_ray.tables.storage import Storage
from tests.builders import make_pairs


@pytest.mark.parametrize("root", ["", "memory://lookup-test/"], ids=["local", "memory"])
def test_every_place_of_a_pair_is_found(tmp_path: Path, root: str) -> None:
    storage = Storage(f"{root}{tmp_path}")
    shards = [write_pool_shard(storage, "wild", number, make_pairs(5, f"topic {number}")) for number in range(3)]
    wild = commit_pool(storage, "wild", "f" * 32, shards, {})
    few = gather_pool(storage, "wild-mismatches", [Piece(wild, 1, (2, 4))], inputs={})
    pair = wild.read(1)["pair_id"][4].as_py()
    for name in (pair, pair[:8], pair[:20]):
        found, places = find_pair(storage, name)
        assert found == pair
        assert [(place.pool.name, place.shard, place.row, place.source) for place in places] == [
            ("wild", 1, 4, None),
            (few.name, 0, 1, ("wild", 1, 4)),
        ]


def test_a_head_that_two_pairs_share_is_refused(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    pairs = make_pairs(2).to_pylist()
    names = ["0123456789abcdef" * 2, "0123456789abcdff" * 2]
    table = make_pairs(2).set_column(0, make_pairs(2).schema.field(0), [names])
    assert len(pairs) == table.num_rows
    commit_pool(storage, "wild", "f" * 32, [write_pool_shard(storage, "wild", 0, table)], {})
    with pytest.raises(InputError, match=r"2 pairs begin with 01234567 .*give more digits"):
        find_pair(storage, "01234567")
    assert find_pair(storage, names[1])[0] == names[1]
