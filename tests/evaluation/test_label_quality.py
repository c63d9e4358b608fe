"""Label quality by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synpref_ray.evaluation.label_quality import label_quality


def test_by_hand():
    rows = [
        ("keep", "chosen"),
        ("keep", "chosen"),
        ("keep", "rejected"),
        ("flip", "rejected"),
        ("flip", "chosen"),
        ("flip", "rejected"),
        ("flip", "rejected"),
        ("drop", "chosen"),
        ("drop", None),
        ("keep", "abstain"),
    ]
    quality = label_quality(*zip(*rows, strict=True))
    assert quality.raw.accuracy == 4 / 8
    assert quality.kept.accuracy == 2 / 3
    assert quality.flipped.accuracy == 3 / 4
    assert (quality.kept_and_flipped.num_correct, quality.kept_and_flipped.num_pairs) == (5, 7)
    assert quality.dropped.accuracy == 1.0
    assert (quality.kept_share, quality.flipped_share) == (3 / 8, 4 / 8)
    assert quality.num_without_truth == 2
    assert quality.confusion == {
        "keep": {"chosen": 2, "rejected": 1},
        "flip": {"chosen": 1, "rejected": 3},
        "drop": {"chosen": 1, "rejected": 0},
    }
    assert 0.35 < quality.kept_and_flipped.low < 5 / 7 < quality.kept_and_flipped.high < 0.95


def test_nothing_decided():
    quality = label_quality([], [])
    assert math.isnan(quality.raw.accuracy)
    assert math.isnan(quality.kept_share)


@pytest.mark.parametrize(("decisions", "truth"), [(["keep"], []), (["kept"], ["chosen"]), (["keep"], ["better"])])
def test_bad_values(decisions, truth):
    with pytest.raises(ValueError, match=r"expected a truth|is not a valid"):
        label_quality(decisions, truth)


@given(st.lists(st.tuples(st.sampled_from(["keep", "flip", "drop"]), st.sampled_from(["chosen", "rejected", None])), max_size=40))
def test_everything_is_counted_once(rows):
    quality = label_quality([row[0] for row in rows], [row[1] for row in rows])
    counted = sum(count for by_truth in quality.confusion.values() for count in by_truth.values())
    assert counted + quality.num_without_truth == len(rows)
    assert quality.raw.num_pairs == quality.kept.num_pairs + quality.flipped.num_pairs + quality.dropped.num_pairs == counted
    assert quality.kept_and_flipped.num_correct == quality.kept.num_correct + quality.flipped.num_correct
