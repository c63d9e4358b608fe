"""The real server: `jobs/annotate.py serve` in a process of its own, on a port of its own, over a workspace that a test has filled."""

import os
import queue
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType

REPOSITORY = Path(__file__).parents[2]
START_SECONDS = 120


class LiveServer:
    """Context manager; `url` is where it answers."""

    def __init__(self, workspace: Path, *settings: str, port: int = 0):
        self.workspace = workspace
        self._command = [sys.executable, str(REPOSITORY / "jobs" / "annotate.py"), "serve", f"workspace={workspace}", *settings]
        self.port = port
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    def __enter__(self) -> "LiveServer":
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process is not None
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait(timeout=60)

    def start(self) -> None:
        """Start the server, on the port it had before if there was one, and wait until it says where it answers."""
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
        command = [*self._command, f"serve.port={self.port}"]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment, cwd=self.workspace)
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()
        said = ""
        while not (found := re.search(r"serving on (http\S+:(\d+))", said)):
            line = lines.get(timeout=START_SECONDS)
            assert line, f"the server did not start: {said}"
            said += line
        self.url, self.port = found[1], int(found[2])

    def _read(self, lines: "queue.Queue[str]") -> None:
        assert self._process is not None
        assert self._process.stderr is not None
        for line in self._process.stderr:  # to its end, or the pipe would fill up and stop the server
            lines.put(line)
        lines.put("")

    def kill(self) -> None:
        """End it as a crash would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(timeout=60)

    def stop(self) -> int:
        """End it as an operator would; return its exit code."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(timeout=60)
