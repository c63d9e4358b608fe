"""Values by path and by form: what is read, and what is refused with which reason."""

from typing import Any

import pytest

from synpref_ray.ingest.fields import PromptFields, TextForm, dig, read_chat, read_form, read_number, read_prompt, read_transcript, read_turn_texts
from synpref_ray.schema import DropReason


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("a", {"b": [10, {"c": 3}]}),
        ("a.b.0", 10),
        ("a.b.1.c", 3),
        ("a.b.2", None),
        ("a.b.x", None),
        ("x.y", None),
        ("a.b.1.c.d", None),
        ("dotted.name", "whole"),
        ("text.0", None),
    ],
)
def test_paths(path: str, value: Any) -> None:
    assert dig({"a": {"b": [10, {"c": 3}]}, "dotted.name": "whole", "text": "abc"}, path) == value


def test_transcripts() -> None:
    text = "\n\nHuman: A question: what is Human: nature?\n\nAssistant: Good.\n\nSecond paragraph.\n\nHuman: More\n\nAssistant:"
    expected = [turn("user", "A question: what is Human: nature?"), turn("assistant", "Good.\n\nSecond paragraph."), turn("user", "More")]
    assert read_transcript(text) == [*expected, turn("assistant", "")]
    assert read_transcript("Human: no blank lines before the first\n\nAssistant: x") == [
        turn("user", "no blank lines before the first"),
        turn("assistant", "x"),
    ]
    assert read_transcript("text before\n\nHuman: x") is DropReason.BAD_ROLE_ORDER
    assert read_transcript(" \n") is DropReason.EMPTY_PROMPT
    assert read_transcript(["x"]) is DropReason.WRONG_TYPE


def test_steerlm_texts() -> None:
    assert read_form("No marker <extra_id_1>", TextForm.STEERLM) == "No marker <extra_id_1>"
    assert read_form(3, TextForm.STEERLM) is DropReason.WRONG_TYPE
    text = "<extra_id_0>System\nBe kind.\n<extra_id_1>User\nq\n\n<extra_id_1>Assistant\n"
    assert read_form(text, TextForm.STEERLM) == [turn("system", "Be kind."), turn("user", "q\n"), turn("assistant", "")]
    assert read_prompt({"prompt": text}, PromptFields(form=TextForm.STEERLM)) == [turn("system", "Be kind."), turn("user", "q\n")]


def test_chats_of_other_names() -> None:
    assert read_chat({"from": "gpt", "value": "x"}) == [turn("assistant", "x")]
    assert read_chat([{"role": "prompter", "text": "q"}, {"from": "Human", "value": "r"}]) == [turn("user", "q"), turn("user", "r")]
    assert read_chat([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]) == [turn("user", "ab")]
    assert read_chat([{"role": "tool", "content": "x"}]) == [turn("tool", "x")]  # unknown roles are the structural filter's to refuse
    assert read_chat([{"role": "user", "content": None}]) == [turn("user", "")]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("text", DropReason.WRONG_TYPE),
        (3, DropReason.WRONG_TYPE),
        (["x"], DropReason.WRONG_TYPE),
        ([{"content": "x"}], DropReason.WRONG_TYPE),
        ([{"role": 3, "content": "x"}], DropReason.WRONG_TYPE),
        ([{"role": "user", "content": 3}], DropReason.WRONG_TYPE),
        ([{"role": "user", "content": ["x"]}], DropReason.WRONG_TYPE),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], DropReason.UNSUPPORTED_CONTENT),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], DropReason.UNSUPPORTED_CONTENT),
    ],
)
def test_chats_that_cannot_be_read(value: Any, reason: DropReason) -> None:
    assert read_chat(value) is reason


def test_json_inside_text() -> None:
    assert read_form('[{"role": "user", "content": "x"}]', TextForm.JSON) == [turn("user", "x")]
    assert read_form([{"from": "human", "value": "x"}], TextForm.JSON) == [turn("user", "x")]
    assert read_form('"plain"', TextForm.JSON) == "plain"
    assert read_form("[broken", TextForm.JSON) is DropReason.INVALID_JSON
    assert read_form("[" * 100_000, TextForm.JSON) is DropReason.INVALID_JSON
    assert read_form("3", TextForm.JSON) is DropReason.WRONG_TYPE
    assert read_form(None, TextForm.JSON) is None
    assert read_turn_texts('["a", null]') == ["a", ""]
    assert read_turn_texts(["a"]) == ["a"]
    assert read_turn_texts("null") is DropReason.MISSING_FIELD
    assert read_turn_texts("[1]") is DropReason.WRONG_TYPE
    assert read_turn_texts('"a"') is DropReason.WRONG_TYPE
    assert read_turn_texts("no json") is DropReason.INVALID_JSON


def test_prompts_are_put_together() -> None:
    row = {"a": "one", "b": " ", "c": "three", "n": 3, "s": "be kind", "m": [turn("user", "q")]}
    assert read_prompt(row, PromptFields(fields=("a",))) == "one"
    assert read_prompt(row, PromptFields(fields=("a", "b", "c", "d"), closing="End:")) == "one\n\nthree\n\nEnd:"
    assert read_prompt(row, PromptFields(fields=("b", "d"))) is None
    assert read_prompt(row, PromptFields(fields=("a", "n"))) is DropReason.WRONG_TYPE
    assert read_prompt(row, PromptFields(fields=("a",), system="s")) == [turn("system", "be kind"), turn("user", "one")]
    assert read_prompt(row, PromptFields(fields=("m",), system="s")) == [turn("system", "be kind"), turn("user", "q")]
    assert read_prompt(row, PromptFields(fields=("m",), system="b")) == [turn("user", "q")]
    assert read_prompt(row, PromptFields(fields=("a",), system="n")) is DropReason.WRONG_TYPE
    assert read_prompt({"p": "\n\nHuman: x\n\nAssistant: "}, PromptFields(fields=("p",), form=TextForm.TRANSCRIPT)) == [turn("user", "x")]


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (1, 1.0),
        ("4", 4.0),
        (" 2.5 ", 2.5),
        (True, 1.0),
        ("N/A", None),
        (None, None),
        (float("nan"), None),
        ("inf", None),
        (10**400, None),
        ([], None),
    ],
)
def test_numbers(value: Any, number: float | None) -> None:
    assert read_number(value) == number
