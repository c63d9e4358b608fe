"""How many items are behind each metric, and how many the official set has for it: sums that must hold, and parts that are told."""

import pytest

from synpref_ray.evaluation.benchmarks import BENCHMARKS
from synpref_ray.evaluation.benchmarks.core import Benchmark, Item, ReadItems
from synpref_ray.evaluation.benchmarks.fields import user_message
from synpref_ray.evaluation.benchmarks.judgebench import JUDGEBENCH, NUM_GPT_PAIRS
from synpref_ray.evaluation.benchmarks.ppe import PPE_CORRECTNESS, PPE_PREFERENCE, SETS, TIES_LEFT_OUT
from synpref_ray.evaluation.benchmarks.rewardbench import REWARDBENCH, SECTIONS
from synpref_ray.evaluation.benchmarks.rm_bench import DOMAINS, RM_BENCH
from synpref_ray.evaluation.benchmarks.rmb import RMB


def read(counts: dict[str, int], left_out: dict[str, int] | None = None) -> ReadItems:
    """Return so many items of each subset."""
    items = [Item(f"{subset} {n}", user_message("q"), ("a", "b"), ((0, 1),), subset) for subset, count in counts.items() for n in range(count)]
    return ReadItems(items, left_out or {})


def test_judgebench_s_metrics_are_of_their_split() -> None:
    gpt = read({f"gpt-4o/{group}": number for group, number in NUM_GPT_PAIRS.items()})
    assert JUDGEBENCH.items_behind("micro", gpt) == JUDGEBENCH.items_behind("single_game/macro", gpt) == (350, 350)  # GPT-4o's file alone is whole
    both = ReadItems([*gpt.items, *read({"claude/mmlu-pro": 270}).items])
    assert JUDGEBENCH.items_behind("micro", both) == (350, 350)
    assert JUDGEBENCH.items_behind("claude/micro", both) == (270, 270)
    assert JUDGEBENCH.items_behind("livebench-math", both) == (56, 56)
    assert JUDGEBENCH.items_behind("claude/livebench-math", both) == (0, None)


def test_votes_without_a_winner_count_for_ppe() -> None:
    whole = read({"": 12_000}, {TIES_LEFT_OUT: 4_038})
    assert PPE_PREFERENCE.items_behind("accuracy", whole) == (12_000, 12_000)
    assert PPE_PREFERENCE.items_behind("accuracy", read({"": 300}, {TIES_LEFT_OUT: 100})) == (300, 15_938)


def test_rmb_s_best_of_n_sets_are_counted_and_its_pairs_are_not_known() -> None:
    found = read({"bon/helpfulness": 5, "bon/harmlessness": 7, "pairwise/helpfulness": 9})
    assert RMB.items_behind("bon/helpfulness", found) == (5, 2109)
    assert RMB.items_behind("bon/best_of/2/model", found) == (12, 3786)
    assert RMB.items_behind("pairwise/helpfulness", found) == (9, None)
    assert RMB.items_behind("overall", found) == (21, None)


@pytest.mark.parametrize(
    ("benchmark", "parts"),
    [
        (RM_BENCH, DOMAINS),
        (PPE_CORRECTNESS, tuple(SETS)),
        (REWARDBENCH, tuple(SECTIONS)),
        (BENCHMARKS["rewardbench2"], ("factuality", "precise_if", "math", "safety", "focus", "ties")),
        (BENCHMARKS["hhh"], ("harmless", "helpful", "honest", "other")),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_parts_of_a_benchmark_add_up(benchmark: Benchmark, parts: tuple[str, ...]) -> None:
    assert sum(benchmark.counted[part].official for part in parts) == benchmark.num_items
    one = read({parts[0]: 3})
    assert benchmark.items_behind("overall", one) == (3, benchmark.num_items)


def test_a_domain_s_matrix_is_of_that_domain() -> None:
    found = read({"chat": 129, "math": 10})
    assert RM_BENCH.items_behind("chat/matrix/concise_over_markdown", found) == (129, 129)
    assert RM_BENCH.items_behind("math/hard", found) == (10, 529)
    assert RM_BENCH.items_behind("present_domains/overall", found) == (139, 1327)
