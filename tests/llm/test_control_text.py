"""Texts that spell control tokens, for servers that tokenise messages themselves."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synpref_ray.llm.control_text import ControlTokens, break_control_text
from tests.llm.chat_families import family

FULL_BAR = "\uff5c"
ODD_TOKENS = ControlTokens(["<own token>", "a!", "!!a", " <lead>", "<", "  ", "\u2581\u2581", "\n<line>"])

CONTROL_TEXT = [
    *("<|im_end|>", "<|start_header_id|>", "<|turn>", "<turn|>", "<bos>", "</s>", "<s>", "<think>", "</think>", "<start_of_turn>", "<tool_call>"),
    *("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[gMASK]", "<unused7>", "<extra_id_0>"),
    *("[|endofturn|]", "[|assistant|]", "[EOS]", "[BOS]", "[EOT]", "<sop>", "<eop>", "]~b]ai", "]~!b[", "[e~["),
    *("<seed:bos>", "</seed:think>", "<mask:1>", "<[begin_of_sentence]>", "<[begin\u2581of\u2581sentence]>", "<reponame>", "<filename>", "<eom>"),
    *("<fim-prefix>", "<ctrl99>", "[extra_id_1]", "[UNUSED_TOKEN_145]", "[control_8]", "[start_header_id]"),
    f"<{FULL_BAR}end\u2581of\u2581sentence{FULL_BAR}>",
]


@pytest.mark.parametrize("text", CONTROL_TEXT)
def test_text_that_looks_like_a_control_token_is_broken_and_stays_readable(text: str) -> None:
    broken = break_control_text(f"a{text}b")
    assert text not in broken
    assert broken.replace(" ", "") == f"a{text}b"
    assert all(part not in broken for part in ("[|", "[E", "[B", "]~", "[e~"))
    assert break_control_text(broken) not in {broken, f"a{text}b"}  # one more space, or it could not be told from a broken one


@pytest.mark.parametrize(
    "text",
    [
        "<div>",
        "a < b > c",
        "x[0]",
        "[1, 2]",
        "List<String>",
        "if (a<b)",
        "<p>text</p>",
        "a|b|c",
        "a[~mask]",
        "[a|b]",
        "a] ~ b",
        "map<a::b>",
        "x[my_id]",
    ],
)
def test_other_text_is_left_alone(text: str) -> None:
    assert break_control_text(text) == text


@settings(deadline=None)
@given(*[st.lists(st.sampled_from([*CONTROL_TEXT, "<", "[", "|>", "|]", " ", "a", ">", "]", "~b"]), max_size=5).map("".join)] * 2)
def test_two_texts_never_become_one(first: str, second: str) -> None:
    assert (break_control_text(first) == break_control_text(second)) == (first == second)


@settings(deadline=None)
@given(
    *[st.lists(st.sampled_from(["<own token>", "a!", "!!a", " <lead>", "\n<line>", "<|a|>", "<", "!", "a", " ", "\n"]), max_size=8).map("".join)] * 2
)
def test_two_texts_never_become_one_with_tokens_of_any_look(first: str, second: str) -> None:
    assert (break_control_text(first, ODD_TOKENS) == break_control_text(second, ODD_TOKENS)) == (first == second)


def test_tokens_of_any_look_are_broken_and_white_space_is_none() -> None:
    broken = break_control_text("x <own token>!!a <lead>\n<line>  <", ODD_TOKENS)
    assert broken == "x < own token>! !a < lead>\n <line>  <"
    assert break_control_text("< own token>", ODD_TOKENS) == "<  own token>"


@pytest.mark.parametrize("template", ["qwen3", "llama3_2", "gemma"])
@given(data=st.data())
def test_a_server_with_that_tokenizer_reads_no_control_token_in_a_broken_text(template: str, data: st.DataObject) -> None:
    one = family(template)
    text = data.draw(st.lists(st.one_of(st.sampled_from([*one.control, "<", "<|", "|>", "</", "[", " ", "\n\n"]), st.text(max_size=4)), max_size=8))
    broken = break_control_text("".join(text), ControlTokens(one.tokenizer.get_added_vocab()))
    assert one.control_ids.isdisjoint(one.tokenizer(broken, add_special_tokens=False)["input_ids"])
