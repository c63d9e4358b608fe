"""The index of codes against brute force: what it finds, what it may not find, and that the same pool gives the same index."""

import os
import signal
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from synpref_ray.errors import ConfigError, InputError, SchemaError
from synpref_ray.pipeline.pool_index import build_pool_index, plan_pool_index
from synpref_ray.pipeline.retrieval import open_neighbours
from synpref_ray.retrieval.index import IndexConfig
from synpref_ray.retrieval.quantised import LeftOut, training_sample
from synpref_ray.retrieval.select import RetrievalConfig, retrieve_pairs
from synpref_ray.tables.sidecars import Sidecar
from tests.retrieval.brute_force import BruteForceSearch
from tests.retrieval.builders import embedded
from tests.retrieval.pools import clustered, write_embedded_pool

pytestmark = pytest.mark.engine
SMALL = IndexConfig(kind="ivf_pq", nlist=16, m=8, shards_per_part=2, num_threads=1)
EVERYTHING = SMALL.model_copy(update={"nprobe": 16, "candidates_per_neighbour": 2000})
"""Every pair becomes a candidate: then nothing is approximate."""


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return write_embedded_pool(tmp_path_factory.mktemp("pool"), clustered(1500, 32, seed=1), 400, missing=range(3, 1500, 70))


def queries(count, seed=2, size=32):
    return clustered(count, size, seed=seed)


def embedded_only(whole):
    return whole.filter(pc.is_valid(whole["embedding"]))


def same(found, expected):
    assert found.ids == expected.ids
    for left, right in zip(found.scores, expected.scores, strict=True):
        np.testing.assert_array_equal(left, right)
        assert left.dtype == np.float32


@pytest.mark.parametrize("k", [1, 8, 1500])
def test_with_every_pair_a_candidate_it_is_exact(pool, k):
    """Ties go by pair_id, pairs without an embedding are not found, nor those of an excluded group or one that is left out."""
    wild, embeddings, whole = pool
    left_out = {"g3", "g50"}
    asked = np.concatenate([queries(4), np.float32(embedded_only(whole)["embedding"].to_pylist()[:4])])
    groups = [*embedded_only(whole)["prompt_group"].to_pylist()[:7], "no such group"]
    there = embedded_only(whole)
    allowed = there.filter(pc.invert(pc.is_in(there["prompt_group"], value_set=pa.array(sorted(left_out)))))
    with build_pool_index(wild, embeddings, EVERYTHING).opened(LeftOut.of(left_out)) as index:
        same(index.search(asked, k, exclude_groups=groups), BruteForceSearch(allowed).search(asked, k, exclude_groups=groups))
    with build_pool_index(wild, embeddings, EVERYTHING).opened(LeftOut()) as index:
        same(index.search(asked, k), BruteForceSearch(embedded_only(whole)).search(asked, k))


def test_codes_find_nearly_all_neighbours(tmp_path):
    vectors = clustered(3040, 32, seed=5)
    wild, embeddings, whole = write_embedded_pool(tmp_path, vectors[:3000], 1000)
    asked = vectors[3000:]
    with build_pool_index(wild, embeddings, IndexConfig(kind="ivf_pq", m=8, nlist=64, num_threads=1)).opened(LeftOut()) as index:
        found = index.search(asked, 8)
    wanted = BruteForceSearch(whole).search(asked, 8)
    recall = np.mean([len({*ours} & {*theirs}) / 8 for ours, theirs in zip(found.ids, wanted.ids, strict=True)])
    assert recall >= 0.9
    scores = dict(zip(wanted.ids[0], wanted.scores[0].tolist(), strict=True))
    assert all(scores.get(pair, score) == score for pair, score in zip(found.ids[0], found.scores[0].tolist(), strict=True))


def test_a_search_goes_deeper_until_it_has_enough(pool):
    """With one list and few candidates at first, all but one prompt group left out: whatever remains is found, best first."""
    wild, embeddings, whole = pool
    config = SMALL.model_copy(update={"nprobe": 1, "candidates_per_neighbour": 1})
    groups = {*whole["prompt_group"].to_pylist()} - {"g7"}
    rest = embedded_only(whole).filter(pc.equal(embedded_only(whole)["prompt_group"], "g7"))
    with build_pool_index(wild, embeddings, config).opened(LeftOut.of(groups)) as index:
        found = index.search(queries(3), 100)
    same(found, BruteForceSearch(rest).search(queries(3), 100))
    assert 0 < len(found.ids[0]) < 100


def test_the_same_pool_gives_the_same_bytes(pool, tmp_path):
    wild, embeddings, _ = pool
    other, beside, _ = write_embedded_pool(tmp_path, clustered(1500, 32, seed=1), 400, missing=range(3, 1500, 70))
    first, second = build_pool_index(wild, embeddings, SMALL), build_pool_index(other, beside, SMALL)
    assert first.fingerprint == second.fingerprint
    assert wild.storage.read_bytes(first.path) == other.storage.read_bytes(second.path)
    one_part = build_pool_index(other, beside, SMALL.model_copy(update={"shards_per_part": 100}))
    assert one_part.folder != second.folder
    with one_part.opened(LeftOut()) as whole, second.opened(LeftOut()) as merged:
        same(whole.search(queries(20), 8), merged.search(queries(20), 8))


