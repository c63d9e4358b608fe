"""Settings of a model behind an OpenAI-compatible HTTP endpoint, hosted or served by oneself, for tagging and judging (Sec. 3.1 and 3.2)."""

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, WrapValidator, model_validator

from synpref_ray.bundled import digest_model
from synpref_ray.config import Settings
from synpref_ray.errors import ConfigError
from synpref_ray.llm.engine import EngineConfig

WIRE_VERSION = 2
"""Raise it with any change of what `wire.py` sends for a request, or of how it mends and reads replies: it is part of every fingerprint."""
ENDPOINT_SETTINGS = frozenset(
    {
        *("model", "revision", "api", "guidance", "logprobs", "seed_requests", "bytes_per_token", "extra_output_tokens", "extra_body"),
        "max_context_tokens",
    }
)
"""Of an endpoint, what changes replies, besides the tokenizer's digest. Not its address: a server that moves keeps its name and `revision`.

`bytes_per_token` counts only without a tokenizer."""

_OURS = frozenset({"model", "prompt", "messages", "n", "best_of", "stream", "max_tokens", "max_completion_tokens"})
_PRICES = {"price_per_million_prompt_tokens", "price_per_million_output_tokens"}

FLUSH_REPLIES = 8
"""For the journal of a paid engine: replies cost money, so an object holds few."""
FLUSH_SECONDS = 1.0


