"""What the tagger and the judge need from a language model: requests in, replies out, counted. Serves every LLM step of Stage 1 and Stage
2.

The protocol is small on purpose: an engine in this process (vLLM) and one behind HTTP must both fit it. A prompt is plain data: an engine
must never read a control token (`<|im_end|>`, `<bos>`, …) out of `Request.prompt`, because pair texts travel in it.
"""

import hashlib
import queue
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, Self, TypeVar

from pydantic import Field, model_validator

from synpref_ray.config import Settings
from synpref_ray.schema import canonical_json

T = TypeVar("T")

REFUSED = "refused"
"""The finish reason of a reply that the model or its provider declined to write; its text is of no use, or the provider's reason."""
TOO_LONG = "too_long"
"""The finish reason in place of a reply where the prompt does not fit what serves the model; its text is empty."""
UNANSWERED = frozenset({REFUSED, TOO_LONG})
"""Finish reasons of replies that hold no answer, and of which another sample would be none either."""

IDLE_SECONDS = 0.5


class EngineDied(RuntimeError):
    """The engine is gone and never comes back: the process that holds it must be replaced. Takes one string, like all of ours."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One generation. Build it with `Request.of`, which derives the key.

    `choices` and `json_schema` guide decoding (at most one of them). `chat` wraps `prompt` as the one user message of the model's own chat
    template; otherwise the model continues the text. `reply_start` is text that the reply is made to begin with; it is not repeated in it.
    """

    key: str
    prompt: str
    max_new_tokens: int
    choices: tuple[str, ...] | None = None
    json_schema: Mapping[str, Any] | None = None
    temperature: float = 0.0
    chat: bool = False
    reply_start: str = ""

    @classmethod
    def of(
        cls,
        prompt: str,
        *,
        prompt_version: str,
        max_new_tokens: int,
        choices: tuple[str, ...] | None = None,
        json_schema: Mapping[str, Any] | None = None,
        temperature: float = 0.0,
        chat: bool = False,
        reply_start: str = "",
        sample: int = 0,
    ) -> Self:
        """Return the request named by the hash (32 hex digits) of everything that shapes its reply, `prompt_version` and the sample number
        included.

        The model is not part of the key: journals live under a sidecar's fingerprint, which names it.
        """
        content = [prompt_version, prompt, max_new_tokens, choices, json_schema, temperature, chat, reply_start, sample]
        key = hashlib.blake2b(canonical_json(content).encode(), digest_size=16).hexdigest()
        return cls(
            key=key,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            choices=choices,
            json_schema=json_schema,
            temperature=temperature,
            chat=chat,
            reply_start=reply_start,
        )

    def retry(self, attempt: int, temperature: float) -> "Request":
        """Return the request for another sample in place of an unreadable reply, at `temperature` or its own if that is higher.

        Its key follows from this one's and `attempt` (1, 2, …), so a resumed run asks for the same retries.
        """
        key = hashlib.blake2b(f"{self.key}\x1fretry\x1f{attempt}".encode(), digest_size=16).hexdigest()
        return replace(self, key=key, temperature=max(temperature, self.temperature))


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back for the request of the same key.

    `choice_logprobs` are in the order of `Request.choices` and normalised among them (their exponentials sum to 1); None when the engine
    cannot tell. `cost` is what all attempts at the request cost, in the unit of the endpoint's prices; 0 for an engine of our own.
    """

    key: str
    text: str
    finish_reason: str
    prompt_tokens: int
    output_tokens: int
    choice_logprobs: tuple[float, ...] | None = None
    cost: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """Which model answers, as its votes record it: `revision` is a digest of the weights' folder, or what the provider calls a version."""

    model: str
    revision: str


