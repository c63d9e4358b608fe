"""docs/plan_40m.md: its tables are what the planner prints, its models are the family's, and the stages' own plans go by the same paces."""

import re
import shlex
from pathlib import Path

import pytest

from synpref_ray.config import load_config
from synpref_ray.errors import ConfigError
from synpref_ray.pipeline.hygiene import HygieneConfig
from synpref_ray.pipeline.job import parse_arguments
from synpref_ray.pipeline.plan import PlanConfig, check_plan, run_plan
from synpref_ray.pipeline.stage1 import Stage1Config
from synpref_ray.pipeline.stage2 import Stage2Config
from synpref_ray.planning.cost import Throughputs
from synpref_ray.planning.stages import StagesConfig
from synpref_ray.reporting.run import Run
from tests.cluster.test_operations_guide import SIZES
from tests.pipeline.test_configs import CONFIGS, FAMILY, JOBS, family_config

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "plan_40m.md").read_text(encoding="utf-8")
WHAT_IF = re.findall(r"^\| `(.+?)` \| .+? \| ([\d,]+) \| ([\d,]+) \|$", PAGE, re.MULTILINE)


def planned(folder: Path, *overrides: str) -> tuple[str, Run]:
    config = load_config(PlanConfig, str(CONFIGS / "plan_40m.yaml"), [f"workspace={folder}", *overrides])
    check_plan(config)
    run = Run(config.storage, "plan", config)
    return run_plan(config, run), run


def test_the_page_shows_what_the_planner_prints(tmp_path: Path) -> None:
    block = re.search(r"<!-- plan -->\n```\n(.*?)\n```", PAGE, re.DOTALL)
    assert block
    assert planned(tmp_path)[0].splitlines() == block[1].splitlines()


@pytest.mark.parametrize(("setting", "gpu_hours", "total"), WHAT_IF, ids=[setting for setting, *_ in WHAT_IF])
def test_what_if_is_what_the_planner_says(tmp_path: Path, setting: str, gpu_hours: str, total: str) -> None:
    stages = planned(tmp_path, *setting.split())[1].metrics["stages"]
    assert (f"{stages['gpu_hours']:,.0f}", f"{stages['total']:,.0f}") == (gpu_hours, total)


def test_several_things_are_varied() -> None:
    assert len(WHAT_IF) >= 8


def test_every_command_has_valid_settings_and_every_file_is_there() -> None:
    commands = re.findall(r"python jobs/(\w+)\.py (.*?)[`\n]", PAGE)
    assert {job for job, _ in commands} == {"plan", "train", "hygiene"}
    for job, words in commands:
        parsed = parse_arguments(shlex.split(words.removesuffix(" SETTING")))
        load_config({**JOBS, "hygiene": HygieneConfig}[job], str(ROOT / parsed.config) if parsed.config else None, parsed.overrides)
    named = re.findall(r"(?:benchmarks/|jobs/configs/|\]\()([\w./-]+\.(?:py|yaml|md))", PAGE)
    assert len(named) > 8
    assert not [name for name in named if not any((folder / name).exists() for folder in (ROOT / "benchmarks", CONFIGS, ROOT / "docs"))]


def test_its_models_are_the_family() -> None:
    stages: StagesConfig = load_config(PlanConfig, str(CONFIGS / "plan_40m.yaml"), []).stages
    assert [model.name for model in stages.models] == [*FAMILY]
    assert [model.billions for model in stages.models] == [float(billions) for _, billions, *_ in SIZES]
    for model in stages.models:
        config = family_config(model.name)
        keeps_all = config.train.gradient_checkpointing_min_tokens > config.train.max_tokens_per_microbatch
        assert model.recompute != keeps_all
        assert model.with_flipped == (FAMILY[model.name][1] == "kept-and-flipped")


def three_digits(value: float) -> float:
    return float(f"{value:.3g}")


def test_the_stages_and_trainings_plan_with_the_same_paces() -> None:
    plan = load_config(PlanConfig, str(CONFIGS / "plan_40m.yaml"), [])
    derived = {name: three_digits(pace) for name, pace in plan.compute.throughputs().model_dump().items()}
    stage1 = load_config(Stage1Config, str(CONFIGS / "stage1.yaml"), []).plan
    stage2 = load_config(Stage2Config, str(CONFIGS / "stage2.yaml"), []).plan
    assert stage1.throughputs == Throughputs(**derived)
    assert stage2.throughputs == Throughputs(**{**derived, "train": 0.0})
    assert stage1.embed == stage2.embed == three_digits(plan.compute.embed_rate())
    assert stage2.mismatch_fraction == plan.assumptions.mismatch_fraction
    for model in plan.stages.models:
        pace = family_config(model.name).plan.throughputs.train
        assert pace == three_digits(plan.compute.train_rate(model.billions, recompute=model.recompute))


def test_a_given_pace_goes_before_the_derived_one(tmp_path: Path) -> None:
    before, after = (planned(tmp_path / name, *words)[1].metrics["stages"] for name, words in (("a", ()), ("b", ("throughputs.judge=7290",))))
    hours = [{stage["name"]: stage["device_hours"] for stage in found["stages"]} for found in (before, after)]
    assert hours[1]["judge mismatches"] == pytest.approx(hours[0]["judge mismatches"] / 10, rel=0.01)
    assert hours[1]["train qwen3-8b"] == hours[0]["train qwen3-8b"]


@pytest.mark.parametrize("setting", ["budget=1000", "prices.gpu_hour=0"])
def test_a_table_by_stages_needs_sizes_and_prices_alone(tmp_path: Path, setting: str) -> None:
    with pytest.raises(ConfigError, match="a table by stages"):
        planned(tmp_path, setting)