class EndpointConfig(Settings):
    """How one OpenAI-compatible endpoint is asked; every worker of a step asks on its own.

    Prices and the limit are in one currency, whichever. `extra_body` is laid over the body of every request; a null leaves a field out.
    """

    base_url: str  # up to and with /v1
    model: str  # its name at the server
    revision: str = ""  # what votes carry; raise it when the model behind the name changes
    api: Literal["completions", "chat"] = "chat"
    """Which of the two interfaces is asked."""
    tokenizer: str = ""  # a model folder, a bundled model or a hub repository; prompts of completions go as its token ids
    api_key_env: str = ""  # the NAME of the environment variable that holds the key
    max_concurrent_requests: int = Field(default=32, gt=0, le=1000)  # ours
    requests_per_minute: float = Field(default=0.0, ge=0)  # 0: no limit
    tokens_per_minute: float = Field(default=0.0, ge=0)  # 0: no limit; prompt and reply together
    timeout_seconds: float = Field(default=120.0, gt=0)  # ours: one attempt, from first to last byte
    give_up_seconds: float = Field(default=600.0, gt=0)  # ours: how long one request may fail; a server restarts within it
    backoff_seconds: float = Field(default=0.5, gt=0)  # ours: doubled at every retry, with full jitter
    max_backoff_seconds: float = Field(default=30.0, gt=0)  # ours
    max_declined_fraction: float = Field(default=0.05, ge=0, le=1)  # ours: providers refuse far less; most of more is a setting they do not take
    """Share of a worker's requests (counted as 400 at least) that the server may leave unanswered in ways of unknown meaning; more is an error."""
    max_context_tokens: int = Field(default=0, ge=0)  # 0: unknown; else a longer request is not sent, its pair is rejected
    bytes_per_token: float = Field(default=3.0, ge=1)  # ours: for counting without a tokenizer; English has over 4, most other scripts fewer
    guidance: Literal["vllm", "openai", "none"] = "openai"
    """How the server is told to follow a schema or a choice."""
    logprobs: bool = True
    """Whether the server is asked for the probabilities of the first tokens."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"  # ours: understood by most servers
    extra_output_tokens: int = Field(default=0, ge=0)  # on top of what a step asks for, for a model that thinks before it answers
    price_per_million_prompt_tokens: float = Field(default=0.0, ge=0)
    """What a million prompt tokens cost."""
    price_per_million_cached_tokens: float | Literal["prompt"] = "prompt"  # of prompt tokens that the server reports as cached
    price_per_million_output_tokens: float = Field(default=0.0, ge=0)
    """What a million generated tokens cost."""
    spending_limit: float = Field(default=0.0, ge=0)  # 0: none; of one tagger or judge in a workspace, over all runs
    seed_requests: bool = False  # ours: a seed per request, from its key
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Further fields of every request."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError("base_url must begin with http:// or https://")
        if self.api == "completions" and not self.tokenizer:
            raise ValueError("api=completions needs a tokenizer: prompts go as token ids, so that no text of a pair becomes a control token")
        if self.api == "completions" and self.guidance == "openai":
            raise ValueError("api=completions has no response_format to guide with: set guidance=vllm or guidance=none")
        if ours := sorted(_OURS & set(self.extra_body)):
            raise ValueError(f"extra_body must leave {', '.join(ours)} alone")
        if isinstance(self.price_per_million_cached_tokens, float) and self.price_per_million_cached_tokens < 0:
            raise ValueError("price_per_million_cached_tokens must not be negative")
        if self.spending_limit and not (self.has_prices and self.model_fields_set >= _PRICES):
            raise ValueError("spending_limit needs price_per_million_prompt_tokens and price_per_million_output_tokens, a free one written as 0")
        return self

    @property
    def has_prices(self) -> bool:
        """Whether requests are known to cost something."""
        return self.price_per_million_prompt_tokens > 0 or self.price_per_million_output_tokens > 0

    @property
    def reservation_seconds(self) -> float:
        """For how long money that was set aside for one attempt can be under way; longer than that, and its worker is dead."""
        return 2 * self.timeout_seconds + 60.0

    def cost(self, prompt_tokens: int, output_tokens: int, cached_tokens: int = 0) -> float:
        """Return the price of one request; `cached_tokens` are among `prompt_tokens`."""
        prompt_price = self.price_per_million_prompt_tokens
        cached_price = prompt_price if self.price_per_million_cached_tokens == "prompt" else self.price_per_million_cached_tokens
        fresh = prompt_tokens - cached_tokens
        return (fresh * prompt_price + cached_tokens * cached_price + output_tokens * self.price_per_million_output_tokens) / 1e6

    def worst_cost(self, prompt_tokens: int, output_tokens: int) -> float:
        """Return the highest price of a request of at most so many tokens, cached or not."""
        return max(self.cost(prompt_tokens, output_tokens), self.cost(prompt_tokens, output_tokens, prompt_tokens))

    def api_key(self) -> str:
        """Return the key from the environment, a placeholder when none is configured.

        Raises:
            ConfigError: the variable is not set.
        """
        if not self.api_key_env:
            return "none"  # the client insists on one; servers without keys ignore it
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise ConfigError(f"the environment variable {self.api_key_env} (api_key_env) is not set: it must hold the key of {self.base_url}")
        return key

    def settings(self) -> dict[str, Any]:
        """Return what changes replies, for fingerprints."""
        values = {**self.model_dump(mode="json", include=set(ENDPOINT_SETTINGS)), "wire": WIRE_VERSION}
        if self.tokenizer:
            del values["bytes_per_token"]
            values["tokenizer"] = digest_model(self.tokenizer)
        return values

    def share(self, num_workers: int) -> "EndpointConfig":
        """Return what one of several workers may ask for, so that together they keep the provider's limits. The spending limit is not split."""
        changes = {
            "max_concurrent_requests": max(1, self.max_concurrent_requests // num_workers),
            "requests_per_minute": self.requests_per_minute / num_workers,
            "tokens_per_minute": self.tokens_per_minute / num_workers,
        }
        return self.model_copy(update=changes)


def _pick(value: Any, handler: Any) -> Any:
    """Validate as the kind that is meant, so that errors speak of its settings alone."""
    if isinstance(value, EndpointConfig | EngineConfig):
        return value
    if not isinstance(value, Mapping):
        raise ValueError("expected the settings of an engine: base_url and model of an endpoint, or model of a vLLM engine")
    return (EndpointConfig if "base_url" in value else EngineConfig).model_validate(dict(value))


AnyEngineConfig: TypeAlias = Annotated[EngineConfig | EndpointConfig, WrapValidator(_pick)]
"""A field that takes either kind of engine: an endpoint if `base_url` is among its settings, else vLLM in the worker itself."""
