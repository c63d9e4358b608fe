"""A shard's finished requests, kept durably while the shard is under way, so that a kill costs seconds of generation (Stage 1 and 2, every
LLM step).

Objects are `journal/<shard>/<number>-<hash>.jsonl`, one reply a line, each written in one atomic call and never changed. Two workers that
happen to run the same shard at once write different objects, or equal ones; loading takes their union.
"""

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from pydantic import Field

from synpref_ray.config import Settings
from synpref_ray.llm.engine import UNANSWERED, Engine, Reply, Request

logger = logging.getLogger(__name__)


class RetryConfig(Settings):
    """How often an unreadable reply is asked for again."""

    max_retries: int = Field(default=2, ge=0)  # ours: bounded; a model that fails three times on a prompt rarely manages the fourth
    retry_temperature: float = Field(default=0.7, gt=0)  # ours: a greedy retry would repeat itself


class JournalStorage(Protocol):
    """Where journal objects live; `write_bytes` is atomic. Paths are relative to it, with `/` between their parts."""

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write one object."""
        ...

    def read_bytes(self, path: str) -> bytes:
        """Read one object."""
        ...

    def list_files(self, prefix: str) -> list[str]:
        """Return the paths of the objects under a folder, none if it does not exist."""
        ...


class Journal:
    """The journal of one shard. `find` answers from earlier runs and this one; `append` adds; `flush` writes what is buffered.

    `num_replies_found`, `num_requests_sent` and `num_retries` (requests, sent or found, that ask again) are of this shard alone, where the
    engine's own counts are of all shards in flight.
    Our choice: an object every `flush_replies` replies or `flush_seconds` seconds, whichever comes first, seen when a
    reply arrives or the engine is idle: a finished reply is never kept in memory for much longer than that.
    """

    def __init__(
        self,
        storage: JournalStorage,
        folder: str,
        *,
        flush_replies: int = 64,
        flush_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._storage = storage
        self._folder = folder.rstrip("/")
        self._flush_replies = flush_replies
        self._flush_seconds = flush_seconds
        self._clock = clock
        self._unanswered_cost = 0.0
        self._buffer: list[Reply] = []
        self._num_unwritable = 0  # of the buffer, what the last try could not write
        self.num_damaged_objects = 0
        self.num_replies_found = 0
        self.num_requests_sent = 0
        self.num_retries = 0
        self._replies, self._num_objects = self._load()
        self._flushed_at = clock()

    def find(self, key: str) -> Reply | None:
        """Return the reply of an earlier run or of this one; counts those found."""
        reply = self._replies.get(key)
        self.num_replies_found += reply is not None
        return reply

    def append(self, reply: Reply) -> None:
        """Remember a finished reply, and write the buffer when it is full or old enough.

        What holds no answer is not kept, and the next run asks again: a provider's rules change, and a server may come back with a longer context.
        """
        if reply.finish_reason not in UNANSWERED:
            self._replies[reply.key] = reply
            self._buffer.append(reply)
        else:
            self._unanswered_cost += reply.cost
        if len(self._buffer) - self._num_unwritable >= self._flush_replies:
            self.flush()
        self.flush_if_old()

    def totals(self) -> dict[str, float]:
        """Return `cost`, `prompt_tokens` and `output_tokens` of all replies that the shard has had, those of earlier runs included, but for what
        earlier runs paid for refusals and the like."""
        replies = self._replies.values()
        return {
            "cost": self._unanswered_cost + sum(reply.cost for reply in replies),
            "prompt_tokens": float(sum(reply.prompt_tokens for reply in replies)),
            "output_tokens": float(sum(reply.output_tokens for reply in replies)),
        }

    def flush_if_old(self) -> None:
        """Write the buffer if the last write is `flush_seconds` ago. For while no reply arrives."""
        if self._clock() - self._flushed_at >= self._flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Write the buffered replies as one object; nothing when there are none. What cannot be written stays for the next try, which is as far
        away as if it had been."""
        self._flushed_at = self._clock()
        self._num_unwritable = len(self._buffer)
        if not self._buffer:
            return
        data = "".join(json.dumps(dataclasses.asdict(reply)) + "\n" for reply in self._buffer).encode()
        digest = hashlib.blake2b(data, digest_size=8).hexdigest()
        self._storage.write_bytes(f"{self._folder}/{self._num_objects:06d}-{digest}.jsonl", data)
        self._num_objects += 1
        self._buffer.clear()
        self._num_unwritable = 0

    def _load(self) -> tuple[dict[str, Reply], int]:
        paths = sorted(path for path in self._storage.list_files(self._folder) if path.endswith(".jsonl"))
        replies: dict[str, Reply] = {}
        for path in paths:
            for reply in self._read(path):
                replies.setdefault(reply.key, reply)  # of two replies to one request the first written stays
        if self.num_damaged_objects:
            logger.warning("journal %s: %s damaged objects ignored, their requests are sent again", self._folder, self.num_damaged_objects)
        return replies, len(paths)

    def _read(self, path: str) -> list[Reply]:
        """Return the whole lines of an object. Writes are atomic, so a torn one is not ours; it costs its requests, not the job."""
        replies = []
        damaged = False
        for line in self._storage.read_bytes(path).splitlines():
            reply = _parse(line)
            damaged |= reply is None
            if reply is not None:
                replies.append(reply)
        self.num_damaged_objects += damaged
        return replies


def generate_once(requests: Sequence[Request], engine: Engine, journal: Journal | None) -> list[Reply]:
    """Return the replies in the order of the requests; nothing that the journal holds, and nothing twice, is sent to the engine."""
    unique = {request.key: request for request in requests}
    found: dict[str, Reply] = {}
    if journal is not None:
        found = {key: reply for key in unique if (reply := journal.find(key)) is not None}
    pending = [request for key, request in unique.items() if key not in found]
    if journal is not None:
        journal.num_requests_sent += len(pending)
    try:
        on_finished, on_idle = (journal.append, journal.flush_if_old) if journal is not None else (None, None)
        fresh = engine.generate(pending, on_finished, on_idle) if pending else []
    finally:
        if journal is not None:
            journal.flush()  # also when the engine died: what it finished is paid for
    found |= {reply.key: reply for reply in fresh}
    return [found[request.key] for request in requests]


def generate_readable(
    requests: Sequence[Request], engine: Engine, journal: Journal | None, is_readable: Callable[[str], bool], retries: RetryConfig
) -> dict[str, Reply]:
    """Return a reply for every request, by the request's key: a readable one, or after `max_retries` more samples the last unreadable one.

    A refusal and a prompt that is too long are answers: they are not asked again.
    """
    replies = {reply.key: reply for reply in generate_once(requests, engine, journal)}
    unique = {request.key: request for request in requests}
    for attempt in range(1, retries.max_retries + 1):
        unreadable = [key for key in unique if replies[key].finish_reason not in UNANSWERED and not is_readable(replies[key].text)]
        if not unreadable:
            break
        if journal is not None:
            journal.num_retries += len(unreadable)
        again = [unique[key].retry(attempt, retries.retry_temperature) for key in unreadable]
        for key, reply in zip(unreadable, generate_once(again, engine, journal), strict=True):
            replies[key] = dataclasses.replace(reply, key=key)
    return replies


def _parse(line: bytes) -> Reply | None:
    try:
        values: Any = json.loads(line)
        if values.get("choice_logprobs") is not None:
            values["choice_logprobs"] = tuple(values["choice_logprobs"])
        return Reply(**values)
    except (ValueError, TypeError, AttributeError):
        return None
