"""Every config in jobs/configs is valid for its job."""

from pathlib import Path

import pytest

from synpref_ray.config import Settings, load_config
from synpref_ray.pipeline.demo import DemoConfig
from synpref_ray.pipeline.ingest import IngestConfig
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
}


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.name)
def test_a_config_is_valid(file: Path) -> None:
    job = file.stem.removeprefix("laptop_").split("_")[0]
    load_config(JOBS[job], str(file), [])


def test_the_paper_s_values_are_the_defaults_and_the_cluster_configs_keep_them() -> None:
    stage1 = load_config(Stage1Config, str(CONFIGS / "stage1.yaml"), [])
    assert (stage1.stop.max_rounds, stage1.retrieval.k_max, stage1.judges[0].judge.max_exemplars) == (8, 8, 8)
    final = load_config(TrainJobConfig, str(CONFIGS / "train_8b.yaml"), []).train
    assert (final.learning_rate, final.global_batch_pairs, final.schedule, final.num_epochs, final.zero_stage) == (3e-6, 10_240, "constant", 1, 1)
