"""Every config in jobs/configs is valid for its job."""

from pathlib import Path
from typing import Any

import pytest

from synpref_ray.config import Settings, load_config
from synpref_ray.errors import ConfigError
from synpref_ray.pipeline.ablate import AblateConfig
from synpref_ray.pipeline.annotation import AnnotateConfig
from synpref_ray.pipeline.attack import AttackConfig
from synpref_ray.pipeline.demo import DemoConfig
from synpref_ray.pipeline.ingest_sources import IngestConfig
from synpref_ray.pipeline.leaks import LeaksConfig
from synpref_ray.pipeline.plan import PlanConfig
from synpref_ray.pipeline.preverify import PreverifyConfig
from synpref_ray.pipeline.stage1 import Stage1Config
from synpref_ray.pipeline.stage2 import Stage2Config
from synpref_ray.pipeline.train_set import TrainJobConfig

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
JOBS: dict[str, type[Settings]] = {
    "ingest": IngestConfig,
    "stage1": Stage1Config,
    "stage2": Stage2Config,
    "train": TrainJobConfig,
    "demo": DemoConfig,
    "attack": AttackConfig,
    "annotate": AnnotateConfig,
    "preverify": PreverifyConfig,
    "decontaminate": LeaksConfig,
    "plan": PlanConfig,
    "ablate": AblateConfig,
}


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.name)
def test_a_config_is_valid(file: Path) -> None:
    job = file.stem.removeprefix("laptop_").split("_")[0]
    load_config(JOBS[job], str(file), [])


def test_the_cluster_configs_keep_the_paper_s_values() -> None:
    stage1 = load_config(Stage1Config, str(CONFIGS / "stage1.yaml"), [])
    assert (stage1.stop.max_rounds, stage1.retrieval.k_max, stage1.judges[0].judge.max_exemplars) == (8, 8, 8)


@pytest.mark.parametrize(("name", "final"), [("stage1", True), ("laptop_stage1", False)])
def test_vllm_must_agree_about_the_models_that_curate_but_on_a_laptop(name: str, final: bool) -> None:
    config = load_config(Stage1Config, str(CONFIGS / f"{name}.yaml"), ["score.compile_layers=true"])
    assert (config.final_parity.vllm, config.round_parity.vllm) == (final, False)
    assert config.final_parity.compile_layers
    assert config.round_parity.compile_layers


# Paper: Sec. 4 and App. E. The 40M kind is the kept and the flipped pairs.
FAMILY = {
    "qwen3-0.6b": ("Qwen/Qwen3-0.6B", "kept"),
    "qwen3-1.7b": ("Qwen/Qwen3-1.7B", "kept"),
    "qwen3-4b": ("Qwen/Qwen3-4B", "kept"),
    "qwen3-8b": ("Qwen/Qwen3-8B", "kept"),
    "llama-3.2-1b": ("meta-llama/Llama-3.2-1B-Instruct", "kept"),
    "llama-3.2-3b": ("meta-llama/Llama-3.2-3B-Instruct", "kept"),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B-Instruct", "kept"),
    "llama-3.1-8b-40m": ("meta-llama/Llama-3.1-8B-Instruct", "kept-and-flipped"),
}
APP_E = ("learning_rate", "schedule", "global_batch_pairs", "num_epochs", "max_length_tokens", "zero_stage")


def family_config(name: str) -> TrainJobConfig:
    return load_config(TrainJobConfig, str(CONFIGS / "family" / f"{name}.yaml"), [])


@pytest.mark.parametrize("name", FAMILY)
def test_each_of_the_eight_models_has_its_config_with_the_paper_s_values(name: str) -> None:
    config = family_config(name)
    backbone, pairs = FAMILY[name]
    assert (config.name, config.train.backbone, config.set) == (name, backbone, f"curated-wild-silver-{pairs}")
    assert [getattr(config.train, field) for field in APP_E] == [3e-6, "constant", 10_240, 1, 16_384, 1]
    assert config.train.use_gpu


@pytest.mark.parametrize(("name", "rate"), [("development", 4e-6), ("development-8b", 1e-6)])
def test_the_development_runs_have_theirs(name: str, rate: float) -> None:
    train = family_config(name).train
    assert [getattr(train, field) for field in APP_E] == [rate, "linear", 256, 1, 16_384, 1]
    assert train.warmup_fraction > 0
    assert ("8B" in train.backbone) == (rate == 1e-6)


def test_nothing_else_is_in_the_family_and_each_says_how_it_is_submitted() -> None:
    files = {file.stem: file.read_text() for file in (CONFIGS / "family").glob("*.yaml")}
    assert set(files) == {*FAMILY, "development", "development-8b", "final"}
    for name, text in files.items():
        command = f"ray job submit --working-dir . -- python jobs/train.py --config jobs/configs/family/{name}.yaml "
        assert (command in text) == (name != "final")
    with pytest.raises(ConfigError, match=r"train\.backbone: Field required"):  # a base, not a config
        family_config("final")


def test_the_paper_s_final_values_are_the_defaults() -> None:
    default: Any = TrainJobConfig.model_fields["train"].annotation
    final = family_config("llama-3.1-8b").train
    assert [default.model_fields[field].default for field in APP_E] == [getattr(final, field) for field in APP_E]
