"""FAISS against brute-force numpy, and what FAISS alone would not promise: ties, batches, exclusions, row order."""

import numpy as np
import pyarrow as pa
import pytest

from synpref_ray.errors import ConfigError, RunConflictError, SchemaError
from synpref_ray.retrieval.index import IndexConfig, PairIndex
from synpref_ray.retrieval.neighbours import JoinedSearch
from synpref_ray.retrieval.select import RetrievalConfig, retrieve_pairs
from synpref_ray.tables.storage import Storage
from tests.retrieval.brute_force import BruteForceSearch
from tests.retrieval.builders import embedded, unit

pytestmark = pytest.mark.engine


def random_pairs(count, size, seed, num_groups=40, num_distinct=None):
    """Random unit vectors; with `num_distinct`, many pairs share one vector exactly."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(num_distinct or count, size)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = vectors[rng.integers(len(vectors), size=count)] if num_distinct else vectors
    ids = [f"{name:08x}" for name in rng.permutation(count * 7)[:count]]
    return embedded(ids, [f"g{group}" for group in rng.integers(num_groups, size=count)], vectors)


def build(pairs):
    return PairIndex.build(pairs, IndexConfig())


def same(found, expected):
    assert found.ids == expected.ids
    for left, right in zip(found.scores, expected.scores, strict=True):
        np.testing.assert_array_equal(left, right)
        assert left.dtype == np.float32


@pytest.mark.parametrize("num_distinct", [None, 12], ids=["distinct", "many ties"])
@pytest.mark.parametrize("k", [1, 7, 500])
def test_faiss_equals_brute_force(num_distinct, k):
    pairs = random_pairs(300, 64, seed=1, num_distinct=num_distinct)
    index, oracle = build(pairs), BruteForceSearch(pairs)
    queries = np.concatenate([np.float32(pairs["embedding"].to_pylist()[:15]), np.random.default_rng(2).normal(size=(15, 64))]).astype(np.float32)
    same(index.search(queries, k), oracle.search(queries, k))
    groups = [*pairs["prompt_group"].to_pylist()[:15], *(f"g{i}" for i in range(14)), "no such group"]
    found = index.search(queries, k, exclude_groups=groups)
    same(found, oracle.search(queries, k, exclude_groups=groups))
    group_of = dict(zip(pairs["pair_id"].to_pylist(), pairs["prompt_group"].to_pylist(), strict=True))
    assert all(group_of[pair] != group for ids, group in zip(found.ids, groups, strict=True) for pair in ids)


def test_ties_beyond_the_first_search_are_found():
    """A hundred pairs at one spot: FAISS may return any of them, the index returns the smallest pair_ids."""
    pairs = embedded([f"p{i:03d}" for i in range(100)][::-1], ["g"] * 100, unit(*[30] * 100))
    assert build(pairs).search(np.float32(unit(30)), 3).ids == [["p000", "p001", "p002"]]


def test_a_query_gives_the_same_alone_or_in_company():
    """FAISS computes small and large batches of queries by different code."""
    pairs = random_pairs(500, 384, seed=3, num_distinct=60)
    index = build(pairs)
    queries = np.float32(pairs["embedding"].to_pylist()[:64])
    together = index.search(queries, 5)
    for row in range(0, 64, 9):
        alone = index.search(queries[row : row + 1], 5)
        assert alone.ids[0] == together.ids[row]
        np.testing.assert_array_equal(alone.scores[0], together.scores[row])


def test_row_order_does_not_matter():
    pairs = random_pairs(50, 8, seed=4)
    shuffled = pairs.take(pa.array(np.random.default_rng(5).permutation(50)))
    assert build(pairs).fingerprint == build(shuffled).fingerprint
    queries = np.float32(unit(*range(0, 360, 30))) @ np.eye(2, 8, dtype=np.float32)
    same(build(pairs).search(queries, 5), build(shuffled).search(queries, 5))


def test_the_fingerprint_sees_every_part():
    base = embedded(["a", "b"], ["g", "h"], unit(0, 10))
    others = [
        embedded(["a", "c"], ["g", "h"], unit(0, 10)),
        embedded(["a", "b"], ["g", "i"], unit(0, 10)),
        embedded(["a", "b"], ["g", "h"], unit(0, 11)),
        embedded(["a"], ["g"], unit(0)),
    ]
    assert len({build(pairs).fingerprint for pairs in [base, *others]}) == 5


def test_pairs_without_an_embedding_cannot_be_found():
    index = build(embedded(["a", "b", "c"], ["g", "h", "i"], [unit(0)[0], None, unit(20)[0]]))
    assert len(index) == 2
    assert index.search(np.float32(unit(10)), 5).ids == [["a", "c"]]


def test_nothing_to_search():
    empty = build(embedded(["a"], ["g"], unit(0)).slice(0, 0))
    assert empty.search(np.float32(unit(0, 1)), 3, exclude_groups=["g", "h"]).ids == [[], []]
    index = build(embedded(["a"], ["g"], unit(0)))
    assert index.search(np.zeros((0, 2), np.float32), 3).ids == []
    assert index.search(np.float32(unit(0)), 0).ids == [[]]
    assert index.search(np.float32(unit(0)), 3, exclude_groups=["g"]).ids == [[]]


def test_bad_input_is_named():
    with pytest.raises(SchemaError, match=r"1 come again \(a\)"):
        build(embedded(["a", "b", "a"], ["g", "h", "i"], unit(0, 1, 2)))
    with pytest.raises(SchemaError, match=r"1 embeddings are not finite \(b\)"):
        build(embedded(["a", "b"], ["g", "h"], [(0.0, 1.0), (float("nan"), 1.0)]))
    index = build(embedded(["a"], ["g"], unit(0)))
    with pytest.raises(SchemaError, match=r"shape \(Q, 2\)"):
        index.search(np.zeros((1, 3), np.float32), 1)
    with pytest.raises(SchemaError, match="finite"):
        index.search(np.float32([[np.nan, 0]]), 1)
    with pytest.raises(SchemaError, match="one prompt group"):
        index.search(np.float32(unit(0)), 1, exclude_groups=[])
    with pytest.raises(SchemaError, match="prompt_group"):
        build(embedded(["a"], ["g"], unit(0)).drop_columns(["prompt_group"]))


def test_a_missing_gpu_is_an_error():
    import faiss

    if faiss.get_num_gpus():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match="faiss-gpu"):
        PairIndex.build(embedded(["a"], ["g"], unit(0)), IndexConfig(use_gpu=True))


@pytest.mark.gpu
def test_the_gpu_gives_what_the_cpu_gives():
    pairs = random_pairs(5000, 384, seed=6, num_distinct=700)
    queries = np.float32(pairs["embedding"].to_pylist()[:50])
    on_gpu = PairIndex.build(pairs, IndexConfig(use_gpu=True))
    same(on_gpu.search(queries, 8), build(pairs).search(queries, 8))


def test_save_and_load(tmp_path):
    storage = Storage(str(tmp_path))
    index = build(random_pairs(40, 8, seed=7))
    index.save(storage, "indexes/gold.parquet")
    loaded = PairIndex.load(storage, "indexes/gold.parquet", IndexConfig(), fingerprint=index.fingerprint)
    queries = np.random.default_rng(8).normal(size=(5, 8)).astype(np.float32)
    same(loaded.search(queries, 4), index.search(queries, 4))
    with pytest.raises(RunConflictError, match="expected 0000"):
        PairIndex.load(storage, "indexes/gold.parquet", IndexConfig(), fingerprint="0000")
    table = storage.read_table("indexes/gold.parquet")
    storage.write_table("indexes/gold.parquet", table.slice(1))  # keeps the metadata: a file whose content was tampered with
    with pytest.raises(RunConflictError, match="build it again"):
        PairIndex.load(storage, "indexes/gold.parquet", IndexConfig())
    build(random_pairs(40, 8, seed=7).slice(0, 0)).save(storage, "indexes/empty.parquet")
    assert len(PairIndex.load(storage, "indexes/empty.parquet", IndexConfig())) == 0


def test_retrieval_on_faiss_equals_retrieval_on_brute_force():
    pool, gold = random_pairs(400, 16, seed=9, num_distinct=50), random_pairs(60, 16, seed=10)
    rng = np.random.default_rng(11)
    gold = gold.append_column("p_chosen", pa.array(rng.uniform(size=60).astype(np.float32)))
    gold = gold.append_column("human_verdict", pa.array(["chosen", "rejected"] * 30))
    found = retrieve_pairs(gold, build(pool), set(), RetrievalConfig())
    assert found.equals(retrieve_pairs(gold, BruteForceSearch(pool), set(), RetrievalConfig()))
    assert found.num_rows > 200


def test_indexes_joined_are_one_index():
    pairs = random_pairs(300, 16, seed=7, num_distinct=40)
    parts = [build(pairs.slice(0, 100)), build(pairs.slice(100, 1)), build(pairs.slice(101))]
    queries = np.random.default_rng(8).normal(size=(9, 16)).astype(np.float32)
    groups = [f"g{i}" for i in range(9)]
    for k in (1, 20, 400):
        same(JoinedSearch(parts).search(queries, k, exclude_groups=groups), build(pairs).search(queries, k, exclude_groups=groups))
