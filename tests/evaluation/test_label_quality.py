"""Label quality by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synpref_ray.evaluation.label_quality import flip_detection, label_quality


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


def test_flip_detection_by_hand():
    # wrong labels: two flipped, one dropped, one kept; right ones: one flipped, one dropped, two kept; one pair without truth
    rows = [("flip", "rejected")] * 2 + [("drop", "rejected"), ("keep", "rejected"), ("flip", "chosen"), ("drop", "chosen")]
    rows += [("keep", "chosen")] * 2 + [("flip", None), ("flip", "abstain")]
    found = flip_detection(*zip(*rows, strict=True))
    assert (found.precision.num_correct, found.precision.num_pairs) == (2, 3)
    assert (found.recall.num_correct, found.recall.num_pairs) == (2, 4)
    assert (found.removed.num_correct, found.removed.num_pairs) == (3, 4)
    assert (found.lost.num_correct, found.lost.num_pairs) == (2, 4)
    assert math.isnan(flip_detection([], []).precision.accuracy)


def test_nothing_found_has_an_interval_all_the_same():
    """Five wrong labels of five prompts, none flipped: a bootstrap would say 0 to 0; Wilson's interval of 0 of 5 ends at z² / (5 + z²) = 0.434."""
    found = flip_detection(["keep"] * 5, ["rejected"] * 5, groups=list("abcde"))
    assert (found.recall.low, found.recall.high) == (0.0, pytest.approx(0.4345, abs=1e-3))
    of_one_prompt = flip_detection(["flip"] * 5, ["rejected"] * 5, groups=["a"] * 5)
    assert of_one_prompt.precision.low == pytest.approx(1 / (1 + 1.959964**2), abs=1e-6)  # one prompt is one trial


def test_an_entry_stands_for_as_many_pairs_as_it_counts():
    entries = [
        ("keep", "chosen", "a", 3),
        ("flip", "chosen", "a", 1),
        ("flip", "rejected", "b", 2),
        ("drop", "rejected", "c", 1),
        ("keep", None, "c", 4),
    ]
    apart = [entry[:3] for entry in entries for _ in range(entry[3])]
    for measure in (label_quality, flip_detection):
        decisions, truth, groups = zip(*apart, strict=True)
        counted = measure([e[0] for e in entries], [e[1] for e in entries], groups=[e[2] for e in entries], counts=[e[3] for e in entries])
        assert counted == measure(decisions, truth, groups=groups)
        alone = measure([e[0] for e in entries], [e[1] for e in entries], counts=[e[3] for e in entries])
        assert alone == measure(decisions, truth)
    with pytest.raises(ValueError, match="a count for each"):
        label_quality(["keep"], ["chosen"], counts=[1, 2])


DECISIONS = st.lists(st.tuples(st.sampled_from(["keep", "flip", "drop"]), st.sampled_from(["chosen", "rejected", None])), max_size=30)


@given(DECISIONS)
def test_flips_found_are_flips_found_whichever_way_one_counts(rows):
    decisions, truth = [row[0] for row in rows], [row[1] for row in rows]
    found, quality = flip_detection(decisions, truth), label_quality(decisions, truth)
    assert found.precision.num_correct == found.recall.num_correct == quality.flipped.num_correct
    assert found.recall.num_pairs == found.removed.num_pairs == quality.raw.num_pairs - quality.raw.num_correct
    assert found.lost.num_pairs == quality.raw.num_correct
    assert found.recall.num_correct <= found.removed.num_correct
