"""Flipping and stopping."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synpref_ray.errors import SchemaError
from synpref_ray.rules.flip import flip_pairs
from synpref_ray.rules.stop import StopConfig, StopReason, stop_reason
from tests.builders import make_pairs


def test_flip_by_hand():
    pairs = make_pairs(3)
    flipped = flip_pairs(pairs, pa.array([False, True, False]))
    assert flipped["chosen"].to_pylist() == ["tea is good", "no tea", "tea is good!!"]
    assert flipped["rejected"].to_pylist() == ["no tea", "tea is good!", "no tea"]
    assert flipped["flipped"].to_pylist() == [False, True, False]
    untouched = [name for name in pairs.column_names if name not in ("chosen", "rejected")]
    assert flipped.select(untouched).equals(pairs.select(untouched))
    assert flipped.column_names == [*pairs.column_names, "flipped"]


@given(st.lists(st.booleans(), min_size=1, max_size=8))
def test_flipping_twice_is_the_identity(flips):
    pairs = make_pairs(len(flips))
    start = flip_pairs(pairs, pa.array([False] * len(flips)))
    assert start.select(pairs.column_names).equals(pairs)
    once = flip_pairs(start, pa.array(flips))
    assert once["flipped"].to_pylist() == flips
    assert flip_pairs(once, pa.array(flips)).equals(start)


def test_flip_of_no_rows_and_bad_masks():
    assert flip_pairs(make_pairs(1).slice(0, 0), pa.array([], pa.bool_())).num_rows == 0
    for flips in (pa.array([True]), pa.array([True, None]), pa.array([1, 0])):
        with pytest.raises(SchemaError, match="needs 2 booleans"):
            flip_pairs(make_pairs(2), flips)


def test_stop_by_hand():
    def reason(accuracies, new=5, **settings):
        return stop_reason(accuracies, num_new_pairs=new, config=StopConfig(**settings))

    assert reason([]) is None
    assert reason([], new=0) is None  # before the first round nothing has been retrieved
    assert reason([0.6] * 7) is None
    assert reason([0.6] * 8) is StopReason.MAX_ROUNDS
    assert reason([0.6, 0.7], max_rounds=2) is StopReason.MAX_ROUNDS
    assert reason([0.6], new=0) is StopReason.NO_NEW_PAIRS
    # plateau of two rounds
    assert reason([0.6, 0.7, 0.7], plateau_rounds=2) is None  # 0.7 beats 0.6
    assert reason([0.6, 0.7, 0.7, 0.69], plateau_rounds=2) is StopReason.PLATEAU
    assert reason([0.6, 0.7, 0.65, 0.71], plateau_rounds=2) is None  # one bad round between two good ones
    assert reason([0.70, 0.705], plateau_rounds=1, min_gain=0.01) is StopReason.PLATEAU
    assert reason([0.70, 0.72], plateau_rounds=1, min_gain=0.01) is None
    assert reason([0.7], plateau_rounds=1) is None
