"""Error-driven retrieval, worked by hand in the plane."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synpref_ray.errors import SchemaError
from synpref_ray.retrieval.neighbours import Neighbours
from synpref_ray.retrieval.select import RETRIEVED_SCHEMA, GoldError, RetrievalConfig, retrieve_pairs, select_neighbours
from synpref_ray.rules.retrieval import num_neighbours
from tests.retrieval.brute_force import BruteForceSearch
from tests.retrieval.builders import embedded, unit


def lists(*ids):
    """Neighbour lists with falling scores 0.9, 0.8, …"""
    return Neighbours([list(row) for row in ids], [np.linspace(0.9, 0.1, 9, dtype=np.float32)[: len(row)] for row in ids])


def picks(selection):
    return [(pick.gold_pair_id, pick.pair_id, pick.rank) for pick in selection.retrieved]


def test_by_hand():
    # k_max 4: k(0.2) = 4, k(0.6) = ceil(1.6) = 2, k(0.9) = ceil(0.4) = 1, k(1.0) = 0
    gold = [GoldError("good", 0.9), GoldError("bad", 0.2), GoldError("perfect", 1.0), GoldError("fair", 0.6)]
    neighbours = lists("abcdef", "abcde", "xyz", "cagh")
    selection = select_neighbours(gold, neighbours, set(), 4)
    assert picks(selection) == [
        ("bad", "a", 0),  # the most wrong goes first
        ("bad", "b", 1),
        ("bad", "c", 2),
        ("bad", "d", 3),
        ("fair", "g", 0),  # c and a are taken: it goes on to its next neighbours
        ("fair", "h", 1),
        ("good", "e", 0),
    ]
    assert [pick.similarity for pick in selection.retrieved] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.7, 0.6, 0.5])
    assert [pick.p for pick in selection.retrieved] == [0.2] * 4 + [0.6] * 2 + [0.9]
    assert selection.short == []


def test_earlier_rounds_are_skipped_and_shortfalls_are_told():
    gold = [GoldError("b", 0.1), GoldError("a", 0.1)]
    selection = select_neighbours(gold, lists("xyz", "xyz"), {"y"}, 2)
    assert picks(selection) == [("a", "x", 0), ("a", "z", 1)]  # equal p: the smaller pair_id first
    assert selection.short == [0]


def test_bad_arguments():
    with pytest.raises(ValueError, match="once"):
        select_neighbours([GoldError("a", 0.1), GoldError("a", 0.2)], lists("x", "y"), set(), 2)
    with pytest.raises(ValueError, match="one neighbour list"):
        select_neighbours([GoldError("a", 0.1)], lists("x", "y"), set(), 2)


CANDIDATES = st.lists(st.sampled_from("abcdefghijkl"), unique=True)


@given(st.lists(st.tuples(st.floats(0, 1), CANDIDATES), max_size=6), st.sets(st.sampled_from("abcdefghijkl")), st.integers(1, 8))
def test_no_pair_twice_and_nobody_passes_over_a_nearer_free_pair(rows, already, k_max):
    gold = [GoldError(f"g{i}", p) for i, (p, _) in enumerate(rows)]
    neighbours = Neighbours([ids for _, ids in rows], [np.linspace(1, 0, len(ids), dtype=np.float32) for _, ids in rows])
    selection = select_neighbours(gold, neighbours, already, k_max)
    ids = [pick.pair_id for pick in selection.retrieved]
    assert len(ids) == len(set(ids))
    assert not already & set(ids)
    seen = set(already)
    for pick in selection.retrieved:
        candidates = neighbours.ids[int(pick.gold_pair_id[1:])]
        assert pick.pair_id == next(pair for pair in candidates if pair not in seen)
        seen.add(pick.pair_id)
    for position, error in enumerate(gold):
        given_to = sum(pick.gold_pair_id == error.pair_id for pick in selection.retrieved)
        wanted = num_neighbours(error.p, k_max)
        assert given_to == wanted or (given_to < wanted and position in selection.short)


def gold_table(ids, angles, p_chosen, verdicts, groups=None):
    columns = {"p_chosen": pa.array(p_chosen, pa.float32()), "human_verdict": pa.array(verdicts, pa.string())}
    vectors = [None if angle is None else unit(angle)[0] for angle in angles]
    return embedded(ids, groups or [f"group of {name}" for name in ids], vectors, **columns)


POOL = embedded([f"u{angle:02d}" for angle in range(0, 90, 10)], [f"pool {i}" for i in range(9)], unit(*range(0, 90, 10)))


def test_retrieve_by_hand():
    gold = gold_table(
        ["right", "wrong", "turned", "unscored", "unembedded"],
        [1, 32, 81, 50, None],
        [0.95, 0.3, 0.3, None, 0.1],
        ["chosen", "chosen", "rejected", "chosen", "chosen"],
    )
    table = retrieve_pairs(gold, BruteForceSearch(POOL), {"u30"}, RetrievalConfig(k_max=3))
    assert table.schema.equals(RETRIEVED_SCHEMA)
    # wrong: p 0.3, k 3: nearest to 32 degrees are 30 (taken in an earlier round), 40, 20, 50
    # turned: p 1 - 0.3, k ceil(0.9) = 1: 80; right: k 1: 0
    assert table["pair_id"].to_pylist() == ["u40", "u20", "u50", "u80", "u00"]
    assert table["gold_pair_id"].to_pylist() == ["wrong", "wrong", "wrong", "turned", "right"]
    assert table["rank"].to_pylist() == [0, 1, 2, 0, 0]
    assert table["similarity"].to_pylist() == pytest.approx([np.cos(np.radians(a)) for a in (8, 12, 18, 1, 1)], abs=1e-6)
    assert table["gold_confidence"].to_pylist() == pytest.approx([0.3, 0.3, 0.3, 0.7, 0.95])


def test_a_gold_pair_never_retrieves_its_own_prompt():
    gold = gold_table(["wrong"], [30], [0.0], ["chosen"], groups=["pool 3"])
    table = retrieve_pairs(gold, BruteForceSearch(POOL), set(), RetrievalConfig(k_max=2))
    assert table["pair_id"].to_pylist() == ["u20", "u40"]


def test_lists_that_run_out_are_searched_deeper():
    """Three errors at one spot want nine pairs; the first search is four deep, and the pool holds nine."""
    gold = gold_table(["a", "b", "c"], [0, 0, 0], [0.0, 0.0, 0.0], ["chosen"] * 3)
    search = BruteForceSearch(POOL)
    table = retrieve_pairs(gold, search, set(), RetrievalConfig(k_max=3))
    assert table["pair_id"].to_pylist() == POOL["pair_id"].to_pylist()
    assert table["gold_pair_id"].to_pylist() == ["a"] * 3 + ["b"] * 3 + ["c"] * 3
    already = {f"u{angle:02d}" for angle in range(0, 60, 10)}
    search = BruteForceSearch(POOL)
    table = retrieve_pairs(gold.slice(0, 1), search, already, RetrievalConfig(k_max=1))
    assert table["pair_id"].to_pylist() == ["u60"]
    assert search.depths == [4, 8]
    table = retrieve_pairs(gold, BruteForceSearch(POOL), already, RetrievalConfig(k_max=8))
    assert table["pair_id"].to_pylist() == ["u60", "u70", "u80"]  # and then the pool is exhausted


def test_only_those_whose_lists_ran_out_are_asked_about_again():
    """Two errors at 0 degrees, and one at 80 that has its own pairs at first."""
    gold = gold_table(["a", "b", "c"], [0, 0, 80], [0.0, 0.0, 0.9], ["chosen"] * 3)
    search = BruteForceSearch(POOL)
    table = retrieve_pairs(gold, search, {"u00", "u10", "u20"}, RetrievalConfig(k_max=2))
    # both lists of eight hold u30 to u70 after what is taken: a gets u30 and u40, b u50 and u60; c gets u80
    assert table["pair_id"].to_pylist() == ["u30", "u40", "u50", "u60", "u80"]
    assert (search.depths, search.num_queries) == ([8], [3])
    search = BruteForceSearch(POOL)
    table = retrieve_pairs(gold, search, {f"u{angle:02d}" for angle in range(0, 70, 10)}, RetrievalConfig(k_max=2))
    # of the first eight only u70 is free: a takes it and is short, as is b: both go on to 16, which is all; there a takes u80 too, and c is short
    assert table["pair_id"].to_pylist() == ["u70", "u80"]
    assert (search.depths, search.num_queries) == ([8, 16, 16], [3, 2, 1])


@settings(deadline=None)
@given(st.permutations(range(6)), st.integers(0, 99))
def test_row_order_of_gold_does_not_matter(order, seed):
    rng = np.random.default_rng(seed)
    gold = gold_table([f"g{i}" for i in range(6)], rng.uniform(0, 90, 6), rng.uniform(0, 1, 6), ["chosen", "rejected"] * 3)
    config = RetrievalConfig(k_max=3)
    expected = retrieve_pairs(gold, BruteForceSearch(POOL), set(), config)
    assert retrieve_pairs(gold.take(pa.array(order)), BruteForceSearch(POOL), set(), config).equals(expected)


def test_no_gold_and_no_verdict():
    empty = gold_table(["a"], [0], [0.1], ["chosen"]).slice(0, 0)
    assert retrieve_pairs(empty, BruteForceSearch(POOL), set(), RetrievalConfig()).num_rows == 0
    with pytest.raises(SchemaError, match="a has none"):
        retrieve_pairs(gold_table(["a"], [0], [0.1], ["abstain"]), BruteForceSearch(POOL), set(), RetrievalConfig())
    with pytest.raises(SchemaError, match="p_chosen"):
        retrieve_pairs(POOL, BruteForceSearch(POOL), set(), RetrievalConfig())
