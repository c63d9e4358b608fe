"""A pool that grows, as parts: what was known of the first version keeps its name."""

from pathlib import Path

import pytest

from synpref_ray.errors import InputError
from synpref_ray.pipeline.steps import Resources, StepInput, run_step
from synpref_ray.tables.parts import join_parts, pool_parts
from synpref_ray.tables.pools import Pool, commit_pool, open_pool, write_pool_shard
from synpref_ray.tables.storage import Storage
from tests.builders import make_pairs
from tests.pipeline.test_steps import counting_step


def grow(storage: Storage, sizes: list[int]) -> Pool:
    """Commit the next version of the pool, with one more shard for each size."""
    before = list(open_pool(storage, "unverified").shards) if storage.exists("pools/unverified") else []
    new = [
        write_pool_shard(storage, "unverified", len(before) + number, make_pairs(size, f"topic {len(before) + number}"))
        for number, size in enumerate(sizes)
    ]
    return commit_pool(storage, "unverified", "f" * 32, [*before, *new], {})


def test_parts_hold_every_shard_once_and_the_first_is_the_first_version(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    first = grow(storage, [3, 2])
    grow(storage, [])
    last = grow(storage, [4])
    parts = pool_parts(storage, "unverified", last.version)
    assert parts[0] == first
    assert [[shard.number for shard in part.shards] for part in parts] == [[0, 1], [2]]
    assert pool_parts(storage, "unverified", 1) == [first]
    assert sum(part.num_rows for part in parts) == last.num_rows


def test_a_step_over_parts_computes_what_joined_and_nothing_else(tmp_path: Path) -> None:
    storage, log = Storage(str(tmp_path / "ws")), tmp_path / "log"
    first = grow(storage, [3, 2])
    step = counting_step(log, Resources())
    before = run_step(step, [StepInput(first, ("chosen",))]).sidecars[0][0]
    assert join_parts([before]) is before
    parts = pool_parts(storage, "unverified", grow(storage, [4]).version)
    again = run_step(step, [StepInput(part, ("chosen",)) for part in parts])
    assert again.sidecars[0][0] == before
    assert again.rows_computed == 4
    both = join_parts([outputs[0] for outputs in again.sidecars])
    assert both.fingerprint != before.fingerprint
    assert [both.read(number).num_rows for number in range(3)] == [3, 2, 4]
    with pytest.raises(InputError, match=r"no part of .* has shard 3"):
        both.read(3)
