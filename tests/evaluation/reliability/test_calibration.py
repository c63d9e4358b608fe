"""Calibration by hand: bins, ECE, temperature; and what must hold for any margins."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synpref_ray.evaluation.reliability.calibration import accuracy_by_margin, best_temperature, calibrate, log_loss
from tests.evaluation.reliability.builders import comparisons

LOGIT_80 = math.log(0.8 / 0.2)


def test_a_calibrated_model_has_no_error() -> None:
    measured = calibrate(comparisons([LOGIT_80] * 8 + [-LOGIT_80] * 2), num_resamples=20)
    assert measured.ece.value == pytest.approx(0.0, abs=1e-12)
    assert measured.overconfidence.value == pytest.approx(0.0, abs=1e-12)
    assert measured.temperature == pytest.approx(1.0, abs=0.01)
    assert [(one.num_pairs, round(one.confidence, 6), one.accuracy) for one in measured.bins] == [(10, 0.8, 0.8)]


def test_the_error_by_hand() -> None:
    # At 0.8: 5 of 10 right; at 0.6: 6 of 10 right. ECE = (|8 - 5| + |6 - 6|) / 20.
    low = math.log(0.6 / 0.4)
    measured = calibrate(comparisons([LOGIT_80] * 5 + [-LOGIT_80] * 5 + [low] * 6 + [-low] * 4), num_resamples=200)
    assert measured.ece.value == pytest.approx(0.15)
    assert measured.overconfidence.value == pytest.approx(0.15)
    assert measured.temperature > 1
    assert measured.log_loss_at_temperature < measured.log_loss
    assert measured.ece.low <= 0.15 <= measured.ece.high
    brier = (5 * 0.2**2 + 5 * 0.8**2 + 6 * 0.4**2 + 4 * 0.6**2) / 20
    assert measured.brier == pytest.approx(brier)


def test_ties_are_half_right() -> None:
    measured = calibrate(comparisons([0.0, 0.0]), num_resamples=5)
    assert measured.ece.value == 0.0
    assert measured.bins[0].accuracy == 0.5


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=60))
def test_bins_hold_every_pair_and_the_temperature_never_hurts(margins: list[float]) -> None:
    measured = calibrate(comparisons(margins), num_resamples=3)
    assert sum(one.num_pairs for one in measured.bins) == len(margins)
    assert 0 <= measured.ece.value <= 1
    assert measured.log_loss_at_temperature <= measured.log_loss + 1e-6
    assert all(one.low <= one.confidence <= one.high + 1e-9 for one in measured.bins)


def test_a_temperature_undoes_a_scale() -> None:
    generator = np.random.default_rng(0)
    margins = generator.normal(1.0, 2.0, 400)
    assert best_temperature(3 * margins) == pytest.approx(3 * best_temperature(margins), rel=0.01)
    assert log_loss(np.zeros(3)) == pytest.approx(math.log(2))


def test_accuracy_by_margin_goes_from_small_to_large() -> None:
    parts = accuracy_by_margin(comparisons([0.1, -0.1, 5.0, 6.0]), num_bins=2)
    assert [(part.low, part.high, part.accuracy.accuracy) for part in parts] == [(0.1, 0.1, 0.5), (5.0, 6.0, 1.0)]
    assert sum(part.accuracy.num_pairs for part in accuracy_by_margin(comparisons([1.0, 2.0]))) == 2


def test_intervals_by_margin_draw_prompts() -> None:
    prompts = [f"p{place}" for place in range(40) for _ in range(9)]
    margins = np.repeat(np.where(np.arange(40) < 24, 1.0, -1.0), 9)
    [part] = accuracy_by_margin(comparisons(margins, prompts=prompts), num_bins=1, num_resamples=500)
    assert part.accuracy.accuracy == pytest.approx(0.6)
    assert part.accuracy.high - part.accuracy.low > 0.25


def test_nothing_to_calibrate_on() -> None:
    with pytest.raises(ValueError, match="no scored pairs"):
        calibrate(comparisons([]))
