"""The ablations' sets: sizes are equal, rules hold, controls are matched, parts are nested; and the whole job on a small loop (slow)."""

import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from synpref_ray.errors import ConfigError, InputError
from synpref_ray.evaluation.accuracy import seed_accuracy
from synpref_ray.evaluation.matching import draw, standardised_differences
from synpref_ray.pipeline.ablate import AblateConfig, _without_training_prompts, check_ablate, read_held_out
from synpref_ray.pipeline.ablation_pairs import Flips, Wild, WildTables, count_words, read_wild
from synpref_ray.pipeline.ablation_sets import Arm, Selection, matched_arms, matched_size, save_arm, scaling_arms, shared_groups
from synpref_ray.reporting.run import Run
from synpref_ray.schema import POOL_SCHEMA
from synpref_ray.tables.pools import Pool, commit_pool, content_digest, write_pool_shard
from synpref_ray.tables.sets import load_set
from synpref_ray.tables.sidecars import Sidecar
from synpref_ray.tables.storage import Storage
from tests.builders import make_pairs
from tests.pipeline.small_loop import REPOSITORY, SmallLoop

NO_POOL = None


def wild(num: int, *, flips: float = 0.3, seed: int = 0) -> Wild:
    """Return a wild pool of numbers: decisions by chance, margins that agree with them."""
    chance = np.random.default_rng(seed)
    rows = []
    for n in range(num):
        decision = chance.choice(["keep", "flip", "drop"], p=[0.5, flips, 0.5 - flips])
        margin = abs(chance.normal(1, 1)) * (-1 if decision == "flip" else 1)
        rows.append(
            {
                "pair_id": f"pair-{n}",
                "shard": n // 100,
                "keep": decision == "keep",
                "flip": decision == "flip",
                "flipped": decision == "flip",
                "margin_best": margin,
                "margin_gold": margin + chance.normal(0, 0.3),
                "category": str(chance.choice(["math", "chat"])),
                "words": int(np.exp(chance.normal(4, 1))),
            }
        )
    return Wild(NO_POOL, pa.Table.from_pylist(rows), "task_category")  # type: ignore[arg-type]


def by_name(arms: list[Arm]) -> dict[str, Arm]:
    return {arm.name: arm for arm in arms}


def decisions_of(pool: Wild) -> dict[str, str]:
    return {row["pair_id"]: "keep" if row["keep"] else "flip" if row["flip"] else "drop" for row in pool.table.to_pylist()}


def flips_of(arm: Arm) -> dict[str, bool]:
    flips = arm.choices[0][1]
    return dict(zip(flips.names.to_pylist(), flips.turned.tolist(), strict=True))


SELECTION = Selection(pairs=40, seed_pairs=10, fractions=(0.1, 0.5, 1.0), seed=3)


def test_sets_are_of_one_size_and_follow_their_rules() -> None:
    pool = wild(300)
    decision = decisions_of(pool)
    arms = by_name(matched_arms(pool, SELECTION))
    assert {arm.num_pairs for arm in arms.values()} == {40}
    assert list(arms) == ["curated", "raw", "filtered", "corrected", "random", "random, matched"]
    curated = flips_of(arms["curated"])
    assert all(flip == (decision[name] == "flip") for name, flip in curated.items())
    assert any(curated.values())
    assert flips_of(arms["raw"]) == dict.fromkeys(curated, False)
    assert {decision[name] for name in flips_of(arms["filtered"])} == {"keep"}
    assert {(decision[name], flip) for name, flip in flips_of(arms["corrected"]).items()} == {("flip", True)}
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
        assert "keep" not in decisions_of(pool).values()
        return
    assert len({arm.num_pairs for arm in arms}) == 1
    assert arms[0].num_pairs <= min(pairs, num)


def test_parts_of_the_curve_are_nested() -> None:
    small, half, whole = (set(flips_of(arm)) for arm in scaling_arms(wild(300), SELECTION))
    assert small < half < whole
    assert len(half) == round(0.5 * len(whole))


