from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from synpref_ray.reward.packing import (
    PADDING,
    Group,
    attention_mask,
    common_prefix_tokens,
    make_group,
    pack,
    packing_stats,
    plan_batches,
)


def tokens(*ids: int) -> Any:
    return np.asarray(ids, dtype=np.int32)


SEQUENCE = st.lists(st.integers(0, 2), min_size=1, max_size=12).map(lambda ids: tokens(*ids))
GROUPS = st.lists(st.lists(SEQUENCE, min_size=1, max_size=4).map(make_group), min_size=1, max_size=12)


def test_common_prefix() -> None:
    assert common_prefix_tokens([tokens(1, 2, 3), tokens(1, 2, 4)]) == 2
    assert common_prefix_tokens([tokens(1, 2), tokens(1, 2, 4), tokens(1, 9)]) == 1
    assert common_prefix_tokens([tokens(1), tokens(2)]) == 0
    assert common_prefix_tokens([tokens(1, 2), tokens(1, 2)]) == 2


def test_a_shared_row_by_hand() -> None:
    batch = pack([make_group([tokens(5, 6, 7), tokens(5, 6, 8, 9)])], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.positions.tolist() == [[0, 1, 2, 2, 3]]
    assert batch.branches.tolist() == [[0, 0, 1, 2, 2]]
    assert (batch.last_rows.tolist(), batch.last_columns.tolist()) == ([0, 0], [2, 4])
    assert attention_mask(batch)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]
    # a window of two positions: position 3 of branch 2 sees positions 2 and 3 of its branch, and nothing of the prefix
    assert attention_mask(batch, window=2)[0, 0].int().tolist()[3:] == [[0, 1, 0, 1, 0], [0, 0, 0, 1, 1]]


def test_padding_sees_itself_only_where_nothing_else_is() -> None:
    batch = pack([Group((tokens(1),), 1, shared=False), Group((tokens(2, 3, 4),), 3, shared=False)], pad_id=3)
    assert batch.branches.tolist() == [[0, PADDING, PADDING], [0, 0, 0]]
    assert batch.last_columns.tolist() == [0, 2]
    mask = attention_mask(batch)[0, 0]
    assert mask[:, 1:].int().tolist() == [[0, 0], [1, 0], [0, 1]]


def test_a_prefix_without_gain_is_not_shared() -> None:
    assert not make_group([tokens(1, 2), tokens(3, 4)]).shared
    assert not make_group([tokens(1, 2)]).shared
    assert make_group([tokens(1, 2), tokens(1, 4)]).shared
    assert not make_group([tokens(1, 2), tokens(1, 4)], may_share=False).shared
    # 3 shared tokens before 100-token replies: 203 + 203^2/100 = 615 against 2 * (103 + 103^2/100) = 418
    long = [np.concatenate([tokens(7, 8, 9), np.full(100, fill, dtype=np.int32)]) for fill in (1, 2)]
    assert not make_group(long, quadratic_tokens=100).shared
    assert make_group(long).shared


def test_identical_replies_and_a_reply_that_begins_another() -> None:
    same = pack([make_group([tokens(1, 2), tokens(1, 2)])])
    assert (same.input_ids.tolist(), same.last_columns.tolist()) == ([[1, 2]], [1, 1])
    begins = pack([make_group([tokens(1, 2), tokens(1, 2, 3)])])
    assert (begins.input_ids.tolist(), begins.last_columns.tolist()) == ([[1, 2, 3]], [1, 2])


def test_empty_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        make_group([tokens(), tokens(1)])


@settings(deadline=None)
@given(GROUPS, st.integers(4, 40), st.integers(0, 10))
def test_plans_hold_every_group_once_within_the_budget(groups: list[Group], max_tokens: int, overhead: int) -> None:
    plan = plan_batches(groups, max_tokens, overhead_tokens=overhead)
    assert sorted(i for batch in plan for i in batch) == list(range(len(groups)))
    for batch in plan:
        padded = sum(groups[i].num_rows for i in batch) * max(groups[i].row_tokens for i in batch)
        assert padded <= max_tokens or len(batch) == 1
    stats = packing_stats(groups, plan)
    assert stats.unique_tokens <= stats.computed_tokens <= min(stats.padded_tokens, stats.sequence_tokens)


def test_the_plan_is_the_cheapest_by_hand() -> None:
    groups = [Group((tokens(*range(n)),), n, shared=False) for n in (2, 10, 9, 2)]
    # sorted 10 9 2 2: [10 9][2 2] costs 20 + 4 + 2 * 3; one batch 40 + 3; [10][9][2 2] 10 + 9 + 4 + 9
    assert plan_batches(groups, 1000, overhead_tokens=3) == [[1, 2], [0, 3]]
    assert plan_batches(groups, 1000, overhead_tokens=100) == [[1, 2, 0, 3]]
    assert plan_batches(groups, 10, overhead_tokens=3) == [[1], [2], [0, 3]]
    assert plan_batches([], 10) == []


@settings(deadline=None)
@given(GROUPS)
def test_every_sequence_can_be_read_back_from_its_row(groups: list[Group]) -> None:
    batch = pack(groups)
    mask = attention_mask(batch)
    sequences = [sequence for group in groups for sequence in group.sequences]
    for sequence, row, column in zip(sequences, batch.last_rows.tolist(), batch.last_columns.tolist(), strict=True):
        seen = torch.nonzero(mask[row, 0, column]).flatten()
        assert batch.input_ids[row, seen].tolist() == sequence.tolist()
        assert batch.positions[row, seen].tolist() == list(range(len(sequence)))
