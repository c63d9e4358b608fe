"""The order in which people verify: worked by hand on a few pairs, and the shares on many."""

import pyarrow as pa

from synpref_ray.rules.annotation_queue import AFTER_RETRIEVED, QueueConfig, order_queue


def candidates(count: int) -> pa.Table:
    """Every third pair is objective and of low controversy, the others are subjective and disputed."""
    easy = [number % 3 == 0 for number in range(count)]
    return pa.table(
        {
            "pair_id": [f"p{number:04d}" for number in range(count)],
            "prompt_group": [f"g{number:04d}" for number in range(count)],
            "objectivity": ["objective" if is_easy else "subjective" for is_easy in easy],
            "controversiality": ["low" if is_easy else "high" for is_easy in easy],
        }
    )


def test_easy_pairs_come_first_and_a_share_by_chance_is_spread_between_them() -> None:
    order = order_queue(candidates(300), QueueConfig(max_pairs=100, audit_share=0.1), retrieved=False).to_pylist()
    assert len(order) == 100
    by_chance = [place for place, row in enumerate(order) if row["selected_by"] == "chance"]
    # Ten of a hundred, at (i + 1/2) / 10 of the way: one in each ten places.
    assert [place // 10 for place in by_chance] == list(range(10))
    by_priority = [row for row in order if row["selected_by"] == "priority"]
    assert all(int(row["pair_id"][1:]) % 3 == 0 for row in by_priority)  # a hundred easy ones, at most ten of them drawn by chance


def test_what_errors_retrieved_comes_before_everything_else() -> None:
    ranks = [order_queue(candidates(20), QueueConfig(), retrieved=retrieved)["rank"].to_pylist() for retrieved in (True, False)]
    assert ranks[0] == list(range(10))
    assert ranks[1] == [AFTER_RETRIEVED + rank for rank in range(10)]


def test_a_share_is_judged_by_several_and_depends_on_the_pair_alone() -> None:
    config = QueueConfig(max_fraction=0.9, repeat_share=0.2, repeat_verdicts=3)
    order = order_queue(candidates(2000), config, retrieved=False).to_pylist()
    wanted = {row["pair_id"]: row["num_verdicts"] for row in order}
    assert set(wanted.values()) == {1, 3}
    assert 0.15 < sum(count == 3 for count in wanted.values()) / len(wanted) < 0.25
    table = candidates(2000)
    again = order_queue(table.take(pa.array(range(1999, -1, -1))), config, retrieved=False).to_pylist()
    assert again == order
    assert set(order_queue(table, QueueConfig(repeat_share=0.0), retrieved=False)["num_verdicts"].to_pylist()) == {1}
