"""Matched controls: exact twins are found, categories are kept, balance is measured by hand, and no candidate is used twice."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synpref_ray.evaluation import matching
from synpref_ray.evaluation.matching import PairFacts, draw, label_noise, match, standardised_differences


def facts(numbers: list[list[float]], categories: str = "", prefix: str = "p") -> PairFacts:
    return PairFacts(
        tuple(f"{prefix}{n}" for n in range(len(numbers))), tuple(categories or "a" * len(numbers)), np.array(numbers, dtype=float).reshape(-1, 3)
    )


def test_twins_are_found() -> None:
    reference = facts([[1, 0, 0.1], [2, 5, 0.4], [9, 1, 0.2]])
    candidates = facts([[9, 1, 0.2], [5, 5, 0.5], [2, 5, 0.4], [1, 0, 0.1]], prefix="c")
    assert match(reference, candidates) == [3, 2, 0]


def test_a_category_outweighs_a_small_distance_and_not_a_large_one() -> None:
    reference = facts([[0, 0, 0], [2, 0, 0]], "ab")  # a standard deviation of 1 in length
    near = facts([[0.5, 0, 0], [0, 0, 0], [2, 0, 0]], "abb", "c")
    assert match(reference, near) == [0, 2]
    far = facts([[30, 0, 0], [0, 0, 0], [2, 0, 0]], "abb", "c")
    assert match(reference, far) == [1, 2]


@given(
    sizes=st.tuples(st.integers(1, 12), st.integers(0, 12)), chunk=st.integers(1, 5), seed=st.integers(0, 5), data=st.randoms(use_true_random=False)
)
def test_every_pair_gets_one_of_its_own(sizes: tuple[int, int], chunk: int, seed: int, data: object) -> None:
    chance = np.random.default_rng(seed)
    reference, candidates = (facts(chance.normal(size=(n, 3)).tolist(), prefix=p) for n, p in ((sizes[0], "p"), (sum(sizes), "c")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "CHUNK", chunk)
        found = match(reference, candidates, seed=seed)
    assert len(set(found)) == len(found) == sizes[0]
    assert min(found) >= 0


def test_too_few_candidates() -> None:
    with pytest.raises(ValueError, match="2 pairs cannot be matched with 1"):
        match(facts([[0, 0, 0], [1, 1, 1]]), facts([[0, 0, 0]]))


def test_differences_by_hand() -> None:
    reference, control = facts([[0, 1, 0], [2, 1, 0]], "ab"), facts([[2, 1, 0.5], [4, 1, 0.5]], "aa")
    found = standardised_differences(reference, control)
    assert found["length"] == pytest.approx(2.0)  # means 1 and 3, both variances 1
    assert found["margin"] == 0.0
    assert found["noise"] == math.inf
    assert abs(found["category"]) == pytest.approx(0.5 / math.sqrt(0.125))  # half against all: variances 0.25 and 0


def test_noise_is_the_models_doubt_of_a_label() -> None:
    found = label_noise(np.array([[0.0, 0.0], [math.log(3), -math.log(3)], [math.log(9), math.nan], [math.nan, math.nan]]))
    assert found == pytest.approx([0.5, 0.5, 0.1, 0.5])


def test_draws_are_nested_and_stable() -> None:
    names = [f"n{n}" for n in range(50)]
    small, large = (draw(names, count, seed=1, use="x") for count in (10, 30))
    assert set(small) < set(large)
    assert small == draw(names, 10, seed=1, use="x") != draw(names, 10, seed=2, use="x")
