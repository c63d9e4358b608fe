"""Selection by chance and by uncertainty, worked by hand, and what holds for any input."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synpref_ray.rules.query_selection import num_called_for, select_random, shortlist, spread_picks, uncertainty

IDS = [f"{number:032x}" for number in range(40)]


def test_the_budget_is_the_sum_of_k() -> None:
    # k_max 8: wrong 8; 0.6 ceil(3.2) = 4; 0.9 ceil(0.8) = 1; sure 0
    assert num_called_for([0.2, 0.5, 0.6, 0.9, 1.0], 8) == 8 + 8 + 4 + 1
    assert num_called_for([], 8) == 0


def test_uncertainty_by_hand() -> None:
    # H(0.5) = 1 bit, H(0.25) = 0.25 * 2 + 0.75 * log2(4/3), H(0) = H(1) = 0
    quarter = 0.25 * 2 + 0.75 * math.log2(4 / 3)
    assert uncertainty([0.5, 0.25, 0.75, 0.0, 1.0]) == pytest.approx([1, quarter, quarter, 0, 0])
    # both sure of opposites: as uncertain as neither being able to tell; mean of (0.5, 0) is a quarter
    assert uncertainty([1.0, 0.5], [0.0, 0.0]) == pytest.approx([1, quarter])
    assert np.isnan(uncertainty([float("nan")])).all()
    with pytest.raises(ValueError, match="from 0 to 1"):
        uncertainty([1.5])


def test_picks_are_spread_over_directions() -> None:
    """Two tight bundles and one lone direction: three picks are one of each, though the first bundle holds the most wanted rows."""
    angles = np.radians([0, 1, 2, 90, 91, 180])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    assert spread_picks(vectors, 3, 256) == [0, 5, 3]  # 180 degrees is farthest from 0, then 90 from both
    assert spread_picks(vectors, 5, 3) == [0, 5, 3, 1, 4]  # clusters in turn
    assert spread_picks(vectors, 4, 1) == [0, 1, 2, 3]  # one cluster: as wanted
    assert spread_picks(np.zeros((3, 2), np.float32), 2, 8) == [0, 1]
    assert spread_picks(vectors[:0], 3, 8) == []


def test_the_shortlist_is_the_most_uncertain() -> None:
    scores = np.array([0.2, np.nan, 0.9, 0.9, 0.5])
    assert shortlist(IDS[:5], scores, {IDS[4]}, 3) == [2, 3, 0]


@given(st.permutations(range(40)), st.sets(st.sampled_from(IDS)), st.integers(0, 50), st.integers(0, 5))
def test_chance_depends_on_names_alone_and_gives_none_twice(order, already, num_pairs, seed) -> None:
    drawn = select_random([IDS[number] for number in order], already, num_pairs, seed=seed)
    assert drawn == select_random(IDS, already, num_pairs, seed=seed)
    assert len(drawn) == len(set(drawn)) == min(num_pairs, len(set(IDS) - already))
    assert not set(drawn) & already
    rest = select_random(IDS, already | set(drawn), 50, seed=seed)
    assert [*drawn, *rest] == select_random(IDS, already, 50, seed=seed)  # a later round goes on where this one stopped


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.data())
def test_entropy_is_symmetric_and_falls_with_the_margin(confidences, data) -> None:
    found = uncertainty(confidences)
    assert found == pytest.approx(uncertainty([1 - p for p in confidences]), abs=1e-9)
    assert (found >= 0).all()
    assert (found <= 1 + 1e-12).all()
    order = np.argsort([abs(p - 0.5) for p in confidences], kind="stable")
    assert (np.diff(found[order]) <= 1e-9).all()
    other = data.draw(st.lists(st.floats(0, 1), min_size=len(confidences), max_size=len(confidences)))
    alone = (found + uncertainty(other)) / 2
    assert (uncertainty(confidences, other) >= alone - 1e-9).all()  # what two models disagree about is more uncertain than either finds it


@given(st.integers(0, 30), st.integers(0, 40), st.integers(1, 40), st.integers(0, 99))
def test_spread_picks_are_distinct_and_as_many_as_there_can_be(num_rows, num_pairs, max_clusters, seed) -> None:
    vectors = np.random.default_rng(seed).normal(size=(num_rows, 3)).astype(np.float32)
    picks = spread_picks(vectors, num_pairs, max_clusters)
    assert len(picks) == len(set(picks)) == min(num_rows, num_pairs)
    if picks:
        assert picks[0] == 0
    if max_clusters == 1:
        assert picks == list(range(len(picks)))
