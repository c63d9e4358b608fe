"""The stages benchmark: stand-ins that say the same whatever the order, a whole Stage 2 with them, and figures that follow from what was measured."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from benchmarks._stage_models import DIMENSION, PairMaker, StandInEmbedder, hashed, make_shard, rewards_of, stage2_config, stand_ins, write_stage1
from benchmarks.stages import BARE, OURS, STORE, gates_of, report, score_bare, score_ours, text_bytes, timed_stage2, wrong_of
from synpref_ray.pipeline.llm_steps import LLMStepConfig
from synpref_ray.pipeline.steps import Resources
from synpref_ray.schema import REWARDS_SCHEMA
from synpref_ray.tables.pools import Pool, commit_pool, list_pools, open_pool
from synpref_ray.tables.sidecars import open_sidecar
from synpref_ray.tables.storage import Storage


def small_workspace(root: Path, sizes: list[int]) -> Pool:
    storage = Storage(str(root))
    write_stage1(storage, 40, seed=3)
    shards = [make_shard(storage, "wild", 3, number, size) for number, size in enumerate(sizes)]
    return commit_pool(storage, "wild", "synthetic", shards, {})


def test_stand_ins_say_the_same_whatever_the_order() -> None:
    pairs = PairMaker(1).rows(0, 2000, "wild")
    assert pairs.equals(PairMaker(1).rows(0, 2000, "wild"))
    assert 2048 < sum(pairs.column(name).nbytes for name in ("prompt", "chosen", "rejected")) / 2000 < 3000
    ids = pairs["pair_id"].combine_chunks()
    numbers = hashed(ids)
    np.testing.assert_array_equal(numbers[700:], hashed(ids[700:]))
    np.testing.assert_allclose(np.histogram(numbers, bins=4, range=(0, 1))[0], 500, atol=90)
    rewards = rewards_of(ids, "best.")
    assert rewards.schema.equals(REWARDS_SCHEMA)
    assert 0.25 < np.mean(rewards["margin"].to_numpy() < 0) < 0.35
    assert 0.16 < np.mean(rewards_of(ids, "gold.")["margin"].to_numpy() < 0) < 0.24
    vectors = StandInEmbedder().embed(["a", "b"])
    np.testing.assert_array_equal(vectors[1:], StandInEmbedder().embed(["b"]))


@pytest.mark.ray
def test_stage_2_with_stand_ins(ray: ModuleType, tmp_path: Path) -> None:
    """Everything real but the models; then another flip bar, which asks no model; and the bare pipeline beside the scoring step."""
    pool = small_workspace(tmp_path / "ws", [60, 0, 50])
    with stand_ins():
        first = timed_stage2(pool.storage, 1)
        again = timed_stage2(pool.storage, 1, gate={"min_flip_confidence": 0.6})
        assert first["scored"] == 110
        assert first["requests"] >= (first["judged"] - 2) * 3  # a tag and two votes each; what is too long for the model is not asked about
        assert (again["scored"], again["requests"]) == (0, 0)
        assert sum(first["decisions"].values()) == sum(again["decisions"].values()) == 110
        assert again["decisions"]["flip"] < first["decisions"]["flip"]
        assert again["judged"] < first["judged"]
        assert len([name for name in list_pools(pool.storage) if name.startswith("wild-mismatches-")]) == 1
        # another judge under that bar is asked about the pairs of that bar alone, not about all that the first one was asked about
        judge = {"judge": "stand-in", "max_input_tokens": 100_000, "max_exemplars": 1}
        judges = [{"engine": {"model": "HuggingFaceTB/SmolLM2-135M-Instruct"}, "judge": judge}]
        asked = timed_stage2(pool.storage, 1, gate={"min_flip_confidence": 0.6}, judges=judges)
        assert asked["judged"] == again["judged"]
        pools = [open_pool(pool.storage, name) for name in list_pools(pool.storage) if name.startswith("wild-mismatches-")]
        assert sorted(found.num_rows for found in pools) == [again["judged"], first["judged"]]
        # a workspace that knew the second bar from the start decides the same
        other = small_workspace(tmp_path / "other", [60, 0, 50])
        assert timed_stage2(other.storage, 1, gate={"min_flip_confidence": 0.6})["decisions"] == again["decisions"]
        timed_stage2(pool.storage, 1, gate={"min_flip_confidence": 0.6})  # the first judge's decisions are the record's again
        here, there = (open_sidecar(one, "decision", one.storage.read_json("rounds/stage2.json")["decision"]).read_all() for one in (pool, other))
        assert here.equals(there)
        score_ours(pool, 1)
        score_bare(pool, 1, tmp_path / "bare")
    assert text_bytes(pool) / 110 > 2048
    assert not (tmp_path / "bare").exists()
    assert stage2_config(pool.storage, 1).parity.enabled is False


def test_a_wider_band_asks_about_its_new_pairs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And decides, pair by pair, as a workspace that had the wide band from the start; all in this process, without Ray."""
    monkeypatch.setattr(LLMStepConfig, "resources", Resources())
    pool, other = (small_workspace(tmp_path / name, [60, 0, 50]) for name in ("ws", "other"))
    here = {"score": {"num_workers": 0}, "embed": {"num_workers": 0, "dimension": DIMENSION}}
    with stand_ins():
        narrow = timed_stage2(pool.storage, 1, **here)
        wide, again = (timed_stage2(pool.storage, 1, **here, gate={"band": 0.1}) for _ in range(2))
        at_once = timed_stage2(other.storage, 1, **here, gate={"band": 0.1})
    assert narrow["judged"] < wide["judged"] == at_once["judged"]
    gathered = [open_pool(pool.storage, name).num_rows for name in list_pools(pool.storage) if name.startswith("wild-mismatches-")]
    assert sorted(gathered) == sorted([narrow["judged"], wide["judged"] - narrow["judged"]])
    assert narrow["requests"] + wide["requests"] == at_once["requests"]
    assert (wide["scored"], again["requests"]) == (0, 0)
    ours, theirs = (open_sidecar(one, "decision", one.storage.read_json("rounds/stage2.json")["decision"]).read_all() for one in (pool, other))
    assert ours.equals(theirs)