def test_nothing_kept_is_nothing_to_compare() -> None:
    pool = wild(20)
    nothing = Wild(pool.pool, pool.table.set_column(2, "keep", pa.repeat(False, 20)), "source")
    with pytest.raises(InputError, match="kept no pair"):
        matched_arms(nothing, SELECTION)


def test_an_arm_is_a_set_over_the_pool_and_equal_selections_are_one_table(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    table = make_pairs(6).select(POOL_SCHEMA.names)
    pool = commit_pool(
        storage, "wild", "made", [write_pool_shard(storage, "wild", 0, table.slice(0, 4)), write_pool_shard(storage, "wild", 1, table.slice(4))], {}
    )
    ids = table["pair_id"].to_pylist()
    flips = Flips.of([(ids[0], False, 0), (ids[5], True, 1)])
    assert flips.digest == content_digest({ids[5]: True, ids[0]: False})  # the name that its table has had since version 1
    one, two = (save_arm(storage, Arm("matched", name, "rule", ((pool, flips),))) for name in ("random, matched", "raw"))
    assert (one.name, two.name) == ("ablation-matched-random-matched", "ablation-matched-raw")
    assert one.digest == two.digest == load_set(storage, one.name).digest
    assert not list((tmp_path / "scratch").rglob("*.parquet"))
    read = one.read()
    assert read["pair_id"].to_pylist() == [ids[0], ids[5]]
    assert read["chosen"].to_pylist() == [table["chosen"][0].as_py(), table["rejected"][5].as_py()]


def test_a_size_below_what_is_asked_for_is_explained(caplog: pytest.LogCaptureFixture) -> None:
    few = wild(300, flips=0.02)
    num_flips = list(decisions_of(few).values()).count("flip")
    assert 0 < num_flips < 10
    why = f"every matched set has {num_flips} pairs, not the 40 asked for: there are no more flipped pairs"
    assert matched_size(few, SELECTION) == (num_flips, why)
    assert {arm.num_pairs for arm in matched_arms(few, SELECTION)} == {num_flips}
    assert why in caplog.text
    assert matched_size(wild(300), SELECTION) == (40, "")


def test_large_pools_are_drawn_from_as_small_ones_are() -> None:
    pool = wild(500)
    names = pool.table["pair_id"].to_pylist()
    for count in (0, 7, 500, 600):
        drawn = pool.draw(np.arange(500), count, seed=5, use="u").tolist()
        assert drawn == draw(names, count, seed=5, use="u")


def two_shards(storage: Storage) -> tuple[Pool, pa.Table]:
    table = make_pairs(8).select(POOL_SCHEMA.names)
    shards = [write_pool_shard(storage, "wild", n, table.slice(4 * n, 4)) for n in range(2)]
    return commit_pool(storage, "wild", "made", shards, {}), table


def write_sidecar(pool: Pool, name: str, table: pa.Table) -> Sidecar:
    sidecar = Sidecar(pool, name, "f" * 32)
    for number in range(2):
        sidecar.write(number, table.slice(4 * number, 4))
    return sidecar


def test_the_wild_pool_is_columns_of_usable_pairs_one_a_comparison(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    pool, table = two_shards(storage)
    reasons = ["agree"] * 8
    reasons[1] = "gold_prompt"
    columns = {
        "pair_id": table["pair_id"],
        "decision": pa.array(["keep", "drop", "flip", "keep", "drop", "flip", "keep", "keep"]),
        "flipped": pa.array([False, False, True, False, False, True, False, False]),
        "decision_reason": pa.array(reasons),
        "margin_best": pa.array([1.0, 1.0, -2.0, None, 0.5, -1.0, 3.0, 4.0], pa.float32()),
        "margin_gold": pa.array([1.0] * 8, pa.float32()),
    }
    decision = write_sidecar(pool, "decision", pa.table(columns))
    run = Run(storage, "ablate", AblateConfig(**settings_of(tmp_path)))
    words = count_words(run, pool)
    assert words.read_all(["words"])["words"].to_pylist() == [len(row["chosen"].split()) + len(row["rejected"].split()) for row in table.to_pylist()]
    found = read_wild(WildTables(pool, decision), words, None)
    ids = table["pair_id"].to_pylist()
    comparisons = table["comparison_id"].to_pylist()
    usable = [n for n in range(8) if n not in (1, 3) and comparisons[n] not in [comparisons[m] for m in range(n) if m not in (1, 3)]]
    assert found.table["pair_id"].to_pylist() == [ids[n] for n in usable]
    assert found.table["shard"].to_pylist() == [n // 4 for n in usable]
    assert found.where("flip").tolist() == [place for place, n in enumerate(usable) if n in (2, 5)]
    assert found.category_from == "source"
    assert found.table["category"].to_pylist() == [table["source"][n].as_py() for n in usable]


def test_prompts_of_a_set_are_found_among_the_held_out_ones_and_left_out(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    pool, table = two_shards(storage)
    ids, groups = table["pair_id"].to_pylist(), table["prompt_group"].to_pylist()
    arms = [Arm("matched", name, "", ((pool, Flips.of([(ids[n], False, n // 4)])),)) for name, n in (("a", 0), ("b", 5))]
    assert shared_groups(arms, {groups[0], groups[5], "other"}) == {groups[0], groups[5]}
    assert shared_groups(arms[:1], {groups[5]}) == set()
    rows = [{name: table[name][n].as_py() for name in ("prompt", "chosen", "rejected")} for n in (0, 5)]
    rows.append({"prompt": "never seen", "chosen": "a", "rejected": "b"})
    file = tmp_path / "held.JSONL"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = AblateConfig(**settings_of(tmp_path, held_out=str(file)))
    run = Run(storage, "ablate", config)
    assert _without_training_prompts(config, run, read_held_out(config), arms).tested.tolist() == [False, False, True]
    assert run.metrics["held_out"] == {"rows": 3, "left_out_as_trained_on": 2}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    with pytest.raises(InputError, match="every pair shares its prompt"):
        _without_training_prompts(config, run, read_held_out(config), arms)


def test_held_out_pairs_may_be_at_a_url(tmp_path: Path) -> None:
    url = f"memory://held-{uuid.uuid4().hex}"
    Storage(url).write_bytes("held.jsonl", b'{"prompt": "p", "chosen": "a", "rejected": "b"}\nnot json\n')
    held_out = read_held_out(AblateConfig(**settings_of(tmp_path, held_out=f"{url}/held.jsonl")))
    assert held_out.prompts[1] == "item row 1"
    Storage(url).write_bytes("many.jsonl", b'{"prompt": "p", "chosen": "a", "rejected": ["b"]}\n')
    with pytest.raises(InputError, match=r"many.jsonl holds no pair \(1 rows\)"):
        read_held_out(AblateConfig(**settings_of(tmp_path, held_out=f"{url}/many.jsonl")))


def settings_of(workspace: Path, held_out: str = "none") -> dict[str, Any]:
    train = {"backbone": "HuggingFaceTB/SmolLM2-135M-Instruct"}
    return {"workspace": str(workspace), "held_out": held_out, "pairs": 4, "seed_pairs": 4, "train": train}


def test_seeds_are_averaged_pair_by_pair() -> None:
    measured = seed_accuracy([[True, True, False, False], [True, False, False, False]], num_resamples=200)
    assert measured.accuracy == pytest.approx(3 / 8)
    assert measured.by_seed == (0.5, 0.25)
    assert measured.low <= measured.accuracy <= measured.high


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    base = settings_of(tmp_path)
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
    held_out = tmp_path / "held_out.parquet"
    pq.write_table(pq.read_table(REPOSITORY / "examples" / "data" / "held_out.parquet").slice(0, 24), held_out)
    config = {**yaml.safe_load(loop.config["train"].read_text()), "held_out": str(held_out)}
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
