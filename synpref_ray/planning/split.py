"""A budget split over people, judges and Stage 2; and plans that cannot be, refused with the arithmetic.

Paper: App. F: give people at most B_H (some 10^5 gold pairs suffice), then the rest to Stage 2. Its worked example does not add up: of 50,000 it pays
25,000 for 50,000 gold pairs and 25,000 for 500,000 silver pairs, which leaves nothing for the millions of Stage 2 pairs that it promises. So here
every plan is checked against its own sum.
"""

import math
from dataclasses import dataclass

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from synpref_ray.config import Settings
from synpref_ray.errors import ConfigError, InputError
from synpref_ray.planning.cost import SIZE_NAMES, Cost, CostModel, SizeName, Sizes

_DUST = 1e-9
"""Of a budget: what sums of floats may miss it by."""
_MAX_PAIRS = 1e12
"""More than there is text for; ours: beyond it a size is an artefact of a price that is all but zero."""


class Policy(Settings):
    """How a budget is split."""

    gold_fraction: float = Field(default=0.25, ge=0.0, le=1.0)  # ours: App. F says "at most B_H"; a half leaves nothing for Stage 2 at its own prices
    max_gold: NonNegativeInt = 100_000  # App. F: O(10^5) gold suffices
    silver_per_gold: NonNegativeFloat = 10.0  # App. F, worked example: 500K silver to 50K gold
    min_stage2: NonNegativeInt = 1  # a plan without Stage 2 is no plan of this paper


@dataclass(frozen=True)
class Split:
    """Sizes that a budget buys; cost and what is left add up to the budget."""

    budget: float
    sizes: Sizes
    cost: Cost

    @property
    def left(self) -> float:
        """What is not spent: less than one more Stage 2 pair costs."""
        return self.budget - self.cost.total


def split_budget(budget: float, model: CostModel, policy: Policy) -> Split:
    """Return what a budget buys under a policy.

    Raises:
        ConfigError: a Stage 2 pair costs so little that the budget is no bound.
        InputError: less than `min_stage2` pairs would be left for Stage 2; with the sum, and the most gold that fits.
    """
    if model.marginal("stage2") * _MAX_PAIRS <= budget:
        raise ConfigError(
            "a Stage 2 pair costs nothing, or next to nothing, at these prices, so the budget sets no size: give sizes.stage2, or prices.gpu_hour"
        )
    price = model.marginal("gold")
    gold = _floor(min(policy.max_gold, policy.gold_fraction * budget / price)) if price else policy.max_gold
    silver = _floor(policy.silver_per_gold * gold)
    left = budget - model.cost({"gold": gold, "silver": silver}).total
    stage2 = max(0, _floor(left / model.marginal("stage2")))
    sizes = Sizes(gold=gold, silver=silver, stage2=stage2)
    if stage2 < policy.min_stage2:
        raise InputError(_refusal(budget, model, sizes, policy))
    return Split(budget, sizes, model.cost(sizes.as_mapping()))


def sizes_for_stage2(stage2: int, model: CostModel, policy: Policy) -> Sizes:
    """Return the sizes whose Stage 2 is given: the gold and silver that `split_budget` would buy beside it.

    With people at most a fraction f of the total, gold = f · (gold · (c_H + s · c_L1) + stage2 · c_L2) / c_H, for s silver pairs to a gold pair.

    Raises:
        InputError: gold and silver would take the whole budget whatever it is.
    """
    price, share = model.marginal("gold"), policy.gold_fraction
    gold = policy.max_gold
    if price:
        left = price - share * (price + policy.silver_per_gold * model.marginal("silver"))
        if left <= 0:
            raise InputError(
                f"with {share:.0%} of the budget for people and {policy.silver_per_gold:g} silver pairs to a gold pair nothing is left for Stage 2 "
                "at these prices: lower policy.gold_fraction or policy.silver_per_gold"
            )
        gold = _floor(min(gold, share * model.marginal("stage2") * stage2 / left))
    return Sizes(gold=gold, silver=_floor(policy.silver_per_gold * gold), stage2=stage2)


def check_sizes(budget: float, model: CostModel, sizes: Sizes, *, min_stage2: int = 0) -> Split:
    """Return what given sizes cost.

    Raises:
        InputError: they cost more than the budget, or leave out Stage 2 where at least `min_stage2` pairs are wanted; with the sum.
    """
    split = Split(budget, sizes, model.cost(sizes.as_mapping()))
    if split.left < -_DUST * budget or sizes.stage2 < min_stage2:
        raise InputError(_refusal(budget, model, sizes, Policy(min_stage2=max(min_stage2, sizes.stage2))))
    return split


def _refusal(budget: float, model: CostModel, sizes: Sizes, policy: Policy) -> str:
    """Return the arithmetic of a plan that does not work, in one line."""
    before: dict[SizeName, float] = {"gold": sizes.gold, "silver": sizes.silver}
    parts = [_term(model, name, before[name]) for name in before]
    spent = model.cost(before).total
    left = budget - spent
    wanted = policy.min_stage2
    needed = model.marginal("stage2") * wanted
    has = f"{left:,.0f} of {budget:,.0f} is left" if left > _DUST * budget else f"nothing of {budget:,.0f} is left"
    text = f"this plan does not add up: {' + '.join(parts)} = {spent:,.0f}, so {has} for Stage 2, where {wanted:,} pairs cost {needed:,.0f}"
    advice = [text]
    per_gold = model.marginal("gold") + policy.silver_per_gold * model.marginal("silver")
    if budget > needed and per_gold > 0:
        gold = min(policy.max_gold, _floor((budget - needed) / per_gold))
        advice.append(f"at {policy.silver_per_gold:g} silver pairs to a gold pair, at most {gold:,} gold pairs leave room for that")
    else:
        advice.append("not even a plan without gold and silver leaves room for that")
    return "; ".join(advice)


def _term(model: CostModel, name: SizeName, pairs: float) -> str:
    return f"{pairs:,.0f} {name} x {model.marginal(name):.4g} = {pairs * model.marginal(name):,.0f}"


def _floor(value: float) -> int:
    """Return the whole pairs in a quotient of floats: what is a whole number but for rounding stays that number."""
    nearest = round(value)
    return nearest if math.isclose(value, nearest, rel_tol=1e-12) else math.floor(value)


__all__ = ["SIZE_NAMES", "Policy", "Split", "check_sizes", "sizes_for_stage2", "split_budget"]
