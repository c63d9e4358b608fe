"""The scaling curve: exact points give their law back, sizes and gains by hand, and what cannot be reached is refused."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synpref_ray.errors import InputError
from synpref_ray.planning.scaling import CurvePoint, Interval, Law, StopRule, fit_curve, pairs_for_target, stop_size, stop_verdict

LAW = Law(limit=90.0, drop=400.0, power=0.5)


def points(law: Law, sizes: list[float], noise: float = 0.0, runs: int = 1) -> list[CurvePoint]:
    generator = np.random.default_rng(1)
    return [CurvePoint(pairs=size, score=law.score(size) + noise * generator.normal()) for size in sizes for _ in range(runs)]


def test_the_law_by_hand() -> None:
    assert LAW.score(400) == 70  # 90 - 400 / 20
    assert LAW.size_for(80) == 1600  # (400 / 10)^2
    assert LAW.gain(400, 1200) == 10
    assert LAW.size_for(90) == math.inf
    assert Law(80.0, 0.0, 0.5).size_for(79) == 0


def test_points_without_noise_give_the_law_back() -> None:
    curve = fit_curve(points(LAW, [100, 400, 1600, 6400]), num_resamples=50)
    assert curve.law.power == pytest.approx(0.5, rel=0.03)
    assert curve.law.limit == pytest.approx(90, abs=0.5)
    assert curve.score(1600).value == pytest.approx(80, abs=0.1)
    assert pairs_for_target(curve, 80).value == pytest.approx(1600, rel=0.02)


def test_the_interval_holds_the_truth_and_widens_with_noise() -> None:
    sizes = [100.0, 400.0, 1600.0, 6400.0]
    narrow, wide = (fit_curve(points(LAW, sizes, noise, 3)).score(1600) for noise in (0.1, 1.0))
    assert narrow.low <= 80 <= narrow.high
    assert narrow.high - narrow.low < wide.high - wide.low
    again = fit_curve(points(LAW, sizes, 1.0, 3)).score(1600)
    assert again == wide


def test_a_flat_curve_promises_nothing() -> None:
    curve = fit_curve([CurvePoint(pairs=size, score=70.0) for size in (10, 100, 1000)])
    assert curve.law.drop == 0
    assert stop_size(curve.law, StopRule()) == 0
    with pytest.raises(InputError, match=r"levels off at 70\.00"):
        pairs_for_target(curve, 71)


def test_no_limit_is_above_the_ceiling() -> None:
    steep = [CurvePoint(pairs=size, score=score) for size, score in ((10, 50.0), (100, 65.0), (1000, 80.0), (10_000, 95.0))]  # as far as they go
    assert fit_curve(steep, num_resamples=20).law.limit > 100
    bounded = fit_curve(steep, ceiling=100.0, num_resamples=20)
    assert bounded.law.limit <= 100
    assert bounded.limit().high <= 100
    assert bounded.law.drop > 0
    assert fit_curve(points(LAW, [100, 400, 1600]), ceiling=100.0).law == fit_curve(points(LAW, [100, 400, 1600])).law


def test_three_points_are_a_curve_of_which_nothing_is_sure() -> None:
    curve = fit_curve(points(LAW, [100, 400, 1600]))
    assert (curve.score(1600).low, curve.score(1600).high) == (-math.inf, math.inf)
    assert stop_verdict(curve.gain(1600, 1e6), StopRule(min_gain=0.001)) == "undecided"
    again = fit_curve(points(LAW, [100, 400, 1600], 0.5, 2))  # six runs at three sizes leave residuals
    assert 0 < again.score(1600).high - again.score(1600).low < 10
    with pytest.raises(InputError, match=r"levels off at [\d.]+, fitted to 3 runs"):
        pairs_for_target(curve, 99)


def test_a_gain_decides_only_with_its_whole_interval() -> None:
    rule = StopRule(min_gain=0.3)
    assert stop_verdict(Interval(0.2, 0.1, 0.29), rule) == "stop"
    assert stop_verdict(Interval(0.2, 0.1, 0.4), rule) == "undecided"
    assert stop_verdict(Interval(0.5, 0.3, 0.9), rule) == "go on"


def test_two_sizes_are_no_curve() -> None:
    with pytest.raises(InputError, match="3 sizes or more, found 2"):
        fit_curve([CurvePoint(pairs=10, score=1), CurvePoint(pairs=10, score=2), CurvePoint(pairs=20, score=3)])


@given(limit=st.floats(50, 100), drop=st.floats(1, 1e4), power=st.floats(0.1, 1.5), gain=st.floats(0.01, 5))
def test_stopping_is_where_the_gain_falls_below_the_threshold(limit: float, drop: float, power: float, gain: float) -> None:
    law, rule = Law(limit, drop, power), StopRule(min_gain=gain, per_pairs=1e6)
    size = stop_size(law, rule)
    if math.isfinite(size):
        assert law.gain(size, 1e6) < gain
        if size > 2:
            assert law.gain(size - max(2.0, 2e-6 * size), 1e6) >= gain * (1 - 1e-6)


@given(drop=st.floats(0, 1e4), power=st.floats(0.05, 2.0), sizes=st.lists(st.floats(10, 1e7), min_size=2, max_size=5))
def test_scores_never_fall_with_size(drop: float, power: float, sizes: list[float]) -> None:
    law = Law(80.0, drop, power)
    scores = [law.score(size) for size in sorted(sizes)]
    assert scores == sorted(scores)