@dataclass(frozen=True, kw_only=True)
class EngineCounts:
    """What one engine did since it started. Replies taken from a journal are not in here: so a resumed run can prove what it saved.

    `retries` are attempts beyond the first of each request, and `cost` is what all attempts cost, refused and lost ones included (endpoints).
    """

    requests_sent: int
    replies: int
    prompt_tokens: int
    cached_prompt_tokens: int
    output_tokens: int
    start_seconds: float
    retries: int = 0
    cost: float = 0.0


class Engine(Protocol):
    """A language model that several threads may share."""

    def generate(
        self, requests: Sequence[Request], on_finished: Callable[[Reply], None] | None = None, on_idle: Callable[[], None] | None = None
    ) -> list[Reply]:
        """Return the replies in the order of the requests; `on_finished` sees each as it finishes, in the caller's thread.

        `on_idle` is called there too, about every `IDLE_SECONDS` in which nothing finishes.

        Raises:
            EngineDied: this engine will not answer any more.
        """
        ...

    def count_tokens(self, text: str) -> int:
        """Return how many tokens `text` takes in a prompt."""
        ...

    def counts(self) -> EngineCounts:
        """Return the running totals."""
        ...

    def identity(self) -> ModelIdentity:
        """Return which model answers."""
        ...


def take(outbox: "queue.SimpleQueue[T]", on_idle: Callable[[], None] | None) -> T:
    """Return what comes next to a caller of `Engine.generate`, who may do something else while nothing comes."""
    if on_idle is None:
        return outbox.get()
    while True:
        try:
            return outbox.get(timeout=IDLE_SECONDS)
        except queue.Empty:
            on_idle()


class EngineConfig(Settings):
    """How one vLLM engine is started; every worker of a step holds one."""

    model: str
    """A folder, a bundled model's name, or a repository of the hub."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Where the engine runs."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # ours: what released checkpoints hold
    max_model_len_tokens: int = Field(default=2048, gt=0)  # ours: bounds the KV cache of one request
    max_num_seqs: int = Field(default=32, gt=0)  # ours: past 32 the two CPU cores gain nothing
    max_batched_tokens: int = Field(default=2048, gt=0)  # ours: vLLM's own default for chunked prefill
    kv_cache_bytes: int = Field(default=1 << 30, gt=0)  # ours, CPU only: 46,592 tokens of SmolLM2-135M
    gpu_memory_share: float = Field(default=0.9, gt=0, le=1)  # ours, GPU only: vLLM's own default
    enforce_eager: bool = True  # ours: compiling costs a small CPU job more than it returns; turn off on GPUs
    num_threads: int = Field(default=2, gt=0)  # ours, CPU only
    tensor_parallel_size: int = Field(default=1, gt=0)
    """GPUs that share one engine."""
    prefix_caching: bool = True  # ours: guideline and exemplars are shared between requests
    in_process: bool = True  # ours: see VllmEngine; starts in 11 s instead of 26 to 44 and leaves no child process behind
    seed: int = 0
    """Seed of sampling."""
    seed_requests: bool = False  # ours: a seed per request, from its key; GPU only, it kills vLLM 0.32 on CPU

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.seed_requests and self.device == "cpu":
            raise ValueError("seed_requests=true needs device=gpu: a seed per request kills vLLM 0.32 on a CPU")
        if self.in_process and self.tensor_parallel_size > 1:
            raise ValueError("in_process=true runs one device: set in_process=false for tensor_parallel_size above 1")
        return self


def engine_environment(config: EngineConfig) -> dict[str, str]:
    """Return the environment in which a process with this engine must start (Ray: `runtime_env={"env_vars": …}`), before anything imports
    torch.

    vLLM reads most of these nowhere else. OMP_WAIT_POLICY keeps idle OpenMP threads from spinning on cores that others need: with two cores
    shared by three busy processes one engine made 168 output tokens/s with it and 45 without (2-core VM, 2026-11-21).
    """
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if config.in_process else "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if config.device == "cpu":
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(config.num_threads), "OMP_WAIT_POLICY": "PASSIVE"}
    return environment
