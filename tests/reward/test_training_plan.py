from collections import Counter

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from synpref_ray.reward.packing import Group, make_group
from synpref_ray.reward.training_plan import evaluation_steps, learning_rate_factor, plan_epoch, plan_ranks


def group(num_tokens: int) -> Group:
    return make_group([np.arange(num_tokens, dtype=np.int32)])


def test_an_epoch_holds_every_pair_once_in_even_batches() -> None:
    ids = [f"pair-{i}" for i in range(515)]
    batches = plan_epoch(ids, seed=1, epoch=0, global_batch_pairs=32)
    assert sorted(i for batch in batches for i in batch) == list(range(515))
    assert Counter(len(batch) for batch in batches) == {31: 5, 30: 12}  # 515 = 5 * 31 + 12 * 30
    assert plan_epoch([], seed=1, epoch=0, global_batch_pairs=32) == []


def test_the_order_follows_ids_seed_and_epoch_alone() -> None:
    ids = [f"pair-{i}" for i in range(40)]
    order = [ids[i] for i in plan_epoch(ids, seed=1, epoch=0, global_batch_pairs=40)[0]]
    backwards = ids[::-1]
    assert [backwards[i] for i in plan_epoch(backwards, seed=1, epoch=0, global_batch_pairs=40)[0]] == order
    assert [ids[i] for i in plan_epoch(ids, seed=1, epoch=1, global_batch_pairs=40)[0]] != order
    assert [ids[i] for i in plan_epoch(ids, seed=2, epoch=0, global_batch_pairs=40)[0]] != order


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 80), st.integers(1, 4))
def test_ranks_get_equally_many_micro_batches_and_every_pair_once(lengths: list[int], max_tokens: int, world_size: int) -> None:
    ranks = plan_ranks([group(length) for length in lengths], max_tokens, world_size)
    assert len(ranks) == world_size
    assert len({len(rank) for rank in ranks}) == 1
    assert sorted(i for rank in ranks for batch in rank for i in batch) == list(range(len(lengths)))


def test_tokens_are_dealt_evenly() -> None:
    ranks = plan_ranks([group(length) for length in (40, 30, 20, 10)], 1, 2)
    assert ranks == [[[0], [3]], [[1], [2]]]


def test_one_pair_on_two_ranks_leaves_an_empty_micro_batch() -> None:
    assert plan_ranks([group(5)], 100, 2) == [[[0]], [[]]]


def test_learning_rate_by_hand() -> None:
    def factors(schedule: str, warmup: float) -> list[float]:
        return [learning_rate_factor(step, 8, schedule=schedule, warmup_fraction=warmup) for step in range(1, 9)]  # type: ignore[arg-type]

    assert factors("constant", 0.0) == [1.0] * 8
    # 2 warm-up steps of 8: 1/3, 2/3, then from 6/6 down by 1/6
    assert factors("linear", 0.25) == pytest.approx([1 / 3, 2 / 3, 6 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert factors("linear", 0.0) == pytest.approx([8 / 8, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert factors("constant", 0.25) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1])


def test_when_gold_is_evaluated() -> None:
    assert evaluation_steps(10, 2, 2) == {5, 10, 15, 20}
    assert evaluation_steps(3, 1, 4) == {1, 2, 3}
    assert evaluation_steps(1, 2, 4) == {1, 2}
