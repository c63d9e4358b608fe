"""What waits for an engine in this process: prompts as token ids, kept small until the engine has room. Serves the vLLM engine.

Our choice: a shard's requests are handed over at once, so that the engine never drains, but equal prompts (the samples of a question) are tokenised
once and share their ids, four bytes each; only what the engine can soon begin becomes Python ints, 36 bytes each in every request. As such, 512 pairs
asked 16 times each with 12,000 tokens were gigabytes.
"""

import queue
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from synpref_ray.llm.choices import Watched, watched_tokens
from synpref_ray.llm.engine import Reply, Request
from synpref_ray.llm.tokens import PlainEncoder

Outbox = queue.SimpleQueue[Reply | str]
"""Where a caller's replies arrive, or why there will be none."""


@dataclass(frozen=True)
class Job:
    """A request with the ids of its prompt."""

    request: Request
    tokens: "array[int]"
    outbox: Outbox
    max_tokens: int
    watched: Watched | None  # where the choices first differ

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and of the longest reply."""
        return len(self.tokens) + self.max_tokens


def make_jobs(requests: Sequence[Request], encoder: PlainEncoder, outbox: Outbox) -> list[Job]:
    """Tokenise the requests of one call, in order; what is equal in several is tokenised once and shared."""
    prompts: dict[tuple[str, bool, str], array[int]] = {}
    choices: dict[tuple[str, ...], tuple[int, Watched | None]] = {}
    jobs = []
    for request in requests:
        name = request.prompt, request.chat, request.reply_start
        if name not in prompts:
            prompts[name] = array("i", encoder.encode_request(request))
        if request.choices is None:
            jobs.append(Job(request, prompts[name], outbox, request.max_new_tokens, None))
            continue
        if request.choices not in choices:
            encoded = [encoder.encode_text(choice) for choice in request.choices]
            choices[request.choices] = max(map(len, encoded)), watched_tokens(encoded)
        longest, watched = choices[request.choices]
        # The last token of the longest choice ends the reply; waiting for an end-of-text token would cost every vote one more forward pass.
        jobs.append(Job(request, prompts[name], outbox, min(request.max_new_tokens, longest), watched))
    return jobs


class Backlog:
    """Jobs in the order in which they came, and how much of them the engine holds. Of one thread.

    Args:
        num_requests: the engine may always hold so many.
        num_tokens: and more than that while all prompts that it holds are shorter together.
    """

    def __init__(self, *, num_requests: int, num_tokens: int) -> None:
        self._limits = num_requests, num_tokens
        self._waiting: deque[Job] = deque()
        self._held_requests = 0
        self._held_tokens = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, job: Job) -> None:
        """Let a job wait."""
        self._waiting.append(job)

    def next(self) -> Job | None:
        """Return the next job for the engine, which holds it from now on; None while it has enough, or nothing waits."""
        num_requests, num_tokens = self._limits
        if not self._waiting or (self._held_requests >= num_requests and self._held_tokens >= num_tokens):
            return None
        job = self._waiting.popleft()
        self._held_requests += 1
        self._held_tokens += len(job.tokens)
        return job

    def finished(self, job: Job) -> None:
        """Note that the engine no longer holds a job."""
        self._held_requests -= 1
        self._held_tokens -= len(job.tokens)

    def clear(self) -> list[Job]:
        """Return what waits, which then waits no more."""
        waiting = list(self._waiting)
        self._waiting.clear()
        return waiting
