"""The plan that `--dry-run` prints: worked by hand at the paper's scale, from pools where they are, and printed before what is missing is said."""

from pathlib import Path

import numpy as np
import pytest

from jobs import stage1, stage2
from synpref_ray.config import load_config
from synpref_ray.pipeline.stage1 import Stage1Config
from synpref_ray.pipeline.stage1_plan import plan_stage1
from synpref_ray.pipeline.stage2 import Stage2Config, plan_stage2
from synpref_ray.pipeline.step_plan import PlannedWork, PoolSize, describe_plan, total
from synpref_ray.pipeline.train_set import TrainJobConfig, plan_train
from tests.pipeline.test_steps import make_pool

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"


def rows_of(text: str) -> dict[str, list[str]]:
    """Return the table's numbers by step."""
    lines = text.splitlines()
    width = len(lines[1].split("  ")[0])
    return {line[:width].strip(): line[width:].split() for line in lines[2:] if line[width : width + 2] == "  " and line[:width].strip()}


def test_hours_follow_from_pairs_workers_and_paces() -> None:
    work = PlannedWork("score", 80_000, 10, workers=4, gpus_per_worker=2.0, pairs_per_hour=1000.0, passes=2)
    assert (work.gpus, work.hours) == (8.0, 20.0)
    assert PlannedWork("score", 80_000, 2, 4, 2.0, 1000.0).hours == 20.0  # two shards keep two workers busy
    assert PlannedWork("score", 80_000, 10, 4, 0.0, 1000.0).hours == 20.0  # without GPUs: by worker
    assert PlannedWork("score", 80_000, 10, 4, 2.0).hours is None
    both = total([work, work], "twice")
    assert (both.pairs, both.shards, both.hours) == (160_000, 20, 40.0)


def test_stage_1_at_the_paper_s_scale(tmp_path: Path) -> None:
    config = load_config(Stage1Config, str(CONFIGS / "stage1.yaml"), [f"workspace={tmp_path / 'none'}"])
    rows = rows_of(plan_stage1(config))
    assert rows["tag (qwen2.5-72b)"] == ["1,000,000", "1,954", "16", "64", "1.3", "85", "-"]  # 80K and 920K in shards of 512; 11,700 an hour and GPU
    assert rows["tag (gpt-4o)"] == [
        "1,000,000",
        "1,954",
        "4",
        "-",
        "1.7",
        "-",
        "3,050",
    ]  # 10,000 requests a minute; 900 x 2.5 + 80 x 10 dollars a million
    gold = [round(100_000 * (number + 1) / 9) for number in range(9)]
    selected = [80_000, 250_000, 250_000, 250_000, 170_000, 0, 0, 0, 0]
    judged = sum(gold) + sum(max(0, pairs - people) for pairs, people in zip(selected, np.diff([0, *gold]).tolist(), strict=True))
    judges = ["qwen2.5-72b", "qwen3-235b-a22b", "gpt-4.1"]
    assert [rows[f"judge ({name}), seed and 8 rounds"][0] for name in judges] == [f"{judged:,}"] * 3
    assert rows["judge (gpt-4.1), seed and 8 rounds"][-1] == f"{judged * (24_720 * 2 + 20 * 8) / 1e6:,.0f}"
    assert rows["train gold RM"][:2] == ["100,000", "391"]  # batches of 256
    silver = [80_000 + min(250_000 * number, 920_000) - round(100_000 * (number + 1) / 9) for number in range(9)]
    assert rows["train best RM, 8 rounds and the last"][0] == f"{sum(silver):,}"


def test_stage_2_at_the_paper_s_scale(tmp_path: Path) -> None:
    config = load_config(Stage2Config, str(CONFIGS / "stage2.yaml"), [f"workspace={tmp_path / 'none'}"])
    text = plan_stage2(config)
    rows = rows_of(text)
    assert rows["score, both RMs"] == ["39,000,000", "4,761", "64", "64", "22.0", "1,408", "-"]  # 2 x 39M at 55,400 an hour on 64 GPUs
    assert rows["tag (qwen2.5-72b)"][:2] == ["13,650,000", "26,661"]  # 35 %, in shards of 512
    assert "wild 39,000,000" in text
    assert rows["decide"][2] == "-"  # no workers of its own, no pace
    assert "without decide (no pace is stated)" in text
    assert "at most 64 GPUs at once" in text
    assert rows["judge (gpt-4.1-mini)"][4] == f"{13_750_000 * 24_740 / 150e6 / 60:.1f}"  # tokens a minute bound it


