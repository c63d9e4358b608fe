"""`--help` says what every setting of every job means, in the words that stand beside it in the source."""

import importlib
from enum import StrEnum
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from synpref_ray.config import Settings
from synpref_ray.pipeline.job import JobConfig
from synpref_ray.pipeline.settings_help import SettingHelp, describe_settings, help_lines

JOBS = sorted(file.stem for file in (Path(__file__).parents[2] / "jobs").glob("*.py") if file.stem != "__init__")


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Round(Settings):
    kind: Literal["round"] = "round"
    radius: float
    """From the middle."""


class Square(Settings):
    kind: Literal["square"] = "square"
    side: float = 1.0  # type: ignore[misc]
    colour: Colour = Colour.RED  # ours: # is no end


class Inner(Settings):
    """A section of its own."""

    rate: float = 0.5  # Sec. 3.2


class Outer(Inner):
    size: int = Field(
        default=1,
        ge=1,
    )
    """How large.

    In pairs.
    """
    inner: Inner = Inner()
    shapes: tuple[Round | Square, ...] = ()
    """What is drawn."""
    bare: str = ""


def test_meanings_are_read_from_under_and_behind_a_field() -> None:
    assert describe_settings(Outer) == [
        SettingHelp("rate", "0.5", "Sec. 3.2"),
        SettingHelp("size", "1", "How large. In pairs"),
        SettingHelp("inner", None, "A section of its own."),
        SettingHelp("inner.rate", "0.5", "Sec. 3.2"),
        SettingHelp("shapes", None, "What is drawn"),
        SettingHelp("shapes.0.kind", "round", "", ("round", "square")),
        SettingHelp("shapes.0.radius", "REQUIRED", "From the middle"),
        SettingHelp("shapes.0.side", "1.0", ""),
        SettingHelp("shapes.0.colour", "red", "ours: # is no end", ("red", "blue")),
        SettingHelp("bare", "", ""),
    ]
    assert help_lines(Inner) == ["  rate = 0.5", "      Sec. 3.2"]
    assert "  shapes.0.colour = red  (red | blue)" in help_lines(Outer)


@pytest.mark.parametrize("job", JOBS)
def test_every_setting_of_a_job_has_a_meaning_or_names_its_choices(job: str) -> None:
    module = importlib.import_module(f"jobs.{job}")
    configs = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, JobConfig)]
    assert configs
    for config in configs:
        assert [setting.key for setting in describe_settings(config) if not setting.meaning and not setting.choices] == []


class Listed(Settings):
    kinds: dict[Colour, str] = Field(default={Colour.RED: "warm"})


def test_help_shows_defaults_as_they_are_written() -> None:
    assert help_lines(Listed) == ["  kinds = {'red': 'warm'}"]
