"""The ablations' sets: sizes are equal, rules hold, controls are matched, parts are nested; and the whole job on a small loop (slow)."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from synpref_ray.errors import ConfigError, InputError
from synpref_ray.evaluation.accuracy import seed_accuracy
from synpref_ray.evaluation.matching import standardised_differences
from synpref_ray.pipeline.ablate import AblateConfig, check_ablate
from synpref_ray.pipeline.ablation_sets import Arm, Selection, Wild, matched_arms, save_arm, scaling_arms
from synpref_ray.schema import POOL_SCHEMA, Decision
from synpref_ray.tables.pools import commit_pool, write_pool_shard
from synpref_ray.tables.sets import load_set
from synpref_ray.tables.storage import Storage
from tests.builders import make_pairs
from tests.pipeline.small_loop import SmallLoop

NO_POOL = None


def wild(num: int, *, flips: float = 0.3, seed: int = 0) -> Wild:
    """Return a wild pool of numbers: decisions by chance, margins that agree with them."""
    chance = np.random.default_rng(seed)
    rows = []
    for n in range(num):
        decision = chance.choice([Decision.KEEP.value, Decision.FLIP.value, Decision.DROP.value], p=[0.5, flips, 0.5 - flips])
        margin = abs(chance.normal(1, 1)) * (-1 if decision == Decision.FLIP else 1)
        rows.append(
            {
                "pair_id": f"pair-{n}",
                "decision": decision,
                "flipped": decision == Decision.FLIP,
                "margin_best": margin,
                "margin_gold": margin + chance.normal(0, 0.3),
                "category": chance.choice(["math", "chat"]),
            }
        )
    numbers = np.stack([chance.normal(4, 1, num), np.abs([row["margin_best"] for row in rows])], axis=1)
    return Wild(NO_POOL, rows, "task_category", numbers)  # type: ignore[arg-type]


def by_name(arms: list[Arm]) -> dict[str, Arm]:
    return {arm.name: arm for arm in arms}


def flips_of(arm: Arm) -> dict[str, bool]:
    return dict(arm.choices[0][1])


SELECTION = Selection(pairs=40, seed_pairs=10, fractions=(0.1, 0.5, 1.0), seed=3)


def test_sets_are_of_one_size_and_follow_their_rules() -> None:
    pool = wild(300)
    decision = {row["pair_id"]: row["decision"] for row in pool.rows}
    arms = by_name(matched_arms(pool, SELECTION))
    assert {arm.num_pairs for arm in arms.values()} == {40}
    assert list(arms) == ["curated", "raw", "filtered", "corrected", "random", "random, matched"]
    curated = flips_of(arms["curated"])
    assert all(flip == (decision[name] == Decision.FLIP) for name, flip in curated.items())
    assert any(curated.values())
    assert flips_of(arms["raw"]) == dict.fromkeys(curated, False)
    assert {decision[name] for name in flips_of(arms["filtered"])} == {Decision.KEEP}
    assert {(decision[name], flip) for name, flip in flips_of(arms["corrected"]).items()} == {(Decision.FLIP, True)}
    assert not any(flips_of(arms["random"]).values())
    assert not set(flips_of(arms["random, matched"])) & set(curated)


def test_controls_are_closer_to_the_curated_pairs_than_chance() -> None:
    arms = by_name(matched_arms(wild(600), SELECTION))
    reference = arms["curated"].facts
    assert reference is not None
    gaps = {name: standardised_differences(reference, arm.facts) for name, arm in arms.items() if arm.facts is not None}
    assert max(abs(value) for value in gaps["random, matched"].values()) < 0.2
    assert abs(gaps["random, matched"]["noise"]) < abs(gaps["random"]["noise"])
    assert gaps["raw"]["noise"] > 0  # source labels of flipped pairs are doubted
    assert gaps["raw"]["length"] == gaps["raw"]["margin"] == gaps["raw"]["category"] == 0


@given(num=st.integers(4, 120), seed=st.integers(0, 20), pairs=st.integers(1, 50))
def test_no_supply_is_exceeded(num: int, seed: int, pairs: int) -> None:
    pool = wild(num, seed=seed)
    try:
        arms = matched_arms(pool, Selection(pairs, 1, (1.0,), seed))
    except InputError:
        assert not [row for row in pool.rows if row["decision"] == Decision.KEEP]
        return
    assert len({arm.num_pairs for arm in arms}) == 1
    assert arms[0].num_pairs <= min(pairs, num)


def test_parts_of_the_curve_are_nested() -> None:
    small, half, whole = (set(flips_of(arm)) for arm in scaling_arms(wild(300), SELECTION))
    assert small < half < whole
    assert len(half) == round(0.5 * len(whole))


def test_nothing_kept_is_nothing_to_compare() -> None:
    pool = wild(20)
    nothing = Wild(NO_POOL, [{**row, "decision": Decision.DROP.value} for row in pool.rows], "source", pool.numbers)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="kept no pair"):
        matched_arms(nothing, SELECTION)


def test_an_arm_is_a_set_over_the_pool_and_equal_selections_are_one_table(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    table = make_pairs(6).select(POOL_SCHEMA.names)
    pool = commit_pool(
        storage, "wild", "made", [write_pool_shard(storage, "wild", 0, table.slice(0, 4)), write_pool_shard(storage, "wild", 1, table.slice(4))], {}
    )
    ids = table["pair_id"].to_pylist()
    flips = {ids[0]: False, ids[5]: True}
    one, two = (save_arm(storage, Arm("matched", name, "rule", ((pool, flips),))) for name in ("random, matched", "raw"))
    assert (one.name, two.name) == ("ablation-matched-random-matched", "ablation-matched-raw")
    assert one.digest == two.digest == load_set(storage, one.name).digest
    read = one.read()
    assert read["pair_id"].to_pylist() == [ids[0], ids[5]]
    assert read["chosen"].to_pylist() == [table["chosen"][0].as_py(), table["rejected"][5].as_py()]


def test_seeds_are_averaged_pair_by_pair() -> None:
    measured = seed_accuracy([[True, True, False, False], [True, False, False, False]], num_resamples=200)
    assert measured.accuracy == pytest.approx(3 / 8)
    assert measured.by_seed == (0.5, 0.25)
    assert measured.low <= measured.accuracy <= measured.high


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    base = {"workspace": str(tmp_path), "held_out": "none", "pairs": 4, "seed_pairs": 4, "train": {"backbone": "HuggingFaceTB/SmolLM2-135M-Instruct"}}
    with pytest.raises(ConfigError, match="at most once"):
        check_ablate(AblateConfig(**base, parts=("matched", "matched")))
    with pytest.raises(ConfigError, match="3 different fractions"):
        check_ablate(AblateConfig(**base, fractions=(0.1, 0.2)))


@pytest.mark.ray
@pytest.mark.engine
@pytest.mark.slow
def test_a_small_loop_is_ablated_and_a_second_run_trains_nothing(tmp_path: Path) -> None:
    loop, workspace = SmallLoop(tmp_path), tmp_path / "ws"
    for job in ("ingest", "stage1", "stage2"):
        loop.run(job, workspace)
    config = {**yaml.safe_load(loop.config["train"].read_text()), "held_out": str(loop.data / "wild.jsonl")}
    config |= {
        "parts": ["matched", "scaling"],
        "pairs": 4,
        "seed_pairs": 4,
        "fractions": [0.3, 0.6, 1.0],
        "seeds": [0],
        "score": {"dtype": "float32"},
    }
    loop.config["ablate"] = tmp_path / "ablate.yaml"
    loop.config["ablate"].write_text(yaml.safe_dump({**config, "parity": {"enabled": False}}))
    first = loop.run("ablate", workspace)
    sizes = {arm["pairs"] for arm in first["matched"]["arms"].values()}
    assert len(sizes) == 1
    assert len(first["scaling"]["points"]) == 3
    assert all(arm["rule"] for arm in first["matched"]["arms"].values())
    again = loop.run("ablate", workspace)
    assert sum(event["computed"] for event in again["events"] if event["event"] == "step") == 0
    assert again["matched"] == first["matched"]
