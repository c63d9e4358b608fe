"""Starts and stops a real vLLM server on loopback, for slow tests."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import pytest

from synpref_ray.llm.engine import EngineConfig, engine_environment

UP_SECONDS = 500.0


def server_command() -> list[str]:
    """Return how to serve a model here: the CPU distribution has another name, and `vllm serve` of 0.32 looks for its own."""
    try:
        version("vllm")
    except PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return [str(Path(sys.executable).parent / "vllm"), "serve"]


class VllmServer:
    """A server of one model, on the same port however often it is started. A context manager: up inside, gone after.

    Args:
        folder: the model.
        log: a file for what the server writes.
        arguments: more of its command line.
    """

    def __init__(self, folder: str, log: Path, *arguments: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._log = log
        self._command = [*server_command(), folder, "--host", "127.0.0.1", "--port", str(self.port), *arguments]
        environment = engine_environment(EngineConfig(model=folder, num_threads=2, in_process=False))
        self._environment = {**os.environ, **environment, "VLLM_CPU_KVCACHE_SPACE": "1"}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "VllmServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it and wait until it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, env=self._environment, stdout=log, stderr=log)
        end = time.monotonic() + UP_SECONDS
        while time.monotonic() < end:
            if self._process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        self.kill()
        pytest.fail(f"the server did not come up: {self._log.read_text()[-3000:]}")

    def kill(self) -> None:
        """End it and its children with SIGKILL, at once."""
        if self._process is None:
            return
        try:
            processes = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            processes = []
        self._process.kill()
        for process in processes:
            if process.is_running():
                process.kill()
        self._process.wait()
        psutil.wait_procs(processes, timeout=30)
        self._process = None