def size(rows: int, seconds: float, *, peak: int, requests: int = 0, **more: Any) -> dict[str, Any]:
    ran = {"seconds": seconds, "steps": {"score, both RMs": 5.0}, "requests": 0, "scored": rows, "decisions": {"keep": rows}, "judged": 3}
    again = {**ran, "seconds": 6.0, "scored": 0, "requests": requests}
    return {
        "rows": rows,
        "gold": 256,
        "bytes_a_row": 2300.0,
        "stage2": ran,
        "again": again,
        "peaks": {"driver": 100, "worker": 200, STORE: peak},
        **more,
    }


def test_figures_and_gates() -> None:
    sizes = [
        size(100_000, 20.0, peak=1000, bare={OURS: [3.0, 2.0, 2.4], BARE: [2.0, 2.0, 2.0]}),
        size(400_000, 80.0, peak=1200),
    ]
    gates = {gate.name: (round(gate.value, 3), gate.passed) for gate in gates_of(sizes)}
    assert gates == {
        "100000 rows: scoring step / bare Ray, time": (1.2, True),
        "400000 rows: decisions derived anew, a minute": (4e6, True),
        "overhead a pair at 400000 / at 100000 rows": (1.0, True),
        "driver's peak at 400000 / at 100000 rows": (1.0, True),
        "worker's peak at 400000 / at 100000 rows": (1.0, True),
        "object store's peak at 400000 / at 100000 rows": (1.2, False),
    }
    assert wrong_of(sizes) == []
    assert wrong_of([size(10, 1.0, peak=1, requests=4)]) == ["10 rows: deriving decisions anew asked the models for 4 replies"]
    text = report(sizes, [{"shards": 100, OURS: [2.0], BARE: [1.0]}])
    assert "| 400000 | 256 | 2300 | 80.0 | 5000 | 200 |  | 4000000 | 2.2 |" in text
    assert "| 100 | 20.0 | 10.0 |" in text
