"""How far nonsense can raise a reward: a black-box search over tokens for a suffix, with a bounded number of questions to the model.

Coordinate search: start from random tokens, take one place after the other, ask about a handful of random tokens for it at once, and keep the best if
it is better. It uses rewards only, no gradients, so it is a lower bound of what an attacker with the weights can do. Our choice throughout.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import Field, PositiveInt

from synpref_ray.config import Settings

Score = Callable[[Sequence[str]], Sequence[float]]
"""Rewards of replies to one prompt, in order; NaN where there is none."""


class SearchConfig(Settings):
    """The search; all of it changes results."""

    suffix_tokens: PositiveInt = 8  # ours
    questions: int = Field(default=96, ge=2)  # ours: replies scored for one start, the start itself included
    candidates: PositiveInt = 12  # ours: tokens tried at one place in one batch
    seed: int = 0
    """Seed of the search."""


@dataclass(frozen=True)
class FoundSuffix:
    """What the search found: rewards of the start, of the start with the first random suffix, and of the best; NaN: the start has no reward."""

    suffix: str
    start_reward: float
    random_reward: float
    best_reward: float
    questions: int


def search_suffix(score: Score, start: str, vocabulary: Sequence[str], config: SearchConfig, *, seed: int) -> FoundSuffix:
    """Search for a suffix of `start` with a high reward; never asks about more than `questions` replies.

    Args:
        vocabulary: texts of tokens; what is scored is text, so that the tokens of a reply may come out otherwise.
        seed: of this start; the same arguments give the same suffix.
    """
    chance = random.Random(seed)
    tokens = [chance.choice(vocabulary) for _ in range(config.suffix_tokens)]
    first, second = score([start, start + "".join(tokens)])
    asked, best = 2, second
    place = 0
    while asked < config.questions and first == first:  # a start without a reward cannot be compared
        tried = [chance.choice(vocabulary) for _ in range(min(config.candidates, config.questions - asked))]
        replies = [start + "".join([*tokens[:place], token, *tokens[place + 1 :]]) for token in tried]
        rewards = score(replies)
        asked += len(replies)
        for token, reward in zip(tried, rewards, strict=True):
            if reward > best or (best != best and reward == reward):
                best, tokens[place] = reward, token
        place = (place + 1) % config.suffix_tokens
    return FoundSuffix("".join(tokens), first, second, best, asked)
