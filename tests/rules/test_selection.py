"""The verification queue."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from synpref_ray.rules.selection import QUEUE_SCHEMA, VerificationConfig, select_for_verification


def candidates(rows):
    return pa.table(
        {
            "pair_id": pa.array([row[0] for row in rows], pa.string()),
            "prompt_group": pa.array([row[3] if len(row) > 3 else row[0] for row in rows], pa.string()),
            "objectivity": pa.array([row[1] for row in rows], pa.string()),
            "controversiality": pa.array([row[2] for row in rows], pa.string()),
        }
    )


def test_priority_by_hand():
    rows = [
        ("untagged", None, None),
        ("subjective high", "subjective", "high"),
        ("subjective low", "subjective", "low"),
        ("objective high", "objective", "high"),
        ("objective untold", "objective", None),
        ("objective low", "objective", "low"),
        ("objective medium", "objective", "medium"),
    ]
    queue = select_for_verification(candidates(rows), VerificationConfig(max_pairs=7, random_fraction=0.0))
    assert queue.schema.equals(QUEUE_SCHEMA)
    assert queue["pair_id"].to_pylist() == [
        "objective low",
        "objective medium",
        "objective high",
        "objective untold",
        "subjective low",
        "subjective high",
        "untagged",
    ]
    assert queue["rank"].to_pylist() == list(range(7))


def test_a_share_is_drawn_from_everything():
    rows = [(f"easy {i}", "objective", "low") for i in range(300)] + [(f"hard {i}", "subjective", "high") for i in range(700)]
    queue = select_for_verification(candidates(rows), VerificationConfig(max_pairs=200, random_fraction=0.5)).to_pylist()
    drawn = [row["pair_id"] for row in queue if row["selected_by"] == "chance"]
    assert len(drawn) == 100
    assert 55 <= sum(name.startswith("hard") for name in drawn) <= 85  # 70 expected, standard deviation 4.3
    assert all(row["pair_id"].startswith("easy") for row in queue if row["selected_by"] == "priority")


def test_a_pair_brings_the_other_pairs_of_its_prompt():
    rows = [("c", "objective", "low", "g1"), ("a", "subjective", "high", "g1"), ("b", "objective", "low", "g2"), ("d", None, None, "g2")]
    queue = select_for_verification(candidates(rows), VerificationConfig(max_pairs=2, random_fraction=0.0))["pair_id"].to_pylist()
    assert sorted(queue) in (["a", "c"], ["b", "d"])
    three = select_for_verification(candidates(rows), VerificationConfig(max_pairs=3, random_fraction=0.0))["pair_id"].to_pylist()
    assert three[:2] == queue


ATTRIBUTES = st.tuples(st.sampled_from(["objective", "subjective", None]), st.sampled_from(["low", "medium", "high", None]))


@given(st.lists(ATTRIBUTES, max_size=30), st.integers(0, 40), st.sampled_from([0.0, 0.3, 1.0]), st.randoms())
def test_the_queue_is_full_unique_and_blind_to_row_order(attributes, max_pairs, fraction, random):
    rows = [(f"p{i}", *pair) for i, pair in enumerate(attributes)]
    config = VerificationConfig(max_pairs=max_pairs, random_fraction=fraction, seed=7)
    queue = select_for_verification(candidates(rows), config)
    ids = queue["pair_id"].to_pylist()
    assert len(ids) == len(set(ids)) == min(max_pairs, len(rows))
    random.shuffle(rows)
    assert select_for_verification(candidates(rows), config).equals(queue)


def test_bad_settings():
    with pytest.raises(ValidationError):
        VerificationConfig(max_pairs=-1)
