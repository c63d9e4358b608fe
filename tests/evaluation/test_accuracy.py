"""Accuracies and their intervals, worked by hand or against exact distributions."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synpref_ray.evaluation.accuracy import (
    accuracy_by,
    as_metrics,
    bootstrap_accuracy,
    is_correct,
    pair_accuracy,
    paired_bootstrap,
)


def flags(right, wrong):
    return np.array([True] * right + [False] * wrong)


def test_a_tie_is_wrong():
    assert is_correct([1.0, 0.0, -0.0, -1.0, 1e-30, math.inf]).tolist() == [True, False, False, False, True, True]
    with pytest.raises(ValueError, match="1 of 2 margins"):
        is_correct([1.0, math.nan])


def test_accuracy_by_hand():
    result = pair_accuracy(flags(7, 3))
    # the Wilson interval of 7 of 10, worked in tests/rules/test_judges.py
    assert (result.num_pairs, result.num_correct, result.accuracy) == (10, 7, 0.7)
    assert (result.low, result.high) == pytest.approx((0.396779, 0.892209), abs=2e-6)
    empty = pair_accuracy([])
    assert math.isnan(empty.accuracy)
    assert (empty.num_pairs, empty.low, empty.high) == (0, 0.0, 1.0)


def test_accuracy_by_group():
    result = accuracy_by([True, False, True, True], ["math", "math", None, "coding"])
    assert {name: (group.num_correct, group.num_pairs) for name, group in result.items()} == {
        "coding": (1, 1),
        "math": (1, 2),
        "unknown": (1, 1),
    }
    with pytest.raises(ValueError, match="found 1"):
        accuracy_by([True, False], ["math"])


def test_groups_of_dependent_pairs_have_intervals_over_prompts() -> None:
    right = [True, True, False, False] * 10
    prompts = [f"p{place // 2}" for place in range(40)]  # both pairs of a prompt are right, or both wrong
    [alone] = accuracy_by(right, ["math"] * 40).values()
    [drawn] = accuracy_by(right, ["math"] * 40, prompts=prompts, num_resamples=500).values()
    assert (alone.num_pairs, alone.accuracy) == (drawn.num_pairs, drawn.accuracy) == (40, 0.5)
    assert drawn.high - drawn.low > 1.2 * (alone.high - alone.low)
    with pytest.raises(ValueError, match="a prompt for each"):
        accuracy_by(right, ["math"] * 40, prompts=["p"])


def test_bootstrap_against_the_exact_distribution():
    # 60 of 100 right: resampled counts are binomial(100, 0.6), whose 2.5 % and 97.5 % quantiles are 50 and 69 (normal: 60 -+ 1.96 * 4.899)
    result = bootstrap_accuracy(flags(60, 40), seed=1)
    assert result.accuracy == 0.6
    assert result.low == pytest.approx(0.50, abs=0.0101)
    assert result.high == pytest.approx(0.69, abs=0.0101)
    assert bootstrap_accuracy(flags(60, 40), seed=1) == result
    assert bootstrap_accuracy(flags(5, 0)).low == 1.0
    with pytest.raises(ValueError, match="no pairs"):
        bootstrap_accuracy([])


def test_the_bootstrap_works_in_blocks_when_there_are_many_pairs():
    many = flags(60_000, 40_000)
    result = bootstrap_accuracy(many, num_resamples=200)  # 8 M draws per block are 83 resamples
    # standard deviation sqrt(0.24 / 100,000) = 0.00155
    assert result.high - result.low == pytest.approx(2 * 1.96 * 0.00155, rel=0.25)


def test_grouped_pairs_are_drawn_together():
    """Ten copies of each of 40 outcomes hold the information of 40 pairs: the interval is sqrt(10) times wider."""
    outcomes = flags(24, 16)
    copies, prompts = np.repeat(outcomes, 10), np.repeat([f"prompt {i}" for i in range(40)], 10)
    grouped, alone = bootstrap_accuracy(copies, groups=list(prompts)), bootstrap_accuracy(outcomes)
    assert grouped.accuracy == alone.accuracy == 0.6
    assert (grouped.low, grouped.high) == pytest.approx((alone.low, alone.high), abs=0.026)  # one step of 1/40
    naive = bootstrap_accuracy(copies)
    assert (grouped.high - grouped.low) / (naive.high - naive.low) == pytest.approx(math.sqrt(10), rel=0.15)
    with pytest.raises(ValueError, match="a group for each"):
        bootstrap_accuracy(copies, groups=["one"])


def test_groups_of_different_size_weigh_by_their_pairs():
    # groups of 3 right and 1 wrong: resamples hold both (3/4), twice the first (1), or twice the second (0)
    result = bootstrap_accuracy([True, True, True, False], groups=["a", "a", "a", "b"])
    assert (result.accuracy, result.low, result.high) == (0.75, 0.0, 1.0)


def test_difference_by_hand():
    a = np.array([True, True, True, False])
    b = np.array([True, False, False, False])
    result = paired_bootstrap(a, b)
    assert (result.accuracy_a, result.accuracy_b, result.difference) == (0.75, 0.25, 0.5)
    assert (result.num_pairs, result.num_seeds) == (4, 1)
    # differences are 0, 1, 1, 0: resampled sums are binomial(4, 1/2), and 0 of 4 comes with probability 1/16 > 2.5 %
    assert (result.low, result.high) == (0.0, 1.0)
    assert not result.is_above_zero


def test_pairing_removes_what_both_models_share():
    """A is right wherever B is, and on 10 of 200 pairs more: sure, though each accuracy alone is uncertain by 7 points."""
    b = flags(100, 100)
    a = b.copy()
    a[100:110] = True
    result = paired_bootstrap(a, b, seed=3)
    assert result.difference == pytest.approx(0.05)
    # resampled sums are binomial(200, 0.05): mean 10, quantiles 4 and 16
    assert (result.low, result.high) == pytest.approx((0.02, 0.08), abs=0.0051)
    assert result.is_above_zero
    swapped = paired_bootstrap(b, a, seed=3)
    assert (swapped.low, swapped.high) == pytest.approx((-result.high, -result.low), abs=1e-12)
    same = paired_bootstrap(a, a)
    assert (same.difference, same.low, same.high) == (0.0, 0.0, 0.0)


def test_seeds_are_averaged_before_pairs_are_drawn():
    # pair by pair over two seeds: A 1, 0.5, 0.5, 0; B 0.5, 0.5, 0, 0; differences 0.5, 0, 0.5, 0
    a = np.array([[True, True, False, False], [True, False, True, False]])
    b = np.array([[True, True, False, False], [False, False, False, False]])
    result = paired_bootstrap(a, b)
    assert (result.accuracy_a, result.accuracy_b, result.difference) == (0.5, 0.25, 0.25)
    assert result.num_seeds == 2
    assert (result.low, result.high) == (0.0, 0.5)  # half of binomial(4, 1/2) over 4
    # repeating a run brings no new pairs: the interval must not shrink
    assert paired_bootstrap(np.repeat(a, 5, axis=0), np.repeat(b, 5, axis=0)).low == result.low
    assert paired_bootstrap(a, b[0]).num_seeds == 1


def test_bad_input():
    with pytest.raises(ValueError, match="same pairs"):
        paired_bootstrap([True], [True, False])
    with pytest.raises(ValueError, match="through is_correct"):
        pair_accuracy([0.3, -0.2])
    with pytest.raises(ValueError, match="axes"):
        pair_accuracy([[True]])


def test_metrics_are_flat():
    metrics = as_metrics("held_out", pair_accuracy(flags(1, 1)))
    assert metrics["held_out/accuracy"] == 0.5
    assert set(metrics) == {f"held_out/{name}" for name in ("num_pairs", "num_correct", "accuracy", "low", "high")}


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30), st.integers(0, 3))
def test_the_interval_holds_the_difference_and_mirrors(rows, seed):
    a, b = (np.array([row[model] for row in rows]) for model in (0, 1))
    result = paired_bootstrap(a, b, seed=seed, num_resamples=400)
    assert -1 <= result.low <= result.high <= 1
    mirrored = paired_bootstrap(b, a, seed=seed, num_resamples=400)
    assert mirrored.difference == pytest.approx(-result.difference)
    assert (mirrored.low, mirrored.high) == pytest.approx((-result.high, -result.low))
