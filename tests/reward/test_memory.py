"""What does not fit in memory is halved, and the rewards are those of one that fits; training says which setting to lower."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from synpref_ray.errors import ConfigError
from synpref_ray.reward.memory import MemoryLimit, explain_training, is_out_of_memory
from synpref_ray.reward.scorer import PairScorer, ScorerConfig, add_rewards
from tests.reward.conftest import random_pairs


class Device:
    """Holds so many tokens and no more; number n has n tokens."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.tried: list[list[int]] = []

    def run(self, batch: Sequence[int]) -> int:
        self.tried.append([*batch])
        if sum(batch) > self.capacity:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return sum(batch)


def test_batches_are_halved_in_order_and_what_did_not_fit_is_not_tried_again() -> None:
    device, memory = Device(10), MemoryLimit()
    done = list(memory.run([[5, 5, 4, 4], [9, 9], [6, 4], [3, 3]], sum, device.run))
    assert done == [([5, 5], 10), ([4, 4], 8), ([9], 9), ([9], 9), ([6, 4], 10), ([3, 3], 6)]
    assert memory.num_halved == 1
    assert device.tried == [[5, 5, 4, 4], [5, 5], [4, 4], [9], [9], [6, 4], [3, 3]]
    assert list(memory.run([[9, 9]], sum, device.run)) == [([9], 9), ([9], 9)]
    assert memory.num_halved == 1


def test_what_cannot_be_halved_names_the_settings() -> None:
    with pytest.raises(ConfigError, match="11 tokens, do not fit in memory alone: lower max_length_tokens"):
        list(MemoryLimit().run([[11, 1]], sum, Device(10).run))


def test_other_errors_pass() -> None:
    def run(batch: Sequence[int]) -> int:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        list(MemoryLimit().run([[1, 2]], sum, run))


def test_torch_on_a_cpu_says_what_we_look_for() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_a_scorer_short_of_memory_gives_the_same_rewards_and_counts(tiny_reward_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = random_pairs(12)
    config = ScorerConfig(dtype="float32", num_threads=1, max_tokens_per_batch=700)
    wanted = add_rewards(pairs, PairScorer.load(tiny_reward_model, config))
    short = PairScorer.load(tiny_reward_model, config)
    forward = type(short.module).forward

    def small(module: Any, batch: Any) -> torch.Tensor:
        if batch.input_ids.numel() > 300:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(module, batch)

    monkeypatch.setattr(type(short.module), "forward", small)
    found = add_rewards(pairs, short)
    assert found["pair_id"].equals(wanted["pair_id"])
    assert found["margin"].to_pylist() == pytest.approx(wanted["margin"].to_pylist(), abs=1e-5)
    counters = short.take_counters()
    assert counters["halved_batches"] >= 1
    assert "halved_batches" not in short.take_counters()


def test_training_names_the_setting() -> None:
    with (
        pytest.raises(ConfigError, match="up to 4096 tokens does not fit in memory while training: lower max_tokens_per_microbatch"),
        explain_training(4096),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory.")
