"""The forms that pages send, as models: a field that is not on the form is refused."""

from typing import Literal

from pydantic import Field, field_validator

from synpref_ray.config import Settings
from synpref_ray.human.protocol import MAX_TEXT_CHARS, Given, unix_lines


class SignedForm(Settings):
    """Any form: it carries its session's token."""

    csrf: str = Field(default="", max_length=200)


class VerdictForm(Given):
    """A verdict, with the revision of the assignment that the page showed."""

    csrf: str = Field(default="", max_length=200)
    choice: str = Field(default="", max_length=20)
    revision: int = Field(ge=0, le=2**31)

    def given(self) -> Given:
        """Return the verdict without what belongs to the form."""
        return Given(**self.model_dump(exclude={"csrf", "revision"}))


class UndoForm(SignedForm):
    """The verdict to take back, as the page knew it; without them nothing is undone."""

    assignment_id: int = Field(default=0, ge=0, le=2**31)
    revision: int = Field(default=0, ge=0, le=2**31)


class SkipForm(SignedForm):
    """A pair given back."""

    reason: str = Field(default="", max_length=500)


class AdjudicationForm(SignedForm):
    """An admin's word."""

    choice: Literal["1", "2", "undecidable"]
    words: int = Field(default=0, ge=0, le=2**31)  # how many words on this pair the page showed
    rationale: str = Field(default="", max_length=MAX_TEXT_CHARS)

    @field_validator("rationale", mode="before")
    @classmethod
    def _line_ends(cls, value: object) -> object:
        return unix_lines(value)


class LoginForm(SignedForm):
    """A name and its secret."""

    name: str = Field(default="", max_length=200)
    secret: str = Field(default="", max_length=1000)
