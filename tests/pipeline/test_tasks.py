"""Plain tasks: results in order, errors of ours as themselves, in this process or on Ray."""

import pytest

from synpref_ray.errors import InputError
from synpref_ray.pipeline.tasks import run_tasks


def multiply(factor: int, number: int) -> int:
    if number < 0:
        raise InputError(f"{number} is below zero")
    return factor * number


def test_in_this_process() -> None:
    assert run_tasks(multiply, 3, [(number,) for number in range(5)], inline=True) == [0, 3, 6, 9, 12]
    assert run_tasks(multiply, 3, []) == []


def test_a_long_pass_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    numbers = [(number,) for number in range(3)]
    with caplog.at_level("INFO"):
        run_tasks(multiply, 3, numbers, inline=True, title="read files")  # over in less than a minute
        assert caplog.messages == []
        monkeypatch.setattr("synpref_ray.pipeline.tasks.PROGRESS_SECONDS", 0.0)
        run_tasks(multiply, 3, numbers, inline=True)
        assert caplog.messages == []
        run_tasks(multiply, 3, numbers, inline=True, title="read files")
    assert caplog.messages == ["read files: 1 of 3 tasks done", "read files: 2 of 3 tasks done"]


@pytest.mark.ray
@pytest.mark.usefixtures("ray")
def test_on_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("synpref_ray.pipeline.tasks.TASKS_PER_CPU", 1)  # fewer at a time than there are
    assert run_tasks(multiply, 3, [(number,) for number in range(30)]) == [3 * number for number in range(30)]
    with pytest.raises(InputError, match="-4 is below zero"):
        run_tasks(multiply, 3, [(1,), (-4,), (2,)])
