"""The names of a pair are pinned: expected values are from `printf '<canonical JSON>' | b2sum -l 128`, not from our code."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synpref_ray.schema import canonical_json, comparison_id, pair_id, prompt_group, stable_hash, stable_uniform

QUESTION = [{"role": "user", "content": "What is 2+2?"}]
TEXT = st.text(max_size=40)
PROMPTS = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXT}), min_size=1, max_size=3)


def test_pair_id_of_a_plain_pair() -> None:
    # printf '[[{"content":"What is 2+2?","role":"user"}],"4","5"]' | b2sum -l 128
    assert pair_id(QUESTION, "4", "5") == "a9ecae38c5add6a58e41fbf5338f9686"


def test_pair_id_keeps_non_ascii_and_escapes_as_json_does() -> None:
    prompt = [{"role": "system", "content": "Tu réponds."}, {"role": "user", "content": '日本の首都は? "ね"\n'}]
    # The same over [[{"content":"Tu réponds.","role":"system"},{"content":"日本の首都は? \"ね\"\n","role":"user"}],"東京","a/b\\c"]
    assert pair_id(prompt, "東京", "a/b\\c") == "72f7eccf817a3c55770a8126dd0d86bb"


def test_pair_id_takes_text_that_utf8_cannot_hold() -> None:
    # printf '[[{"content":"hi","role":"user"}],"a\xed\xa0\x80","b"]' | b2sum -l 128
    assert pair_id([{"role": "user", "content": "hi"}], "a\ud800", "b") == "42bc2177d45a7daf8bf2914f9cab80e0"


def test_comparison_id_sorts_the_replies() -> None:
    # printf '[[{"content":"What is 2+2?","role":"user"}],["4","5"]]' | b2sum -l 128
    assert comparison_id(QUESTION, "5", "4") == comparison_id(QUESTION, "4", "5") == "c2e44ea4f90f2a08cbe7bdf17546aab7"


def test_ids_ignore_key_order_and_further_keys_of_a_message() -> None:
    other = [{"content": "What is 2+2?", "name": "Ada", "role": "user"}]
    assert pair_id(other, "4", "5") == pair_id(QUESTION, "4", "5")


@given(PROMPTS, TEXT, TEXT)
def test_a_swap_changes_the_pair_and_not_the_comparison(prompt: list[dict[str, str]], one: str, other: str) -> None:
    assert comparison_id(prompt, one, other) == comparison_id(prompt, other, one)
    assert (pair_id(prompt, one, other) == pair_id(prompt, other, one)) == (one == other)
    assert comparison_id(prompt, one, other) != pair_id(prompt, one, other)


@given(PROMPTS, TEXT)
def test_text_cannot_move_between_the_parts_of_a_pair(prompt: list[dict[str, str]], text: str) -> None:
    assert pair_id(prompt, text + "x", "") != pair_id(prompt, text, "x")


def test_prompt_group_ignores_case_punctuation_and_white_space() -> None:
    # printf '[["user","what is 2 2"]]' | b2sum -l 128
    expected = "57dd4cf1bccab218e692f2c846af000a"
    for text in ("What is 2+2?", "  what is 2 + 2", "WHAT_is\n2\t2!!"):
        assert prompt_group([{"role": "user", "content": text}]) == expected


@pytest.mark.parametrize(
    "other",
    [
        [{"role": "user", "content": "What is 3+3?"}],
        [{"role": "system", "content": "What is 2+2?"}],
        [{"role": "system", "content": "Be brief."}, *QUESTION],
        [{"role": "user", "content": "What is 22?"}],
    ],
)
def test_prompt_group_tells_prompts_apart(other: list[dict[str, str]]) -> None:
    assert prompt_group(other) != prompt_group(QUESTION)


def test_prompt_group_without_a_word_is_the_exact_text() -> None:
    # printf '[{"content":"?!","role":"user"}]' | b2sum -l 128
    assert prompt_group([{"role": "user", "content": "?!"}]) == "791a595c83eb9d7e35974689a1fcd380"
    assert prompt_group([{"role": "user", "content": "!?"}]) != prompt_group([{"role": "user", "content": "?!"}])


def test_stable_hash_is_pinned() -> None:
    # printf '7\x1fabc\x1faudit' | b2sum -l 64
    assert stable_hash(7, "abc", "audit") == 0x44DCFCDDC01AB522
    assert stable_uniform(7, "abc", "audit") == (0x44DCFCDDC01AB522 >> 11) / 2**53


@given(st.integers(), TEXT, TEXT)
def test_stable_uniform_lies_in_the_unit_interval(seed: int, name: str, use: str) -> None:
    assert 0.0 <= stable_uniform(seed, name, use) < 1.0


def test_stable_uniform_is_spread_and_independent_between_uses() -> None:
    first = [stable_uniform(0, str(number), "one") for number in range(4000)]
    second = [stable_uniform(0, str(number), "two") for number in range(4000)]
    # Four standard errors: the mean of 4000 uniforms has 0.2887/sqrt(4000) = 0.0046, the share of both below 1/2 sqrt(3/16/4000) = 0.0068.
    assert abs(sum(first) / 4000 - 0.5) < 0.018
    assert abs(sum(a < 0.5 and b < 0.5 for a, b in zip(first, second, strict=True)) / 4000 - 0.25) < 0.028


@given(st.recursive(st.none() | st.booleans() | st.integers() | TEXT, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner)))
def test_canonical_json_is_json_and_unique(value: object) -> None:
    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(json.loads(text)) == text
