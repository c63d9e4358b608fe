"""LLM steps on Ray whose models are endpoints, counted at a real local server: kills, limits, several taggers."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from synpref_ray.errors import SpendingLimitError
from synpref_ray.tables.storage import Storage
from tests.llm.fakes import GOOD_TAG
from tests.llm.http_server import Answer, LocalServer, Seen, chat
from tests.pipeline.endpoint_steps import DriverConfig, endpoint, make_pool, request_keys, tag
from tests.pipeline.small_loop import REPOSITORY, environment

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def answer_tag(seen: Seen, number: int) -> Answer:
    return Answer(chat(GOOD_TAG, prompt_tokens=100, output_tokens=50))


def asked_about(server: LocalServer) -> list[str]:
    """Return the prompt of each request that arrived, in order of arrival."""
    return [re.findall(r"Say something about tea number \d+\.", body["messages"][0]["content"])[-1] for body in server.bodies()]


def journaled(root: Path) -> set[str]:
    lines = [line for path in root.glob("pools/*/*/*/journal/*/*.jsonl") for line in path.read_text().splitlines()]
    return {json.loads(line)["key"] for line in lines}


def test_a_killed_driver_never_asks_again_what_is_journaled(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, 6, 10)
    keys = request_keys(pool.read_all())

    killed = threading.Event()

    def answer_until_the_kill(seen: Seen, number: int) -> Answer:
        if number >= 24:
            killed.wait(900)  # so that the kill finds work left, however busy the machine is
        return answer_tag(seen, number)

    with LocalServer(answer_until_the_kill) as server:
        settings = json.dumps({"taggers": [endpoint(server.url)]})
        command = [sys.executable, str(REPOSITORY / "tests" / "pipeline" / "endpoint_steps.py"), str(tmp_path), settings]
        driver = subprocess.Popen(command, env=environment(), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 600
            while len(journaled(tmp_path)) < 16:
                assert driver.poll() is None, "the driver ended before the moment came"
                assert time.monotonic() < deadline, "the moment never came"
                time.sleep(0.05)
        finally:
            os.kill(driver.pid, signal.SIGKILL)
            driver.wait()
            killed.set()
        before = -1
        while before != server.num_seen():  # Ray's reaper ends the workers
            before = server.num_seen()
            time.sleep(5)
        finished = journaled(tmp_path)
        done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        asked = asked_about(server)
        again = [prompt for prompt in asked[before:] if keys[prompt] in finished]
        assert again == []
        assert set(asked) == set(keys)
        lost = before - len(finished)  # in flight at the kill, or answered in the last second before it
        assert lost <= 8 + 4
        assert len(asked) == len(keys) + lost
        third = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False, timeout=900)
        assert third.returncode == 0, third.stderr[-3000:]
        assert server.num_seen() == len(asked)


@pytest.mark.usefixtures("ray")
def test_several_taggers_are_merged_and_one_that_is_added_tags_alone(tmp_path: Path) -> None:
    make_pool(tmp_path, 2, 3)
    planning = GOOD_TAG.replace("math", "planning")
    with LocalServer(answer_tag) as first, LocalServer(lambda seen, number: Answer(chat(planning))) as second:
        one, other = endpoint(first.url, "one"), endpoint(second.url, "other")
        tagged, _ = tag(tmp_path, DriverConfig.model_validate({"taggers": [one]}))
        assert tagged.merged[0].read(0)["task_category"].to_pylist() == ["math"] * 3
        tagged, _ = tag(tmp_path, DriverConfig.model_validate({"taggers": [other, one]}))
        assert tagged.merged[0].read(0)["task_category"].to_pylist() == ["planning"] * 3  # a tie goes to the first
        assert (first.num_seen(), second.num_seen()) == (6, 6)


@pytest.mark.usefixtures("ray")
def test_the_spending_limit_holds_over_workers_and_runs_and_finished_replies_stay(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, 4, 5)
    price = {"price_per_million_prompt_tokens": 0.0, "price_per_million_output_tokens": 10_000.0, "max_concurrent_requests": 2}  # 0.5 a reply
    with LocalServer(answer_tag) as server:
        limited = {**endpoint(server.url, spending_limit=6.0, **price), "num_workers": 2}
        for _ in range(2):  # the second run finds the limit spent, and asks for nothing more than it leaves
            with pytest.raises(SpendingLimitError, match="spending limit of 6 is reached"):
                tag(tmp_path, DriverConfig.model_validate({"taggers": [limited]}))
            assert 0 < 0.5 * server.num_seen() <= 6.0
            assert [path.name for path in (tmp_path / "spending" / "attributes.tagger").iterdir()] == ["spent.json"]
        paid = server.num_seen()
        raised = {**endpoint(server.url, spending_limit=100.0, **price), "num_workers": 2}
        tagged, run = tag(tmp_path, DriverConfig.model_validate({"taggers": [raised]}))
        assert tagged.merged[0].read(3)["drop_reason"].null_count == 5
        assert server.num_seen() == 20
        assert run.steps[0]["cost"] == pytest.approx(0.5 * (20 - paid))
        assert Storage(str(tmp_path)).exists("pools/seed")
        assert pool.num_rows == 20
