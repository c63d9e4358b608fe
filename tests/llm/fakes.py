"""Stand-ins for the fast tier: an engine that answers by a script and counts, a journal store in memory."""

import threading
from collections.abc import Callable, Sequence

from synpref_ray.llm.engine import EngineCounts, EngineDied, ModelIdentity, Reply, Request

GOOD_TAG = (
    '{"task_category":"math","objectivity":"objective","controversiality":"low",'
    '"desired_attributes":"the right sum","annotation_guideline":"Prefer the right sum."}'
)


class ScriptedEngine:
    """Answers every request with `answer(request)`, in reverse order of arrival, and is idle after each; a token is a character.

    `dies_after` replies it raises `EngineDied`, and from then on. `sent` lists all requests it ever got.
    """

    def __init__(self, answer: Callable[[Request], str | Reply], dies_after: int | None = None) -> None:
        self._answer = answer
        self._dies_after = dies_after
        self._lock = threading.Lock()
        self._replies: list[Reply] = []
        self.sent: list[Request] = []

    def generate(
        self, requests: Sequence[Request], on_finished: Callable[[Reply], None] | None = None, on_idle: Callable[[], None] | None = None
    ) -> list[Reply]:
        """Answer the last request first."""
        finished: dict[str, Reply] = {}
        with self._lock:
            self.sent.extend(requests)
            for request in reversed(requests):
                if self._dies_after is not None and len(self._replies) >= self._dies_after:
                    raise EngineDied("scripted death")
                reply = self._reply(request)
                self._replies.append(reply)
                finished[request.key] = reply
                if on_finished is not None:
                    on_finished(reply)
                if on_idle is not None:
                    on_idle()
        return [finished[request.key] for request in requests]

    def count_tokens(self, text: str) -> int:
        """Count characters."""
        return len(text)

    def counts(self) -> EngineCounts:
        """Sum up what was answered."""
        return EngineCounts(
            requests_sent=len(self.sent),
            replies=len(self._replies),
            prompt_tokens=sum(reply.prompt_tokens for reply in self._replies),
            cached_prompt_tokens=0,
            output_tokens=sum(reply.output_tokens for reply in self._replies),
            start_seconds=0.0,
        )

    def identity(self) -> ModelIdentity:
        """Be the model "scripted"."""
        return ModelIdentity(model="scripted", revision="r1")

    def _reply(self, request: Request) -> Reply:
        answer = self._answer(request)
        if isinstance(answer, Reply):
            return answer
        return Reply(key=request.key, text=answer, finish_reason="stop", prompt_tokens=len(request.prompt), output_tokens=len(answer))


class MemoryStorage:
    """Journal objects in a dictionary."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def write_bytes(self, path: str, data: bytes) -> None:
        """Keep one object."""
        self.objects[path] = data

    def read_bytes(self, path: str) -> bytes:
        """Return one object."""
        return self.objects[path]

    def list_files(self, prefix: str) -> list[str]:
        """Return the paths below a folder."""
        return [path for path in self.objects if path.startswith(f"{prefix}/")]
