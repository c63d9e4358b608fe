"""Clean gold: the split, and every check against attempts to get gold where it must not be."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synpref_ray.errors import CleanGoldError
from synpref_ray.rules.gold import (
    GoldConfig,
    GoldSplit,
    check_best_rm_training,
    check_exemplars,
    check_gold_rm_training,
    check_silver,
    check_split,
    describe_small_gold,
    gold_split,
    split_gold,
)
from synpref_ray.schema import pair_id, prompt_group


def pairs(*rows, **columns):
    """A table of (pair_id, prompt_group) rows and further columns."""
    table = {"pair_id": pa.array([row[0] for row in rows], pa.string()), "prompt_group": pa.array([row[1] for row in rows], pa.string())}
    return pa.table({**table, **columns})


GOLD = pairs(("w1", "A"), ("w2", "A"), ("w3", "B"), ("a1", "C"), gold_split=["working", "working", "working", "audit"])


def targets(*rows):
    """A table of (pair_id, prompt_group, exemplar_ids) rows."""
    return pairs(*(row[:2] for row in rows), exemplar_ids=pa.array([row[2] for row in rows], pa.list_(pa.string())))


def test_the_split_depends_on_group_and_seed_alone():
    groups = [f"group {i}" for i in range(2000)]
    config = GoldConfig(seed=3, audit_fraction=0.25)
    splits = split_gold(pa.array(groups), config).to_pylist()
    assert splits == [gold_split(group, config) for group in groups]
    assert splits[::-1] == split_gold(pa.array(groups[::-1]), config).to_pylist()
    assert splits.count("audit") / 2000 == pytest.approx(0.25, abs=0.03)  # three standard deviations of 2,000 draws are 0.029
    assert splits != split_gold(pa.array(groups), GoldConfig(seed=4, audit_fraction=0.25)).to_pylist()
    assert split_gold(pa.array([], pa.string()), config).to_pylist() == []


@given(st.lists(st.sampled_from("abcdefgh"), max_size=30), st.integers(0, 5))
def test_no_group_lies_on_both_sides(groups, seed):
    splits = split_gold(pa.chunked_array([groups[:3], groups[3:]], pa.string()), GoldConfig(seed=seed, audit_fraction=0.5)).to_pylist()
    assert len({*zip(groups, splits, strict=True)}) == len(set(groups))


def test_a_moved_gold_pair_is_found():
    config = GoldConfig()
    gold = pairs(("p1", "A"), ("p2", "B"))
    good = gold.append_column("gold_split", split_gold(gold["prompt_group"], config))
    check_split(good, config)
    other = {"working": "audit", "audit": "working"}
    for bad in (other[good["gold_split"][1].as_py()], None, "test"):
        moved = gold.append_column("gold_split", pa.array([good["gold_split"][0].as_py(), bad]))
        with pytest.raises(CleanGoldError, match=r"^1 gold pairs .*\(p2\)"):
            check_split(moved, config)


def test_clean_exemplars_pass():
    check_exemplars(targets(("t1", "X", ["w1", "w3"]), ("t2", "B", ["w1", "w2"]), ("t3", "A", None), ("t4", "A", [])), GOLD)
    check_exemplars(targets(), GOLD)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("t", "A", ["w3", "w2"]), "own prompt"),  # another pair of the same prompt
        (("w1", "A", ["w1"]), "own prompt"),  # itself: leave-one-out
        (("w1", "A", ["w2"]), "own prompt"),  # leave-one-out, by its prompt group
        (("t", "X", ["w1", "a1"]), "audit gold"),
        (("a1", "C", ["a1"]), "audit gold"),
        (("t", "X", ["silver1"]), "not gold"),
    ],
)
def test_dirty_exemplars_are_refused(row, message):
    clean = ("t0", "X", ["w1", "w2", "w3"])
    with pytest.raises(CleanGoldError, match=message) as caught:
        check_exemplars(targets(clean, row), GOLD)
    assert f"({row[0]})" in str(caught.value)


def test_exemplars_after_slicing_and_chunking():
    """List offsets of slices and chunks must not shift blame or hide a leak."""
    rows = [("t0", "X", ["w1"]), ("t1", "A", ["w3"]), ("t2", "B", ["w3"]), ("t3", "X", ["w3"])]
    table = targets(*rows)
    check_exemplars(table.slice(0, 2), GOLD)
    check_exemplars(table.slice(3), GOLD)
    chunked = pa.concat_tables([table.slice(1, 2), table.slice(3)])
    gold = pa.concat_tables([GOLD.slice(2), GOLD.slice(0, 2)])
    for bad in (table.slice(1), chunked):
        with pytest.raises(CleanGoldError, match=r"^1 pairs .*\(t2\)"):
            check_exemplars(bad, gold)


def test_exemplars_without_a_split_count_as_not_working():
    gold = pairs(("w1", "A"), gold_split=pa.array([None], pa.string()))
    with pytest.raises(CleanGoldError, match="audit gold"):
        check_exemplars(targets(("t", "X", ["w1"])), gold)


@pytest.mark.parametrize("check", [check_silver, check_best_rm_training])
def test_no_gold_in_silver_or_under_the_best_rm(check):
    check(pairs(("s1", "X"), ("s2", "Y")), GOLD)
    check(pairs(), GOLD)
    check(pairs(("s1", "X")), GOLD.slice(0, 0))
    for row in [("s2", "A"), ("s2", "C"), ("w3", "Z")]:  # prompt of working gold, of audit gold, a gold pair under a changed group
        with pytest.raises(CleanGoldError, match=rf"^1 .*\({row[0]}\)"):
            check(pairs(("s1", "X"), row), GOLD)


def test_a_gold_prompt_in_other_clothes_is_still_a_gold_prompt():
    """The same prompt in other case and punctuation, with the labels the other way round, has another pair_id but the same group."""
    gold_prompt, silver_prompt = ([{"role": "user", "content": text}] for text in ("Name a tea.", "  name a TEA!!"))
    gold = pairs((pair_id(gold_prompt, "x", "y"), prompt_group(gold_prompt)), gold_split=["audit"])
    silver = pairs((pair_id(silver_prompt, "y", "x"), prompt_group(silver_prompt)))
    assert gold["pair_id"][0] != silver["pair_id"][0]
    with pytest.raises(CleanGoldError, match="1 silver pairs"):
        check_silver(silver, gold)


def test_the_gold_rm_trains_on_working_gold_alone():
    check_gold_rm_training(pairs(("w1", "A"), ("w3", "B")), GOLD)
    with pytest.raises(CleanGoldError, match=r"audit gold \(a1\)"):
        check_gold_rm_training(pairs(("w1", "A"), ("a1", "C")), GOLD)
    with pytest.raises(CleanGoldError, match=r"audit gold \(s1\)"):
        check_gold_rm_training(pairs(("s1", "C")), GOLD)
    with pytest.raises(CleanGoldError, match=r"not gold \(s1\)"):
        check_gold_rm_training(pairs(("w1", "A"), ("s1", "Z")), GOLD)


def test_at_most_three_pairs_are_named():
    with pytest.raises(CleanGoldError) as caught:
        check_silver(pairs(*((f"s{i}", "A") for i in range(5))), GOLD)
    assert str(caught.value).startswith("5 silver pairs share a prompt with gold (s0, s1, s2 …): ")
    with pytest.raises(CleanGoldError, match=r"^1 pairs .*\(t\)"):
        check_exemplars(targets(("t", "A", ["w1", "w2"])), GOLD)


def test_small_gold_is_told_with_how_far_an_interval_reaches():
    """The half-width of Wilson's interval at one half is z / 2 / sqrt(n + z²): 0.1 at n = 92.2."""
    assert describe_small_gold({GoldSplit.WORKING: 93, GoldSplit.AUDIT: 93}) == ""
    told = describe_small_gold({GoldSplit.WORKING: 200, GoldSplit.AUDIT: 20})
    assert told.startswith("gold is too small to judge by: 200 working (±7 points) and 20 audit (±20 points) pairs")
    assert "0 audit (±50 points)" in describe_small_gold({GoldSplit.WORKING: 200, GoldSplit.AUDIT: 0})
