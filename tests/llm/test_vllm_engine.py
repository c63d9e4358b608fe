"""Real vLLM with the bundled model: shared by two threads, journaled, killed, closed."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from synpref_ray.llm.engine import EngineConfig, engine_environment


def run_session(mode: str) -> dict:
    environment = {**os.environ, **engine_environment(EngineConfig(model="m", in_process=mode == "in_process")), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.llm.engine_session", mode]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check_end(seen: dict) -> None:
    text, output_tokens, logprobs = seen["choice"]
    assert text in {"1", "2"}
    assert output_tokens == 1
    assert sum(math.exp(value) for value in logprobs) == pytest.approx(1.0)
    assert min(seen["hostile_tokens"]) > 2  # ordinary text, not one control token each
    assert seen["too_long"] == [["too_long", "length"], [0, 2047], 1]  # it is left out, and the others of the call are answered
    assert seen["many"] == 1  # 40 greedy samples of one prompt, more than the engine holds at once
    assert "Replace this worker process" in seen["told"]
    assert seen["stays_dead"] is True
    assert seen["children_after"] == 0


@pytest.mark.engine
def test_two_threads_share_one_engine_and_a_second_run_sends_nothing() -> None:
    seen = run_session("in_process")
    assert seen["children_while_up"] == 0
    assert [row["drop_reason"] for row in seen["tags"]] == [None] * 3
    assert all(row["annotation_guideline"] for row in seen["tags"])
    for row in seen["votes"]:
        assert [vote["order"] for vote in row["votes"]] == [0, 1]
        assert all(vote["verdict"] in {"chosen", "rejected"} and vote["logprob"] < 0 for vote in row["votes"])
    assert seen["sent_after_first"] == 3 + 3 * 2
    assert seen["sent_after_second"] == seen["sent_after_first"]
    check_end(seen)


@pytest.mark.engine
@pytest.mark.slow
def test_an_engine_in_child_processes_dies_loudly_and_leaves_none_behind() -> None:
    seen = run_session("children")
    assert seen["children_while_up"] >= 1
    check_end(seen)
