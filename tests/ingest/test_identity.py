"""The fast names of a pair equal the plain definitions in schema.py, on any text."""

import hashlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from synpref_ray import schema
from synpref_ray.ingest.identity import name_pair

TEXT = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n\t_\"\\/'.,!éßİǰKﬁ中\u2028\x00\x1c")), max_size=40)
PROMPT = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXT), min_size=1, max_size=4)


def messages(prompt: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in prompt]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(PROMPT, TEXT, TEXT)
def test_names_equal_the_definitions(prompt: list[tuple[str, str]], chosen: str, rejected: str) -> None:
    names = name_pair(prompt, chosen, rejected)
    plain = messages(prompt)
    assert names.pair_id == schema.pair_id(plain, chosen, rejected)
    assert names.comparison_id == schema.comparison_id(plain, chosen, rejected)
    assert names.prompt_group == schema.prompt_group(plain)


@pytest.mark.parametrize("characters_at_once", [8, 64])  # below and above the number that are replaced one by one
def test_every_alphabet_groups_as_defined(characters_at_once: int) -> None:
    for start in range(0x80, 0x3100, characters_at_once):
        text = "".join(f"a{chr(code)}b " for code in range(start, start + characters_at_once))
        assert name_pair([("user", text)], "x", "y").prompt_group == schema.prompt_group(messages([("user", text)]))


def test_a_worked_pair_has_the_hash_of_its_canonical_json() -> None:
    names = name_pair([("user", 'Say "é"\n')], "Hi", "Ha")
    pair_json = '[[{"content":"Say \\"é\\"\\n","role":"user"}],"Hi","Ha"]'
    comparison_json = '[[{"content":"Say \\"é\\"\\n","role":"user"}],["Ha","Hi"]]'
    group_json = '[["user","say é"]]'
    digests = [hashlib.blake2b(text.encode(), digest_size=16).hexdigest() for text in (pair_json, comparison_json, group_json)]
    assert list(names[:3]) == digests


def test_half_a_surrogate_pair_has_no_name() -> None:
    with pytest.raises(UnicodeEncodeError):
        name_pair([("user", "q")], "a\ud800", "b")
