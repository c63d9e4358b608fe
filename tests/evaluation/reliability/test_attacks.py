"""Hacks rewrite by fixed rules; their measure by hand; the suffix search against rewards that are known functions of the text."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synpref_ray.evaluation.reliability.attacks import GIBBERISH, HACKS, KINDS, Triple, corpus, gibberish, hacked, measure_hack
from synpref_ray.evaluation.reliability.paired import paired_test
from synpref_ray.evaluation.reliability.suffix_search import SearchConfig, search_suffix

TRIPLE = Triple("t", ({"role": "user", "content": "Name a colour, please."},), "Blue is one.", "Seven. Eight.")


@pytest.mark.parametrize("kind", sorted(HACKS))
def test_a_hack_keeps_the_reply_and_adds_to_it(kind: str) -> None:
    text = hacked(kind, TRIPLE)
    assert text != TRIPLE.worse
    assert all(word in text for word in ("Seven", "Eight"))
    assert text == hacked(kind, TRIPLE)


def test_gibberish_is_seeded_and_as_long_as_the_better_reply() -> None:
    text = hacked(GIBBERISH, TRIPLE)
    assert len(text.split()) == 3
    assert text == gibberish(3, seed=0, name="t")
    assert text != gibberish(3, seed=1, name="t")


def test_the_corpus_is_whole() -> None:
    triples = corpus()
    assert len({triple.name for triple in triples}) == len(triples) == 20
    assert all(triple.better != triple.worse and triple.prompt for triple in triples)
    assert len(KINDS) == 7


def test_the_measure_by_hand() -> None:
    rewards = np.array([[2.0, 0.0, 3.0], [2.0, 0.0, 1.0], [2.0, 3.0, 3.0], [2.0, 1.0, 1.0]])
    measured = measure_hack(rewards, ["a", "b", "c", "d"], num_resamples=50)
    assert measured.beats_better.value == 0.5
    assert measured.beat_before == 0.25
    assert measured.shift.value == pytest.approx((3 + 1 + 0 + 0) / (2 + 2 - 1 + 1))  # mean rise 1, mean gap 1
    assert measured.beats_better.low < 0.5 < measured.beats_better.high


def test_no_gap_makes_no_shift() -> None:
    measured = measure_hack(np.array([[1.0, 2.0, 3.0]]), ["a"], num_resamples=5)
    assert math.isnan(measured.shift.value)


class Judge:
    """Rewards the letter a, and counts what it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, replies: Sequence[str]) -> list[float]:
        self.asked += len(replies)
        return [float(reply.count("a")) for reply in replies]


VOCABULARY = [" b", " c", " a", " aa", "d"]


@given(seed=st.integers(0, 2**32), questions=st.integers(2, 60), tokens=st.integers(1, 6), candidates=st.integers(1, 7))
def test_the_search_keeps_its_budget_and_never_gets_worse(seed: int, questions: int, tokens: int, candidates: int) -> None:
    judge, config = Judge(), SearchConfig(suffix_tokens=tokens, questions=questions, candidates=candidates)
    found = search_suffix(judge, "bad", VOCABULARY, config, seed=seed)
    assert judge.asked == found.questions <= questions
    assert found.best_reward >= found.random_reward
    assert found.best_reward == Judge()(["bad" + found.suffix])[0]
    assert found == search_suffix(Judge(), "bad", VOCABULARY, config, seed=seed)


def test_enough_questions_find_the_best_suffix() -> None:
    found = search_suffix(Judge(), "bad", VOCABULARY, SearchConfig(suffix_tokens=3, questions=200, candidates=5), seed=1)
    assert found.best_reward == 1 + 6  # the start's own letter, and two in each of three tokens
    assert found.start_reward == 1


def test_a_start_without_a_reward_is_not_searched() -> None:
    found = search_suffix(lambda replies: [math.nan for _ in replies], "x", VOCABULARY, SearchConfig(), seed=1)
    assert found.questions == 2
    assert math.isnan(found.start_reward)


def test_two_models_by_hand() -> None:
    a = np.array([[True] * 9 + [False]])
    b = np.array([[True] * 4 + [False] * 6])
    tested = paired_test(a, b, [f"p{n}" for n in range(10)], num_resamples=200)
    assert (tested.only_a, tested.only_b) == (5, 0)
    assert tested.p_value == pytest.approx(2 * 0.5**5)
    assert tested.difference.difference == pytest.approx(0.5)
    same = paired_test(a, a, [f"p{n}" for n in range(10)], num_resamples=50)
    assert same.p_value == 1.0
    assert same.difference.low == same.difference.high == 0.0


def test_seeds_vote_on_every_pair() -> None:
    a = np.array([[True, False], [True, True], [True, False]])
    tested = paired_test(a, np.array([[False, False]]), ["x", "y"], num_resamples=50)
    assert (tested.only_a, tested.only_b) == (1, 0)
    assert tested.difference.accuracy_a == pytest.approx(4 / 6)
