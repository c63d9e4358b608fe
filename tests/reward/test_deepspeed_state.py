"""The state of a DeepSpeed engine, out and into a fresh one, for every ZeRO stage: one process, no Ray."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed

from synpref_ray.reward.communication_op import drop_stale_locks, extensions_environment
from synpref_ray.reward.engine import PlainEngine, TrainingEngine
from synpref_ray.reward.packing import PackedBatch, make_group, pack
from synpref_ray.reward.trainer import build_module
from tests.reward.test_trainer import config_for


@pytest.fixture(scope="module")
def _one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One process group for the module: DeepSpeed remembers the first one that it sees."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**extensions_environment(), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            patch.setenv(name, value)
        drop_stale_locks()
        rendezvous = tmp_path_factory.mktemp("ranks") / "rendezvous"
        torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()


def batch(step: int) -> PackedBatch:
    chance = torch.Generator().manual_seed(step)
    sequences = [torch.randint(0, 250, (length,), generator=chance).int().numpy() for length in (9, 12)]
    return pack([make_group(sequences)])


def train(engine: TrainingEngine, steps: range) -> list[float]:
    losses = []
    for step in steps:
        rewards = engine.forward(batch(step))
        loss = -torch.nn.functional.logsigmoid(rewards[0] - rewards[1])
        engine.backward(loss, last=True)
        engine.step(1.0)
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.engine
@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_fresh_engine_goes_on_from_the_state_of_another(zero_stage: int, tiny_backbone: str) -> None:
    from synpref_ray.reward.deepspeed_engine import DeepSpeedEngine

    config = config_for(tiny_backbone, zero_stage=zero_stage, weight_decay=0.1, max_grad_norm=1e9, learning_rate=1e-2)
    whole = DeepSpeedEngine(build_module(config), config)
    losses = train(whole, range(3))
    state = {name: whole.parameter_state(name) for name in whole.parameter_names()}
    assert all(set(parts) == {"weight", "exp_avg", "exp_avg_sq"} for parts in state.values())
    expected = train(whole, range(3, 6))

    restored, plain = DeepSpeedEngine(build_module(config), config), PlainEngine(build_module(config), config)
    assert restored.parameter_names() == plain.parameter_names()
    for engine in (restored, plain):
        for name in engine.parameter_names():
            engine.restore_parameter(name, state[name], 3)
        assert engine.updates == 3
    assert train(restored, range(3, 6)) == expected  # bit for bit
    assert train(plain, range(3, 6)) == pytest.approx(expected, rel=1e-5)
    assert losses[0] == pytest.approx(0.69, abs=0.3)
    for name in whole.parameter_names():
        for part, tensor in whole.parameter_state(name).items():
            assert torch.equal(tensor, restored.parameter_state(name)[part]), (name, part)
