"""Replies of the tagger and the judge, read strictly: what does not have the promised shape is no answer (Sec. 3.1; Sec. 3.2, Step 3)."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from synpref_ray.errors import ReplyParseError
from synpref_ray.schema import Controversiality, Objectivity, TaskCategory

_Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Tag(BaseModel):
    """The paper's five attributes of one pair. Paper: Sec. 3.1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task_category: TaskCategory
    objectivity: Objectivity
    controversiality: Controversiality
    desired_attributes: _Text
    annotation_guideline: _Text


def parse_tag(text: str, *, max_attributes_chars: int, max_guideline_chars: int) -> Tag:
    """Return the tag in a reply; the limits are those of its schema, which not every endpoint enforces.

    Raises:
        ReplyParseError: the reply is not one JSON object with exactly the five fields, each valid and within its limit. A reply that was cut short is
            not repaired, and a text that is too long not cut: the enums would pass, but a guideline that stops in mid-sentence would steer every
            later verdict.
    """
    try:
        tag = Tag.model_validate_json(text)
    except ValidationError as error:
        fields = sorted({str(problem["loc"][0]) if problem["loc"] else "JSON" for problem in error.errors(include_input=False)})
        raise ReplyParseError(f"expected the five attributes as JSON, found a problem with {', '.join(fields)}") from None
    for field, most in (("desired_attributes", max_attributes_chars), ("annotation_guideline", max_guideline_chars)):
        if (length := len(getattr(tag, field))) > most:
            raise ReplyParseError(f"expected at most {most} characters of {field}, found {length}")
    return tag


def parse_choice(text: str) -> int:
    """Return 1 or 2, the candidate that a judge's reply names.

    Raises:
        ReplyParseError: the reply, white space aside, is neither.
    """
    choice = text.strip()
    if choice not in {"1", "2"}:
        raise ReplyParseError(f"expected 1 or 2, found a reply of {len(text)} characters")
    return int(choice)
