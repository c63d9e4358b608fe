"""Reward models: rendering, prefix-shared packing, training and scoring. `RewardModel.load(folder).score(pairs)` is the public face."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from synpref_ray.reward.scorer import RewardModel

__all__ = ["RewardModel"]


def __getattr__(name: str) -> Any:
    """Load the model's code when somebody asks for it: most modules of this package need neither it nor the compilers that it brings."""
    if name != "RewardModel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from synpref_ray.reward.scorer import RewardModel

    return RewardModel