def test_only_what_is_missing_is_made(pool, tmp_path):
    wild, embeddings, _ = write_embedded_pool(tmp_path, clustered(1500, 32, seed=1), 400)
    index = build_pool_index(wild, embeddings, SMALL)
    wanted, storage = wild.storage.read_bytes(index.path), wild.storage
    assert storage.list_files(f"{index.folder}/parts") == []  # merged
    trained = tmp_path / index.folder / "trained.faiss"
    made = trained.stat().st_mtime_ns
    assert build_pool_index(wild, embeddings, SMALL).is_sealed
    for name in ("manifest.json", "index.faiss"):
        storage.delete(f"{index.folder}/{name}")
    assert not index.is_sealed
    build_pool_index(wild, embeddings, SMALL)
    assert trained.stat().st_mtime_ns == made
    assert storage.read_bytes(index.path) == wanted
    assert storage.read_json(f"{index.folder}/manifest.json")["vectors"] == 1500


def test_the_name_follows_what_is_stored(pool):
    wild, embeddings, _ = pool
    name = plan_pool_index(wild, embeddings, SMALL).fingerprint
    for same_index in ({"nprobe": 3}, {"candidates_per_neighbour": 99}, {"num_threads": 2}, {"use_gpu": True}, {"exact_below": 5}):
        assert plan_pool_index(wild, embeddings, SMALL.model_copy(update=same_index)).fingerprint == name
    for other in ({"nlist": 8}, {"m": 16}, {"seed": 1}, {"train_per_list": 50}):
        assert plan_pool_index(wild, embeddings, SMALL.model_copy(update=other)).fingerprint != name


def test_the_sample_is_seeded_and_of_the_size_asked_for(pool):
    _, embeddings, whole = pool
    sample = training_sample(embeddings, 600, seed=4)
    np.testing.assert_array_equal(sample, training_sample(embeddings, 600, seed=4))
    assert len(sample) == 600
    assert not np.array_equal(sample, training_sample(embeddings, 600, seed=5))
    assert len(training_sample(embeddings, 10_000, seed=4)) == embedded_only(whole).num_rows


def test_rules_of_the_config_by_hand():
    config = IndexConfig()
    assert [config.search_exactly([size]) for size in (1, 299_999, 300_000)] == [[True], [True], [False]]
    assert IndexConfig(kind="exact").search_exactly([10**9, 5]) == [True, True]
    # 4 vectors for each of 256 codewords: a part below that is exact
    assert IndexConfig(kind="ivf_pq").search_exactly([1023, 1024, 10**6]) == [True, False, False]
    assert IndexConfig(kind="ivf_pq", nlist=1000).search_exactly([3999, 4000]) == [True, False]
    # of a grown pool: 200,000 and 200,000 and 99,999 pairs are not three small pools; the smallest ones are exact up to 300,000 together
    assert config.search_exactly([200_000, 200_000]) == [True, False]
    assert config.search_exactly([200_000, 99_999, 200_000]) == [True, True, False]
    assert config.search_exactly([200_000, 100_000, 200_000]) == [False, True, False]
    assert config.search_exactly([10**6, 0, 5000]) == [False, True, True]
    assert config.search_exactly([]) == []
    million, wide = config.shape(1_000_000, 384), config.shape(40_000_000, 1024)
    assert (million.nlist, million.factory) == (4096, "OPQ48_384,IVF4096,PQ48x8np")  # 4 √1e6 = 4,000
    assert (wide.nlist, wide.factory) == (32768, "OPQ48_384,IVF32768,PQ48x8np")  # 4 √4e7 = 25,298: nearer to 2^15 than to 2^14 as a ratio
    assert config.model_copy(update={"m": 8, "nlist": 5}).shape(10, 20).factory == "OPQ8_16,IVF5,PQ8x8np"
    assert config.model_copy(update={"nlist": 5}).shape(10, 384).nprobe == 5
    with pytest.raises(ConfigError, match=r"index\.m is 48, but embeddings have 32"):
        config.shape(10, 32)


def test_what_cannot_be_built_or_searched_is_told(pool, tmp_path):
    wild, embeddings, _ = pool
    with pytest.raises(InputError, match=r"4096 lists .* on 1478 embeddings: set index\.kind=exact"):
        build_pool_index(wild, embeddings, SMALL.model_copy(update={"nlist": 4096}))
    with pytest.raises(ConfigError, match="sees no GPU"):
        build_pool_index(wild, embeddings, SMALL.model_copy(update={"use_gpu": True, "seed": 7}))
    with build_pool_index(wild, embeddings, SMALL).opened(LeftOut()) as index:
        with pytest.raises(SchemaError, match="shape"):
            index.search(queries(2, size=16), 3)
        assert index.search(queries(2), 0).ids == [[], []]
        assert index.search(queries(0), 3).ids == []
    broken = clustered(1500, 32, seed=1)
    broken[700, 3] = np.nan
    other, beside, _ = write_embedded_pool(tmp_path, broken, 400)
    with pytest.raises(SchemaError, match=r"shard 2 .* not finite"):
        build_pool_index(other, beside, SMALL)


