"""Which tokens tell choices apart, and what their log-probabilities come to."""

import math

import pytest

from synpref_ray.llm.choices import log_sum, normalise_logprobs, watched_tokens


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ([[5], [6]], (0, (5, 6))),
        ([[9, 5, 7], [9, 6]], (1, (5, 6))),
        ([[5, 1], [5, 2], [6, 3]], None),  # the first token rules one out, and does not name the others
        ([[5], [5, 6]], None),  # one begins the other
        ([[5], [5]], None),
    ],
)
def test_the_first_token_at_which_all_choices_differ(choices: list[list[int]], expected: object) -> None:
    assert watched_tokens(choices) == expected


def test_log_probabilities_are_normalised_among_themselves() -> None:
    assert normalise_logprobs([math.log(0.3), math.log(0.1)]) == pytest.approx((math.log(0.75), math.log(0.25)))
    assert normalise_logprobs([-1e4, -1e4]) == pytest.approx((math.log(0.5), math.log(0.5)))  # no underflow
    assert log_sum([math.log(0.2), math.log(0.3)]) == pytest.approx(math.log(0.5))
