"""The retrieval benchmark: its vectors depend on seed and shard alone and lie as it says, and the figures follow from what was measured."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks._retrieval_data import Mixture, make_pool, make_queries
from benchmarks.retrieval import CODES, EXACT, forecast, gates_of, recall, report, unit_costs
from synpref_ray.tables.storage import Storage


def test_vectors_depend_on_seed_and_shard_alone(tmp_path: Path) -> None:
    mixture = Mixture.make(20_000, 32, seed=1)
    vectors, prompts = mixture.draw(3, 500)
    again, _ = Mixture.make(20_000, 32, seed=1).draw(3, 500)
    np.testing.assert_array_equal(vectors, again)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert not np.array_equal(vectors, mixture.draw(4, 500)[0])
    assert not np.array_equal(vectors, Mixture.make(20_000, 32, seed=2).draw(3, 500)[0])
    same = prompts[:, None] == prompts[None, :]
    similar = vectors @ vectors.T
    np.fill_diagonal(same, False)
    assert similar[same].mean() > 0.85 > 0.4 > similar[~same].mean() > 0  # pairs of one prompt are near, all share a direction
    pool, embeddings = make_pool(Storage(str(tmp_path)), 9000, 32, seed=1)
    assert [shard.rows for shard in pool.shards] == [8192, 808]
    assert make_pool(Storage(str(tmp_path)), 9000, 32, seed=1)[1].fingerprint == embeddings.fingerprint
    assert len(set(pool.read_all(["pair_id"])["pair_id"].to_pylist())) == 9000
    with pytest.raises(OSError, match="another size or seed"):
        make_pool(Storage(str(tmp_path)), 9000, 32, seed=2)
    assert make_queries(9000, 32, 1, 7).shape == (7, 32)


def measured(build: dict[str, float], search: float, size: int, nlist: int) -> dict[str, Any]:
    peaks = {"driver": 1 << 20, "worker": 2 << 20}
    work = {"train": float(nlist**2), "fill": float(size * nlist), "merge": float(size), "search": nlist + size / nlist * nlist / 32}
    codes = {
        "build": build, "search": [search] * 3, "bytes": 60 * size, "peaks": peaks, "work": work, "factory": "F", "nprobe": 1, "code_bytes": 56,
    }  # fmt: skip
    exact = {"build": {"build": 5.0}, "search": [2.0] * 3, "bytes": 1536 * size, "peaks": peaks}
    return {EXACT: exact, CODES: codes, "recall": 0.97}


def test_figures_and_gates() -> None:
    assert recall([["a", "b"], ["c", "d"]], [["a", "b"], ["c", "e"]]) == 0.75
    small = measured({"train": 10.0, "fill": 20.0, "merge": 1.0}, 1.0, 250_000, 2048)
    large = measured({"train": 40.0, "fill": 160.0, "merge": 4.0}, 2.0, 1_000_000, 4096)
    results = {"250000": small, "1000000": large}
    gates = {gate.name: gate.passed for gate in gates_of(results)}
    assert gates == {
        "1000000 pairs: recall@8 against exact": True,
        "1000000 pairs: bytes of a code with its row number": True,
        "1000000 pairs: bytes of the whole index / vectors": True,
    }
    # 30 s for 4,096² - 2,048² lists squared; 140 s for the vectors and lists between the sizes
    assert unit_costs(results)["train"] == pytest.approx(30 / (4096**2 - 2048**2))
    assert unit_costs(results)["fill"] == pytest.approx(140 / (1e6 * 4096 - 2.5e5 * 2048))
    arguments = Namespace(threads=2, m=48, nlist=0, nprobe=0, dimension=384, queries=1000)
    first, *_, last = forecast(results, arguments)
    assert first["train"] == pytest.approx(30 / (4096**2 - 2048**2) * 32768**2)  # on two cores, as measured
    assert last["fill"] == pytest.approx(140 / (1e6 * 4096 - 2.5e5 * 2048) * 4e7 * 32768 * 2 / 256)
    assert last["train"] == pytest.approx(first["train"] / 32)  # one node of 64 cores
    text = report(results, arguments)
    assert "| 1000000 | exact | 1 | 1536.0 | 5.0 | 500.0 |" in text
    assert "| 1000000 | codes | 0.9700 | 60.0 | 204.0 | 500.0 |" in text
