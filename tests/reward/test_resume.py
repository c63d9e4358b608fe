"""A run that dies anywhere goes on from its last checkpoint, and ends as the run that never died."""

from pathlib import Path
from typing import Any

import pytest
import torch

from synpref_ray.errors import InputError
from synpref_ray.reward import trainer
from synpref_ray.reward.engine import PlainEngine
from synpref_ray.reward.trainer import train_in_process
from synpref_ray.reward.training_record import TrainingRecord
from tests.reward.conftest import random_pairs, save_tiny_backbone
from tests.reward.test_trainer import config_for, same_weights

PAIRS, GOLD = random_pairs(20), random_pairs(6, seed=9)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package catches it."""


def run(backbone: str, output: Path, **changes: Any) -> TrainingRecord:
    config = config_for(backbone, **{"num_epochs": 3, "evaluations_per_epoch": 2, "checkpoint_every_steps": 2, **changes})
    return train_in_process(PAIRS, GOLD, config, str(output))


def die_in(monkeypatch: pytest.MonkeyPatch, name: str, update: int) -> None:
    """Let the engine die in its method `name` when it has taken `update` optimizer steps."""
    method = getattr(PlainEngine, name)

    def dying(self: PlainEngine, *arguments: Any, **named: Any) -> Any:
        if self.updates >= update:
            raise Killed
        return method(self, *arguments, **named)

    class DyingEngine(PlainEngine):
        pass

    setattr(DyingEngine, name, dying)
    monkeypatch.setattr(trainer, "PlainEngine", DyingEngine)


def comparable(record: TrainingRecord) -> list[dict[str, Any]]:
    timed = {"seconds", "tokens_per_second", "unique_tokens_per_second", "stall_fraction", "flops_per_second", "mfu"}
    return [entry.model_dump(exclude=timed) for entry in [*record.steps, *record.evaluations]]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, TrainingRecord, Path]:
    """A backbone, and the record and model of a run that nobody killed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    backbone = save_tiny_backbone(folder / "backbone", head=False)
    return backbone, run(backbone, folder / "model"), folder / "model"


@pytest.mark.parametrize(
    ("method", "update"),
    [("forward", 0), ("backward", 3), ("step", 4), ("parameter_state", 4), ("total", 5), ("maximum", 8)],
)
def test_a_killed_run_ends_as_if_nothing_had_happened(
    method: str, update: int, uninterrupted: tuple[str, TrainingRecord, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, whole, model_of_whole = uninterrupted
    with monkeypatch.context() as patch:
        die_in(patch, method, update)
        with pytest.raises(Killed):
            run(backbone, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    resumed = run(backbone, tmp_path / "model")
    assert comparable(resumed) == comparable(whole)  # bit for bit
    assert resumed.chosen_step == whole.chosen_step
    assert same_weights(tmp_path / "model", model_of_whole)
    assert not (tmp_path / "model.training").exists()


def test_only_what_came_after_the_last_checkpoint_is_done_again(tiny_backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        die_in(patch, "step", 7)
        with pytest.raises(Killed):
            run(tiny_backbone, tmp_path / "model")
    checkpoints = tmp_path / "model.training" / "checkpoints"
    assert sorted(folder.name for folder in checkpoints.iterdir()) == ["step-000004", "step-000006"]  # the last two are kept
    taken: list[int] = []

    class CountingEngine(PlainEngine):
        def step(self, learning_rate_factor: float) -> float:
            taken.append(self.updates)
            return super().step(learning_rate_factor)

    monkeypatch.setattr(trainer, "PlainEngine", CountingEngine)
    record = run(tiny_backbone, tmp_path / "model")
    assert (len(record.steps), taken) == (9, [6, 7, 8])


def test_other_settings_start_anew_and_other_resources_go_on(tiny_backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tiny_backbone, tmp_path / "whole")
    for name in ("same", "other"):
        with monkeypatch.context() as patch:
            die_in(patch, "step", 5)
            with pytest.raises(Killed):
                run(tiny_backbone, tmp_path / name)
    messages: list[str] = []
    monkeypatch.setattr(trainer.logger, "info", lambda message, *values: messages.append(message % values))
    resumed = run(tiny_backbone, tmp_path / "same", max_tokens_per_microbatch=150, gradient_checkpointing=True)
    assert "going on after optimizer step 4 of 9" in messages
    assert [step.loss for step in resumed.steps] == pytest.approx([step.loss for step in whole.steps], rel=1e-4)
    messages.clear()
    other = run(tiny_backbone, tmp_path / "other", seed=5)
    assert not any("going on" in message for message in messages)
    assert len(other.steps) == 9


def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(tiny_backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OverflowingEngine(PlainEngine):
        def forward(self, batch: Any) -> torch.Tensor:
            rewards = super().forward(batch)
            return rewards * float("nan") if self.updates == 7 else rewards

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "PlainEngine", OverflowingEngine)
        message = r"the loss became nan in optimizer step {} \(pairs [0-9a-f]{{32}}, .*the weights of step \d are the last good ones"
        with pytest.raises(InputError, match=message.format(8)):
            run(tiny_backbone, tmp_path / "model", evaluations_per_epoch=1, checkpoint_every_steps=4)
        with pytest.raises(InputError, match=message.format(7)):  # here in an evaluation
            run(tiny_backbone, tmp_path / "other", evaluations_per_epoch=3, checkpoint_every_steps=4)
    folder = tmp_path / "model.training"
    assert (folder / "checkpoints" / "step-000004" / "progress.json").is_file()
    assert len(list(folder.glob("weights/*/model.safetensors"))) >= 1
    resumed, whole = (run(tiny_backbone, tmp_path / name, evaluations_per_epoch=1, checkpoint_every_steps=4) for name in ("model", "whole"))
    assert comparable(resumed) == comparable(whole)


def test_a_gradient_that_is_not_finite_stops_before_anything_is_updated_or_kept(
    tiny_backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ExplodingEngine(PlainEngine):
        def step(self, learning_rate_factor: float) -> float:
            if self.updates == 4:
                next(iter(self._parameters.values())).grad[0] = float("inf")  # type: ignore[index]
            return super().step(learning_rate_factor)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "PlainEngine", ExplodingEngine)
        with pytest.raises(InputError, match=r"the gradient's norm became inf in optimizer step 5; the weights of step \d are the last good ones"):
            run(tiny_backbone, tmp_path / "model", checkpoint_every_steps=1)
    assert max(int(folder.name[-6:]) for folder in (tmp_path / "model.training" / "checkpoints").iterdir()) == 4
    assert comparable(run(tiny_backbone, tmp_path / "model")) == comparable(run(tiny_backbone, tmp_path / "whole"))


def test_what_has_lost_its_identity_is_not_gone_on_from(tiny_backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        die_in(patch, "step", 5)
        with pytest.raises(Killed):
            run(tiny_backbone, tmp_path / "model", seed=7)
    (tmp_path / "model.training" / "identity.json").unlink()  # a removal that was cut off
    assert run(tiny_backbone, tmp_path / "model").num_resumes == 0


def test_a_damaged_checkpoint_is_one_clear_error(tiny_backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        die_in(patch, "step", 5)
        with pytest.raises(Killed):
            run(tiny_backbone, tmp_path / "model")
    (state,) = (tmp_path / "model.training" / "checkpoints" / "step-000004").glob("*.safetensors")
    state.unlink()
    with pytest.raises(InputError, match=r"step-000004 lacks \d+ of the model's parameters"):
        run(tiny_backbone, tmp_path / "model")
