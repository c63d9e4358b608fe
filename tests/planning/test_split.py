"""Budgets: the paper's worked example is refused with its own arithmetic, and what a budget buys adds up to it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synpref_ray.errors import ConfigError, InputError
from synpref_ray.planning.cost import Assumptions, CostModel, Prices, Sizes, Throughputs
from synpref_ray.planning.split import Policy, check_sizes, sizes_for_stage2, split_budget
from tests.planning.test_cost import MODELS

PAPER = CostModel(Prices(gold_pair=0.50, silver_pair=0.05, stage2_pair=0.01), Throughputs(), Assumptions())


def test_the_worked_example_of_the_paper_spends_all_before_stage_2() -> None:
    policy = Policy(gold_fraction=0.5, silver_per_gold=10, min_stage2=1_000_000)  # 50K gold and 500K silver of 50,000
    with pytest.raises(InputError) as refused:
        split_budget(50_000, PAPER, policy)
    text = str(refused.value)
    assert "50,000 gold x 0.5 = 25,000 + 500,000 silver x 0.05 = 25,000 = 50,000" in text
    assert "nothing of 50,000 is left for Stage 2, where 1,000,000 pairs cost 10,000" in text
    assert "at most 40,000 gold pairs" in text  # 40,000 * 0.5 + 400,000 * 0.05 = 40,000


def test_its_sizes_are_refused_too_when_given() -> None:
    with pytest.raises(InputError, match="nothing of 50,000 is left"):
        check_sizes(50_000, PAPER, Sizes(gold=50_000, silver=500_000, stage2=1_000_000))
    with pytest.raises(InputError, match="where 1 pairs cost"):
        check_sizes(50_000, PAPER, Sizes(gold=50_000, silver=500_000), min_stage2=1)
    assert check_sizes(50_000, PAPER, Sizes(gold=50_000, silver=500_000)).left == 0


def test_its_other_split_puts_all_into_people() -> None:
    with pytest.raises(InputError, match=r"100,000 gold x 0\.5 = 50,000"):
        split_budget(50_000, PAPER, Policy(gold_fraction=1.0, silver_per_gold=0))


def test_a_split_that_works() -> None:
    split = split_budget(50_000, PAPER, Policy(gold_fraction=0.4, silver_per_gold=10, min_stage2=1_000_000))
    assert split.sizes == Sizes(gold=40_000, silver=400_000, stage2=1_000_000)
    assert split.left == 0


def test_gold_is_capped() -> None:
    split = split_budget(1_000_000, PAPER, Policy())
    assert split.sizes.gold == 100_000


def test_a_plan_for_which_no_gold_fits_says_so() -> None:
    with pytest.raises(InputError, match="not even a plan without gold"):
        split_budget(100, PAPER, Policy(min_stage2=1_000_000))


def test_a_stage_2_for_nothing_sets_no_size() -> None:
    with pytest.raises(ConfigError, match="costs nothing"):
        split_budget(100, CostModel(Prices(stage2_pair=0), Throughputs(), Assumptions()), Policy())
    for price in (1e-310, 1e-300, 1e-12):
        with pytest.raises(ConfigError, match="costs nothing, or next to nothing"):
            split_budget(100, CostModel(Prices(stage2_pair=price), Throughputs(), Assumptions()), Policy())


@given(model=MODELS, budget=st.floats(1, 1e7), policy=st.builds(Policy, gold_fraction=st.floats(0, 1), silver_per_gold=st.floats(0, 20)))
def test_splits_add_up(model: CostModel, budget: float, policy: Policy) -> None:
    try:
        split = split_budget(budget, model, policy)
    except (InputError, ConfigError):
        return
    assert sum(line.cost for line in split.cost.lines) + split.left == pytest.approx(budget)
    assert split.left >= -1e-9 * budget
    assert split.left <= model.marginal("stage2") * (1 + 1e-6) + 1e-6 * budget
    assert split.sizes.stage2 >= policy.min_stage2
    assert check_sizes(budget, model, split.sizes).sizes == split.sizes


def test_sizes_for_a_stage_2_are_those_that_a_budget_buys() -> None:
    split = split_budget(50_000, PAPER, Policy())
    assert sizes_for_stage2(split.sizes.stage2, PAPER, Policy()) == split.sizes == Sizes(gold=25_000, silver=250_000, stage2=2_500_000)
    small = sizes_for_stage2(1000, PAPER, Policy(gold_fraction=0.1))  # gold is 0.1 of the total: g = 0.1 (g + 10) / 0.5, g = 2.5
    assert (small.gold, small.silver) == (2, 20)
    assert sizes_for_stage2(10**9, PAPER, Policy()).gold == Policy().max_gold
    with pytest.raises(InputError, match="nothing is left for Stage 2"):
        sizes_for_stage2(1000, PAPER, Policy(gold_fraction=0.5))
