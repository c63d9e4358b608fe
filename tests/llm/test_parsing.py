"""Strict reading of replies."""

import json

import pytest

from synpref_ray.errors import ReplyParseError
from synpref_ray.llm.parsing import Tag, parse_choice, parse_tag
from synpref_ray.schema import Controversiality, Objectivity, TaskCategory
from tests.llm.fakes import GOOD_TAG


def parse(text: str) -> Tag:
    return parse_tag(text, max_attributes_chars=64, max_guideline_chars=96)


def test_a_whole_tag_is_read() -> None:
    tag = parse(GOOD_TAG)
    assert (tag.task_category, tag.objectivity, tag.controversiality) == (TaskCategory.MATH, Objectivity.OBJECTIVE, Controversiality.LOW)
    assert (tag.desired_attributes, tag.annotation_guideline) == ("the right sum", "Prefer the right sum.")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "JSON"),
        ("no", "JSON"),
        (GOOD_TAG[:-3], "JSON"),  # cut short
        (GOOD_TAG + "x", "JSON"),
        ("[]", "JSON"),
        (GOOD_TAG.replace('"math"', '"maths"'), "task_category"),
        (GOOD_TAG.replace('"low"', "null"), "controversiality"),
        (GOOD_TAG.replace("the right sum", "  "), "desired_attributes"),
        (json.dumps({**json.loads(GOOD_TAG), "extra": 1}), "extra"),
        (json.dumps({key: value for key, value in json.loads(GOOD_TAG).items() if key != "objectivity"}), "objectivity"),
    ],
)
def test_anything_else_is_no_tag(text: str, named: str) -> None:
    with pytest.raises(ReplyParseError, match=named):
        parse(text)


@pytest.mark.parametrize(("field", "most"), [("desired_attributes", 64), ("annotation_guideline", 96)])
def test_a_text_beyond_its_limit_is_no_tag(field: str, most: int) -> None:
    values = json.loads(GOOD_TAG)
    assert len(getattr(parse(json.dumps({**values, field: f" {'é' * most}\n"})), field)) == most  # white space around does not count
    with pytest.raises(ReplyParseError, match=f"at most {most} characters of {field}, found {most + 1}"):
        parse(json.dumps({**values, field: "é" * (most + 1)}))


def test_the_error_does_not_repeat_the_reply() -> None:
    with pytest.raises(ReplyParseError) as caught:
        parse('{"task_category": "SECRET"}')
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(("text", "choice"), [("1", 1), (" 2", 2), ("2\n", 2)])
def test_choices(text: str, choice: int) -> None:
    assert parse_choice(text) == choice


@pytest.mark.parametrize("text", ["", "3", "12", "1 and 2", "Candidate 1"])
def test_no_choice(text: str) -> None:
    with pytest.raises(ReplyParseError):
        parse_choice(text)
