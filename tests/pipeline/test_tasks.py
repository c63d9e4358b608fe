"""Plain tasks: results in order, errors of ours as themselves, in this process or on Ray."""

import math
import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import ray

from synpref_ray.errors import InputError
from synpref_ray.pipeline.cluster import configure_ray_data, tell_if_no_room
from synpref_ray.pipeline.tasks import run_tasks, window_size


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


def test_tasks_follow_the_cluster_from_none_to_the_bound() -> None:
    sizes = [window_size({"CPU": cpus}, 112) for cpus in (0, 16, 32, 128, 1000)]
    assert sizes == [64, 64, 112, 112, 112], "no more than the bound, whatever is there"
    assert window_size({}, 32) == 32
    assert [window_size({"CPU": 64}, 112, num_cpus=cpus) for cpus in (0.5, 1, 2, 3, 4, 6, 16)] == [112, 112, 56, 28, 28, 14, 7]
    assert window_size({"CPU": 8}, 4, num_cpus=8) == 1
    assert window_size({"CPU": 100}, math.inf) == 400, "a local Ray has no bound but what it can do"
    assert [window_size({"GPU": gpus, "CPU": 1000}, 112, num_cpus=2, num_gpus=1) for gpus in (0, 8, 64)] == [8, 8, 64]


def linger(seconds: float, number: int) -> tuple[int, float, float]:
    start = time.time()
    time.sleep(seconds)
    return number, start, time.time()


@pytest.mark.ray
@pytest.mark.usefixtures("ray")
def test_the_cluster_is_looked_at_again_while_tasks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, under_way = count(1), []
    wait = ray.wait

    def watched(running: list[Any], **how: Any) -> Any:
        under_way.append(len(running))
        return wait(running, **how)

    monkeypatch.setattr(ray, "wait", watched)
    monkeypatch.setattr("synpref_ray.pipeline.tasks.LOOK_SECONDS", 0.0)
    monkeypatch.setattr("synpref_ray.pipeline.tasks.max_running", lambda *_: 1 if next(looks) < 6 else 4)  # as if nodes came
    assert run_tasks(multiply, 3, [(number,) for number in range(12)]) == [3 * number for number in range(12)]
    assert (under_way[0], max(under_way), under_way[-1]) == (1, 4, 1)


@pytest.mark.ray
@pytest.mark.usefixtures("ray")
def test_no_more_cpus_are_asked_for_than_allowed() -> None:
    configure_ray_data(max_cpus=2)
    try:
        ran = run_tasks(linger, 0.1, [(number,) for number in range(8)])
    finally:
        configure_ray_data()
    assert [number for number, _, _ in ran] == list(range(8))
    assert max(sum(begun <= start < ended for _, begun, ended in ran) for _, start, _ in ran) <= 2


@pytest.mark.ray
@pytest.mark.usefixtures("ray")
def test_work_that_no_node_could_hold_is_told_before_it_waits(caplog: pytest.LogCaptureFixture) -> None:
    tell_if_no_room("judge", 8.0, 0.0)
    assert caplog.messages == []
    tell_if_no_room("judge", 1.0, 4.0)
    tell_if_no_room("index", 9.0, 0.0)
    assert [message.partition(";")[0] for message in caplog.messages] == [
        "judge waits for a node with 1 CPUs and 4 GPUs",
        "index waits for a node with 9 CPUs and 0 GPUs",
    ]


@pytest.mark.ray
@pytest.mark.usefixtures("ray")
def test_tasks_that_no_node_could_hold_are_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def stop(*_: Any) -> None:
        raise ray.exceptions.RayError("waited long enough")

    run_tasks(multiply, 3, [], options={"num_cpus": 9})
    assert caplog.messages == [], "nothing waits"
    monkeypatch.setattr("synpref_ray.pipeline.tasks._collect", stop)
    for title in ("fill the index", ""):
        with pytest.raises(ray.exceptions.RayError, match="long enough"):
            run_tasks(multiply, 3, [(1,)], title=title, options={"num_cpus": 9})
    assert [message.partition(";")[0] for message in caplog.messages] == [
        "fill the index waits for a node with 9 CPUs and 0 GPUs",
        "multiply waits for a node with 9 CPUs and 0 GPUs",
    ]


@pytest.mark.ray
@pytest.mark.usefixtures("ray")
def test_on_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("synpref_ray.pipeline.tasks.MIN_CPUS", 1)
    monkeypatch.setattr("synpref_ray.pipeline.tasks.TASKS_PER_CPU", 1)  # fewer at a time than there are
    assert run_tasks(multiply, 3, [(number,) for number in range(30)]) == [3 * number for number in range(30)]
    with pytest.raises(InputError, match="-4 is below zero"):
        run_tasks(multiply, 3, [(1,), (-4,), (2,)])


def fail_or_write(folder: Path, name: str) -> None:
    if not name:
        raise InputError("no name")
    while not (folder / "failed").exists():
        time.sleep(0.05)
    (folder / name).touch()


@pytest.mark.ray
@pytest.mark.usefixtures("ray")
def test_after_an_error_no_task_is_cancelled(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no name"):
        run_tasks(fail_or_write, tmp_path, [("",), ("other",)])
    (tmp_path / "failed").touch()
    deadline = time.monotonic() + 60
    while not (tmp_path / "other").exists():
        assert time.monotonic() < deadline, "cancelling a task that is just done may abort the driver"
        time.sleep(0.05)
