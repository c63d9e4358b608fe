import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from synpref_ray.reward.loss import bradley_terry_loss

FINITE = st.floats(-50, 50, width=32)


def test_worked_values() -> None:
    # margin 0 -> ln 2; margin ln 3 -> -ln(3/4); margin -ln 3 -> -ln(1/4)
    loss = bradley_terry_loss(torch.tensor([1.5, math.log(3.0), 0.0]), torch.tensor([1.5, 0.0, math.log(3.0)]))
    assert loss.tolist() == pytest.approx([math.log(2), math.log(4 / 3), math.log(4)], rel=1e-6)


def test_target_margin_asks_for_more() -> None:
    loss = bradley_terry_loss(torch.tensor([2.0]), torch.tensor([0.0]), target_margin=2.0)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)


def test_bfloat16_rewards_are_compared_in_float32() -> None:
    loss = bradley_terry_loss(torch.tensor([23.0], dtype=torch.bfloat16), torch.tensor([22.875], dtype=torch.bfloat16))
    assert loss.dtype is torch.float32
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.125)), rel=1e-6)


@settings(deadline=None)
@given(FINITE, FINITE, st.floats(-10, 10, width=32))
def test_adding_a_constant_changes_nothing(chosen: float, rejected: float, constant: float) -> None:
    shifted = bradley_terry_loss(torch.tensor([chosen + constant], dtype=torch.float64), torch.tensor([rejected + constant], dtype=torch.float64))
    assert shifted.item() == pytest.approx(bradley_terry_loss(torch.tensor([chosen]), torch.tensor([rejected])).item(), abs=2e-5)


def test_huge_margins_stay_finite() -> None:
    loss = bradley_terry_loss(torch.tensor([1e4, -1e4]), torch.tensor([-1e4, 1e4]))
    assert loss.tolist() == [0.0, 2e4]
