"""docs/serving.md, for real: a vLLM server on loopback gives the raw logits that our scorer gives, and leaves no process behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import pytest

from synpref_ray.llm.engine import EngineConfig, engine_environment
from synpref_ray.reward import RewardModel
from synpref_ray.reward.model import load_tokenizer
from synpref_ray.reward.render import render_conversation
from tests.reward.conftest import save_tiny_reward_model_for_vllm

PROMPT = [{"role": "user", "content": "Name a colour."}]
REPLIES = ["Blue.", "¡Rojo! 🙂", "A much longer reply that goes on and on, and says nothing."]


def server_command() -> list[str]:
    """Return the recipe's command: the CPU distribution has another name, and `vllm serve` of 0.32 looks for its own."""
    try:
        version("vllm")
    except PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return [str(Path(sys.executable).parent / "vllm"), "serve"]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Return the model's folder and the address of a server that is up; stop it, and check that it is gone."""
    folder = save_tiny_reward_model_for_vllm(tmp_path / "rm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    recipe = ["--runner", "pooling", "--pooler-config", '{"use_activation": false}', "--max-model-len", "512", "--enforce-eager"]
    here = ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "rm"]
    environment = {**os.environ, **engine_environment(EngineConfig(model=folder, num_threads=1, in_process=False)), "VLLM_CPU_KVCACHE_SPACE": "1"}
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen([*server_command(), folder, *recipe, *here], env=environment, stdout=log, stderr=log)
    children: list[psutil.Process] = []
    try:
        wait_until_up(server, f"http://127.0.0.1:{port}/health", tmp_path / "log")
        children = psutil.Process(server.pid).children(recursive=True)
        yield folder, f"http://127.0.0.1:{port}/classify"
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)
        assert psutil.wait_procs(children, timeout=30)[1] == []
    finally:
        for process in [server, *(child for child in children if child.is_running())]:
            process.kill()
        server.wait()


def wait_until_up(server: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    end = time.monotonic() + 500
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(1.0)
    pytest.fail(log.read_text()[-3000:])


def ask(url: str, body: dict[str, Any]) -> list[float]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        data = json.load(answer)["data"]
    assert [entry["index"] for entry in data] == list(range(len(data)))
    return [entry["probs"][0] for entry in data]


@pytest.mark.slow
@pytest.mark.engine
def test_the_served_model_gives_our_raw_logits_for_messages_tokens_and_text(served: tuple[str, str]) -> None:
    folder, url = served
    expected = RewardModel.load(folder, dtype="float32", num_threads=1).score_replies(PROMPT, REPLIES)
    assert max(map(abs, expected)) > 1.0  # or a probability would do as well
    tokenizer = load_tokenizer(folder)
    tokens = [render_conversation(tokenizer, PROMPT, reply) for reply in REPLIES]
    assert ask(url, {"input": tokens}) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    conversations = [[*PROMPT, {"role": "assistant", "content": reply}] for reply in REPLIES]
    assert [ask(url, {"messages": messages})[0] for messages in conversations] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in conversations]
    assert ask(url, {"input": texts, "add_special_tokens": False}) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    squashed = ask(url, {"input": tokens, "use_activation": True})
    assert all(0.0 < value < 1.0 for value in squashed)
