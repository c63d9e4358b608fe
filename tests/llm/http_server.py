"""A real HTTP server on loopback that answers as an OpenAI-compatible endpoint would, by a script, or forwards and injects faults.

Everything a test may ask about is recorded before the answer's first byte is sent, so a client that has its answer finds it recorded.
"""

import http.client
import json
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Fault = Literal["429", "reset", "stall", "malformed", "no_choices", "500", "cut", "drip"]
FAULTS: tuple[Fault, ...] = ("429", "reset", "stall", "malformed", "no_choices", "500", "cut", "drip")
SLOW_FAULTS = frozenset({"stall", "drip"})


@dataclass(frozen=True)
class Answer:
    """What to send back: a status with a JSON body, or raw bytes, or one of the faults."""

    body: Any = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    fault: Fault | None = None


@dataclass(frozen=True)
class Seen:
    """A request that arrived; the names of headers are lower case."""

    path: str
    body: dict[str, Any]
    headers: Mapping[str, str]


def completion(text: str, *, prompt_tokens: int = 10, output_tokens: int = 2, **choice: Any) -> dict[str, Any]:
    """Return the body of a text completion."""
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": output_tokens, "total_tokens": prompt_tokens + output_tokens}
    return {"object": "text_completion", "choices": [{"index": 0, "text": text, "finish_reason": "stop", **choice}], "usage": usage}


def chat(text: str | None, *, prompt_tokens: int = 10, output_tokens: int = 2, refusal: str | None = None, **choice: Any) -> dict[str, Any]:
    """Return the body of a chat completion."""
    body = completion("", prompt_tokens=prompt_tokens, output_tokens=output_tokens)
    message = {"role": "assistant", "content": text, "refusal": refusal}
    return {**body, "object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": "stop", **choice}]}


def error(status: int, message: str, *, code: str | None = None, kind: str = "invalid_request_error", **headers: str) -> Answer:
    """Return an error as these servers write one."""
    return Answer({"error": {"message": message, "type": kind, "code": code, "param": None}}, status, headers)


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # with http.server's 5, a burst of connections waits a second for its second try


class LocalServer:
    """Serves on a free port of loopback, a thread per connection, until the `with` block ends.

    Args:
        script: from the request and its number (0, 1, …, in order of arrival) to the answer; it may block. None forwards it.
        forward_to: host and port of the server to forward to.
    """

    def __init__(self, script: Callable[[Seen, int], Answer | None], forward_to: tuple[str, int] | None = None) -> None:
        self._script = script
        self._forward_to = forward_to
        self._lock = threading.Lock()
        self.stopping = threading.Event()  # ends stalled answers
        self.seen: list[Seen] = []
        self.answered: list[Seen] = []  # with status 200 and no fault
        self.num_open = 0
        self.max_open = 0
        self._server = _Listener(("127.0.0.1", 0), _handler_of(self))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        """The base URL for a client."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> "LocalServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def num_seen(self) -> int:
        """Return how many requests have arrived."""
        with self._lock:
            return len(self.seen)

    def bodies(self) -> list[dict[str, Any]]:
        """Return the bodies that have arrived."""
        with self._lock:
            return [seen.body for seen in self.seen]

    def arrive(self, seen: Seen) -> int:
        """Record a request; return its number."""
        with self._lock:
            self.seen.append(seen)
            self.num_open += 1
            self.max_open = max(self.max_open, self.num_open)
            return len(self.seen) - 1

    def leave(self, seen: Seen, answer: Answer | None) -> None:
        """Record that a request is about to be answered."""
        with self._lock:
            self.num_open -= 1
            if answer is not None and answer.status == 200 and answer.fault is None:
                self.answered.append(seen)

    def answer(self, seen: Seen, number: int) -> Answer:
        """Ask the script, or the server behind."""
        answer = self._script(seen, number)
        if answer is not None:
            return answer
        assert self._forward_to is not None
        connection = http.client.HTTPConnection(*self._forward_to, timeout=300)
        try:
            connection.request("POST", seen.path, json.dumps(seen.body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            return Answer(response.read(), response.status)
        except (OSError, http.client.HTTPException):
            return Answer(fault="reset")
        finally:
            connection.close()


def _handler_of(server: LocalServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # headers and body are two writes

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen = Seen(self.path, body, {name.lower(): value for name, value in self.headers.items()})
            number = server.arrive(seen)
            answer = None
            try:
                answer = server.answer(seen, number)
            finally:
                server.leave(seen, answer)
            try:
                self._send(answer)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client did not wait

        def _send(self, answer: Answer) -> None:
            if answer.fault == "reset":
                # Linger 0 makes closing send a reset.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
                return
            if answer.fault == "stall":
                server.stopping.wait(60)
                self.close_connection = True
                return
            if answer.fault == "drip":
                self.send_response(200)
                self.send_header("Content-Length", "1000000")
                self.end_headers()
                while not server.stopping.wait(0.05):
                    self.wfile.write(b" ")
                self.close_connection = True
                return
            status, headers, body = answer.status, dict(answer.headers), answer.body
            if answer.fault == "429":
                limited = error(429, "slow down", code="rate_limit_exceeded", kind="rate_limit", **{"Retry-After": "0.01"})
                status, headers, body = 429, dict(limited.headers), limited.body
            if answer.fault == "500":
                status, body = 500, b"<html>oops</html>"
            if answer.fault in {"malformed", "cut"}:
                body = b'{"choices": [{"text": "1", "fini'
            if answer.fault == "no_choices":
                body = {"object": "text_completion", "choices": []}
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data) + (answer.fault == "cut")))
            self.end_headers()
            self.wfile.write(data)
            if answer.fault == "cut":
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            """Stay silent."""

    return Handler