def test_a_cost_above_its_limit_is_told(tmp_path: Path) -> None:
    words = [f"workspace={tmp_path / 'none'}", "judges.2.engine.spending_limit=70000"]
    text = plan_stage1(load_config(Stage1Config, str(CONFIGS / "stage1.yaml"), words))
    assert "judge (gpt-4.1), seed and 8 rounds: 71,644 is more than its spending_limit of 70,000, where the job would end" in text
    text = plan_stage1(load_config(Stage1Config, str(CONFIGS / "stage1.yaml"), words[:1]))
    assert "spending_limit" not in text
    assert "endpoints: 74,694" in text


def test_an_endpoint_without_limits_and_prices_has_no_hours_and_no_costs(tmp_path: Path) -> None:
    words = [
        f"workspace={tmp_path / 'none'}",
        'judges.2.engine={"base_url": "http://h/v1", "model": "m"}',
        'taggers.2.engine={"base_url": "http://h/v1", "model": "m"}',
    ]
    text = plan_stage1(load_config(Stage1Config, str(CONFIGS / "stage1.yaml"), words))
    assert rows_of(text)["tag (gpt-4o)"][2:] == ["4", "-", "-", "-"]
    assert "endpoints:" not in text


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-3.1-8b-40m"])
def test_a_final_training_at_the_paper_s_scale(tmp_path: Path, name: str) -> None:
    config = load_config(TrainJobConfig, str(CONFIGS / "family" / f"{name}.yaml"), [f"workspace={tmp_path / 'none'}"])
    numbers = {
        "llama-3.1-8b": ["26,000,000", "2,540", "64", "64", "33.6", "2,149"],
        "llama-3.1-8b-40m": ["40,000,000", "3,907", "64", "64", "51.7", "3,306"],
    }
    assert rows_of(plan_train(config))[f"train {name}"] == numbers[name]  # 12,100 pairs an hour on each of 64 GPUs


def test_a_laptop_s_plan_counts_the_pools_that_are_there(tmp_path: Path) -> None:
    for name, sizes in {"seed": [5, 3], "unverified": [4, 0, 6], "wild": [7]}.items():
        make_pool(tmp_path, name, sizes)
    overrides = [f"workspace={tmp_path}", "annotator.kind=simulated", "annotator.path=x", "annotator.seed_pairs=4", "annotator.round_pairs=2"]
    text = plan_stage1(load_config(Stage1Config, str(CONFIGS / "laptop_stage1.yaml"), overrides))
    assert rows_of(text)["tag (tagger)"][:4] == ["18", "5", "1", "-"]
    assert "simulated" in text
    assert "states no pace" in text
    assert "plan.pool_pairs" not in text
    assert rows_of(plan_stage2(load_config(Stage2Config, str(CONFIGS / "laptop_stage2.yaml"), [f"workspace={tmp_path}"])))["decide"][:2] == ["7", "1"]


@pytest.mark.parametrize(("job", "main"), [("stage1", stage1.main), ("stage2", stage2.main)])
def test_a_dry_run_prints_the_plan_and_then_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, job: str, main: object
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert callable(main)
    assert main(["--config", str(CONFIGS / f"{job}.yaml"), f"workspace={tmp_path / 'none'}", "--dry-run"]) == 2
    said = capsys.readouterr()
    assert "GPU hours" in said.out
    assert "does not exist" in said.err
    assert "OPENAI_API_KEY (api_key_env) is not set" in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert not (tmp_path / "none").exists()


def test_nothing_is_divided_by_nothing() -> None:
    text = describe_plan([PlannedWork("tag", 0, 0, 1, 0.0, 5.0)], {"seed": PoolSize(0, 0, is_stated=True)})
    assert "0.0 hours" in text
