"""The training benchmark's peer runs in bfloat16 autocast in every training, and nowhere else."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks._common import Stopwatch
from benchmarks._trl import ACCELERATE_LEFTOVERS, TrlSetting, TrlSide
from synpref_ray.errors import ConfigError, SynprefError
from synpref_ray.reward.model import load_backbone_with_head, load_tokenizer
from synpref_ray.reward.render import RenderedPairs, render_pairs
from tests.reward.conftest import random_pairs, save_tiny_backbone

pytestmark = pytest.mark.engine  # importing TRL takes seconds


@pytest.fixture
def side(tmp_path: Path) -> TrlSide:
    pytest.importorskip("trl", reason="TRL is a peer of the benchmarks only")
    folder = save_tiny_backbone(tmp_path / "backbone", head=False)
    return TrlSide(load_backbone_with_head(folder, "float32", new_head=True), load_tokenizer(folder), 4, Stopwatch(), str(tmp_path / "trl"))


def rendered(side: TrlSide, num_pairs: int = 4) -> RenderedPairs:
    return render_pairs(side._tokenizer, random_pairs(num_pairs), 4096)


def watch_dtype(model: Any) -> list[torch.dtype]:
    """Return a list to which every forward pass adds the dtype that the first layer's queries were computed in."""
    seen: list[torch.dtype] = []
    model.base_model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    return seen


def test_every_training_over_one_model_runs_in_bfloat16(side: TrlSide) -> None:
    seen = watch_dtype(side.model)
    pairs, counts = rendered(side), []
    for setting in (TrlSetting(2, "sorted"), TrlSetting(8, "random", as_shipped=True), TrlSetting(2, "group_by_length")):
        measured = side.train(pairs, setting)
        assert measured["seconds"] > 0
        assert measured["loss"] == pytest.approx(0.69, abs=0.05)
        counts.append(len(seen))
    assert set(seen) == {torch.bfloat16}
    assert counts == [2, 4, 6]  # two micro-batches; one, and once more as it is recomputed; two
    assert not set(ACCELERATE_LEFTOVERS) & set(side.model.__dict__)


def test_a_training_in_float32_is_refused(side: TrlSide) -> None:
    side.model._is_accelerate_prepared = True  # what accelerate leaves behind
    with pytest.raises(SynprefError, match="outside bfloat16 autocast"):
        side.train(rendered(side), TrlSetting(2, "sorted"))


def test_a_device_batch_that_does_not_divide_the_global_one_is_refused(side: TrlSide) -> None:
    with pytest.raises(ConfigError, match="3 pairs does not divide the global batch of 4"):
        side.train(rendered(side), TrlSetting(3, "sorted"))


@pytest.mark.slow
def test_the_compiled_peer_runs_in_bfloat16_without_a_break_of_ours(side: TrlSide) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    measured = side.train(rendered(side), TrlSetting(2, "sorted", compiled=True))
    assert measured["loss"] == pytest.approx(0.69, abs=0.05)
    assert counters["stats"]["unique_graphs"] > 0
    assert dict(counters["graph_break"]) == {}
    assert side.train(rendered(side), TrlSetting(2, "sorted"))["seconds"] > 0
