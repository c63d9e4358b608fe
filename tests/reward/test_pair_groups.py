"""Pairs of one prompt share rows, identical replies are laid out once, and every pair finds its two rewards."""

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
from hypothesis import given, settings

from synpref_ray.reward.packing import RowLayout, Tokens, batch_tokens
from synpref_ray.reward.pair_groups import group_pairs, num_pairs, pair_places, prompt_keys

SHARING = RowLayout(may_share=True, max_group_tokens=1000)


def tokens(*values: int) -> Tokens:
    return np.asarray(values, dtype=np.int32)


def test_four_replies_in_six_pairs_are_one_row() -> None:
    prompt = (1, 2, 3)
    replies = [tokens(*prompt, 10 + i, 20 + i) for i in range(4)]
    pairs = {}
    for first in range(4):
        for second in range(first + 1, 4):
            pairs[len(pairs)] = (replies[second], replies[first].copy())  # equal tokens, another array
    (group,) = group_pairs(pairs, ["p"] * 6, SHARING)
    assert len(group.group.sequences) == 4
    assert group.group.unique_tokens == 3 + 4 * 2
    for pair, chosen, rejected in zip(group.pairs, group.chosen, group.rejected, strict=True):
        assert group.group.sequences[chosen].tolist() == pairs[pair][0].tolist()
        assert group.group.sequences[rejected].tolist() == pairs[pair][1].tolist()


def test_a_row_does_not_outgrow_its_limit_and_prompts_do_not_mix() -> None:
    pairs = {i: (tokens(1, 2, 3, 10 + i), tokens(1, 2, 3, 30 + i)) for i in range(6)}
    layout = RowLayout(may_share=True, max_group_tokens=3 + 4)
    groups = group_pairs(pairs, ["a", "a", "a", "b", "b", "b"], layout)
    assert [group.pairs for group in groups] == [(0, 1), (2,), (3, 4), (5,)]
    assert all(group.group.unique_tokens <= 7 for group in groups)


def test_without_sharing_identical_replies_are_still_computed_once() -> None:
    common = tokens(1, 2, 3, 4)
    pairs = {0: (common, tokens(1, 2, 9)), 1: (common.copy(), tokens(1, 2, 8))}
    (group,) = group_pairs(pairs, ["p", "p"], RowLayout(may_share=False, max_group_tokens=1000))
    assert (group.group.shared, len(group.group.sequences)) == (False, 3)
    apart = {0: (tokens(1, 2, 3), tokens(1, 2, 4)), 1: (tokens(1, 2, 5), tokens(1, 2, 6))}
    assert len(group_pairs(apart, ["p", "p"], RowLayout(may_share=False, max_group_tokens=1000))) == 2


def test_separate_rows_do_not_outgrow_the_limit_either() -> None:
    """Each further pair would add a padded row."""
    anchor = tokens(1, *range(10, 30))
    pairs = {i: (anchor, tokens(1, *range(40 + i, 60 + i))) for i in range(6)}
    groups = group_pairs(pairs, ["p"] * 6, RowLayout(may_share=False, max_group_tokens=63))
    assert all(batch_tokens([group.group]) <= 63 for group in groups)
    assert [group.pairs for group in groups] == [(0, 1), (2, 3), (4, 5)]


def test_a_pair_of_identical_replies_is_one_sequence() -> None:
    (group,) = group_pairs({0: (tokens(1, 2), tokens(1, 2))}, ["p"], SHARING)
    assert (len(group.group.sequences), group.chosen, group.rejected) == (1, (0,), (0,))


sequences = st.lists(st.integers(0, 3), min_size=1, max_size=6).map(lambda values: np.asarray(values, dtype=np.int32))


@settings(deadline=None)
@given(st.lists(st.tuples(sequences, sequences, st.sampled_from("abc")), max_size=12), st.booleans(), st.integers(1, 30))
def test_every_pair_finds_its_own_replies(pairs: list[tuple[Tokens, Tokens, str]], may_share: bool, longest: int) -> None:
    layout = RowLayout(may_share, longest)
    groups = group_pairs({i: (chosen, rejected) for i, (chosen, rejected, _) in enumerate(pairs)}, [key for _, _, key in pairs], layout)
    assert sorted(pair for group in groups for pair in group.pairs) == list(range(len(pairs)))
    assert num_pairs(groups) == len(pairs)
    laid_out = [sequence for group in groups for sequence in group.group.sequences]
    chosen, rejected = pair_places(groups)
    for pair, first, second in zip((pair for group in groups for pair in group.pairs), chosen, rejected, strict=True):
        assert laid_out[first].tolist() == pairs[pair][0].tolist()
        assert laid_out[second].tolist() == pairs[pair][1].tolist()


def test_equal_prompts_have_equal_keys() -> None:
    turn = {"role": "user", "content": "hi"}
    keys = prompt_keys(pa.chunked_array([pa.array([[turn], [turn, turn], [turn], [{"role": "system", "content": "hi"}]])]))
    assert keys[0] == keys[2]
    assert len(set(keys)) == 3
