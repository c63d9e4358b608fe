"""docs/plan_40m.md: its tables are what the planner prints, its models are the family's, and the stages' own plans go by the same paces."""

import re
import shlex
from pathlib import Path

import pytest

from synpref_ray.config import load_config
from synpref_ray.errors import ConfigError
from synpref_ray.llm.endpoint_config import EndpointConfig
from synpref_ray.pipeline.hygiene import HygieneConfig
from synpref_ray.pipeline.job import parse_arguments
from synpref_ray.pipeline.plan import PlanConfig, check_plan, run_plan
from synpref_ray.pipeline.stage1 import Stage1Config
from synpref_ray.pipeline.stage1_plan import plan_stage1
from synpref_ray.pipeline.stage2 import Stage2Config, plan_stage2
from synpref_ray.planning.cost import Throughputs
from synpref_ray.planning.stages import StagesConfig
from synpref_ray.reporting.run import Run
from tests.cluster.test_operations_guide import SIZES
from tests.pipeline.test_configs import CONFIGS, FAMILY, JOBS, family_config

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "plan_40m.md").read_text(encoding="utf-8")
WHAT_IF = re.findall(r"^\| `(.+?)` \| .+? \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", PAGE, re.MULTILINE)


def planned(folder: Path, *overrides: str) -> tuple[str, Run]:
    config = load_config(PlanConfig, str(CONFIGS / "plan_40m.yaml"), [f"workspace={folder}", *overrides])
    check_plan(config)
    run = Run(config.storage, "plan", config)
    return run_plan(config, run), run


def test_the_page_shows_what_the_planner_prints(tmp_path: Path) -> None:
    block = re.search(r"<!-- plan -->\n```\n(.*?)\n```", PAGE, re.DOTALL)
    assert block
    assert planned(tmp_path)[0].splitlines() == block[1].splitlines()


@pytest.mark.parametrize(("setting", "gpu_hours", "endpoints", "total"), WHAT_IF, ids=[setting for setting, *_ in WHAT_IF])
def test_what_if_is_what_the_planner_says(tmp_path: Path, setting: str, gpu_hours: str, endpoints: str, total: str) -> None:
    stages = planned(tmp_path, *setting.split())[1].metrics["stages"]
    assert [f"{stages[name]:,.0f}" for name in ("gpu_hours", "endpoints", "total")] == [gpu_hours, endpoints, total]


@pytest.mark.parametrize(("job", "kind"), [("stage1", Stage1Config), ("stage2", Stage2Config)])
def test_the_page_s_sums_of_the_stages_are_those_of_their_own_plans(tmp_path: Path, job: str, kind: type[Stage1Config] | type[Stage2Config]) -> None:
    config = load_config(kind, str(CONFIGS / f"{job}.yaml"), [f"workspace={tmp_path / 'none'}"])
    text = plan_stage1(config) if isinstance(config, Stage1Config) else plan_stage2(config)
    hours, gpu_hours, endpoints = re.search(r"other: ([\d,.]+) hours, ([\d,]+) GPU hours.*?endpoints: ([\d,]+) by", text, re.DOTALL).groups()  # type: ignore[union-attr]
    assert f"| Stage {job[-1]} | {hours} | {gpu_hours} | {endpoints} |" in PAGE


def test_several_things_are_varied() -> None:
    assert len(WHAT_IF) >= 8


def test_every_command_has_valid_settings_and_every_file_is_there() -> None:
    commands = re.findall(r"python jobs/(\w+)\.py (.*?)[`\n]", PAGE)
    assert {job for job, _ in commands} == {"plan", "train", "hygiene", "stage1"}
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
    assert stage1.throughputs == Throughputs(score=derived["score"], train=derived["train"])
    assert stage2.throughputs == Throughputs(score=derived["score"])
    for one in (stage1, stage2):
        assert one.tag_tokens == plan.compute.tag_request
        assert one.judge_tokens == plan.compute.judge_request
    assert stage1.embed == stage2.embed == three_digits(plan.compute.embed_rate())
    assert stage2.mismatch_fraction == plan.assumptions.mismatch_fraction
    for model in plan.stages.models:
        pace = family_config(model.name).plan.throughputs.train
        assert pace == three_digits(plan.compute.train_rate(model.billions, recompute=model.recompute))


@pytest.mark.parametrize(("number", "kind"), [(1, Stage1Config), (2, Stage2Config)])
def test_its_taggers_and_judges_are_those_of_the_stages(number: int, kind: type[Stage1Config] | type[Stage2Config]) -> None:
    plan = load_config(PlanConfig, str(CONFIGS / "plan_40m.yaml"), [])
    config = load_config(kind, str(CONFIGS / f"stage{number}.yaml"), [])
    for listed, steps, paces, rate in (
        (plan.stages.taggers, {step.tagger.name: step for step in config.taggers}, config.plan.taggers, plan.compute.tag_rate),
        (plan.stages.judges, {step.judge.judge: step for step in config.judges}, config.plan.judges, plan.compute.judge_rate),
    ):
        models = [model for model in listed if number in model.stages]
        assert [model.name for model in models] == [*steps]
        assert paces == {model.name: three_digits(model.speed * rate(model.billions)) for model in models if model.billions}
        for model in models:
            engine = steps[model.name].engine
            assert isinstance(engine, EndpointConfig) == (not model.billions)
            if isinstance(engine, EndpointConfig):
                assert engine.spending_limit
                for name in ("price_per_million_prompt_tokens", "price_per_million_output_tokens", "tokens_per_minute"):
                    assert getattr(engine, name) == getattr(model, name)


def test_a_given_pace_goes_before_the_derived_one(tmp_path: Path) -> None:
    all_judges = 1 / (1 / 728.7 + 1 / 1204.0)  # one after another
    given = (("a", ()), ("b", (f"throughputs.judge={10 * all_judges}",)))
    before, after = (planned(tmp_path / name, *words)[1].metrics["stages"] for name, words in given)
    hours = [{stage["name"]: stage["device_hours"] for stage in found["stages"]} for found in (before, after)]
    for judge in ("qwen2.5-72b", "qwen3-235b-a22b"):
        assert hours[1][f"judge mismatches: {judge}"] == pytest.approx(hours[0][f"judge mismatches: {judge}"] / 10, rel=0.01)
    assert hours[1]["judge mismatches: gpt-4.1-mini"] == hours[0]["judge mismatches: gpt-4.1-mini"]
    assert hours[1]["train qwen3-8b"] == hours[0]["train qwen3-8b"]


@pytest.mark.parametrize("setting", ["budget=1000", "prices.gpu_hour=0"])
def test_a_table_by_stages_needs_sizes_and_prices_alone(tmp_path: Path, setting: str) -> None:
    with pytest.raises(ConfigError, match="a table by stages"):
        planned(tmp_path, setting)