def test_retrieval_is_the_same_by_either_index(pool):
    """What the errors on gold call for, with everything a candidate: the pairs, their order and similarities."""
    wild, embeddings, whole = pool
    count = 12
    gold = embedded(
        [f"gold{i}" for i in range(count)],
        [f"g{i}" for i in range(count)],
        queries(count).tolist(),
        p_chosen=pa.array(np.linspace(0.05, 0.9, count), pa.float32()),
        human_verdict=["chosen", "rejected"] * (count // 2),
    )
    records = []
    for config in (IndexConfig(kind="exact"), EVERYTHING):
        with open_neighbours([(wild, embeddings)], LeftOut.of({"g1", "g2"}), config) as neighbours:
            records.append(retrieve_pairs(gold, neighbours, set(whole["pair_id"].to_pylist()[:300]), RetrievalConfig()))
    assert records[0].num_rows > 20
    assert records[0].equals(records[1])


def test_parts_of_a_grown_pool_are_one_pool(tmp_path, monkeypatch):
    """Which index is decided on the sum; a small part is exact, an empty one is passed over, and nothing that is left out is found."""
    from synpref_ray.pipeline import retrieval

    vectors = clustered(4500, 16, seed=3)
    cuts = {"big": vectors[:3000], "small": vectors[3000:3200], "other": vectors[3200:]}
    parts = {name: write_embedded_pool(tmp_path / name, part, 100, prefix=name) for name, part in cuts.items()}
    nothing = replace(parts["big"][0], shards=())
    empty = (nothing, Sidecar(nothing, "embeddings", "0" * 32))
    sides = [*(part[:2] for part in parts.values()), empty]
    built = []
    build = retrieval.build_pool_index

    def noted(pool, *more):
        built.append(pool.num_rows)
        return build(pool, *more)

    monkeypatch.setattr(retrieval, "build_pool_index", noted)
    whole = embedded_only(pa.concat_tables([part[2] for part in parts.values()]))
    gone = set(whole["pair_id"].to_pylist()[::3])
    allowed = whole.filter(pc.invert(pc.is_in(whole["pair_id"], value_set=pa.array(sorted(gone)))))
    asked = queries(5, size=16)
    for settings, expected in (({"exact_below": 4000}, [3000]), ({"exact_below": 4501}, []), ({"kind": "ivf_pq"}, [3000, 1300])):
        config = EVERYTHING.model_copy(update={"kind": "auto", "m": 4, **settings})
        built.clear()
        with open_neighbours(sides, LeftOut.of(pairs=gone), config) as neighbours:
            same(neighbours.search(asked, 30), BruteForceSearch(allowed).search(asked, 30))
        assert built == expected
    with open_neighbours([empty], LeftOut(), EVERYTHING) as neighbours:
        assert neighbours.search(asked, 3).ids == [[]] * 5


@pytest.mark.ray
def test_codes_whose_holder_is_killed_are_read_again(ray, tmp_path, monkeypatch):
    from synpref_ray.pipeline import pool_index

    monkeypatch.setattr(pool_index, "INLINE_ROWS", 100)
    wild, embeddings, _ = write_embedded_pool(tmp_path, clustered(2000, 16, seed=8), 1000)
    asked = queries(5, seed=9, size=16)
    index = build_pool_index(wild, embeddings, IndexConfig(kind="ivf_pq", nlist=8, m=4, num_threads=1))
    with index.opened(LeftOut()) as search:
        before = search.search(asked, 8)
        pid = ray.get(search._codes.holder.__ray_call__.remote(lambda holder: os.getpid()))
        os.kill(pid, signal.SIGKILL)
        same(search.search(asked, 8), before)
        assert ray.get(search._codes.holder.__ray_call__.remote(lambda holder: os.getpid())) != pid


@pytest.mark.ray
def test_on_ray_as_in_one_process(ray, tmp_path, monkeypatch):
    """A pool that is too large for one process: parts, merge, codes in an actor and scores by tasks."""
    from synpref_ray.pipeline import pool_index

    vectors = clustered(24_000, 16, seed=8)
    wild, embeddings, _ = write_embedded_pool(tmp_path / "ray", vectors, 4000)
    config = IndexConfig(kind="ivf_pq", nlist=32, m=4, shards_per_part=2, num_threads=1)
    asked = queries(30, seed=9, size=16)
    with build_pool_index(wild, embeddings, config).opened(LeftOut.of({"g1"})) as index:
        found = index.search(asked, 8, exclude_groups=[f"g{i}" for i in range(30)])
    monkeypatch.setattr(pool_index, "INLINE_ROWS", 10**9)
    other, beside, _ = write_embedded_pool(tmp_path / "here", vectors, 4000)
    with build_pool_index(other, beside, config).opened(LeftOut.of({"g1"})) as index:
        same(found, index.search(asked, 8, exclude_groups=[f"g{i}" for i in range(30)]))
