"""The samples file and which replies may be shipped."""

from pathlib import Path

import pytest

from examples.demo_tasks.sampling import read_samples, usable, write_samples


@pytest.mark.parametrize("reply", ["Bees fly.", "Caf\u00e9!\n\u201cYes\u201d", "\U0001f41d bees"])
def test_usable(reply: str) -> None:
    assert usable(reply)


@pytest.mark.parametrize("reply", ["", "  \n", "cut \ufffd", "tab\tbed", "\u043f\u0447\u0435\u043b\u0430", "nul \x00", "Oh shit."])
def test_not_usable(reply: str) -> None:
    assert not usable(reply)


def test_samples_round_trip_and_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    samples = {"b?": ["x", "y\nz"], "a?": ["\u00e9"]}
    write_samples(tmp_path / "one.gz", samples)
    write_samples(tmp_path / "two.gz", dict(reversed(samples.items())))
    assert read_samples(tmp_path / "one.gz") == samples
    assert (tmp_path / "one.gz").read_bytes() == (tmp_path / "two.gz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.gz", "two.gz"]


def test_absent_file_is_empty(tmp_path: Path) -> None:
    assert read_samples(tmp_path / "none.gz") == {}
