"""How pairs are made of replies, dealt to pools and mislabelled."""

import random
from collections import Counter

import pytest

from examples.demo_tasks.assembly import HELD_OUT_POOL, AssemblyConfig, DemoPair, assemble
from examples.demo_tasks.kinds import CHECKS, KINDS, Task, build_tasks
from synpref_ray.errors import InputError
from synpref_ray.schema import Verdict

SMALL = AssemblyConfig(num_seed=20, num_unverified=40, num_wild=50, num_held_out=30, unverified_noise=0.25)
ONE_KIND = [kind for kind in KINDS if kind.name == "question"]


def made_up_samples(tasks: list[Task]) -> dict[str, list[str]]:
    return {
        task.text: [f"Reply {number} to {task.text} {'and so on ' * (number * 3 % 7)}{'?' if number % 2 else '.'}" for number in range(6)]
        for task in tasks
    }


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return build_tasks(40, 12, ONE_KIND)


@pytest.fixture(scope="module")
def pools(tasks: list[Task]) -> dict[str, list[DemoPair]]:
    return assemble(tasks, made_up_samples(tasks), SMALL)


def test_sizes_and_exact_noise(pools: dict[str, list[DemoPair]]) -> None:
    wrong = {name: sum(pair.verdict is Verdict.REJECTED for pair in pairs) for name, pairs in pools.items()}
    assert {name: len(pairs) for name, pairs in pools.items()} == {"seed": 20, "unverified": 40, "wild": 50, HELD_OUT_POOL: 30}
    assert wrong == {"seed": 2, "unverified": 10, "wild": 15, HELD_OUT_POOL: 0}


def test_verdict_is_what_the_checker_says(pools: dict[str, list[DemoPair]]) -> None:
    for pair in (pair for pairs in pools.values() for pair in pairs):
        check = CHECKS[pair.kind]
        assert check(pair.chosen, pair.slots) == (pair.verdict is Verdict.CHOSEN)
        assert check(pair.rejected, pair.slots) == (pair.verdict is Verdict.REJECTED)


def test_prompts_are_disjoint_and_replies_used_once(pools: dict[str, list[DemoPair]]) -> None:
    pool_of_prompt: dict[str, set[str]] = {}
    for name, pairs in pools.items():
        for pair in pairs:
            pool_of_prompt.setdefault(pair.prompt, set()).add(name)
        replies = [(pair.prompt, reply) for pair in pairs for reply in (pair.chosen, pair.rejected)]
        assert len(replies) == len(set(replies))
        assert max(Counter(pair.prompt for pair in pairs).values()) <= SMALL.max_pairs_per_prompt
    assert all(len(names) == 1 for names in pool_of_prompt.values())


def test_lengths_are_evened_out(pools: dict[str, list[DemoPair]]) -> None:
    for name in ("wild", HELD_OUT_POOL):
        better = [(pair.chosen, pair.rejected) if pair.verdict is Verdict.CHOSEN else (pair.rejected, pair.chosen) for pair in pools[name]]
        shorter = sum(len(right) < len(wrong) for right, wrong in better) / len(better)
        assert 0.3 <= shorter <= 0.7


def test_order_of_input_does_not_matter(tasks: list[Task], pools: dict[str, list[DemoPair]]) -> None:
    shuffled = list(tasks)
    random.Random(1).shuffle(shuffled)
    assert assemble(shuffled, made_up_samples(shuffled), SMALL) == pools


def test_row_order_is_independent_of_the_noise(tasks: list[Task], pools: dict[str, list[DemoPair]]) -> None:
    clean = assemble(tasks, made_up_samples(tasks), SMALL.model_copy(update={"wild_noise": 0.0}))
    assert [pair.comparison_id for pair in clean["wild"]] == [pair.comparison_id for pair in pools["wild"]]
    assert all(pair.verdict is Verdict.CHOSEN for pair in clean["wild"])


def test_too_few_samples_are_an_error(tasks: list[Task]) -> None:
    with pytest.raises(InputError, match="too few"):
        assemble(tasks, {}, SMALL)


def test_tasks_are_different_and_held_out_words_are_new() -> None:
    tasks = build_tasks(31, 12)
    assert len({task.text for task in tasks}) == len(tasks)
    pool_words, held_out_words = (
        {word.rstrip("s").casefold() for task in tasks if task.held_out is held_out for value in task.slots.values() for word in value.split()}
        for held_out in (False, True)
    )
    assert pool_words & held_out_words <= {"of", "kind"}
