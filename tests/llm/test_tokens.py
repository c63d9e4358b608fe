"""No text of a pair becomes a control token. The tokenizer is a byte-level one of 256 tokens plus added ones, made here."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from synpref_ray.errors import InputError
from synpref_ray.llm.engine import Request
from synpref_ray.llm.tokens import PlainEncoder, first_letters

SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>"]
CONTROL = [*SPECIAL, "<think>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' }}"


def make_tokenizer(chat_template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("\n\n", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template)


TOKENIZER = make_tokenizer()
ENCODER = PlainEncoder(TOKENIZER)
CONTROL_IDS = {TOKENIZER.convert_tokens_to_ids(token) for token in CONTROL}


def request(prompt: str, **settings: object) -> Request:
    return Request.of(prompt, prompt_version="v", max_new_tokens=1, **settings)


def test_the_tokenizer_itself_would_read_control_tokens() -> None:
    assert set(TOKENIZER("a<|im_end|><think>")["input_ids"]) & CONTROL_IDS


@given(st.lists(st.one_of(st.sampled_from([*CONTROL, "<|im_", "end|>", "<", "|>", "\n\n"]), st.text(max_size=5)), max_size=8).map("".join))
def test_text_never_becomes_a_control_token_and_is_not_changed(text: str) -> None:
    tokens = ENCODER.encode_text(text)
    assert not set(tokens) & CONTROL_IDS
    assert TOKENIZER.decode(tokens, clean_up_tokenization_spaces=False) == text


def test_the_template_keeps_its_own_control_tokens_around_the_prompt() -> None:
    tokens = ENCODER.encode_request(request("hi<|im_end|>", chat=True, reply_start="So <s>"))
    assert TOKENIZER.decode(tokens) == "<|im_start|>user\nhi<|im_end|><|im_end|>\n<|im_start|>assistant\nSo <s>"
    start, end = TOKENIZER.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert [token for token in tokens if token in CONTROL_IDS] == [start, end, start]  # the template's three, none of the pair's


def test_a_plain_prompt_is_continued_by_the_start_of_the_reply() -> None:
    assert ENCODER.encode_request(request("a ", reply_start="b")) == ENCODER.encode_text("a b")


@pytest.mark.parametrize("template", [None, "{{ messages[0]['content'] }}{{ messages[0]['content'] }}", "no message"])
def test_a_template_that_cannot_carry_the_prompt_is_one_line(template: str | None) -> None:
    with pytest.raises(InputError, match="use_chat_template=false"):
        PlainEncoder(make_tokenizer(template)).encode_request(request("a", chat=True))


@given(
    st.lists(st.text("<>[a|.", min_size=2, max_size=5), max_size=8),
    st.lists(st.one_of(st.text("<>[a|.b\n", max_size=6), st.sampled_from(["<a>", "<<a", "[|", "aa"])), max_size=6).map("".join),
)
def test_control_strings_are_found_wherever_they_stand(strings: list[str], text: str) -> None:
    expected = [place for place in range(len(text)) if any(text.startswith(string, place) for string in strings)]
    assert [match.start() for match in first_letters(strings).finditer(text)] == expected
    assert all(len(match.group()) == 1 for match in first_letters(strings).finditer(text))
    flat = re.compile(f"(?=({'|'.join(map(re.escape, sorted(strings, key=len, reverse=True)))}))" if strings else r"(?!)")  # how it used to be
    assert [match.start() for match in flat.finditer(text)] == expected


def test_thousands_of_control_strings_share_their_beginnings() -> None:
    many = first_letters([f"<unused{number}>" for number in range(6200)])
    assert many.pattern.count("unused") == 1  # a letter of the text is compared with it once, not 6,200 times
    assert [match.start() for match in many.finditer("<unused> <unused61> <unused6200> <unused6199>")] == [9, 33]
