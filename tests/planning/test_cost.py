"""The cost model: the paper's sum by hand, GPU lines by hand, and what must hold for any prices."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synpref_ray.errors import ConfigError
from synpref_ray.planning.cost import Assumptions, CostModel, Prices, SizeName, Throughputs

SIZES: tuple[SizeName, ...] = ("gold", "silver", "stage2")
PRICE = st.floats(0, 10, allow_nan=False)
RATE = st.floats(1, 1e6, allow_nan=False)
COUNT = st.integers(0, 50_000_000)
MODELS = st.builds(
    CostModel,
    st.builds(Prices, gold_pair=PRICE, silver_pair=PRICE, stage2_pair=PRICE, gpu_hour=PRICE),
    st.builds(Throughputs, tag=RATE, score=RATE, judge=RATE, train=RATE),
    st.builds(
        Assumptions,
        mismatch_fraction=st.floats(0, 1),
        curated_fraction=st.floats(0, 1),
        tag_scope=st.sampled_from(["mismatches", "all"]),
        rounds=st.integers(1, 8),
        num_models=st.integers(1, 8),
    ),
)


def test_the_sum_of_the_paper() -> None:
    model = CostModel(Prices(gold_pair=0.5, silver_pair=0.05, stage2_pair=0.01), Throughputs(), Assumptions())
    cost = model.cost({"gold": 50_000, "silver": 500_000, "stage2": 1_000_000})
    assert [line.cost for line in cost.lines] == [25_000, 25_000, 10_000]
    assert cost.total == 60_000
    assert cost.gpu_hours == 0


def test_gpu_hours_by_hand() -> None:
    about = Assumptions(mismatch_fraction=0.25, curated_fraction=0.5, rounds=3, num_epochs=2, num_models=2)
    model = CostModel(Prices(gold_pair=0, silver_pair=0, stage2_pair=0, gpu_hour=2), Throughputs(tag=10, score=100, judge=5, train=20), about)
    cost = model.cost({"gold": 10, "silver": 20, "stage2": 1000})
    # tag 10 + 20 + 250 = 280 -> 28 h; two passes of 1000 -> 20 h; judge 250 -> 50 h; train 20 * 2.5 + 10 + 500 * 2 * 2 = 2060 -> 103 h
    assert {line.name: line.quantity for line in cost.lines if line.unit == "GPU hours"} == {
        "GPU: tag": 28, "GPU: score": 20, "GPU: judge": 50, "GPU: train": 103,
    }  # fmt: skip
    assert cost.gpu_hours == 201
    assert cost.total == 402


def test_an_unknown_throughput_is_refused_where_gpus_cost() -> None:
    model = CostModel(Prices(gpu_hour=1), Throughputs(tag=1, judge=1, train=1), Assumptions())
    with pytest.raises(ConfigError, match=r"throughputs\.score"):
        model.cost({"stage2": 1})
    assert model.cost({"gold": 1}).total == pytest.approx(0.5 + 1 + 1)  # nothing to score


@given(model=MODELS, sizes=st.fixed_dictionaries(dict.fromkeys(SIZES, COUNT)), name=st.sampled_from(SIZES), more=COUNT)
def test_cost_never_falls_with_a_size(model: CostModel, sizes: dict[SizeName, int], name: SizeName, more: int) -> None:
    bigger = {**sizes, name: sizes[name] + more}
    before, after = model.cost(sizes), model.cost(bigger)
    assert after.total >= before.total
    assert all(b.cost >= a.cost for a, b in zip(before.lines, after.lines, strict=True))


@given(model=MODELS, sizes=st.fixed_dictionaries(dict.fromkeys(SIZES, COUNT)))
def test_cost_is_linear(model: CostModel, sizes: dict[SizeName, int]) -> None:
    total = sum(model.marginal(name) * count for name, count in sizes.items())
    assert math.isclose(model.cost(sizes).total, total, rel_tol=1e-9, abs_tol=1e-9)
