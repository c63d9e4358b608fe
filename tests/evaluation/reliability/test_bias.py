"""Biases planted in margins are found where they are, and a correction that moves the pressure to its neighbour is caught."""

import numpy as np
import pytest

from synpref_ray.evaluation.reliability.bias import ALL, audit_biases, corrected_margins, features_of, style_shifts
from synpref_ray.evaluation.reliability.comparisons import Comparisons
from tests.evaluation.reliability.builders import comparisons, reply

P = 400


def texts(seed: int, *, together: bool) -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    """Return better and worse replies whose words and marks vary, together or apart, and the two differences."""
    chance = np.random.default_rng(seed)
    words = chance.integers(5, 60, size=(P, 2))
    marks = words // 4 + chance.integers(0, 3, size=(P, 2)) if together else chance.integers(0, 15, size=(P, 2))
    sides = [[reply(int(w), int(m), place) for place, (w, m) in enumerate(zip(words[:, s], marks[:, s], strict=True))] for s in (0, 1)]
    features = [np.array([features_of(text) for text in side]) for side in sides]
    difference = features[0] - features[1]
    return sides[0], sides[1], difference[:, 0], difference[:, 1]


def planted(length: float, markdown: float, *, together: bool, noise: float = 0.5) -> Comparisons:
    better, worse, by_length, by_markdown = texts(3, together=together)
    chance = np.random.default_rng(9)
    return comparisons(1.0 + length * by_length + markdown * by_markdown + chance.normal(0, noise, P), better, worse)


def test_features_by_hand() -> None:
    length, markdown, verbosity = features_of("# One\n- two two\n**bold**")
    assert length == pytest.approx(np.log1p(4))
    assert markdown == pytest.approx(np.log1p(4))  # heading, list item, two bold marks
    assert verbosity == pytest.approx(1 / 4)
    assert features_of("") == (0.0, 0.0, 0.0)


def test_a_planted_length_bias_is_found_and_nothing_else() -> None:
    report = audit_biases(planted(1.0, 0.0, together=False), num_resamples=200)
    assert report.features["length"].slope.low > 0.5
    assert report.features["length"].pressure.low > 0.5
    assert abs(report.features["markdown"].slope.value) < 0.1
    assert report.features["length"].more.accuracy > report.features["length"].less.accuracy
    assert "verbosity" not in report.features  # no word repeats: no pair differs


def test_taking_length_out_of_a_model_biased_for_length_moves_nothing() -> None:
    report = audit_biases(planted(1.0, 0.0, together=True), num_resamples=200)
    length = next(one for one in report.mitigations if one.mitigated == "length")
    assert abs(length.after["length"]) < 0.1 < abs(length.before["length"])
    assert length.moved_to == ()


def test_a_correction_that_moves_the_pressure_to_markdown_is_caught() -> None:
    """Length is favoured and Markdown punished. They go together, and so much that Markdown's own pressure is hidden; without length it shows.

    With both differences in standard deviations and their correlation rho, margin = L / rho - M has no covariance with M, and without what L explains
    by itself, -(M - rho L), its correlation with M is -sqrt(1 - rho^2).
    """
    better, worse, length, markdown = texts(3, together=True)
    length, markdown = ((values - values.mean()) / values.std() for values in (length, markdown))
    rho = float(np.mean(length * markdown))
    margins = 1.0 + length / rho - markdown + np.random.default_rng(9).normal(0, 0.05, P)
    report = audit_biases(comparisons(margins, better, worse), num_resamples=300)
    mended = {one.mitigated: one for one in report.mitigations}
    assert abs(mended["length"].before["markdown"]) < 0.05
    assert mended["length"].after["markdown"] == pytest.approx(-np.sqrt(1 - rho**2), abs=0.05)
    assert mended["length"].moved_to == ("markdown",)
    assert mended[ALL].moved_to == ()
    assert max(abs(value) for value in mended[ALL].after.values()) < 0.15


def test_a_correction_never_sees_the_pairs_it_corrects() -> None:
    pairs = planted(1.0, 0.0, together=False)
    difference = np.array([features_of(a)[0] - features_of(b)[0] for a, b in zip(pairs.better, pairs.worse, strict=True)])[:, np.newaxis]
    once = corrected_margins(pairs.margins, difference, pairs.prompts)
    changed = pairs.margins.copy()
    changed[0] += 100.0
    again = corrected_margins(changed, difference, pairs.prompts)
    assert again[0] - once[0] == pytest.approx(100.0)  # its own margin has no part in its slope


def test_few_pairs_say_nothing() -> None:
    with pytest.raises(ValueError, match="20 scored pairs or more"):
        audit_biases(comparisons([1.0] * 5))
    flat = audit_biases(comparisons([1.0] * 30))
    assert flat.features == {}


def test_style_shifts_by_hand() -> None:
    # Right over wrong is worth 2 at every style; detailed adds 1, Markdown 3.
    rewards = np.array([[2.0, 3.0, 5.0, 0.0, 1.0, 3.0]] * 4)
    found = style_shifts(rewards, ["a", "b", "c", "d"], num_resamples=20)
    assert found["right_over_wrong"].value == 2.0
    assert found["detailed_over_concise"].value == 0.5
    assert found["markdown_over_concise"].value == 1.5
    assert found["markdown_over_detailed"].value == 1.0
    assert found["markdown_over_concise"].low == found["markdown_over_concise"].high == 1.5


def test_below_chance_there_is_no_unit_for_style_shifts() -> None:
    rewards = np.array([[0.0, 1.0, 3.0, 2.0, 3.0, 5.0]] * 4)  # wrong over right by 2 at every style; Markdown adds 3 as above
    found = style_shifts(rewards, ["a", "b", "c", "d"], num_resamples=20)
    assert found["right_over_wrong"].value == -2.0
    assert all(np.isnan([one.value, one.low, one.high]).all() for name, one in found.items() if name != "right_over_wrong")
    mixed = np.array([[2.0, 3.0, 5.0, 0.0, 1.0, 3.0], [0.0, 1.0, 3.0, 1.5, 2.5, 4.5]])  # in a quarter of the resamples wrong is over right
    shift = style_shifts(mixed, ["a", "b"], num_resamples=100)["markdown_over_concise"]
    assert shift.value == pytest.approx(3 / 0.25)
    assert 0 < shift.low <= shift.value <= shift.high


def test_accuracies_where_there_is_more_or_less_draw_prompts() -> None:
    """Each prompt has nine comparisons, all right or all wrong: the interval is that of 40 prompts, not of 360 comparisons."""
    chance = np.random.default_rng(4)
    prompts = [f"p{place}" for place in range(40) for _ in range(9)]
    margins = np.repeat(np.where(np.arange(40) < 24, 1.0, -1.0), 9) * chance.uniform(0.5, 1.5, 360)
    better = [reply(int(words), 0, place) for place, words in enumerate(chance.integers(20, 40, 360))]
    pairs = comparisons(margins, better, [reply(10)] * 360, prompts)
    more = audit_biases(pairs, num_resamples=500).features["length"].more
    assert more.accuracy == pytest.approx(0.6)
    assert more.high - more.low > 0.25  # Wilson's over 360 would be 0.10 wide
