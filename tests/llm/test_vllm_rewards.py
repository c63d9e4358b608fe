"""Real vLLM as a side of the parity gate: what it cannot load is one line, and its process goes with its parent. That the engines agree is in
`tests/pipeline/test_parity_gate.py`."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from synpref_ray.errors import SynprefError
from synpref_ray.llm.vllm_rewards import ClassifierConfig, classify_tokens
from tests.processes import children_of
from tests.reward.conftest import save_tiny_backbone

CONFIG = ClassifierConfig(num_threads=1, kv_cache_bytes=1 << 26, timeout_seconds=300)
PARENT = """
import sys
import numpy as np
from synpref_ray.llm.vllm_rewards import ClassifierConfig, classify_tokens
classify_tokens(sys.argv[1], [np.arange(9, dtype=np.int32)], ["float32"], ClassifierConfig())
"""


def engines_of(process: psutil.Process) -> list[psutil.Process]:
    return [child for child, command in children_of(process).items() if "resource_tracker" not in command]


@pytest.mark.engine
@pytest.mark.slow
def test_what_vllm_cannot_load_is_one_line(tmp_path: Path) -> None:
    folder = save_tiny_backbone(tmp_path / "rm", head=True)  # heads of 8, which its attention on a CPU does not have
    before = engines_of(psutil.Process())  # a Ray of other tests may be up
    with pytest.raises(SynprefError, match="vLLM cannot score") as error:
        classify_tokens(folder, [np.arange(9, dtype=np.int32)], ["float32"], CONFIG)
    assert "\n" not in str(error.value)
    assert [child for child in engines_of(psutil.Process()) if child not in before] == []


@pytest.mark.engine
def test_a_vllm_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    before = engines_of(psutil.Process())
    with pytest.raises(SynprefError, match="within 1 s"):
        classify_tokens(str(tmp_path), [np.arange(9, dtype=np.int32)], ["float32"], CONFIG.model_copy(update={"timeout_seconds": 1.0}))
    assert [child for child in engines_of(psutil.Process()) if child not in before] == []


@pytest.mark.engine
def test_a_killed_parent_leaves_no_vllm_behind(tmp_path: Path) -> None:
    folder = save_tiny_backbone(tmp_path / "rm", head=True)
    parent = subprocess.Popen([sys.executable, "-c", PARENT, folder], env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
    process = psutil.Process(parent.pid)
    wait_until(lambda: engines_of(process) != [])
    children = engines_of(process)
    time.sleep(1.0)  # so that the child is past its first lines, where its lifeline is
    assert all(child.is_running() for child in children)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    gone, alive = psutil.wait_procs(children, timeout=30)
    assert len(gone) == 1
    assert alive == []


def wait_until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
