"""Reward models: rendering, prefix-shared packing, training and scoring. `RewardModel.load(folder).score(pairs)` is the public face."""

from synpref_ray.reward.scorer import RewardModel

__all__ = ["RewardModel"]
