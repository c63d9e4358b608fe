"""The annotation guideline: every combination has a text, and each part says which it is of."""

import itertools

import pytest

from synpref_ray.llm.guidelines import BY_CATEGORY, BY_CONTROVERSIALITY, BY_OBJECTIVITY, guideline_for
from synpref_ray.schema import Controversiality, Objectivity, TaskCategory


def test_every_combination_has_a_text_of_its_own() -> None:
    texts = {guideline_for(*values) for values in itertools.product(TaskCategory, Objectivity, Controversiality)}
    assert len(texts) == 12 * 2 * 3
    assert all(len(text.splitlines()) == 3 for text in texts)


def test_the_parts_cover_the_enums() -> None:
    assert set(BY_CATEGORY) == set(TaskCategory)
    assert set(BY_OBJECTIVITY) == set(Objectivity)
    assert set(BY_CONTROVERSIALITY) == set(Controversiality)


def test_no_part_names_a_candidate_or_quotes() -> None:
    for text in (*BY_CATEGORY.values(), *BY_OBJECTIVITY.values(), *BY_CONTROVERSIALITY.values()):
        assert "Candidate" not in text
        assert '"' not in text


def test_an_unknown_value_is_an_error() -> None:
    with pytest.raises(ValueError, match="cooking"):
        guideline_for("cooking", "objective", "low")
