"""k(p) against the paper's steps, worked by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synpref_ray.rules.retrieval import num_neighbours


@pytest.mark.parametrize(
    ("p", "k"),
    [
        (0.0, 8),
        (0.3, 8),
        (0.5, 8),  # wrong, or undecided: k_max
        (0.500001, 4),  # ceil(8 * 0.499999) = ceil(3.999992)
        (0.6, 4),  # ceil(3.2)
        (0.625, 3),  # exactly 3
        (0.7, 3),  # ceil(2.4)
        (0.75, 2),
        (0.8, 2),  # ceil(1.6)
        (0.875, 1),
        (0.99, 1),  # ceil(0.08)
        (1.0, 0),
    ],
)
def test_k_by_hand(p, k):
    assert num_neighbours(p) == k


def test_rounding_does_not_add_a_neighbour():
    assert math.ceil(10 * (1 - 0.7)) == 4  # the trap
    assert num_neighbours(0.7, k_max=10) == 3
    assert num_neighbours(float(np.float32(0.7)), k_max=10) == 3  # 0.699999988...
    assert num_neighbours(0.9, k_max=10) == 1


CONFIDENCES = st.floats(0, 1)


@given(CONFIDENCES, CONFIDENCES, st.integers(0, 64))
def test_k_never_exceeds_k_max_nor_rises_with_p(p, q, k_max):
    low, high = sorted((p, q))
    assert 0 <= num_neighbours(high, k_max) <= num_neighbours(low, k_max) <= k_max


@given(CONFIDENCES)
def test_float32_confidences_cost_at_most_the_guard(p):
    as_float32 = float(np.float32(p))
    exact = 8 if as_float32 <= 0.5 else math.ceil(8 * (1 - as_float32) - 1e-6)
    assert num_neighbours(as_float32) == max(exact, 0)


@pytest.mark.parametrize(("p", "k_max"), [(math.nan, 8), (-0.1, 8), (1.1, 8), (0.5, -1)])
def test_bad_values_are_refused(p, k_max):
    with pytest.raises(ValueError, match="expected"):
        num_neighbours(p, k_max)
